"""Figures of notebook 01: importance of every sub-layer."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from ...report.panels import importance_bar, importance_map, rows_of_panels
from ...report.style import (
    COLORS,
    DASHES,
    KIND_NAMES,
    MARKERS,
    WIDTH,
    Drawing,
    figure,
    for_each_model,
    nothing_to_show,
)
from ...report.tables import Tables

WORDS = {"attention": "attention layer", "mlp": "MLP layer", "block": "block"}

# ---- on one pair of axes --------------------------------------------------------------------------------------------


def depth_profile(ax: Axes, data: pd.DataFrame, title: str) -> None:
    """Importance by layer, a line for each kind: mean over corpora, the band from the lowest to the highest corpus."""
    markers = {kind: MARKERS[kind] for kind in KIND_NAMES}
    sns.lineplot(data, x="layer", y="importance", hue="kind", style="kind", hue_order=KIND_NAMES, style_order=KIND_NAMES,
                 palette=COLORS, markers=markers, dashes=DASHES, errorbar=("pi", 100), markeredgewidth=0, ax=ax)  # fmt: skip
    handles, names = ax.get_legend_handles_labels()
    ax.legend(handles, [KIND_NAMES[name] for name in names], ncols=3, loc="upper right")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(yscale="log", xlabel="Layer", ylabel="Importance, 1 − cosine", title=title)


def token_quantiles(ax: Axes, data: pd.DataFrame, kind: str) -> None:
    """Spread of importance over tokens by layer: median, half of the tokens, nine tenths of them."""
    color = COLORS[kind]
    ax.fill_between(data["layer"], data["q05"], data["q95"], color=color, alpha=0.18, linewidth=0, label="90 % of tokens")
    ax.fill_between(data["layer"], data["q25"], data["q75"], color=color, alpha=0.4, linewidth=0, label="50 % of tokens")
    ax.plot(data["layer"], data["q50"], color=color, marker=MARKERS[kind], label="median")
    ax.set(yscale="log", xlabel="Layer")


def dropping_order(ax: Axes, data: pd.DataFrame, color: str) -> None:
    """Which layers (x) are dropped once n are (y)."""
    n_layers = len(data)
    is_dropped = np.zeros((n_layers, n_layers))
    for position, layer in zip(data["position"], data["layer"], strict=True):
        is_dropped[position:, layer] = 1
    every = max(1, n_layers // 6)
    grid = pd.DataFrame(is_dropped, index=range(1, n_layers + 1))
    sns.heatmap(grid, ax=ax, cmap=ListedColormap(["#f2f2f2", color]), vmin=0, vmax=1, cbar=False, xticklabels=every,
                yticklabels=every)  # fmt: skip
    ax.invert_yaxis()
    ax.tick_params(axis="both", labelrotation=0)
    ax.set(xlabel="Layer")


def corpus_matrix(ax: Axes, data: pd.DataFrame) -> None:
    """Rank correlation of importance between corpora."""
    names = list(dict.fromkeys([*data["a"], *data["b"]]))
    grid = pd.DataFrame(1.0, index=names, columns=names)
    for row in data.itertuples():
        grid.loc[row.a, row.b] = grid.loc[row.b, row.a] = row.correlation
    sns.heatmap(grid, ax=ax, cmap="cividis", vmin=0, vmax=1, annot=True, fmt=".2f", annot_kws={"size": 7}, cbar=False,
                square=True)  # fmt: skip
    ax.tick_params(axis="both", length=0, labelrotation=0)
    ax.set_xticklabels(names, rotation=30, ha="right")


# ---- the figures ----------------------------------------------------------------------------------------------------


@figure("01_similarity")
def fig02_block_importance(tables: Tables) -> Drawing:
    """Importance of blocks on each corpus (paper, Fig. 2)."""
    return _heatmaps(tables["importance"], ["block"], "corpus")


@figure("01_similarity")
def fig03_mlp_attention_importance(tables: Tables) -> Drawing:
    """Importance of attention and of MLP on each corpus (paper, Fig. 3)."""
    return _heatmaps(tables["importance"], ["attention", "mlp"], "corpus")


@figure("01_similarity")
def fig06_dropping_order(tables: Tables) -> Drawing:
    """Which layers are dropped when, on the first corpus (paper, Figs. 6 and 11)."""
    order = _first_corpus(tables["order"])
    models = list(order["model"].unique())
    fig, axes = rows_of_panels(models, KIND_NAMES.values(), 1.9)
    for row, model in zip(axes, models, strict=True):
        for ax, kind in zip(row, KIND_NAMES, strict=True):
            data = order[(order["model"] == model) & (order["kind"] == kind)]
            dropping_order(ax, data, COLORS[kind])
        row[0].set_ylabel("Layers dropped")
    depth = tables["depth"].groupby(["model", "kind"], sort=False)["correlation"].mean()

    def sentence(rows: pd.DataFrame) -> str:
        model, n = rows["model"].iloc[0], min(8, rows["position"].nunique())
        first = rows[(rows["kind"] == "attention") & (rows["position"] < n)].sort_values("position")["layer"]
        deep = ", ".join(f"{depth[model, kind]:+.2f} ({name})" for kind, name in KIND_NAMES.items())
        return (
            f"The first {n} attention layers to be dropped are {', '.join(map(str, first))}. The rank correlation of depth and "
            f"importance is {deep}; near -1, deeper layers would be the more redundant ones."
        )

    return Drawing(fig, order, for_each_model(order, sentence))


@figure("01_similarity")
def fig10_sample_count(tables: Tables) -> Drawing:
    """Importance from more and more samples of the first corpus (paper, Fig. 10)."""
    drawing = _heatmaps(tables["sample_count"], list(KIND_NAMES), "n_samples", "Samples")
    agreement = tables["sample_agreement"]
    if agreement.empty:
        return drawing

    def sentence(rows: pd.DataFrame) -> str:
        few = rows[rows["n_samples"] == rows["n_samples"].min()]
        worst = few.loc[few["correlation"].idxmin()]
        return (
            f"Groups of only {worst['n_samples']} samples already rank the layers as all the others do, with a mean "
            f"correlation of {worst['correlation']:.2f} or more (the least is that of {KIND_NAMES[worst['kind']]})."
        )

    return drawing._replace(takeaway=for_each_model(agreement, sentence))


@figure("01_similarity")
def figS1_depth_profile(tables: Tables) -> Drawing:
    """Importance by layer for the three kinds: mean over corpora; bands reach from the lowest to the highest corpus."""
    data = tables["importance"]
    models = list(data["model"].unique())
    fig, axes = plt.subplots(len(models), 1, figsize=(WIDTH, 0.4 + 2.3 * len(models)), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        depth_profile(ax, data[data["model"] == model], model)
    for ax in axes.flat[1:]:
        ax.get_legend().remove()

    def sentence(rows: pd.DataFrame) -> str:
        mean = rows.groupby(["kind", "layer"])["importance"].mean().unstack("kind")
        lower = (mean["attention"] < mean["mlp"]).sum()
        return (
            f"Attention changes the stream less than MLP does in {lower} of {len(mean)} layers. Averaged over layers, "
            f"importance is {mean['attention'].mean():.3f} for attention, {mean['mlp'].mean():.3f} for MLP and "
            f"{mean['block'].mean():.3f} for blocks."
        )

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("01_similarity")
def figS2_token_distribution(tables: Tables) -> Drawing:
    """Spread of importance over tokens, on the first corpus: where the median, 50 % and 90 % of the tokens are."""
    data = _first_corpus(tables["distribution"])
    models = list(data["model"].unique())
    fig, axes = rows_of_panels(models, KIND_NAMES.values(), 2.0, sharex=True, sharey=True)
    for row, model in zip(axes, models, strict=True):
        for ax, kind in zip(row, KIND_NAMES, strict=True):
            rows = data[(data["model"] == model) & (data["kind"] == kind)]
            token_quantiles(ax, rows, kind)
        row[0].set_ylabel("Importance per token")
        row[0].legend(loc="upper right", fontsize=7)

    def sentence(rows: pd.DataFrame) -> str:
        attention = rows[rows["kind"] == "attention"]
        least = attention.loc[attention["q95"].idxmin()]
        return (
            f"In attention layer {least['layer']}, 95 % of the tokens keep a cosine above {1 - least['q95']:.3f}: its "
            "small mean hides no tokens that it changes a lot."
        )

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("01_similarity")
def figS3_corpus_agreement(tables: Tables) -> Drawing:
    """Rank correlation of importance between corpora, for each kind."""
    data = tables["corpora"]
    models = list(data["model"].unique())
    if not models:
        return nothing_to_show("One corpus only: nothing to compare", data)
    fig, axes = rows_of_panels(models, KIND_NAMES.values(), 2.2)
    for row, model in zip(axes, models, strict=True):
        for ax, kind in zip(row, KIND_NAMES, strict=True):
            rows = data[(data["model"] == model) & (data["kind"] == kind)]
            corpus_matrix(ax, rows)
            if ax is not row[0]:
                ax.set_yticks([])
        scale = ScalarMappable(plt.Normalize(0, 1), "cividis")
        row[0].figure.colorbar(scale, ax=row, label="Spearman's correlation", shrink=0.7)

    def sentence(rows: pd.DataFrame) -> str:
        lowest = rows.loc[rows.groupby("kind", sort=False)["correlation"].idxmin()]
        pairs = ", ".join(f"{KIND_NAMES[r.kind]} {r.correlation:.2f} ({r.a} and {r.b})" for r in lowest.itertuples())
        return f"The two corpora that agree least, for each kind: {pairs}."

    return Drawing(fig, data, for_each_model(data, sentence))


def _heatmaps(data: pd.DataFrame, kinds: list[str], rows: str, label: str = "") -> Drawing:
    """A row of heat maps for each model, one for each kind, on one colour scale."""
    models = list(data["model"].unique())
    height = 0.9 + 0.2 * data[rows].nunique()
    fig, axes = rows_of_panels(models, [KIND_NAMES[kind] for kind in kinds], height, sharey=True)
    shown = data[data["kind"].isin(kinds)]
    for row, model in zip(axes, models, strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            chosen = shown[(shown["model"] == model) & (shown["kind"] == kind)]
            importance_map(ax, chosen, rows)
        row[0].set_ylabel(label)
        importance_bar(row)

    def sentence(of_model: pd.DataFrame) -> str:
        mean = of_model.groupby(["kind", "layer"])["importance"].mean()
        return " ".join(
            f"The {WORDS[kind]} that changes its input least is {mean[kind].idxmin()} (importance {mean[kind].min():.3f}); "
            f"the one that changes it most is {mean[kind].idxmax()} ({mean[kind].max():.2f})."
            for kind in kinds
        )

    return Drawing(fig, shown, for_each_model(shown, sentence))


def _first_corpus(data: pd.DataFrame) -> pd.DataFrame:
    """The rows of the corpus that comes first for each model: the one that layers are selected on."""
    first = data.groupby("model")["corpus"].transform("first")
    return data[data["corpus"] == first]
