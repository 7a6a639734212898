"""Figures of notebook 08: abilities against layers dropped."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import PercentFormatter

from ...report.panels import curves, rows_of_panels
from ...report.style import COLORS, KIND_NAMES, LINES, MARKERS, WIDTH, Drawing, figure, for_each_model, nothing_to_show
from ...report.tables import Tables
from ..ablations.rows import TEXT
from .abilities import ANSWERS
from .changes import LORA, NONE, WANDA

LABELS = {NONE: "weights as they are", WANDA: f"{WANDA}, as many weights"}


@figure("08_what_breaks")
def figS27_what_breaks(tables: Tables) -> Drawing:
    """What is left of each ability without n attention layers (left) and without n MLPs (right), as a share of the dense model.

    Abilities at which the dense model is no better than guessing are left out.
    """
    data = tables["abilities"].query("kind != 'dense'").dropna(subset=["retained"])
    models = list(data["model"].unique())
    if not models:
        return nothing_to_show("The dense model is at chance in all abilities", data)
    n_rows = data.groupby("model")["ability"].nunique()
    shape = {"figsize": (WIDTH, 0.9 + 0.26 * n_rows.sum()), "squeeze": False, "height_ratios": list(n_rows[models])}
    fig, axes = plt.subplots(len(models), 2, **shape)
    for row, model in zip(axes, models, strict=True):
        of_model = data[data["model"] == model]
        order = list(of_model.groupby("ability")["retained"].mean().sort_values().index)  # what breaks first on top
        for ax, kind in zip(row, ("attention", "mlp"), strict=True):
            shares = of_model[of_model["kind"] == kind].pivot(index="ability", columns="n", values="retained")
            shares = shares.reindex(order)
            sns.heatmap(shares, ax=ax, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".0%", cbar=False, linewidths=0.5,
                        yticklabels=ax is row[0], annot_kws={"size": 7})  # fmt: skip
            ax.set(xlabel=f"{KIND_NAMES[kind]} dropped", ylabel="", title=model if len(models) > 1 and ax is row[0] else "")
            ax.tick_params(left=False, bottom=False)

    def sentence(rows: pd.DataFrame) -> str:
        told = []
        for kind, name in (("attention", "attention layers"), ("mlp", "MLPs")):
            of_kind = rows[rows["kind"] == kind]
            if of_kind.empty:
                continue
            last = of_kind[of_kind["n"] == of_kind.groupby("ability")["n"].max().min()]  # asked of all abilities
            low, high = (last.loc[last["retained"].agg(pick)] for pick in ("idxmin", "idxmax"))
            told.append(f"without {low['n']} {name} {low['ability']} keeps {low['retained']:.0%} and {high['ability']} "
                        f"{high['retained']:.0%}")  # fmt: skip
        return f"The least and the most that is left: {'; '.join(told)}.".replace("%", " %")

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("08_what_breaks")
def fig12_mathematics(tables: Tables) -> Drawing:
    """Exact answers to mathematical word problems (GSM8K) against the number of attention layers dropped."""
    data = tables["abilities"][tables["abilities"]["ability"] == ANSWERS]
    models = list(data["model"].unique())
    if not models:
        return nothing_to_show("GSM8K was not asked", data)
    fig, axes = plt.subplots(1, len(models), figsize=(min(WIDTH, 3.6 * len(models)), 2.4), squeeze=False, sharey=True)
    for ax, model in zip(axes[0], models, strict=True):
        curves(ax, data[data["model"] == model], "value", "low", "high", model if len(models) > 1 else "")
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        ax.set(xlabel="Attention layers dropped")
    axes[0][0].set(ylabel="Exact answers", ylim=(-0.01, max(0.1, 1.05 * data["high"].max())))  # a model may have none right

    def sentence(rows: pd.DataFrame) -> str:
        ends = rows.sort_values("n").iloc[[0, -1]]
        spans = [f" ({r.low:.1%} to {r.high:.1%})" if r.low < r.high else "" for r in ends.itertuples()]
        first, last = (f"{score:.1%}{span}".replace("%", " %") for score, span in zip(ends["value"], spans, strict=True))
        n_problems, n = ends["samples"].iloc[0], ends["n"].iloc[1]
        return f"The dense model answers {first} of {n_problems} problems exactly, and without {n} layers {last}."

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("08_what_breaks")
def figS28_long_context(tables: Tables) -> Drawing:
    """What is found in the context, by its length: attention dropped, MLPs dropped, and nothing (paper, Table 12)."""
    data = tables["long_context"].query("context != 'mean'")
    panels = list(data[["model", "probe"]].drop_duplicates().itertuples(index=False))
    if not panels:
        return nothing_to_show("Nothing was asked about the context", data)
    n_columns = min(2, len(panels))
    n_lines = -(-len(panels) // n_columns)
    fig, axes = plt.subplots(n_lines, n_columns, figsize=(WIDTH, 0.5 + 2.0 * n_lines), squeeze=False, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (model, probe) in zip(axes.flat, panels, strict=False):
        rows = data[(data["model"] == model) & (data["probe"] == probe)]
        counts = sorted(rows["n"].unique())
        for (kind, n), curve in rows.groupby(["kind", "n"], sort=False):
            shade = 1 - 0.55 * counts.index(n) / max(1, len(counts) - 1) if kind != "dense" else 1
            label = "Dense" if kind == "dense" else f"{n} of {KIND_NAMES[kind]}"
            error = np.clip([curve["accuracy"] - curve["low"], curve["high"] - curve["accuracy"]], 0, None)
            ax.errorbar(curve["context"], curve["accuracy"], error, color=COLORS[kind], marker=MARKERS[kind], alpha=shade,
                        linestyle=LINES[kind], label=label, elinewidth=0.8, capsize=1.5)  # fmt: skip
        title = f"{probe} ({model})" if data["model"].nunique() > 1 else probe
        ax.set(xlabel="Tokens read", title=title.capitalize(), ylim=(-0.03, 1.03))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    for ax in axes[:, 0]:
        ax.set_ylabel("Found")
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5)

    def sentence(rows: pd.DataFrame) -> str:
        told = []
        for probe, of_probe in rows.groupby("probe", sort=False):
            mean = of_probe.groupby(["kind", "n"])["accuracy"].mean()
            n = mean["attention"].index.max() if "attention" in mean.index.get_level_values("kind") else None
            parts = [f"{kind if kind != 'mlp' else 'MLP'} dropped {mean[kind, n]:.0%}" for kind in ("attention", "mlp")
                     if n is not None and (kind, n) in mean.index]  # fmt: skip
            told.append(f"{probe}: dense {mean['dense', 0]:.0%}, " + ", ".join(parts) + f" (n = {n})")
        return f"Found, as a mean over contexts. {'; '.join(told)}.".replace("%", " %")

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("08_what_breaks")
def figS29_confidence(tables: Tables) -> Drawing:
    """How often choices are right, how sure the model is of them, and how far apart these are, against layers dropped."""
    data = tables["confidence"]
    models = list(data["model"].unique())
    if not models:
        return nothing_to_show("No task with choices was asked", data)
    titles = {"accuracy": "Accuracy", "confidence": "Confidence", "error": "Calibration error"}
    fig, rows_of_axes = rows_of_panels(models, titles.values(), 2.0, sharey=True)
    for row, model in zip(rows_of_axes, models, strict=True):
        for ax, (name, title) in zip(row, titles.items(), strict=True):
            curves(ax, data[data["model"] == model], name, f"{name}_low", f"{name}_high", title)
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        row[0].legend()

    def sentence(rows: pd.DataFrame) -> str:
        dense = rows[rows["n"] == 0].iloc[0]
        told = [f"dense {dense['error']:.1%}"]
        for kind, name in (("attention", "attention layers"), ("mlp", "MLPs")):
            of_kind = rows[rows["kind"] == kind]
            if len(of_kind):
                last = of_kind.loc[of_kind["n"].idxmax()]
                told.append(f"{last['error']:.1%} without {last['n']} {name}")
        return f"Expected calibration error: {', '.join(told)}.".replace("%", " %")

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("08_what_breaks")
def figS31_shrinking(tables: Tables) -> Drawing:
    """Bytes of weights against what is lost on held-out text, for dropping, rounding, pruning and tuning; lower left is better.

    Numbers say how many attention layers are dropped. Pruned weights are stored as zeros.
    """
    data = tables["changes"].query(f"measure == '{TEXT}' and kind != 'mlp'")
    models = list(data["model"].unique())
    if not models:
        return nothing_to_show("No weights were changed", data)
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.65 * len(models)), 2.8), squeeze=False)
    for ax, model in zip(axes[0], models, strict=True):
        of_model = data[data["model"] == model]
        changes = list(of_model["change"].unique())
        for i, (change, rows) in enumerate(of_model.groupby("change", sort=False)):
            x, y = rows["bytes"] / 1e6, -rows["from_dense"]
            error = np.clip(
                [rows["from_dense_high"] - rows["from_dense"], rows["from_dense"] - rows["from_dense_low"]], 0, None
            )
            ax.errorbar(x, y, error, marker="osD^v"[i % 5], linestyle=":", color=sns.color_palette("colorblind")[i],
                        label=LABELS.get(change, change), elinewidth=0.8, capsize=1.5)  # fmt: skip
            for size, lost, n in zip(x, y, rows["n"], strict=True) if change != WANDA else ():  # all in one place
                ax.annotate(f"{n}", (size, lost), xytext=(4, 3), textcoords="offset points", fontsize=7)
        ax.axhline(0, color="0.7", linewidth=0.8)
        ax.set(xlabel="Megabytes of weights", ylabel="Nats per token lost", title=model if len(models) > 1 else "")
        ax.legend(ncols=2 if len(changes) > 3 else 1)

    def sentence(rows: pd.DataFrame) -> str:
        of = rows.set_index(["change", "n"])
        told = [
            f"{'no' if n == 0 else n} layers dropped{'' if change == NONE else ', ' + change} {r['bytes'] / 1e6:.0f} MB and "
            f"{-r['from_dense']:+.3f} nats"
            for (change, n), r in of.iterrows() if change != LORA and n in (0, rows["n"].max()) and (change, n) != (NONE, 0)
        ]  # fmt: skip
        return f"Beside {of.loc[(NONE, 0), 'bytes'] / 1e6:.0f} MB of the dense model: {'; '.join(told)}."

    return Drawing(fig, data, for_each_model(data, sentence))
