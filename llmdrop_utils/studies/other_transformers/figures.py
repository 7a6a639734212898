"""Figures of notebook 12: encoders and vision transformers beside a decoder."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ...report.style import COLORS, KIND_NAMES, LINES, MARKERS, WIDTH, Drawing, figure, for_each_model, nothing_to_show
from ...report.tables import Tables
from .rows import FINDING, MEAN
from .work import AGREEMENT, COSINE

ACCURACY = "next-token accuracy"
PANELS = {COSINE: "Cosine with dense", AGREEMENT: "Rank agreement", "found": "Found, of what the dense model finds"}


@figure("12_other_transformers")
def figS34_importance(tables: Tables) -> Drawing:
    """Importance by depth of text encoders, vision transformers and the run's first decoder, each on its first data set."""
    rows = tables["importance"]
    if rows.empty:
        return nothing_to_show("This run has no encoder.", rows)
    first = rows[rows["corpus"] == rows.groupby("model")["corpus"].transform("first")]
    data = pd.concat([part for part in (first[["model", "kind", "layer", "importance", "low", "high"]], tables["decoder"])
                      if len(part)], ignore_index=True)  # fmt: skip
    models = list(data["model"].unique())
    columns = min(2, len(models))
    lines = -(-len(models) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(WIDTH, 0.5 + 1.8 * lines), squeeze=False, sharey=True)
    for ax, model in zip(axes.flat, models, strict=False):
        for kind, name in KIND_NAMES.items():
            of_kind = data[(data["model"] == model) & (data["kind"] == kind)]
            ax.plot(of_kind["layer"], of_kind["importance"], color=COLORS[kind], linestyle=LINES[kind], marker=MARKERS[kind],
                    label=name)  # fmt: skip
            ax.fill_between(of_kind["layer"], of_kind["low"], of_kind["high"], color=COLORS[kind], alpha=0.2, linewidth=0)
        ax.set(title=model, yscale="log", xlabel="Layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes.flat[len(models) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("Importance")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=3)
    told = []
    for model, of_model in data.groupby("model", sort=False):
        mean = of_model.groupby("kind")["importance"].mean()
        told.append(f"{model} {mean['attention']:.3f}, {mean['mlp']:.3f} and {mean['block']:.3f}")
    return Drawing(fig, data, f"Mean importance of attention, MLP and block: {'; '.join(told)}.")


@figure("12_other_transformers")
def figS35_curves(tables: Tables) -> Drawing:
    """What is kept against the share of the layers dropped: cosine with the dense embedding, agreement of the ranks of
    similarities, and what is found (retrieval by reciprocal rank, 1-NN accuracy; of the decoder next-token accuracy), above
    guessing. Means over data sets; bars: 95 % intervals.
    """
    if tables["quality"].empty:
        return nothing_to_show("This run has no encoder.", tables["quality"])
    data = _curves(tables)
    models = list(data["model"].unique())
    shape = {"figsize": (WIDTH, 0.6 + 1.6 * len(models)), "squeeze": False, "sharey": "row"}
    fig, axes = plt.subplots(len(models), len(PANELS), **shape)
    for line, model in zip(axes, models, strict=True):
        of_model = data[data["model"] == model]
        for ax, (panel, title) in zip(line, PANELS.items(), strict=True):
            rows = of_model[of_model["panel"] == panel]
            if rows.empty:
                ax.axis("off")
                continue
            _lines(ax, rows)
            if rows["value"].isna().all():
                ax.text(0.5, 0.5, "nothing above guessing", ha="center", transform=ax.transAxes)
            measure = rows["measure"].iloc[0]
            ax.set_title(title if measure == panel else f"Share kept of {measure}", fontsize=8)
        first = line[-1] if set(of_model["panel"]) == {"found"} else line[0]
        first.set_ylabel(model.replace(" (", "\n("), fontsize=7)
        first.tick_params(labelleft=True)
        first.set_ylim(bottom=-0.1)
    fig.supxlabel("Share of the layers dropped, %", fontsize=8)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=3)

    def sentence(rows: pd.DataFrame) -> str:
        found = rows[rows["panel"] == "found"]
        half = found.loc[(found["share"] - 0.5).abs().groupby(found["kind"]).idxmin().drop("dense", errors="ignore")]
        if half["value"].isna().any():
            return f"the dense model only guesses ({found['measure'].iloc[0]}), so there is nothing to retain."
        n, left = half.set_index("kind")["n"], 100 * half.set_index("kind")["value"]
        return (
            f"without {n['attention']} attention layers {left['attention']:.0f} % of {found['measure'].iloc[0]} is left, "
            f"without {n['mlp']} MLPs {left['mlp']:.0f} %."
        )

    return Drawing(fig, data, for_each_model(data, sentence))


def _curves(tables: Tables) -> pd.DataFrame:
    """Means over data sets: raw cosines and agreements, and what is retained of what is found."""
    reads = tables["models"].set_index("model")["reads"]
    mean = tables["quality"].query(f"data == '{MEAN}'")
    columns = ["model", "panel", "measure", "kind", "n", "share", "value", "low", "high"]
    ends = {"retained": "value", "retained_low": "low", "retained_high": "high"}
    raw = mean[mean["measure"].isin(PANELS)].assign(panel=lambda rows: rows["measure"])
    found = mean[mean["measure"] == mean["model"].map(reads).map(FINDING)]
    found = found.drop(columns=["value", "low", "high"]).rename(columns=ends).assign(panel="found")
    decoder = tables["decoder_quality"].rename(columns=ends).assign(panel="found", measure=ACCURACY)
    return pd.concat([part[columns] for part in (raw, found, decoder) if len(part)], ignore_index=True)


def _lines(ax: Axes, rows: pd.DataFrame) -> None:
    """A line for each kind, from the dense model on."""
    dense = rows[rows["kind"] == "dense"]
    for i, (kind, name) in enumerate(KIND_NAMES.items()):
        line = pd.concat([dense, rows[rows["kind"] == kind]])
        error = np.clip([line["value"] - line["low"], line["high"] - line["value"]], 0, None)
        ax.errorbar(100 * line["share"] + i - 1, line["value"], error, color=COLORS[kind], linestyle=LINES[kind],
                    marker=MARKERS[kind], elinewidth=0.8, capsize=1.5, label=name)  # fmt: skip
    ax.axhline(0, color="0.7", linewidth=0.6)
    ax.set(xlim=(-4, 104))
