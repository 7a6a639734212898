"""Figures of notebook 02: quality against the number of dropped sub-layers."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from ...report.panels import curves, task_grid, text_curves
from ...report.style import KIND_NAMES, WIDTH, Drawing, figure, for_each_model, nothing_to_show
from ...report.tables import Tables

NONE_DROPPED = "The model has too few layers for the numbers that the profile drops for tasks."


@figure("02_drop_curves")
def fig05_drop_curves(tables: Tables) -> Drawing:
    """Score of each task against the number of layers dropped (paper, Fig. 5)."""
    data = tables["tasks"]

    def sentence(rows: pd.DataFrame) -> str:
        n = shared_count(rows)
        scores = rows.pivot(index="task", columns=["kind", "n"], values="value")
        lost = {kind: scores["dense", 0] - scores[kind, n] for kind in KIND_NAMES if (kind, n) in scores}
        worst = [f"{KIND_NAMES[kind]} on {loss.idxmax()} ({100 * loss.max():.1f} points)" for kind, loss in lost.items()]
        dense = rows[rows["kind"] == "dense"]
        guessing = dense[dense["low"] <= dense["chance"]]["task"]
        text = f"The largest losses at n = {n}: {', '.join(worst)}." if lost else NONE_DROPPED
        if len(guessing):
            text += f" Nothing follows from {', '.join(guessing)}: there even the dense model is not above guessing."
        return text

    return Drawing(task_grid(data), data, for_each_model(data, sentence))


@figure("02_drop_curves")
def figS4_text_curves(tables: Tables) -> Drawing:
    """Perplexity, next-token accuracy and divergence from the dense model on held-out text."""
    data, reach = tables["text"], tables["reach"]

    def sentence(rows: pd.DataFrame) -> str:
        model = rows["model"].iloc[0]
        of_model = reach[reach["model"] == model].set_index("kind")["n"]
        upto = ", ".join(f"{n} for {KIND_NAMES[kind]}" for kind, n in of_model.items())
        perplexity = rows.set_index(["kind", "n"])["perplexity"]
        n = max(of_model.get("attention", 0), rows[rows["n"] > 0]["n"].min())
        there = ", ".join(f"{_about(perplexity[k, n])} ({name})" for k, name in KIND_NAMES.items() if (k, n) in perplexity)
        return (
            f"At least 90 % of the dense model's next-token accuracy is retained up to this many dropped layers: {upto}. "
            f"With {n} dropped, perplexity is {there}; the dense model's is {_about(perplexity['dense', 0])}."
        )

    return Drawing(text_curves(data, "a block counts as one layer"), data, for_each_model(data, sentence))


@figure("02_drop_curves")
def figS5_average(tables: Tables) -> Drawing:
    """Mean score of all tasks against the number of layers dropped."""
    data = tables["average"]
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.55 * len(models)), 2.6), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        rows = data[data["model"] == model]
        title = f"Mean of {rows['tasks'].iloc[0]} tasks, {model}"
        curves(ax, rows, "value", "low", "high", title, dodge=0.02 * rows["n"].max())
        ax.axhline(rows["chance"].iloc[0], color="0.5", linewidth=0.8, linestyle=":")
        ax.text(0, rows["chance"].iloc[0], "random guess", fontsize=6.5, color="0.35", va="bottom")
        ax.text(1, rows["value"].iloc[0], "dense", fontsize=6.5, ha="right", va="bottom", transform=ax.get_yaxis_transform())
        ax.set_ylabel("Score")
    axes.flat[0].legend(loc="lower left", bbox_to_anchor=(0, 0.12))

    def sentence(rows: pd.DataFrame) -> str:
        n = shared_count(rows)
        dropped = rows[(rows["n"] == n) & rows["kind"].isin(KIND_NAMES)].set_index("kind")
        lost = [
            f"{KIND_NAMES[kind]} {row['points_lost']:.1f} ({row['points_lost_low']:.1f} to {row['points_lost_high']:.1f})"
            for kind, row in dropped.iterrows()
        ]
        dense = rows[rows["kind"] == "dense"].iloc[0]
        above = 100 * (dense["value"] - dense["chance"])
        side = "above" if above > 0 else "below"
        of_n = f"Points lost at n = {n}: {', '.join(lost)}." if n else NONE_DROPPED
        return f"{of_n} The dense model is {abs(above):.1f} points {side} guessing."

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("02_drop_curves")
def figS16_across_corpora(tables: Tables) -> Drawing:
    """Loss added on each corpus by dropping the attention layers that another corpus chooses (rows: chosen on it)."""
    data = tables["across"]
    if data.empty:
        return nothing_to_show("The profile has one corpus: nothing to compare", data)
    panels = list(data.groupby(["model", "n"], sort=False))
    fig, axes = plt.subplots(1, len(panels), figsize=(min(WIDTH, 3.4 * len(panels)), 2.6), squeeze=False)
    for ax, ((model, n), rows) in zip(axes.flat, panels, strict=True):
        grid = rows.pivot(index="chosen_on", columns="tested_on", values="cost")
        lowest = min(0, grid.to_numpy().min())  # dropping may help
        order = list(rows["chosen_on"].unique())
        sns.heatmap(grid.loc[order, order], ax=ax, annot=True, fmt=".2f", cmap="cividis_r", cbar=False, vmin=lowest)
        ax.set(xlabel="Tested on", ylabel="Chosen on", title=f"{model}\nAttn-{n}: added loss, nats per token")
        ax.tick_params(axis="both", length=0, labelrotation=0)

    def sentence(rows: pd.DataFrame) -> str:
        n = rows["n"].max()
        others = rows[(rows["n"] == n) & (rows["chosen_on"] != rows["tested_on"])]
        worst = others.loc[others["excess"].idxmax()]
        beaten = others[others["excess_high"] < 0].groupby("tested_on", sort=False)["cost"].idxmin()
        better = [
            f"{others.loc[i, 'chosen_on']} for {tested_on} ({others.loc[i, 'excess']:+.3f})" for tested_on, i in beaten.items()
        ]
        found = f" Another corpus chooses better for some than they choose themselves: {', '.join(better)}." if better else ""
        return (
            f"The {n} attention layers that one corpus chooses cost at most {worst['excess']:+.3f} nats per token "
            f"({worst['excess_low']:+.3f} to {worst['excess_high']:+.3f}) more on another than the layers that this one "
            f"chooses: chosen on {worst['chosen_on']}, tested on {worst['tested_on']}, where they cost {worst['cost']:.3f}."
            f"{found}"
        )

    return Drawing(fig, data, for_each_model(data, sentence))


def shared_count(rows: pd.DataFrame) -> int:
    """The largest number dropped at which most kinds were measured; 0 if the model is too shallow for all of the profile's."""
    kinds = rows[rows["kind"].isin(KIND_NAMES)].groupby("n")["kind"].nunique()
    return int(kinds[kinds == kinds.max()].index.max()) if len(kinds) else 0


def _about(perplexity: float) -> str:
    return "over a million" if perplexity > 1e6 else f"{perplexity:,.0f}"
