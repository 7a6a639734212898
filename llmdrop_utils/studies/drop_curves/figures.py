"""Figures of notebook 02: quality against the number of dropped sub-layers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from ...report.style import COLORS, LINES, MARKERS, NAMES, WIDTH, figure
from ...report.tables import Tables

TEXT_PANELS = {  # column -> label, logarithmic?
    "perplexity": ("Perplexity", True),
    "retained": ("Next-token accuracy,\nshare of the dense model's", False),
    "kl": ("KL from the dense model,\nnats per token", True),
}


# ---- on one pair of axes --------------------------------------------------------------------------------------------


def curves(ax: Axes, data: pd.DataFrame, value: str, low: str, high: str, title: str) -> None:
    """A line for each kind over the number dropped, starting from the dense model, with 95 % intervals."""
    dense = data[data["kind"] == "dense"]
    ax.axhline(dense[value].iloc[0], color=COLORS["dense"], linewidth=0.8, linestyle=(0, (4, 2)))
    for kind in (kind for kind in NAMES if kind in set(data["kind"]) - {"dense"}):
        line = pd.concat([dense, data[data["kind"] == kind]])
        errors = [line[value] - line[low], line[high] - line[value]]
        ax.errorbar(line["n"], line[value], np.clip(errors, 0, None), color=COLORS[kind], marker=MARKERS[kind],
                    linestyle=LINES[kind], label=NAMES[kind], elinewidth=0.8, capsize=1.5)  # fmt: skip
    ax.set_xlabel("Layers dropped")
    ax.set_title(title)


# ---- the figures ----------------------------------------------------------------------------------------------------


@figure("02_drop_curves")
def fig05_drop_curves(tables: Tables):
    """Paper, Fig. 5: each task against the number dropped, with the dense model's score and random guess."""
    return task_grid(tables)


@figure("02_drop_curves")
def figS4_text_curves(tables: Tables):
    """Perplexity, next-token accuracy and divergence on held-out text against the number dropped."""
    return text_curves(tables["text"], "a block counts as one")


@figure("02_drop_curves")
def figS5_average(tables: Tables):
    """Mean score of all tasks against the number dropped."""
    data = tables["average"]
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.55 * len(models)), 2.6), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        rows = data[data["model"] == model]
        curves(ax, rows, "value", "low", "high", f"Mean of {rows['tasks'].iloc[0]} tasks, {model}")
        ax.axhline(rows["chance"].iloc[0], color="0.5", linewidth=0.8, linestyle=":")
        ax.text(0, rows["chance"].iloc[0], "random guess", fontsize=6.5, color="0.35", va="bottom")
        ax.text(ax.get_xlim()[1], rows["value"].iloc[0], "dense", fontsize=6.5, ha="right", va="bottom")
        ax.set_ylabel("Score")
    axes.flat[0].legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    return fig, data


def task_grid(tables: Tables):
    """A row of panels for each model, one panel for each task."""
    data = tables["tasks"]
    models, tasks = list(data["model"].unique()), list(data["task"].unique())
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    fig, axes = plt.subplots(lines * len(models), columns, figsize=(WIDTH, 0.3 + 1.9 * lines * len(models)), squeeze=False)
    for m, model in enumerate(models):
        panels = axes[m * lines : (m + 1) * lines].flat
        for ax, task in zip(panels, tasks, strict=False):
            rows = data[(data["model"] == model) & (data["task"] == task)]
            if rows.empty:
                continue
            first = rows.iloc[0]
            curves(ax, rows, "value", "low", "high", f"{task}, {model}" if len(models) > 1 else task)
            ax.axhline(first["chance"], color="0.5", linewidth=0.8, linestyle=":")
            ax.set_ylabel(f"{first['metric']}, {first['num_fewshot']}-shot")
        for ax in panels:
            ax.axis("off")
    axes.flat[0].legend(loc="best", fontsize=7)
    fig.supxlabel("dashed: dense model; dotted: random guess; bars: 95 % intervals over documents", fontsize=7)
    return fig, data


def text_curves(data: pd.DataFrame, note: str):
    """A row of panels for each model: perplexity, what is retained, divergence."""
    models = list(data["model"].unique())
    fig, axes = plt.subplots(len(models), 3, figsize=(WIDTH, 0.6 + 2.2 * len(models)), squeeze=False)
    for row, model in zip(axes, models, strict=True):
        rows = data[data["model"] == model]
        for ax, (column, (label, logarithmic)) in zip(row, TEXT_PANELS.items(), strict=True):
            shown = rows[rows[column] > 0] if column == "kl" else rows
            if column == "kl":  # the dense model's is zero by definition, and has no place on a logarithmic axis
                for kind in (kind for kind in NAMES if kind in set(shown["kind"])):
                    line = shown[shown["kind"] == kind]
                    style = {"color": COLORS[kind], "marker": MARKERS[kind], "linestyle": LINES[kind], "label": NAMES[kind]}
                    ax.plot(line["n"], line[column], **style)
                    ax.fill_between(line["n"], line["kl_low"], line["kl_high"], color=COLORS[kind], alpha=0.15, linewidth=0)
                ax.set_xlabel("Layers dropped")
                ax.set_title(model)
            else:
                curves(ax, shown, column, f"{column}_low", f"{column}_high", model)
            ax.set_ylabel(label)
            if logarithmic:
                ax.set_yscale("log")
            ax.xaxis.set_minor_locator(MultipleLocator(1 if rows["n"].max() < 50 else 5))
            if column == "perplexity":  # what lies above says nothing more
                ax.set_ylim(rows[column].min() / 1.5, min(1e6, 1.5 * rows[column].max()))
            if column == "retained":
                ax.axhline(0.9, color="0.5", linewidth=0.8, linestyle=":")
                ax.text(rows["n"].max(), 0.9, "90 %", fontsize=6.5, color="0.35", ha="right", va="bottom")
                ax.set_ylim(bottom=0)
    axes.flat[2].legend(loc="lower right", fontsize=7)  # where curves of divergence never are
    fig.supxlabel(f"dashed: dense model; bars: 95 % intervals over samples\nperplexity is cut at a million; {note}", fontsize=7)
    return fig, data
