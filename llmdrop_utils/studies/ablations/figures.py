"""Figures of notebook 04: methods and calibrations beside cosine."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ...report.style import COLORS, KIND_NAMES, LINES, MARKERS, WIDTH, Drawing, figure, for_each_model, nothing_to_show
from ...report.tables import Tables
from .rows import CONTINUATION, COSINE, TASKS, TEXT

SHADES = ("#4292c6", "#08306b", "#9ecae1", "#E69F00", "#D55E00", "#000000")  # fewer and more layers dropped
AXES = {
    TEXT: "Text:\nnats per token gained",
    TASKS: "Tasks:\nmean score gained",
    CONTINUATION: "Continuation:\nshare of equal tokens gained",
}


def differences(ax: Axes, rows: pd.DataFrame, labels: list[str], column: str, counts: list[int]) -> None:
    """A row for each label, a point with its interval for each number dropped; zero is cosine."""
    step = 0.7 / max(1, len(counts))
    for j, n in enumerate(counts):
        of_n = rows[rows["n"] == n].set_index(column)
        there = [label for label in labels if label in of_n.index]
        of_n = of_n.loc[there]
        y = np.array([labels.index(label) for label in there]) + (j - (len(counts) - 1) / 2) * step
        x = of_n["difference"]
        error = np.clip([x - of_n["difference_low"], of_n["difference_high"] - x], 0, None)
        ax.errorbar(x, y, xerr=error, linestyle="none", marker="o", color=SHADES[j % len(SHADES)], label=f"{n} dropped",
                    elinewidth=0.8, capsize=1.5)  # fmt: skip
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)


@figure("04_ablations")
def figS24_methods(tables: Tables) -> Drawing:
    """Every method beside cosine at the same number of attention layers dropped: text, tasks, and the dense model's own words.

    Right of zero a method chooses better layers than cosine on the same samples; the first axis is linear between -0.1 and 0.1.
    """
    data = tables["quality"].query("kind == 'attention' and method != @COSINE")
    models, measures = list(data["model"].unique()), [m for m in AXES if m in set(data["measure"])]
    if not models:
        return nothing_to_show("No method was compared", data)
    height = 0.9 + len(models) * (0.5 + 0.28 * data["method"].nunique())
    shape = {"figsize": (WIDTH, height), "squeeze": False, "sharey": "row"}
    fig, axes = plt.subplots(len(models), len(measures), **shape)
    for row, model in zip(axes, models, strict=True):
        of_model = data[data["model"] == model]
        text = of_model[of_model["measure"] == TEXT]
        labels = list(text.groupby("method")["difference"].mean().sort_values(ascending=False).index)
        counts = sorted(of_model["n"].unique())
        for ax, measure in zip(row, measures, strict=True):
            rows = of_model[of_model["measure"] == measure]
            differences(ax, rows, labels, "method", counts)
            ax.set_xlabel(AXES[measure])
            if measure == TEXT:  # the best methods differ by a hundredth of what the worst do
                ax.set_xscale("symlog", linthresh=0.1)
                ax.set_xticks([-10, -1, -0.1, 0, 0.1], ["-10", "-1", "-0.1", "0", "0.1"])
            if len(models) > 1:
                ax.set_title(model)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)

    def sentence(rows: pd.DataFrame) -> str:
        found = []
        for measure in measures:
            of = rows[rows["measure"] == measure]
            better = list(dict.fromkeys(of[of["outcome"] == "better"]["method"]))
            found.append(f"on {measure} {', '.join(better) if better else 'none'}")
        n_methods = rows["method"].nunique()
        return f"Of {n_methods} methods these are better than cosine, all comparisons taken together: {'; '.join(found)}."

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("04_ablations")
def figS25_calibration(tables: Tables) -> Drawing:
    """Cosine on fewer samples, shorter ones and other corpora: what the chosen layers cost on held-out text of the first.

    Right of zero they are worse than those that all samples choose.
    """
    data = tables["calibration"]
    if data.empty:
        return nothing_to_show("Nothing was varied", data)
    data = data.assign(label=data["varied"] + " " + data["setting"].astype(str))
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.62 * len(models)), 1.0 + 0.3 * data["label"].nunique()),
                             squeeze=False, sharey=True)  # fmt: skip
    for ax, model in zip(axes[0], models, strict=True):
        of_model = data[data["model"] == model]
        differences(ax, of_model, list(of_model["label"].unique()), "label", sorted(of_model["n"].unique()))
        ax.set(xlabel="Nats per token more than with all samples", title=model if len(models) > 1 else "")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)

    def sentence(rows: pd.DataFrame) -> str:
        worst = rows.loc[rows["difference"].idxmax()]
        at = f"{worst['label']}, {worst['n']} dropped"
        return f"The most that another calibration costs is {worst['difference']:.3f} nats per token ({at})."

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("04_ablations")
def figS26_residual(tables: Tables) -> Drawing:
    """Importance with the residual connection and without it (paper, Table 6): perplexity of held-out text without n layers."""
    text = tables["quality"].query("measure == @TEXT and method in (@COSINE, 'without residual')")
    data = text.assign(
        perplexity=np.exp(-text["value"]), perplexity_low=np.exp(-text["high"]), perplexity_high=np.exp(-text["low"])
    )
    models = list(data["model"].unique())
    if "without residual" not in set(data["method"]):
        return nothing_to_show("Nothing was ranked without residual", data)
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.62 * len(models)), 2.8), squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        of_model = data[data["model"] == model]
        for (kind, method), line in of_model.groupby(["kind", "method"], sort=False):
            line = line.sort_values("n")
            error = [line["perplexity"] - line["perplexity_low"], line["perplexity_high"] - line["perplexity"]]
            ax.errorbar(line["n"], line["perplexity"], np.clip(error, 0, None), color=COLORS[kind], marker=MARKERS[kind],
                        linestyle=LINES[kind], fillstyle="full" if method == COSINE else "none", elinewidth=0.8, capsize=1.5,
                        label=f"{KIND_NAMES[kind]}, {'with' if method == COSINE else 'without'} residual")  # fmt: skip
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="Layers dropped", ylabel="Perplexity", title=model if len(models) > 1 else "")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)

    def sentence(rows: pd.DataFrame) -> str:
        most = rows[rows["n"] == rows["n"].max()].set_index(["kind", "method"])["perplexity"]
        told = [
            f"{KIND_NAMES[kind]} {most[kind, COSINE]:.0f} with residual, {most[kind, 'without residual']:.0f} without"
            for kind in ("attention", "mlp") if (kind, "without residual") in most.index
        ]  # fmt: skip
        return f"Perplexity with {rows['n'].max()} layers dropped: {'; '.join(told)}."

    return Drawing(fig, data, for_each_model(data, sentence))
