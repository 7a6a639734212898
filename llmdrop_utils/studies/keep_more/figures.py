"""Figures of notebook 10: what each way keeps."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from ...report.panels import rows_of_panels
from ...report.style import COLORS, LINES, MARKERS, WIDTH, Drawing, figure, for_each_model, nothing_to_show
from ...report.tables import Tables
from .rows import CHOICES, ERROR, MEAN
from .study import COSINE
from .work import HEALING, PLAIN, REPAIR, REPAIR_HEALING, SEARCH

MARKS = "osD^v"  # of orders of layers, cosine first
SHOWN = [PLAIN, REPAIR, HEALING, REPAIR_HEALING]
OTHERS = [CHOICES, ERROR, "copy", "continuation"]


@figure("10_keep_more")
def figS32_keep_more(tables: Tables) -> Drawing:
    """Perplexity over the dense model's with n attention layers dropped, as a mean over corpora, by what makes up for them.

    Circles: layers as cosine ranks them. Other marks: layers that were chosen otherwise. Bars: 95 % intervals.
    """
    data = tables["quality"].query("n > 0").loc[lambda rows: rows["measure"] == MEAN]
    panels = list(data[["model", "n"]].drop_duplicates().itertuples(index=False))
    if not panels:
        return nothing_to_show("Nothing was dropped", data)
    ways = sorted(data["way"].unique(), key=lambda way: data.loc[data["way"] == way, "value"].mean(), reverse=True)
    n_orders = data["layers"].nunique()
    step = min(0.3, 0.8 / n_orders)
    n_columns = min(2, len(panels))
    n_lines = -(-len(panels) // n_columns)
    shape = {"figsize": (WIDTH, n_lines * (0.7 + 0.24 * len(ways))), "squeeze": False, "sharey": True}
    fig, axes = plt.subplots(n_lines, n_columns, **shape)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (model, n) in zip(axes.flat, panels, strict=False):
        of_panel = data[(data["model"] == model) & (data["n"] == n)]
        for i, (layers, rows) in enumerate(of_panel.groupby("layers", sort=False)):
            places = [ways.index(way) + step * (i - (n_orders - 1) / 2) for way in rows["way"]]
            error = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
            ax.errorbar(rows["value"], places, xerr=error, linestyle="", marker=MARKS[i % len(MARKS)], capsize=2,
                        color=sns.color_palette("colorblind")[i], label=f"layers by {layers}")  # fmt: skip
        ax.axvline(1, color="0.7", linewidth=0.8)
        ax.set(
            xscale="log",
            xlabel="Perplexity over dense",
            title=f"{n} dropped" + (f" ({model})" if data["model"].nunique() > 1 else ""),
        )
        ax.set_yticks(range(len(ways)), ways)
        ax.set_ylim(-0.6, len(ways) - 0.4)
        ticks = [t for t in (1, 1.25, 1.5, 2, 3, 4, 6, 10, 20, 50) if t <= 1.1 * of_panel["high"].max()]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2)

    def sentence(rows: pd.DataFrame) -> str:
        most = rows[rows["n"] == rows["n"].max()].set_index(["layers", "way"])["value"]
        told = [
            f"{way} {most[COSINE, way]:.2f}" for way in (PLAIN, REPAIR, HEALING, REPAIR_HEALING) if (COSINE, way) in most.index
        ]
        return f"Without {rows['n'].max()} attention layers, times the dense model's perplexity: {', '.join(told)}."

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("10_keep_more")
def figS33_other_measures(tables: Tables) -> Drawing:
    """Right choices, calibration error, what is copied from the context, and tokens of the dense model's own continuations that
    stay the most probable. Bars: 95 % intervals; line: dense model."""
    data = tables["quality"].loc[lambda rows: rows["measure"].isin(OTHERS)]
    models, measures = list(data["model"].unique()), [each for each in OTHERS if each in set(data["measure"])]
    if not measures:
        return nothing_to_show("Nothing else was measured", data)
    ways = list(data[data["n"] > 0]["way"].unique())
    shape = {"figsize": (WIDTH, len(models) * (0.8 + 0.2 * len(ways))), "squeeze": False, "sharey": True}
    fig, axes = plt.subplots(len(models), len(measures), **shape)
    for line, model in zip(axes, models, strict=True):
        for ax, measure in zip(line, measures, strict=True):
            of_panel = data[(data["model"] == model) & (data["measure"] == measure)]
            for i, ((layers, n), rows) in enumerate(of_panel[of_panel["n"] > 0].groupby(["layers", "n"])):
                places = [ways.index(way) + 0.3 * i - 0.15 for way in rows["way"]]
                error = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
                ax.errorbar(rows["value"], places, xerr=error, linestyle="", marker="osD^"[i % 4], capsize=1.5, markersize=4,
                            color=sns.color_palette("colorblind")[i], label=f"{n} dropped, layers by {layers}")  # fmt: skip
            ax.axvline(of_panel[of_panel["n"] == 0]["value"].iloc[0], color="0.6", linewidth=0.8)
            ax.set(title=measure.capitalize())
            ax.set_yticks(range(len(ways)), ways)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)

    def sentence(rows: pd.DataFrame) -> str:
        n = rows["n"].max()
        told = []
        for measure in measures:
            of = rows[rows["measure"] == measure].set_index(["layers", "way", "n"])["value"]
            shown = {way: (COSINE, way, n) for way in (PLAIN, REPAIR, REPAIR_HEALING)} | {
                f"{REPAIR} of searched layers": (SEARCH, REPAIR, n)
            }
            parts = [f"{name} {of[key]:.0%}" for name, key in shown.items() if key in of.index]
            told.append(f"{measure}: dense {of['dense', PLAIN, 0]:.0%}, {', '.join(parts)}")
        return f"Without {n} attention layers, chosen by cosine. {'; '.join(told)}.".replace("%", " %")

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("10_keep_more")
def figS36_rankings(tables: Tables) -> Drawing:
    """Importance of attention (1 − cosine) by layer: in the dense model (black), and of what is left where some was dropped
    (blue; grey bands: what was dropped). Corner: rank correlation of the two over the layers that are left. Bars and brackets:
    95 % intervals."""
    if "importance" not in tables:
        return nothing_to_show("Not run: the tables of this run are of an older version, without importance", pd.DataFrame())
    data = tables["importance"].query("kind == 'attention'")
    data = data[data["way"].isin(SHOWN) & data["layers"].isin(["dense", COSINE])]
    rankings = tables["rankings"].query("kind == 'attention'").set_index(["model", "layers", "way", "n"])
    panels = list(data[data["n"] > 0][["model", "n"]].drop_duplicates().itertuples(index=False))
    if not panels:
        return nothing_to_show("Too few layers are left to be ranked", data)
    ways = [way for way in SHOWN if way in set(data["way"])]
    titles = [f"{model}, {n} attention layers dropped" for model, n in panels]
    fig, lines = rows_of_panels(titles, [way.capitalize() for way in ways], 1.7, sharey=True)
    for line, (model, n) in zip(lines, panels, strict=True):
        of_model = data[data["model"] == model]
        dense = of_model[of_model["n"] == 0].set_index("layer")
        for ax, way in zip(line, ways, strict=True):
            rows = of_model[(of_model["way"] == way) & (of_model["n"] == n)].set_index("layer")
            ax.plot(
                dense.index, dense["importance"], color=COLORS["dense"], linestyle=LINES["dense"], linewidth=0.9, label="dense"
            )
            for layer in dense.index.difference(rows.index) if len(rows) else []:
                ax.axvspan(layer - 0.5, layer + 0.5, color="0.9", linewidth=0)
            ax.set(yscale="log", xlabel="Layer")
            if rows.empty:  # a way that this model's structure does not allow
                continue
            now = rows.reindex(dense.index)
            error = np.clip([now["importance"] - now["low"], now["high"] - now["importance"]], 0, None)
            ax.errorbar(now.index, now["importance"], error, color=COLORS["attention"], marker=MARKERS["attention"],
                        linestyle=LINES["attention"], elinewidth=0.8)  # fmt: skip
            found = rankings.loc[(model, COSINE, way, n)]
            note = f"{found['correlation']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
            ax.text(0.97, 0.97, note, transform=ax.transAxes, ha="right", va="top", fontsize=7)
        line[0].set_ylabel("Importance")

    def sentence(rows: pd.DataFrame) -> str:
        model, n = rows["model"].iloc[0], rows["n"].max()
        of = {way: rankings.loc[(model, COSINE, way, n)] for way in ways if (model, COSINE, way, n) in rankings.index}
        told = "; ".join(f"{way} {one['correlation']:.2f}" for way, one in of.items())
        means = "; ".join(f"{way} {one['relative']:.2f}" for way, one in of.items())
        left = next(iter(of.values()))["n_left"]
        return (
            f"Rank correlation of the {left} attention layers that are left without {n} with the same in the dense model: "
            f"{told}. Their mean importance, times the dense model's: {means}."
        )

    return Drawing(fig, data, for_each_model(data, sentence))
