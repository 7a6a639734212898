"""Figures of notebook 07: stages of training."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ...report.panels import importance_bar, importance_map, rows_of_panels
from ...report.style import COLORS, DASHES, KIND_NAMES, MARKERS, WIDTH, Drawing, figure, for_each_model
from ...report.tables import Tables
from ...report.verdicts import threshold
from .rows import LAYERS

IN_TEXT = {"attention": "attention", "mlp": "MLP", "block": "blocks"}
LABELS = 20  # of stages that fit beside each other in a figure's width
COLUMNS = 3  # panels beside each other

# ---- on one pair of axes --------------------------------------------------------------------------------------------


def over_training(ax: Axes, data: pd.DataFrame, value: str, legend: bool, bands: bool = True) -> None:
    """A line for each kind over the stages: mean over seeds, the band from the lowest to the highest end of their intervals.

    Without bands, a thin line for each seed instead: wide bands of three kinds cover each other.
    """
    markers = {kind: MARKERS[kind] for kind in KIND_NAMES}  # seaborn mixes no filled markers with others
    sns.lineplot(data, x="position", y=value, hue="kind", style="kind", hue_order=KIND_NAMES, style_order=KIND_NAMES,
                 palette=COLORS, markers=markers, dashes=DASHES, errorbar=None, markeredgewidth=0, legend=legend,
                 ax=ax)  # fmt: skip
    for kind in KIND_NAMES:
        if not bands:
            for _, seed in data[data["kind"] == kind].groupby("seed"):
                ax.plot(seed["position"], seed[value], color=COLORS[kind], linewidth=0.6, alpha=0.6)
            continue
        rows = data[data["kind"] == kind].groupby("position")
        low, high = rows["low"].min(), rows["high"].max()
        ax.fill_between(low.index, low, high, color=COLORS[kind], alpha=0.2, linewidth=0)
    if legend:
        handles, names = ax.get_legend_handles_labels()
        ax.legend(handles, [KIND_NAMES[name] for name in names], loc="best", fontsize=7)


def name_stages(ax: Axes, stages: pd.DataFrame, n_panels: int) -> None:
    """Stages are evenly spaced; ticks say how much training each has seen, as many as fit with `n_panels` in a row."""
    places = sorted(stages["position"].unique())
    labels = stage_labels(stages)
    every = max(1, math.ceil(len(labels) * n_panels / LABELS))
    shown = range(len(labels) - 1, -1, -every)  # the last one among them
    slanted = len(shown) > 4
    ax.set_xticks([places[i] for i in shown], [labels[i] for i in shown], rotation=45 if slanted else 0,
                  ha="right" if slanted else "center")  # fmt: skip
    ax.set_xticks(places, minor=True)
    ax.set_xlabel(stage_heading(stages))


def rules_begin(stages: pd.DataFrame) -> float | None:
    """Between which positions the rules begin to judge: half-way between the last stage that they leave out and the next.

    None if they leave nothing out but untrained weights, or if it is unknown how much training the stages have seen.
    """
    early = stages[stages["progress"] < threshold("redundant_from_the_start", "first")]["position"]
    return early.max() + 0.5 if early.nunique() > 1 else None


def mark_rules(ax: Axes, stages: pd.DataFrame, label: bool) -> None:
    """A line where the rules begin to judge."""
    if (begins := rules_begin(stages)) is not None:
        ax.axvline(begins, color="0.5", linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
        if label:
            ax.text(begins, 0.02, " rules judge\n from here", fontsize=6.5, color="0.35", transform=ax.get_xaxis_transform())


def loss_curve(ax: Axes, stages: pd.DataFrame, losses: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Loss on held-out text at the stages, the training loss between them, and what token frequencies alone would give."""
    first = stages[(stages["seed"] == stages["seed"].iloc[0]) & (stages["tokens"] > 0)]
    if len(losses):  # between stages on a logarithmic scale, as the stages themselves are spaced
        shown = losses[losses["tokens"] >= first["tokens"].min()]
        x = np.interp(np.log(shown["tokens"].astype(float)), np.log(first["tokens"].astype(float)), first["position"])
        sns.lineplot(x=x, y=shown["loss"], units=shown["seed"], estimator=None, color="0.65", linewidth=0.8, ax=ax)
        ax.lines[0].set_label("training text")
    known = len(ax.lines)
    sns.lineplot(stages, x="position", y="nll", units="seed", estimator=None, color=COLORS["dense"], marker=MARKERS["dense"],
                 markeredgecolor=COLORS["dense"], linewidth=1.0, ax=ax)  # fmt: skip
    ax.lines[known].set_label("held-out text")
    if runs["unigram_entropy"].notna().any():
        ax.axhline(runs["unigram_entropy"].iloc[0], color="0.3", linestyle=":", linewidth=1.0, label="token frequencies alone")
    ax.legend(loc="best", fontsize=7)


