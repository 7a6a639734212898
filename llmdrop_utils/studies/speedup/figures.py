"""Figures of notebook 05: time against what is dropped."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ...report.style import COLORS, LINES, MARKERS, NAMES, WIDTH, figure
from ...report.tables import Tables

GENERATION = "generation from samples"

FILLS = {"eager": "full", "compiled": "none"}  # filled markers: eager; open ones: compiled


def _line(ax: Axes, rows: pd.DataFrame, x: str, kind: str, label: str, backend: str) -> None:
    """Speed-up with its interval; the prediction as a thin grey line; noisy timings are ringed."""
    rows = rows.sort_values(x)
    error = [rows["speedup"] - rows["speedup_low"], rows["speedup_high"] - rows["speedup"]]
    ax.errorbar(rows[x], rows["speedup"], np.clip(error, 0, None), color=COLORS[kind], marker=MARKERS[kind], label=label,
                linestyle=LINES[kind], fillstyle=FILLS[backend], elinewidth=0.8, capsize=1.5)  # fmt: skip
    ax.plot(rows[x], rows["predicted"], color=COLORS[kind], linewidth=0.7, linestyle=":")
    noisy = rows[rows["noisy"].astype(bool)]
    ax.plot(noisy[x], noisy["speedup"], linestyle="none", marker="o", markersize=9, fillstyle="none", color="0.4")


@figure("05_speedup")
def figS8_speedup(tables: Tables):
    """Speed-up against the number dropped: reading a prompt, decoding behind it, and both as in the paper."""
    data = tables["speed"].query("kind != 'dense'")
    generation = data[data["what"] == GENERATION]
    models, prompt = list(generation["model"].unique()), generation["context"].max()
    panels = {
        f"Prefill, {prompt:,} tokens": data.query("what == 'prefill' and context == @prompt"),
        f"Decode, context {prompt:,}": data.query("what == 'decode' and context == @prompt"),
        f"{prompt:,} tokens in and out": generation[generation["context"] == prompt],
    }
    fig, axes = plt.subplots(len(models), 3, figsize=(WIDTH, 0.5 + 2.1 * len(models)), squeeze=False, sharey="row")
    for row, model in zip(axes, models, strict=True):
        for ax, (title, rows) in zip(row, panels.items(), strict=True):
            rows = rows[rows["model"] == model]
            batch = generation[generation["model"] == model]["batch_size"].iloc[0]
            rows = rows[rows["batch_size"] == batch].drop_duplicates(["backend", "kind", "n"])
            for (backend, kind), line in rows.groupby(["backend", "kind"], sort=False):
                name = NAMES[kind] + (", compiled" if backend == "compiled" else "")
                start = line.iloc[:1].assign(n=0, speedup=1, speedup_low=1, speedup_high=1, predicted=1, noisy=False)
                _line(ax, pd.concat([start, line]), "n", kind, name, backend)
            ax.axhline(1, color="0.5", linewidth=0.8)
            ax.set_title(title if len(models) == 1 else f"{title}\n{model}")
            ax.set_xlabel("Layers dropped")
        row[0].set_ylabel(f"Speed-up over dense\n(batch {batch})")
    axes.flat[0].legend(loc="upper left")
    fig.supxlabel(
        "dotted: predicted from bytes and operations; bars: 95 % intervals over repeats; ring: noisy timing", fontsize=7
    )
    return fig, data


@figure("05_speedup")
def figS9_context(tables: Tables):
    """Where dropping attention starts to gain more than dropping MLP: decoding over contexts and batches."""
    data = _swept(tables)
    models, batches = list(data["model"].unique()), sorted(data["batch_size"].unique())
    shape = {"figsize": (WIDTH * min(1, 0.4 * len(batches) + 0.1), 0.5 + 2.1 * len(models)), "squeeze": False}
    fig, axes = plt.subplots(len(models), len(batches), sharey="row", **shape)
    for row, model in zip(axes, models, strict=True):
        for ax, batch in zip(row, batches, strict=True):
            rows = data[(data["model"] == model) & (data["batch_size"] == batch)]
            for (backend, kind), line in rows.groupby(["backend", "kind"], sort=False):
                name = f"{NAMES[kind]}-{line['n'].iloc[0]}" + (", compiled" if backend == "compiled" else "")
                _line(ax, line.drop_duplicates("context"), "context", kind, name, backend)
            ax.axhline(1, color="0.5", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ticks = sorted(rows["context"].unique())
            shown = [t for i, t in enumerate(ticks) if i == 0 or np.log2(t / ticks[i - 1]) > 0.7]
            ax.set_xticks(shown, [f"{t:,}" for t in shown])
            ax.minorticks_off()
            ax.set_xlabel("Tokens in the cache")
            ax.set_title(f"Decode, batch {batch}" + (f"\n{model}" if len(models) > 1 else ""))
        row[0].set_ylabel("Speed-up over dense")
    axes.flat[0].legend(loc="upper left")
    fig.supxlabel(
        "dotted: predicted from bytes and operations; bars: 95 % intervals over repeats; ring: noisy timing", fontsize=7
    )
    return fig, data


@figure("05_speedup")
def figS10_limit(tables: Tables):
    """Time of a decode step, dense and with the most attention gone, above what the device could do at best."""
    data = tables["speed"].query("what == 'decode' and batch_size == 1 and kind in ('dense', 'attention')")
    data = data[data["room"].isna()]
    most = data.groupby("model")["n"].max()
    data = data[(data["n"] == 0) | (data["n"] == data["model"].map(most))].drop_duplicates(
        ["model", "backend", "kind", "context"]
    )
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.5 * len(models)), 2.5), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        rows = data[data["model"] == model]
        for (backend, kind), line in rows.groupby(["backend", "kind"], sort=False):
            line = line.sort_values("context")
            n = line["n"].iloc[0]
            name = (f"Attn-{n}" if n else "Dense") + (", compiled" if backend == "compiled" else "")
            style = {"color": COLORS[kind], "marker": MARKERS[kind], "fillstyle": FILLS[backend]}
            ax.plot(line["context"], 1e3 * line["seconds"], label=name, **style)
            if backend == rows["backend"].iloc[0]:
                least = 1e3 * line["seconds"] * line["share_of_limit"]
                ax.plot(line["context"], least, color=COLORS[kind], linewidth=0.8, linestyle=":")
        ax.set_ylim(bottom=0)
        ax.set_xlabel("Tokens in the cache")
        ax.set_ylabel("Milliseconds a token")
        ax.set_title(f"{model}, batch 1\n(dotted: the device's limit)")
    axes.flat[0].legend(loc="upper left")
    return fig, data


@figure("05_speedup")
def figS11_trade(tables: Tables):
    """What a speed-up costs: points lost against speed-up, one line for each kind (the slope is the paper's SDR)."""
    data = tables["trade"]
    if not len(data) or data["points_lost"].isna().all():
        fig, ax = plt.subplots(figsize=(WIDTH * 0.5, 1.0))
        ax.text(0.5, 0.5, "no quality was measured in this run", ha="center", va="center")
        ax.axis("off")
        return fig, data
    data = data.dropna(subset=["points_lost"])
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.55 * len(models)), 2.7), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        for (backend, kind), line in data[data["model"] == model].groupby(["backend", "kind"], sort=False):
            line = line.sort_values("n")
            x, y = 100 * (line["speedup"] - 1), line["points_lost"]
            x_error = [100 * (line["speedup"] - line["speedup_low"]), 100 * (line["speedup_high"] - line["speedup"])]
            y_error = [y - line["points_lost_low"], line["points_lost_high"] - y]
            name = NAMES[kind] + (", compiled" if backend == "compiled" else "")
            ax.errorbar(x, y, np.clip(y_error, 0, None), np.clip(x_error, 0, None), color=COLORS[kind], marker=MARKERS[kind],
                        linestyle=LINES[kind], fillstyle=FILLS[backend], label=name, elinewidth=0.6)  # fmt: skip
            for a, b, n in zip(x, y, line["n"], strict=True):
                ax.annotate(str(n), (a, b), (3, 3), textcoords="offset points", fontsize=7, color=COLORS[kind])
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_xlabel("Speed-up of the generation, %")
        ax.set_ylabel("Points lost, mean of tasks")
        ax.set_title(f"{model} (numbers: layers dropped)")
    axes.flat[0].legend(loc="upper right")  # much speed at much loss: no line goes there
    return fig, data


def _swept(tables: Tables) -> pd.DataFrame:
    """Decoding with attention or MLP layers gone, at the contexts and batches where both were timed."""
    data = tables["speed"].query("what == 'decode' and kind in ('attention', 'mlp')")
    data = data[data["room"].isna() & ~data["fill"].astype(bool)]
    kinds = data.groupby(["model", "backend", "batch_size", "context", "n"])["kind"].transform("nunique")
    both = data[kinds == 2]
    crossed = tables["crossover"][["model", "n"]].drop_duplicates()
    return both.merge(crossed, on=["model", "n"])
