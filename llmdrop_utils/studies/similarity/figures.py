"""Figures of notebook 01: importance of every sub-layer."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import MaxNLocator

from ...report.style import COLORS, KIND_NAMES, LINES, MARKERS, WIDTH, figure
from ...report.tables import Tables

# The paper's colours end at 0.3 as well, but run linearly from 0: there attention and MLP of most layers look the same.
HEATMAP = {"cmap": "cividis_r", "norm": LogNorm(vmin=0.003, vmax=0.3)}

HEATMAP_TICKS = [0.003, 0.01, 0.03, 0.1, 0.3]


# ---- on one pair of axes --------------------------------------------------------------------------------------------


def heatmap(ax: Axes, data: pd.DataFrame, rows: str, title: str):
    """Importance by layer (x) and by the column `rows` (y), in order of appearance; returns the image."""
    labels = list(data[rows].unique())
    grid = data.pivot(index=rows, columns="layer", values="importance").loc[labels]
    image = ax.imshow(grid, aspect="auto", interpolation="nearest", **HEATMAP)
    ax.set_yticks(range(len(labels)), labels)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("Layer")
    ax.set_title(title)
    ax.spines[:].set_visible(False)
    return image


def depth_profile(ax: Axes, data: pd.DataFrame, title: str) -> None:
    """Importance by layer, a line for each kind: mean over corpora, the band from the lowest to the highest corpus."""
    for kind in KIND_NAMES:
        by_layer = data[data["kind"] == kind].groupby("layer")["importance"]
        mean = by_layer.mean()
        ax.fill_between(mean.index, by_layer.min(), by_layer.max(), color=COLORS[kind], alpha=0.2, linewidth=0)
        ax.plot(mean.index, mean, color=COLORS[kind], marker=MARKERS[kind], linestyle=LINES[kind], label=KIND_NAMES[kind])
    ax.set_yscale("log")
    ax.set_xlabel("Layer")
    ax.set_ylabel("Importance, 1 − cosine")
    ax.set_title(title)


def token_quantiles(ax: Axes, data: pd.DataFrame, kind: str, title: str) -> None:
    """Spread of importance over tokens by layer: median, half of the tokens, nine tenths of them."""
    color = COLORS[kind]
    ax.fill_between(data["layer"], data["q05"], data["q95"], color=color, alpha=0.18, linewidth=0, label="90 % of tokens")
    ax.fill_between(data["layer"], data["q25"], data["q75"], color=color, alpha=0.4, linewidth=0, label="50 % of tokens")
    ax.plot(data["layer"], data["q50"], color=color, marker=MARKERS[kind], label="median")
    ax.set_yscale("log")
    ax.set_xlabel("Layer")
    ax.set_title(title)


def dropping_order(ax: Axes, data: pd.DataFrame, title: str, color: str) -> None:
    """Which layers (x) are gone once n are dropped (y)."""
    n_layers = len(data)
    gone = np.zeros((n_layers, n_layers))
    for position, layer in zip(data["position"], data["layer"], strict=True):
        gone[position:, layer] = 1
    colors = ListedColormap(["#f2f2f2", color])
    ax.imshow(gone, aspect="auto", origin="lower", cmap=colors, vmin=0, vmax=1, interpolation="nearest",
              extent=(-0.5, n_layers - 0.5, 0.5, n_layers + 0.5))  # fmt: skip
    ax.set_xlabel("Layer")
    ax.set_title(title)


def corpus_matrix(ax: Axes, data: pd.DataFrame, title: str):
    """Rank correlation of importance between corpora; returns the image."""
    names = list(dict.fromkeys([*data["a"], *data["b"]]))
    grid = pd.DataFrame(1.0, index=names, columns=names)
    for row in data.itertuples():
        grid.loc[row.a, row.b] = grid.loc[row.b, row.a] = row.correlation
    image = ax.imshow(grid, cmap="cividis", vmin=0, vmax=1)
    for (i, j), value in np.ndenumerate(grid.to_numpy()):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.5 else "black")
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.spines[:].set_visible(False)
    ax.set_title(title)
    return image


# ---- the figures ----------------------------------------------------------------------------------------------------


@figure("01_similarity")
def fig02_block_importance(tables: Tables):
    """Paper, Fig. 2: importance of blocks on each corpus."""
    return _heatmaps(tables["importance"], ["block"], "corpus")


@figure("01_similarity")
def fig03_mlp_attention_importance(tables: Tables):
    """Paper, Fig. 3: importance of MLP and of attention on each corpus."""
    return _heatmaps(tables["importance"], ["attention", "mlp"], "corpus")


@figure("01_similarity")
def fig06_dropping_order(tables: Tables):
    """Paper, Figs. 6 and 11: which layers go when, on the first corpus."""
    order = _first_corpus(tables["order"])
    models = list(order["model"].unique())
    fig, axes = plt.subplots(len(models), 3, figsize=(WIDTH, 0.35 + 1.9 * len(models)), squeeze=False)
    for row, model in zip(axes, models, strict=True):
        for ax, kind in zip(row, KIND_NAMES, strict=True):
            data = order[(order["model"] == model) & (order["kind"] == kind)]
            dropping_order(ax, data, f"{KIND_NAMES[kind]}, {model}", COLORS[kind])
        row[0].set_ylabel("Layers dropped")
    return fig, order


@figure("01_similarity")
def fig10_sample_count(tables: Tables):
    """Paper, Fig. 10: importance from more and more samples of the first corpus."""
    return _heatmaps(tables["sample_count"], list(KIND_NAMES), "n_samples", "Samples")


@figure("01_similarity")
def figS1_depth_profile(tables: Tables):
    """Importance by layer, the three kinds together."""
    data = tables["importance"]
    models = list(data["model"].unique())
    fig, axes = plt.subplots(len(models), 1, figsize=(WIDTH, 0.4 + 2.3 * len(models)), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        depth_profile(ax, data[data["model"] == model], model)
    axes.flat[0].legend(ncols=3, loc="upper right")
    return fig, data


@figure("01_similarity")
def figS2_token_distribution(tables: Tables):
    """Spread of importance over tokens, on the first corpus."""
    data = _first_corpus(tables["distribution"])
    models = list(data["model"].unique())
    fig, axes = plt.subplots(
        len(models), 3, figsize=(WIDTH, 0.35 + 2.0 * len(models)), squeeze=False, sharey=True, sharex="row"
    )
    for row, model in zip(axes, models, strict=True):
        for ax, kind in zip(row, KIND_NAMES, strict=True):
            rows = data[(data["model"] == model) & (data["kind"] == kind)]
            token_quantiles(ax, rows, kind, f"{KIND_NAMES[kind]}, {model}")
        row[0].set_ylabel("Importance of a token")
        row[0].legend(loc="upper right", fontsize=7)
    return fig, data


@figure("01_similarity")
def figS3_corpus_agreement(tables: Tables):
    """Rank correlation of importance between corpora, for each kind."""
    data = tables["corpora"]
    models = list(data["model"].unique())
    if not models:
        fig, ax = plt.subplots(figsize=(WIDTH, 0.6))
        ax.text(0.5, 0.5, "One corpus only: nothing to compare", ha="center", va="center")
        ax.axis("off")
        return fig, data
    fig, axes = plt.subplots(len(models), 3, figsize=(WIDTH, 0.3 + 2.3 * len(models)), squeeze=False)
    for row, model in zip(axes, models, strict=True):
        for ax, kind in zip(row, KIND_NAMES, strict=True):
            rows = data[(data["model"] == model) & (data["kind"] == kind)]
            image = corpus_matrix(ax, rows, f"{KIND_NAMES[kind]}, {model}")
            if ax is not row[0]:
                ax.set_yticks([])
    fig.colorbar(image, ax=axes, label="Spearman's correlation", shrink=0.7)
    return fig, data


def _heatmaps(data: pd.DataFrame, kinds: list[str], rows: str, label: str = ""):
    """A row of heat maps for each model, one for each kind, on one colour scale."""
    models = list(data["model"].unique())
    height = 0.55 + 0.2 * data[rows].nunique()
    fig, axes = plt.subplots(
        len(models), len(kinds), figsize=(WIDTH, 0.3 + (0.35 + height) * len(models)), squeeze=False, sharey="row"
    )
    shown = data[data["kind"].isin(kinds)]
    for row, model in zip(axes, models, strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            chosen = shown[(shown["model"] == model) & (shown["kind"] == kind)]
            image = heatmap(ax, chosen, rows, f"{KIND_NAMES[kind]}, {model}")
        row[0].set_ylabel(label)
    bar = fig.colorbar(image, ax=axes, label="Importance\n(bright: redundant)", extend="both", shrink=0.9, pad=0.01)
    bar.set_ticks(HEATMAP_TICKS, labels=map(str, HEATMAP_TICKS))
    return fig, shown


def _first_corpus(data: pd.DataFrame) -> pd.DataFrame:
    """The rows of the corpus that comes first for each model: the one that layers are selected on."""
    first = data.groupby("model")["corpus"].transform("first")
    return data[data["corpus"] == first]