def stage_heading(stages: pd.DataFrame) -> str:
    """What the labels of stages are."""
    return "Tokens seen" if stages["tokens"].notna().all() else "Stage"


def stage_labels(stages: pd.DataFrame) -> list[str]:
    """Tokens seen, in short ("1.2M"), or the names of the stages where tokens are unknown."""
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
def fig07_training_stages(tables: Tables) -> Drawing:
    """Importance by stage and layer; mean over seeds (paper, Fig. 7)."""
    data = tables["importance"].groupby(["model", "kind", "position", "layer"], sort=False)["importance"].mean().reset_index()
    models = list(data["model"].unique())
    heights = [0.9 + 0.17 * data[data["model"] == model]["position"].nunique() for model in models]
    fig, axes = rows_of_panels(models, KIND_NAMES.values(), heights, sharey=True)
    for row, model in zip(axes, models, strict=True):
        stages = tables["stages"][tables["stages"]["model"] == model]
        for ax, kind in zip(row, KIND_NAMES, strict=True):
            rows = data[(data["model"] == model) & (data["kind"] == kind)].sort_values(["position", "layer"])
            importance_map(ax, rows, "position")
            if (begins := rules_begin(stages)) is not None:
                ax.axhline(begins + 0.5, color="white", linewidth=1.2, linestyle=(0, (4, 2)))  # cells are centred on a half
        labels = stage_labels(stages)
        row[0].set_yticks(np.arange(len(labels)) + 0.5, labels)  # the middle of a cell
        row[0].set_ylabel(stage_heading(stages))
        importance_bar(row)

    def sentence(rows: pd.DataFrame) -> str:
        ends = [rows[rows["position"] == end].set_index(["kind", "layer"])["importance"] for end in _ends(rows)]
        layers = {kind: [end[kind].idxmin() for end in ends] for kind in KIND_NAMES}
        moves = [f"{IN_TEXT[kind]} {first} to {last}" for kind, (first, last) in layers.items()]
        return f"Most redundant layer, first stage to last: {', '.join(moves)}."

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("07_training_stages")
def figS13_stage_means(tables: Tables) -> Drawing:
    """Mean importance of each kind over training, over all layers and without the first; and the loss at the same stages.
    Lines of importance are means over seeds, lines of loss single seeds. Bands run from the lowest to the highest end of the
    seeds' 95 % intervals.
    """
    models = list(tables["means"]["model"].unique())
    fig, axes, n_columns = _grid(len(models), 5.6, rows_each=3)
    labels = ("Mean importance,\nall layers", "Mean importance,\nall but the first", "Loss,\nnats per token")
    for i, (model, column) in enumerate(zip(models, axes, strict=True)):
        own = {name: tables[name][tables[name]["model"] == model] for name in ("means", "stages", "losses", "runs")}
        for ax, first, layers in zip(column, axes[0], LAYERS, strict=False):
            over_training(ax, own["means"][own["means"]["layers"] == layers], "importance", legend=ax is axes[0][0])
            _plain_log_scale(ax)
            ax.sharex(column[2])
            ax.tick_params(labelbottom=False)
            ax.set_xlabel("")
            if ax is not first:
                ax.sharey(first)
        column[0].set_title(model)
        loss_curve(column[2], own["stages"], own["losses"], own["runs"])
        name_stages(column[2], own["stages"], n_columns)
        for ax in column:
            mark_rules(ax, own["stages"], label=ax is column[0])
        for ax, label in zip(column, labels, strict=True):
            ax.set_ylabel(label if i % n_columns == 0 else "")

    def sentence(rows: pd.DataFrame) -> str:
        mean = rows.groupby(["layers", "position", "kind"])["importance"].mean().unstack("kind")
        lowest = mean["attention"] < mean[["mlp", "block"]].min(axis=1)
        found = [f"{lowest[layers].sum()} of {len(lowest[layers])} stages ({layers})" for layers in rows["layers"].unique()]
        ends = [mean.loc["all layers"].loc[end] for end in _ends(rows)]
        moves = [f"{IN_TEXT[kind]} {ends[0][kind]:.3f} to {ends[1][kind]:.3f}" for kind in KIND_NAMES]
        return (
            f"Attention is the most redundant kind at {' and '.join(found)}. Mean importance over all layers, first stage to "
            f"last: {', '.join(moves)}."
        )

    return Drawing(fig, tables["means"], for_each_model(tables["means"], sentence))


