"""Figures of notebook 11: models beside each other."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from ...measure.causes import DISTANCE, ENTROPY, OUTPUT, RANK, SINK, SLIDING, STREAM, WEIGHTS
from ...report.panels import legend_above
from ...report.rules import DEVIATES, INCONCLUSIVE, REPRODUCED
from ...report.style import COLORS, KIND_NAMES, LINES, MARKERS, WIDTH, Drawing, figure, nothing_to_show
from ...report.tables import Tables
from ...report.terminal import count
from ...report.verdicts import load_claims
from ...sources.catalogue import exact_name
from .compare import SERIES
from .rows import DAMAGE, IMPORTANCE, TARGETS

CAUSES = {  # name -> in a figure
    IMPORTANCE: "Importance (cosine)",
    OUTPUT: "Output / stream",
    ENTROPY: "Attention entropy, nats",
    SINK: "Weight on first token",
    RANK: "Effective rank of input",
    STREAM: "Stream, log10 mean square",
    SLIDING: "Sliding window",
    WEIGHTS: "Value-output weights",
    DISTANCE: "Distance to last layer",
}
MEASURES = {"text": "Next-token accuracy, 90 % kept", "tasks": "Tasks above guessing, 95 % kept"}
NEEDS_02 = "Notebook 02 has not been run on any of these models: nothing to compare"


@figure("11_sizes_and_causes")
def figS17_sizes(tables: Tables) -> Drawing:
    """Share of the layers of a kind that can be dropped before quality falls, against size (open: all that were tried). Lines
    join models of one series, which were trained alike. Bars: 95 % intervals."""
    data = tables["reach"]
    if data.empty:
        return nothing_to_show(NEEDS_02, data)
    models = tables["models"].sort_values("parameters", kind="stable")
    sizes = models.set_index("model")["parameters"]
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharey=True, sharex=True)
    for ax, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for i, (kind, name) in enumerate(KIND_NAMES.items()):
            rows = data[(data["measure"] == measure) & (data["kind"] == kind)]
            rows = rows.assign(size=rows["model"].map(sizes).astype(float)).sort_values("size")
            errors = np.clip([rows["share"] - rows["share_low"], rows["share_high"] - rows["share"]], 0, None)
            x, cut = rows["size"] * 1.03 ** (i - 1), rows["is_cut"].astype(bool)
            ax.errorbar(x, 100 * rows["share"], 100 * errors, color=COLORS[kind], label=name, marker=MARKERS[kind],
                        markersize=6, linestyle="none", elinewidth=1, capsize=2)  # fmt: skip
            for series in SERIES:
                alike = rows["model"].isin([exact_name(model) for model in series])
                ax.plot(x[alike], 100 * rows["share"][alike], color=COLORS[kind], linestyle=LINES[kind], linewidth=1)
            ax.plot(x[cut], 100 * rows["share"][cut], color=COLORS[kind], marker=MARKERS[kind], markersize=6, linestyle="none",
                    markerfacecolor="white", zorder=3)  # fmt: skip
        ax.set(xscale="log", title=title)
        names = [model.split(" ")[0].removesuffix("-Instruct").removesuffix("-Chat") for model in sizes.index]
        ax.set_xticks(sizes, names, rotation=35, ha="right", minor=False)
        ax.set_xticks([], minor=True)
        ax.margins(x=0.08)
    axes[0].set(ylabel="Layers that can be dropped, %", ylim=(-2, None))
    legend_above(fig, axes[0])

    def sentence(measure: str) -> str:
        of_kind = data[data["measure"] == measure].set_index("kind")
        if not {"attention", "mlp"} <= {*of_kind.index}:
            return ""
        attention, mlp = (of_kind.loc[[kind]].set_index("model") for kind in ("attention", "mlp"))
        of = lambda rows: f"{100 * rows['share'].min():.0f} to {100 * rows['share'].max():.0f} %"  # noqa: E731
        apart = (attention["share_low"] - mlp["share_high"]).dropna() > 0
        title = MEASURES[measure][0].lower() + MEASURES[measure][1:]
        return (
            f"{of(attention)} of the attention layers but {of(mlp)} of the MLPs ({title}; intervals apart in {apart.sum()} of "
            f"{len(apart)})"
        )

    found = [told for measure in MEASURES if (told := sentence(measure))]
    several = (
        f"Over {len(sizes)} models from {count(sizes.min())} to {count(sizes.max())} parameters" if len(sizes) > 1 else "Here"
    )
    return Drawing(fig, data, f"{several}, {'; and '.join(found)} can go." if found else "")


@figure("11_sizes_and_causes")
def figS18_depth(tables: Tables) -> Drawing:
    """Importance by depth, on the first corpus, of every model."""
    data = tables["depth"]
    if data.empty:
        return nothing_to_show("Notebook 01 has not been run on any of these models", data)
    models = list(data["model"].unique())
    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(WIDTH, 0.5 + 1.9 * lines), squeeze=False, sharey=True)
    for ax, model in zip(axes.flat, models, strict=False):
        for kind, name in KIND_NAMES.items():
            rows = data[(data["model"] == model) & (data["kind"] == kind)]
            ax.plot(rows["layer"], rows["importance"], color=COLORS[kind], linestyle=LINES[kind], marker=MARKERS[kind],
                    markersize=2.5, label=name)  # fmt: skip
            ax.fill_between(rows["layer"], rows["low"], rows["high"], color=COLORS[kind], alpha=0.2, linewidth=0)
        ax.set(title=model.replace(" (", "\n("), yscale="log", xlabel="Layer")
    for ax in axes.flat[len(models) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("Importance")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    deep = []
    for model, rows in data[data["kind"] == "attention"].groupby("model", sort=False):
        half = rows["layer"] >= len(rows) / 2
        deep.append(f"{model} {rows[half]['importance'].mean() / rows[~half]['importance'].mean():.2f}")
    text = f"Mean importance of attention in the deeper half, as a share of that in the shallower half: {', '.join(deep)}."
    return Drawing(fig, data, text)


@figure("11_sizes_and_causes")
def figS19_claims(tables: Tables) -> Drawing:
    """The verdict on each claim of notebooks 01 to 04, 08 and 10, for each model (empty: not run)."""
    data = tables["claims"]
    if data.empty:
        return nothing_to_show("None of the notebooks 01 to 04, 08 and 10 has been run on these models", data)
    outcomes = {REPRODUCED: "#009E73", INCONCLUSIVE: "#F0E442", DEVIATES: "#D55E00"}
    words = {claim["id"]: claim["claim"] for claim in load_claims()}
    order = [claim for claim in words if claim in set(data["claim"])]
    grid = data.pivot(index="claim", columns="model", values="verdict").loc[order, list(data["model"].unique())]
    codes = grid.apply(lambda column: column.map({outcome: i for i, outcome in enumerate(outcomes)})).astype(float)
    fig, ax = plt.subplots(figsize=(WIDTH, 1.2 + 0.32 * len(grid)))
    marks = grid.map({REPRODUCED: "yes", INCONCLUSIVE: "?", DEVIATES: "no"}.get).fillna("")
    sns.heatmap(codes, ax=ax, cmap=ListedColormap(list(outcomes.values())), vmin=-0.5, vmax=2.5, cbar=False, linewidths=1.5,
                annot=marks, fmt="")  # fmt: skip
    ax.set_yticks(np.arange(len(order)) + 0.5, [_wrapped(words[claim]) for claim in order], rotation=0)
    ax.set_xticks(
        np.arange(grid.shape[1]) + 0.5, [model.replace(" (", "\n(") for model in grid.columns], rotation=20, ha="right"
    )
    ax.tick_params(axis="both", length=0)
    ax.set(xlabel="", ylabel="")
    handles = [Patch(color=color, label=outcome) for outcome, color in outcomes.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
    counts = data.groupby("model", sort=False)["verdict"].value_counts()
    text = ", ".join(
        f"{model} {counts.get((model, REPRODUCED), 0)} of {int(grid[model].notna().sum())}" for model in grid.columns
    )
    return Drawing(fig, data[["model", "claim", "verdict"]], f"Reproduced: {text}.")


def _wrapped(claim: str) -> str:
    """A claim on two lines."""
    words = claim.rstrip(".").split()
    half, line = sum(map(len, words)) / 2, list[str]()
    while sum(map(len, line)) < half:
        line.append(words[len(line)])
    rest = " ".join(words[len(line) :])
    return " ".join(line) + (f"\n{rest}" if len(claim) > 50 and rest else f" {rest}".rstrip())


@figure("11_sizes_and_causes")
def figS20_predictors(tables: Tables) -> Drawing:
    """Rank correlation over layers of each property with the importance of attention, and with what dropping it alone costs."""
    data, overall = tables["predictors"], tables["overall"]
    models = list(tables["models"]["model"])
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True)
    for ax, target in zip(axes, TARGETS, strict=True):
        rows = data[data["target"] == target]
        grid = rows.pivot(index="cause", columns="model", values="correlation").reindex(list(CAUSES)).reindex(columns=models)
        if len(models) > 1:
            mean = overall[overall["target"] == target].set_index("cause")["correlation"]
            grid["mean"] = mean.reindex(grid.index)
        sns.heatmap(grid, ax=ax, cmap="vlag", vmin=-1, vmax=1, annot=True, fmt="+.1f", cbar=False, annot_kws={"fontsize": 7})
        ax.set_title({IMPORTANCE: "with importance", DAMAGE: "with damage (KL)"}[target])
        ax.set_xticks(np.arange(grid.shape[1]) + 0.5, [name.split(" ")[0] for name in grid.columns], rotation=35, ha="right")
        ax.set_yticks(np.arange(len(CAUSES)) + 0.5, list(CAUSES.values()), rotation=0)
        ax.tick_params(axis="both", length=0)
        ax.set(xlabel="", ylabel="")

    def sentence(target: str) -> str:
        rows = overall[(overall["target"] == target) & (overall["models"] == len(models))].dropna(subset="correlation")
        if rows.empty:  # a single layer
            return f"{target} cannot be ranked"
        best = rows.loc[rows["correlation"].abs().idxmax()]
        ends = f" ({best['low']:+.2f} to {best['high']:+.2f})" if best["low"] == best["low"] else ""
        return f"{target} goes best with {CAUSES[best['cause']].lower()} ({best['correlation']:+.2f}{ends})"

    over = f"Over {len(models)} models" if len(models) > 1 else "In this model"
    return Drawing(fig, data, f"{over}, {' and '.join(map(sentence, TARGETS))}.")


@figure("11_sizes_and_causes")
def figS21_causes_by_depth(tables: Tables) -> Drawing:
    """Importance and damage of each attention layer, and what may cause them, by relative depth."""
    layers, causes = tables["layers"], tables["causes"]
    long = [layers.assign(cause=IMPORTANCE, value=layers["importance"]), layers.assign(cause=DAMAGE, value=layers["kl"])]
    shown = [ENTROPY, SINK, RANK, OUTPUT, STREAM, WEIGHTS]
    data = pd.concat([*long, causes[causes["cause"].isin(shown)]])[["model", "cause", "layer", "value"]].dropna()
    panels = {IMPORTANCE: "Importance (cosine)", DAMAGE: "Damage: KL when dropped alone"} | {
        name: CAUSES[name] for name in shown
    }
    colors = {model: f"C{i}" for i, model in enumerate(tables["models"]["model"])}  # not all models have all causes
    fig, axes = plt.subplots(2, 4, figsize=(WIDTH, 3.6), sharex=True)
    for ax, (cause, title) in zip(axes.flat, panels.items(), strict=True):
        rows = data[data["cause"] == cause]
        for model, of_model in rows.groupby("model", sort=False):
            x = of_model["layer"] / max(1, of_model["layer"].max())
            ax.plot(x, of_model["value"], color=colors[model], linewidth=1, label=model)
        logarithmic = len(rows) and cause in (IMPORTANCE, DAMAGE, OUTPUT, WEIGHTS) and rows["value"].min() > 0
        ax.set_yscale("log" if logarithmic else "linear")
        ax.set_title(title, fontsize=7)
    fig.supxlabel("Depth, from the first layer (0) to the last (1)", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), fontsize=7)
    worst = layers.loc[layers.groupby("model", sort=False)["kl"].idxmax()]
    text = ", ".join(
        f"{row['model']} layer {row['layer']} ({row['kl']:.2f} nats per token)" for row in worst.to_dict("records")
    )
    return Drawing(fig, data, f"The attention layer that costs most when it is dropped alone: {text}.")
