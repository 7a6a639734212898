"""Figures of notebook 03: joint and iterative dropping."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from ...report.style import COLORS, LINES, MARKERS, NAMES, WIDTH, figure
from ...report.tables import Tables
from ..drop_curves.figures import task_grid, text_curves


def staircase(ax: Axes, data: pd.DataFrame, title: str) -> None:
    """How many attention and MLP layers are gone (y) once n sub-layers are (x), in the joint ranking."""
    for kind in ("attention", "mlp"):
        gone = (data["kind"] == kind).cumsum()
        ax.step([0, *data["position"]], [0, *gone], where="post", color=COLORS[kind], linestyle=LINES[kind], label=NAMES[kind])
    ax.set_xlabel("Sub-layers dropped jointly")
    ax.set_title(title)


@figure("03_joint_drop")
def fig08_joint_drop(tables: Tables):
    """Paper, Fig. 8: joint against single kinds at equal n. Joint runs on attention's line until the first MLP goes."""
    return text_curves(tables["text"], "a block counts as one; joint lies on attention until the first MLP goes")


@figure("03_joint_drop")
def figS6_joint_tasks(tables: Tables):
    """Paper, Fig. 8, on tasks: joint against single kinds."""
    return task_grid(tables)


@figure("03_joint_drop")
def figS7_joint_order(tables: Tables):
    """Which kind goes when in the joint ranking."""
    data = tables["order"]
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.55 * len(models)), 2.4), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        rows = data[data["model"] == model]
        staircase(ax, rows, model)
        first = rows[rows["kind"] == "mlp"]["position"].iloc[0]
        ax.axvline(first, color="0.5", linewidth=0.8, linestyle=":")
        ax.text(first, 0.96, f" first MLP at {first}", fontsize=7, transform=ax.get_xaxis_transform(), va="top")
        ax.set_ylabel("Layers of the kind gone")
    axes.flat[0].legend(loc="lower right")
    return fig, data


@figure("03_joint_drop")
def fig09_iterative(tables: Tables):
    """Paper, Fig. 9: attention dropped one by one against all at once, as loss of log-likelihood on held-out text."""
    data = tables["iterative"]
    fig, ax = plt.subplots(figsize=(WIDTH * 0.55, 0.9 + 0.28 * max(1, len(data))))
    labels = [f"{row.model}, Attn-{row.n}" for row in data.itertuples()]
    for y, row in enumerate(data.itertuples()):
        ax.plot([row.low, row.high], [y, y], color=COLORS["attention"])
        ax.plot(row.difference, y, color=COLORS["attention"], marker=MARKERS["attention"])
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(-0.7, max(1, len(labels)) - 0.3)
    ax.set_xlabel("Iterative minus one-shot, nats per token\n(left of zero: iterative is better)")
    return fig, data