@figure("07_training_stages")
def figS14_stage_agreement(tables: Tables) -> Drawing:
    """Rank correlation of each stage's importance with that of the last stage.
    Thick lines are means over seeds, thin ones single seeds.
    """
    data = tables["agreement"]
    fig, axes = _panels(data, "correlation", "Rank correlation\nwith the last stage", bands=False)
    for ax in axes:
        ax.set_ylim(top=1.05)

    def sentence(rows: pd.DataFrame) -> str:
        earlier = rows[rows["progress"] < 1]
        if earlier.empty:
            return "There is no earlier stage."
        mean = earlier.groupby(["kind", "position"])["correlation"].mean().unstack("kind")
        names = earlier.drop_duplicates("position").set_index("position")["stage"]
        ends = dict.fromkeys(_ends(earlier))
        text = [f"{names[end]} {', '.join(f'{mean.loc[end, k]:.2f} for {IN_TEXT[k]}' for k in KIND_NAMES)}" for end in ends]
        return f"Correlation with the last stage: at {'; at '.join(text)}."

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("07_training_stages")
def figS15_stage_cost(tables: Tables) -> Drawing:
    """Loss added at each stage by dropping the quarter of a kind that the last stage would drop.
    Bands run from the lowest to the highest end of the seeds' 95 % intervals.
    """
    data = tables["cost"].query("share == 'quarter'")
    fig, axes = _panels(data, "cost", "Added loss,\nnats per token")
    for ax, (model, rows) in zip(axes, data.groupby("model", sort=False), strict=True):
        ax.set_title(f"{model}, {rows['n'].iloc[0]} layers")

    def sentence(rows: pd.DataFrame) -> str:
        mean = rows.groupby(["kind", "position"])["cost"].mean()
        first, last = _ends(rows)
        moves = [f"{mean[kind, first]:+z.3f} to {mean[kind, last]:+z.3f} for {IN_TEXT[kind]}" for kind in KIND_NAMES]
        return f"Added loss, first stage to last: {', '.join(moves)}."

    return Drawing(fig, data, for_each_model(data, sentence))


def _panels(data: pd.DataFrame, value: str, label: str, bands: bool = True) -> tuple[plt.Figure, list[Axes]]:
    """A panel for each model, with a line for each kind over the stages."""
    models = list(data["model"].unique())
    fig, axes, n_columns = _grid(len(models), 2.6)
    for i, (model, (ax,)) in enumerate(zip(models, axes, strict=True)):
        rows = data[data["model"] == model]
        over_training(ax, rows, value, legend=i == 0, bands=bands)
        ax.axhline(0, color="0.6", linewidth=0.6)
        name_stages(ax, rows, n_columns)
        mark_rules(ax, rows, label=i == 0)
        ax.set(title=model, ylabel=label if i % n_columns == 0 else "")
    return fig, [ax for (ax,) in axes]


def _grid(n_models: int, height: float, rows_each: int = 1) -> tuple[plt.Figure, list[list[Axes]], int]:
    """Axes for each model, `rows_each` below each other and as high as `height` in inches; and how many models are in a row."""
    n_columns = min(n_models, COLUMNS)
    n_rows = math.ceil(n_models / n_columns)
    fig, axes = plt.subplots(n_rows * rows_each, n_columns, figsize=(WIDTH, height * n_rows), squeeze=False)
    places = [divmod(i, n_columns) for i in range(n_rows * n_columns)]
    of_model = [list(axes[row * rows_each : (row + 1) * rows_each, column]) for row, column in places]
    for ax in (ax for spare in of_model[n_models:] for ax in spare):
        ax.remove()
    return fig, of_model[:n_models], n_columns


def _plain_log_scale(ax: Axes) -> None:
    """A logarithmic axis with plain numbers: 0.02 instead of 2 x 10^-2."""
    if not ax.lines:  # of a model of one layer, all but the first are none
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _ends(rows: pd.DataFrame) -> tuple[int, int]:
    """The first and the last position."""
    return rows["position"].min(), rows["position"].max()
