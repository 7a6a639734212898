"""Figures of notebook 09: sizes of files and caches, and speed in another runtime."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ...report.style import COLORS, WIDTH, Drawing, figure, for_each_model, nothing_to_show
from ...report.tables import Tables
from ..speedup.figures import RING

RUNTIMES = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#CC79A7")  # Okabe-Ito, in the order of the tables
MARKS = ("x", "o", "s", "^", "D")
ASIDE = 1.07  # a factor between the contexts at which two runtimes are drawn
SHADES = (1.0, 0.62, 0.34, 0.2)  # of a bar: dense, then fewer and fewer attention layers


def bars(ax: Axes, rows: pd.DataFrame, unit: float, value: str, dense: str) -> None:
    """A group of bars for each file: dense, then each number dropped, with its share of the dense one above it."""
    files, counts = list(rows["file"].unique()), sorted(rows["n"].unique())
    width = 0.8 / len(counts)
    for j, n in enumerate(counts):
        of_n = rows[rows["n"] == n].set_index("file").loc[files]
        x = np.arange(len(files)) + (j - (len(counts) - 1) / 2) * width
        color, label = (COLORS["attention"], f"{n} attention layers dropped") if n else (COLORS["dense"], "dense")
        ax.bar(x, of_n[value] / unit, 0.94 * width, color=color, alpha=SHADES[min(j, len(SHADES) - 1)], label=label)
        for at, share, height in zip(x, of_n[value] / of_n[dense], of_n[value] / unit, strict=True):
            ax.annotate(
                f"{100 * share:.0f} %" if n else "", (at, height), (0, 1), textcoords="offset points", ha="center", fontsize=6.5
            )
    ax.set_xticks(range(len(files)), files)


@figure("09_take_away")
def figS22_files(tables: Tables) -> Drawing:
    """Size of the files of a dropped model, and what a token takes in llama.cpp's cache, beside the dense model's."""
    files, caches = tables["files"], tables["caches"]
    models = list(files["model"].unique())
    shape = {"figsize": (WIDTH, 0.7 + 2.1 * len(models)), "squeeze": False, "width_ratios": (3, 2)}
    fig, axes = plt.subplots(len(models), 2, **shape)
    for (left, right), model in zip(axes, models, strict=True):
        bars(left, files[files["model"] == model], 1e6, "file_bytes", "dense_file_bytes")
        bars(right, caches[caches["model"] == model], 1e3, "counted_bytes", "dense_bytes")
        left.set(ylabel="Megabytes on disk", title=model if len(models) > 1 else "")
        right.set(ylabel="Kilobytes per token in the cache")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels))

    def sentence(rows: pd.DataFrame) -> str:
        last = rows[rows["n"] == rows["n"].max()].drop_duplicates("file")
        shares = [f"{100 * (1 - r.file_bytes / r.dense_file_bytes):.0f} % ({r.file})" for r in last.itertuples()]
        cache = caches[(caches["model"] == rows["model"].iloc[0]) & (caches["n"] == last["n"].iloc[0])].iloc[0]
        return (
            f"Without {last['n'].iloc[0]} attention layers files are smaller by {', '.join(shares)}, and the cache by "
            f"{100 * (1 - cache['counted_bytes'] / cache['dense_bytes']):.0f} %."
        )

    data = files.merge(caches, how="left", on=["model", "file", "n"])
    return Drawing(fig, data, for_each_model(files, sentence))


@figure("09_take_away")
def figS23_served(tables: Tables) -> Drawing:
    """Speed-up without attention layers in llama.cpp and in torch: reading a prompt, and decoding behind it."""
    data = tables["speed"].query("n > 0")
    models, counts, runtimes = ([*data[name].unique()] for name in ("model", "n", "runtime"))
    if not models:
        return nothing_to_show("Nothing was timed", data)
    loads = [(model, what) for model in models for what in ("prefill", "decode")]
    shape = {"figsize": (WIDTH, 0.9 + 1.9 * len(loads)), "squeeze": False, "sharey": True, "sharex": True}
    fig, axes = plt.subplots(len(loads), len(counts), **shape)
    for row, (model, what) in zip(axes, loads, strict=True):
        for ax, n in zip(row, counts, strict=True):
            panel(ax, data[(data["model"] == model) & (data["what"] == what) & (data["n"] == n)], runtimes)
            name = {"prefill": "Prefill", "decode": "Decode"}[what]
            ax.set_title(f"{name}, {n} attention layers dropped" + (f"\n{model}" if len(models) > 1 else ""))
        row[0].set_ylabel("Speed-up over dense")
    for ax in axes[-1]:
        ax.set_xlabel("Tokens in the prompt (prefill), in the cache (decode)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    handles, labels = [*handles, Line2D([], [], **RING)], [*labels, "noisy"]
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    where = tables["models"].iloc[0]

    def sentence(rows: pd.DataFrame) -> str:
        longest = rows[rows["context"] == rows["context"].max()]
        told = [_gain(longest[longest["what"] == what], what) for what in ("prefill", "decode")]
        return f"With {longest['context'].iloc[0]:,} tokens and {longest['n'].max()} layers dropped: {'; '.join(told)}."

    timed = (
        f" Timed on {where['device']}; bars cover {100 * data['level'].min():.1f} % over repeats, in which files take turns."
    )
    return Drawing(fig, data, for_each_model(data, sentence) + timed)


def panel(ax: Axes, rows: pd.DataFrame, runtimes: list[str]) -> None:
    """Speed-up over the context, a line for each runtime, and the prediction; noisy timings are ringed."""
    for i, (runtime, color, mark) in enumerate(zip(runtimes, RUNTIMES, MARKS, strict=False)):
        line = rows[rows["runtime"] == runtime].sort_values("context")
        error = [line["speedup"] - line["speedup_low"], line["speedup_high"] - line["speedup"]]
        x = line["context"] * ASIDE ** (i - (len(runtimes) - 1) / 2)  # so that bars do not hide each other
        noisy = line["noisy"].astype(bool)
        ax.plot(x[noisy], line["speedup"][noisy], **RING)
        ax.errorbar(x, line["speedup"], np.clip(error, 0, None), color=color, marker=mark, label=runtime,
                    elinewidth=0.8, capsize=1.5)  # fmt: skip
    predicted = rows.drop_duplicates("context").sort_values("context")
    label = "predicted, in torch"
    ax.plot(predicted["context"], predicted["predicted"], color="0.4", linewidth=0.8, linestyle=":", label=label)
    ax.axhline(1, color="0.5", linewidth=0.8)
    ticks = sorted(rows["context"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()


def _gain(rows: pd.DataFrame, what: str) -> str:
    """The most that were dropped: "prefill 1.76 times as fast in torch, ..."."""
    most = rows[rows["n"] == rows["n"].max()]
    return f"{what} " + ", ".join(f"{r.speedup:.2f} times as fast in {r.runtime}" for r in most.itertuples())
