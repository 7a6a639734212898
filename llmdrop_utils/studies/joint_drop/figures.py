"""Figures of notebook 03: joint and iterative dropping."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ...report.panels import task_grid, text_curves
from ...report.style import COLORS, LINES, MARKERS, NAMES, WIDTH, Drawing, figure, for_each_model, nothing_to_show
from ...report.tables import Tables
from ...report.verdicts import threshold


def staircase(ax: Axes, data: pd.DataFrame, title: str) -> None:
    """How many attention and MLP layers are dropped (y) once n sub-layers are (x), in the joint ranking."""
    for kind in ("attention", "mlp"):
        count = (data["kind"] == kind).cumsum()
        ax.step([0, *data["position"]], [0, *count], where="post", color=COLORS[kind], linestyle=LINES[kind], label=NAMES[kind])
    ax.set(xlabel="Sub-layers dropped jointly", title=title)


@figure("03_joint_drop")
def fig08_joint_drop(tables: Tables) -> Drawing:
    """Joint drop against single kinds on held-out text (paper, Fig. 8). Until the first MLP it is attention drop."""
    data = tables["text"]
    pairs = tables["gaps"].query("kind == 'joint' and other == 'attention' and measure == 'text'")

    def sentence(rows: pd.DataFrame) -> str:
        of_model = pairs[pairs["model"] == rows["model"].iloc[0]]
        same, differ = (of_model[of_model["same_plan"].astype(bool) == value] for value in (True, False))
        text = f"Up to {same['n'].max()} dropped, joint drop is attention drop. " if len(same) else ""
        if differ.empty:
            return text + "No larger number was tried for both."
        last = differ.loc[differ["n"].idxmax()]
        share = rows.set_index(["kind", "n"])["retained"]
        left = [f"{100 * share[kind, last['n']]:.0f} % ({name})" for kind, name in NAMES.items() if (kind, last["n"]) in share]
        return (
            f"{text}With {last['n']} dropped, joint minus attention is {last['difference']:+.2f} nats per token "
            f"({last['low']:+.2f} to {last['high']:+.2f}; above zero joint is better). Retained of the next-token accuracy "
            f"are then {', '.join(left)}."
        )

    note = "a block counts as one layer; joint drop is attention drop until the first MLP is dropped"
    return Drawing(text_curves(data, note), data, for_each_model(data, sentence))


@figure("03_joint_drop")
def figS6_joint_tasks(tables: Tables) -> Drawing:
    """Joint drop against single kinds on tasks. Points of joint and attention drop coincide where both are the same plan."""
    data = tables["tasks"]
    pairs = tables["gaps"].query("kind == 'joint' and other == 'attention' and measure == 'tasks'")

    def sentence(rows: pd.DataFrame) -> str:
        of_model = pairs[pairs["model"] == rows["model"].iloc[0]]
        differ = of_model[~of_model["same_plan"].astype(bool)]
        if differ.empty:
            tried = ", ".join(map(str, of_model["n"])) or "no number"
            return f"The tasks say nothing of joint drop: at {tried} dropped it is the same plan as attention drop."
        text = [f"{100 * r.difference:+.1f} at {r.n} ({100 * r.low:+.1f} to {100 * r.high:+.1f})" for r in differ.itertuples()]
        return f"Joint minus attention drop, in points of the mean score: {', '.join(text)}."

    return Drawing(task_grid(data), data, for_each_model(data, sentence))


@figure("03_joint_drop")
def figS7_joint_order(tables: Tables) -> Drawing:
    """How many layers of each kind are dropped as the joint ranking is followed."""
    data = tables["order"]
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.55 * len(models)), 2.4), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        rows = data[data["model"] == model]
        staircase(ax, rows, model)
        first = rows[rows["kind"] == "mlp"]["position"].iloc[0]
        ax.axvline(first, color="0.5", linewidth=0.8, linestyle=":")
        ax.text(first, 0.96, f" first MLP at {first}", fontsize=7, transform=ax.get_xaxis_transform(), va="top")
        ax.set_ylabel("Layers of the kind dropped")
    axes.flat[0].legend(loc="lower right")
    ahead = tables["first_mlp"].set_index("model")

    def sentence(rows: pd.DataFrame) -> str:
        row = ahead.loc[rows["model"].iloc[0]]
        mlp = rows[rows["kind"] == "mlp"]
        return (
            f"{row['attention_before']} of {row['n_layers']} attention layers (95 % interval {row['low']:.0f} to "
            f"{row['high']:.0f}) are dropped before the first MLP, that of layer {mlp['layer'].iloc[0]}."
        )

    return Drawing(fig, data, for_each_model(data, sentence))


@figure("03_joint_drop")
def fig09_iterative(tables: Tables) -> Drawing:
    """Attention dropped one by one minus all at once, on held-out text, with 95 % intervals over samples (paper, Fig. 9)."""
    data = tables["iterative"]
    if data.empty:
        return nothing_to_show("No number of layers to compare: see `iterative` in the profile", data)
    fig, ax = plt.subplots(figsize=(WIDTH * 0.65, 0.9 + 0.34 * len(data)))
    for y, row in enumerate(data.itertuples()):
        ax.plot([row.low, row.high], [y, y], color=COLORS["attention"])
        ax.plot(row.difference, y, color=COLORS["attention"], marker=MARKERS["attention"])
    ax.axvline(0, color="0.3", linewidth=0.8)
    margin = -threshold("iterative_no_better", "nats")
    ax.axvline(margin, color="0.5", linewidth=0.8, linestyle=":")
    ax.text(margin, 0.98, " the rule's margin", fontsize=6.5, color="0.35", va="top", transform=ax.get_xaxis_transform())
    several = data["model"].nunique() > 1
    labels = [(f"{r.model}, " if several else "") + f"Attn-{r.n}\n({r.shared} of {r.n} shared)" for r in data.itertuples()]
    ax.set_yticks(range(len(data)), labels)
    title = "" if several else data["model"].iloc[0]
    xlabel = "Iterative minus one-shot, nats per token\n(left of zero: iterative is better)"
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set(ylim=(len(data) - 0.3, -0.7), xlabel=xlabel, title=title)

    def sentence(rows: pd.DataFrame) -> str:
        text = []
        for r in rows.itertuples():
            better = "iterative is better" if r.high < 0 else "one-shot is better" if r.low > 0 else "no difference shows"
            found = f"{better}, {r.difference:+.3f} nats per token ({r.low:+.3f} to {r.high:+.3f})"
            text.append(f"Attn-{r.n}: {'the same layers either way' if r.shared == r.n else found}")
        return "; ".join(text) + "."

    return Drawing(fig, data, for_each_model(data, sentence))
