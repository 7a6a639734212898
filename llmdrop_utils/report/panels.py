"""What figures of several notebooks share: drawings on one pair of axes, and grids of them."""

from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import COLORS, LINES, MARKERS, NAMES, WIDTH

# The paper's colours end at 0.3 as well, but run linearly from 0: there attention and MLP of most layers look the same.
HEATMAP: dict[str, Any] = {"cmap": "cividis_r", "norm": LogNorm(vmin=0.003, vmax=0.3)}
HEATMAP_TICKS = [0.003, 0.01, 0.03, 0.1, 0.3]


def rows_of_panels(
    models: list[str], titles: Iterable[str], heights: float | list[float], **share: Any
) -> tuple[Figure, list[np.ndarray]]:
    """A row of panels for each model, under its exact name, which would not fit beside a panel's title; and the axes of each.

    heights: of a row's panels, in inches.
    """
    titles, each = list(titles), [heights] * len(models) if isinstance(heights, float) else heights
    fig = plt.figure(figsize=(WIDTH, sum(each) + 0.3 * len(models)))
    rows = []
    for part, model in zip(fig.subfigures(len(models), 1, squeeze=False, height_ratios=each).flat, models, strict=True):
        part.suptitle(model, fontsize=8.5)
        rows.append(part.subplots(1, len(titles), squeeze=False, **share)[0])
        for ax, title in zip(rows[-1], titles, strict=True):
            ax.set_title(title)
    return fig, rows


def importance_map(ax: Axes, data: pd.DataFrame, rows: str) -> None:
    """A heat map of importance by layer (x) and by the column `rows` (y), in order of appearance."""
    grid = data.pivot(index=rows, columns="layer", values="importance").loc[data[rows].unique()]
    sns.heatmap(grid, ax=ax, cbar=False, xticklabels=max(1, grid.shape[1] // 6), **HEATMAP)
    ax.tick_params(axis="both", length=0, labelrotation=0)
    ax.set(xlabel="Layer", ylabel="")


def importance_bar(axes: np.ndarray) -> None:
    """The colours of a row of heat maps of importance."""
    label = "Importance\n(bright: redundant)"
    bar = axes[0].figure.colorbar(ScalarMappable(**HEATMAP), ax=axes, label=label, extend="both", shrink=0.9, pad=0.01)
    bar.set_ticks(HEATMAP_TICKS, labels=list(map(str, HEATMAP_TICKS)))


def curves(ax: Axes, data: pd.DataFrame, value: str, low: str, high: str, title: str = "", dodge: float = 0.0) -> None:
    """A line for each kind over the number dropped, starting from the dense model (dashed), with 95 % intervals.

    dodge: how far apart, in layers, kinds stand at equal n, so that their intervals do not cover each other.
    """
    dense = data[data["kind"] == "dense"]
    kinds = [kind for kind in NAMES if kind in set(data["kind"]) - {"dense"}]
    for i, kind in enumerate(kinds):
        rows = data[data["kind"] == kind]
        x = [*dense["n"], *rows["n"] + dodge * (i - (len(kinds) - 1) / 2)]
        line = pd.concat([dense.assign(**{low: np.nan, high: np.nan}), rows])  # the dense model's interval is drawn once
        errors = np.clip([line[value] - line[low], line[high] - line[value]], 0, None)
        # Joint drop is attention drop until the first MLP is dropped: open markers let both be seen.
        hollow: dict[str, Any] = {"markerfacecolor": "none", "markersize": 6, "zorder": 3} if kind == "joint" else {}
        ax.errorbar(x, line[value], errors, color=COLORS[kind], marker=MARKERS[kind], linestyle=LINES[kind],
                    label=NAMES[kind], elinewidth=0.8, capsize=1.5, **hollow)  # fmt: skip
    for row in dense.to_dict("records"):
        ax.axhline(row[value], color=COLORS["dense"], linewidth=0.8, linestyle=(0, (4, 2)))
        errors = np.clip([[row[value] - row[low]], [row[high] - row[value]]], 0, None)
        ax.errorbar(row["n"], row[value], errors, color=COLORS["dense"], marker=".", elinewidth=0.8, capsize=1.5, zorder=4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="Layers dropped", title=title)


TEXT_PANELS = {  # column -> title, logarithmic?
    "perplexity": ("Perplexity", True),
    "retained": ("Accuracy, share of dense", False),
    "kl": ("KL from dense, nats/token", True),
}


def text_curves(data: pd.DataFrame, note: str) -> Figure:
    """A row of panels for each model: perplexity on held-out text, next-token accuracy, divergence from the dense model."""
    models = list(data["model"].unique())
    fig, axes = plt.subplots(len(models), 3, figsize=(WIDTH, 0.9 + 2.0 * len(models)), squeeze=False, sharex="row")
    for row, model in zip(axes, models, strict=True):
        rows = data[data["model"] == model]
        for ax, (column, (title, logarithmic)) in zip(row, TEXT_PANELS.items(), strict=True):
            # The dense model's divergence is zero by definition, and has no place on a logarithmic axis.
            shown = rows[rows["kl"] > 0] if column == "kl" else rows
            curves(ax, shown, column, f"{column}_low", f"{column}_high", title)
            ax.set_yscale("log" if logarithmic else "linear")
        row[0].set(ylabel=model, ylim=(rows["perplexity"].min() / 1.5, min(1e6, 1.5 * rows["perplexity"].max())))
        row[1].axhline(0.9, color="0.5", linewidth=0.8, linestyle=":")
        row[1].text(rows["n"].max(), 0.9, "90 %", fontsize=6.5, color="0.35", ha="right", va="bottom")
        row[1].set_ylim(bottom=0)
    legend_above(fig, axes.flat[0])
    fig.supxlabel(f"dashed: dense model; bars: 95 % intervals over samples; perplexity is cut at a million\n{note}", fontsize=7)
    return fig


def task_grid(data: pd.DataFrame) -> Figure:
    """Panels for each model, one for each task: its score against the number dropped."""
    models, tasks = list(data["model"].unique()), list(data["task"].unique())
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    height = 0.6 + 1.9 * lines * len(models)
    fig, axes = plt.subplots(lines * len(models), columns, figsize=(WIDTH, height), squeeze=False)
    for m, model in enumerate(models):
        panels = axes[m * lines : (m + 1) * lines].flat
        for ax, task in zip(panels, tasks, strict=False):
            rows = data[(data["model"] == model) & (data["task"] == task)]
            if rows.empty:
                continue
            first = rows.iloc[0]
            title = f"{task}, {model}" if len(models) > 1 else task
            curves(ax, rows, "value", "low", "high", title, dodge=0.025 * rows["n"].max())
            ax.axhline(first["chance"], color="0.5", linewidth=0.8, linestyle=":")
            ax.set_ylabel(f"{first['metric']}, {first['num_fewshot']}-shot")
        for ax in panels:
            ax.axis("off")
    legend_above(fig, axes.flat[0])
    fig.supxlabel("dashed: dense model; dotted: random guess; bars: 95 % intervals over documents", fontsize=7)
    return fig


def legend_above(fig: Figure, ax: Axes) -> None:
    """One legend for the figure, above all panels: that of one pair of axes."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels))
