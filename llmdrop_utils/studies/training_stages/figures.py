"""Figures of notebook 07: stages of training."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ...report.style import COLORS, KIND_NAMES, LINES, MARKERS, WIDTH, figure
from ...report.tables import Tables
from ..similarity.figures import HEATMAP_TICKS, heatmap

# ---- on one pair of axes --------------------------------------------------------------------------------------------


def over_training(ax: Axes, data: pd.DataFrame, value: str) -> None:
    """A line for each kind over the stages: mean over seeds, the band from the lowest to the highest end of their intervals."""
    for kind in KIND_NAMES:
        rows = data[data["kind"] == kind].groupby("position")
        mean = rows[value].mean()
        ax.fill_between(mean.index, rows["low"].min(), rows["high"].max(), color=COLORS[kind], alpha=0.2, linewidth=0)
        ax.plot(mean.index, mean, color=COLORS[kind], marker=MARKERS[kind], linestyle=LINES[kind], label=KIND_NAMES[kind])


def name_stages(ax: Axes, stages: pd.DataFrame) -> None:
    """Stages stand at equal distances; ticks say how much training each has seen."""
    labels = stage_labels(stages)
    ax.set_xticks(
        sorted(stages["position"].unique()),
        labels,
        rotation=45 if len(labels) > 4 else 0,
        ha="right" if len(labels) > 4 else "center",
    )
    ax.set_xlabel("Tokens seen" if stages["tokens"].notna().all() else "Stage")


def loss_curve(ax: Axes, stages: pd.DataFrame, losses: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Loss on held-out text at the stages, the training loss between them, and what token frequencies alone would give."""
    first = stages[stages["seed"] == stages["seed"].iloc[0]]
    tokens, position = first["tokens"].to_numpy(float), first["position"].to_numpy(float)
    for _, rows in losses.groupby("seed"):
        # Between stages a logarithmic scale, as the stages themselves lie; before the first step there is no loss.
        x = np.interp(np.log(rows["tokens"]), np.log(tokens[1:]), position[1:])
        ax.plot(x, rows["loss"], color="0.65", linewidth=0.8, label="training" if rows["seed"].iloc[0] == 0 else None)
    for seed, rows in stages.groupby("seed"):
        ax.plot(rows["position"], rows["nll"], color=COLORS["dense"], marker=MARKERS["dense"], linewidth=1.0,
                label="held-out text" if seed == stages["seed"].iloc[0] else None)  # fmt: skip
    if runs["unigram_entropy"].notna().any():
        ax.axhline(runs["unigram_entropy"].iloc[0], color="0.3", linestyle=":", linewidth=1.0, label="token frequencies alone")
    ax.legend(loc="best", fontsize=7)


def stage_labels(stages: pd.DataFrame) -> list[str]:
    """Tokens seen, in short ("1.2M"), or the names of the stages where tokens are not known."""
    one = stages.drop_duplicates("position").sort_values("position")
    if one["tokens"].isna().any():
        return list(one["stage"])
    return [_short(tokens) for tokens in one["tokens"]]


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


# ---- the figures ----------------------------------------------------------------------------------------------------


@figure("07_training_stages")
def fig07_training_stages(tables: Tables):
    """Paper, Fig. 7: importance by stage and layer; mean over seeds."""
    data = tables["importance"].groupby(["model", "kind", "position", "layer"], sort=False)["importance"].mean().reset_index()
    models = list(data["model"].unique())
    heights = [0.9 + 0.17 * data[data["model"] == model]["position"].nunique() for model in models]
    fig, axes = plt.subplots(
        len(models), 3, figsize=(WIDTH, 0.3 + sum(heights)), squeeze=False, sharey="row", height_ratios=heights
    )
    for row, model in zip(axes, models, strict=True):
        stages = tables["stages"][tables["stages"]["model"] == model]
        for ax, kind in zip(row, KIND_NAMES, strict=True):
            rows = data[(data["model"] == model) & (data["kind"] == kind)].sort_values(["position", "layer"])
            image = heatmap(ax, rows, "position", f"{KIND_NAMES[kind]}, {model}")
        labels = stage_labels(stages)
        row[0].set_yticks(range(len(labels)), labels)
        row[0].set_ylabel("Tokens seen" if stages["tokens"].notna().all() else "Stage")
    bar = fig.colorbar(image, ax=axes, label="Importance\n(bright: redundant)", extend="both", shrink=0.9, pad=0.01)
    bar.set_ticks(HEATMAP_TICKS, labels=map(str, HEATMAP_TICKS))
    return fig, data


@figure("07_training_stages")
def figS13_stage_means(tables: Tables):
    """Mean importance of each kind over training, over all layers and without the first; and the loss below it."""
    models = list(tables["means"]["model"].unique())
    fig, axes = plt.subplots(3, len(models), figsize=(WIDTH, 5.6), squeeze=False, sharex="col")
    for column, model in zip(axes.T, models, strict=True):
        own = {name: tables[name][tables[name]["model"] == model] for name in ("means", "stages", "losses", "runs")}
        for ax, left, layers in zip(column, axes[:, 0], ("all layers", "all but the first"), strict=False):
            over_training(ax, own["means"][own["means"]["layers"] == layers], "importance")
            ax.set_yscale("log")
            if ax is not left:
                ax.sharey(left)
        column[0].set_title(model)
        loss_curve(column[2], own["stages"], own["losses"], own["runs"])
        name_stages(column[2], own["stages"])
    labels = ("Mean importance,\nall layers", "Mean importance,\nall but the first", "Loss,\nnats a token")
    for ax, label in zip(axes[:, 0], labels, strict=True):
        ax.set_ylabel(label)
    axes[0, 0].legend(loc="best", fontsize=7)
    return fig, tables["means"]


@figure("07_training_stages")
def figS14_stage_agreement(tables: Tables):
    """How well each stage ranks the layers as the last one does."""
    data = tables["agreement"]
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH, 2.6), squeeze=False, sharey=True)
    for ax, model in zip(axes.flat, models, strict=True):
        rows = data[data["model"] == model]
        over_training(ax, rows, "correlation")
        ax.axhline(0, color="0.6", linewidth=0.6)
        name_stages(ax, rows)
        ax.set_title(model)
    axes.flat[0].set_ylabel("Rank correlation with the last stage")
    axes.flat[0].legend(loc="best")
    return fig, data


@figure("07_training_stages")
def figS15_stage_cost(tables: Tables):
    """What it costs, at each stage, to drop the quarter of a kind that the last stage would drop."""
    data = tables["cost"].query("share == 'quarter'")
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH, 2.6), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        rows = data[data["model"] == model]
        over_training(ax, rows, "cost")
        ax.axhline(0, color="0.6", linewidth=0.6)
        name_stages(ax, rows)
        ax.set_title(f"{model}, {rows['n'].iloc[0]} layers of a kind")
    axes.flat[0].set_ylabel("Loss added by dropping, nats a token")
    axes.flat[0].legend(loc="best")
    return fig, data
