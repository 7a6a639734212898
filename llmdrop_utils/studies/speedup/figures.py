"""Figures of notebook 05: time against what is dropped."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ...report.style import COLORS, LINES, MARKERS, NAMES, WIDTH, Drawing, figure, for_each_model, nothing_to_show
from ...report.tables import Tables
from .crossover import crossing_in_words
from .generation import GENERATION

FILLS = {"eager": "full", "compiled": "none"}  # filled markers: eager; open ones: compiled
LAYERS = {"attention": "attention layers", "mlp": "MLP layers", "block": "blocks", "joint": "attention and MLP layers"}
LABEL_AT = {"attention": (3, 3), "mlp": (3, -9), "block": (-8, 3), "joint": (-8, -9)}  # points of equal n may coincide
DOTTED: dict[str, Any] = {"color": "0.4", "linewidth": 0.8, "linestyle": ":"}
RING: dict[str, Any] = {"color": "0.4", "linestyle": "none", "marker": "o", "markersize": 9, "fillstyle": "none"}

# ---- on one pair of axes --------------------------------------------------------------------------------------------


def speedup_line(ax: Axes, rows: pd.DataFrame, x: str, kind: str, label: str, backend: str) -> None:
    """Speed-up with its interval; the prediction as a thin dotted line; noisy timings are ringed."""
    rows = rows.sort_values(x)
    error = [rows["speedup"] - rows["speedup_low"], rows["speedup_high"] - rows["speedup"]]
    ax.errorbar(rows[x], rows["speedup"], np.clip(error, 0, None), color=COLORS[kind], marker=MARKERS[kind], label=label,
                linestyle=LINES[kind], fillstyle=FILLS[backend], elinewidth=0.8, capsize=1.5)  # fmt: skip
    ax.plot(rows[x], rows["predicted"], color=COLORS[kind], linewidth=0.7, linestyle=":")
    noisy = rows[rows["noisy"].astype(bool)]
    ax.plot(noisy[x], noisy["speedup"], **RING)


def speedup_panel(ax: Axes, rows: pd.DataFrame, title: str) -> None:
    """Speed-up over the number dropped, a line for each kind and back end, from the dense model on."""
    for (backend, kind), line in rows.groupby(["backend", "kind"], sort=False):
        start = line.iloc[:1].assign(n=0, speedup=1, speedup_low=1, speedup_high=1, predicted=1, noisy=False)
        speedup_line(ax, pd.concat([start, line]), "n", kind, NAMES[kind] + _compiled(backend), backend)
    ax.axhline(1, color="0.5", linewidth=0.8)
    ax.set(title=title, xlabel="Layers dropped")


def context_panel(ax: Axes, rows: pd.DataFrame, title: str) -> None:
    """Speed-up over the context, a line for each kind at one number dropped."""
    for (backend, kind), line in rows.groupby(["backend", "kind"], sort=False):
        name = f"{line['n'].iloc[0]} {LAYERS[kind]} dropped{_compiled(backend)}"
        speedup_line(ax, line.drop_duplicates("context"), "context", kind, name, backend)
    ax.axhline(1, color="0.5", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ticks = sorted(rows["context"].unique(), reverse=True)
    shown: list[int] = []
    for tick in ticks:  # the longest first, and others as far as labels do not touch
        if not shown or np.log2(shown[-1] / tick) > 0.25 * np.log2(ticks[0] / ticks[-1]):
            shown.append(tick)
    ax.set_xticks(shown, [f"{t:,}" for t in shown])
    ax.minorticks_off()
    ax.set(title=title, xlabel="Tokens in the cache")


def limit_panel(ax: Axes, rows: pd.DataFrame, title: str, ticks: int) -> None:
    """Milliseconds per token over the context; dotted in the same colour, what bytes and operations would take."""
    first = rows["backend"].iloc[0]
    for (backend, kind), line in rows.groupby(["backend", "kind"], sort=False):
        line, n = line.sort_values("context"), line["n"].iloc[0]
        name = (f"{n} {LAYERS[kind]} dropped" if n else NAMES[kind]) + _compiled(backend)
        ax.plot(line["context"], 1e3 * line["seconds"], label=name, color=COLORS[kind], marker=MARKERS[kind],
                fillstyle=FILLS[backend])  # fmt: skip
        if backend == first:
            estimate = 1e3 * line["seconds"] * line["share_of_limit"]
            ax.plot(line["context"], estimate, color=COLORS[kind], linewidth=0.8, linestyle=":")
    ax.xaxis.set_major_locator(MaxNLocator(ticks))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set(title=title, xlabel="Tokens in the cache", ylabel="Milliseconds per token")
    ax.set_ylim(bottom=0)


def trade_panel(ax: Axes, rows: pd.DataFrame, title: str) -> None:
    """Points lost over speed-up, a line for each kind and back end; every point carries its number dropped."""
    for (backend, kind), line in rows.groupby(["backend", "kind"], sort=False):
        line = line.sort_values("n")
        x, y = 100 * (line["speedup"] - 1), line["points_lost"]
        x_error = [100 * (line["speedup"] - line["speedup_low"]), 100 * (line["speedup_high"] - line["speedup"])]
        y_error = [y - line["points_lost_low"], line["points_lost_high"] - y]
        ax.errorbar(x, y, np.clip(y_error, 0, None), np.clip(x_error, 0, None), color=COLORS[kind], marker=MARKERS[kind],
                    linestyle=LINES[kind], fillstyle=FILLS[backend], label=NAMES[kind] + _compiled(backend),
                    elinewidth=0.6)  # fmt: skip
        for a, b, n in zip(x, y, line["n"], strict=True):
            ax.annotate(str(n), (a, b), LABEL_AT[kind], textcoords="offset points", fontsize=7, color=COLORS[kind])
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set(title=title, xlabel="Speed-up of the generation, %", ylabel="Points lost, mean of tasks")


# ---- the figures ----------------------------------------------------------------------------------------------------


@figure("05_speedup")
def figS8_speedup(tables: Tables) -> Drawing:
    """Speed-up against the number dropped: reading a prompt, decoding behind it, and both as in the paper, from samples."""
    data = tables["speed"].query("kind != 'dense' and what != 'generation'")
    generation = data[data["what"] == GENERATION]
    if generation.empty:
        return nothing_to_show("No whole generation could be composed", data)
    models, prompt = list(generation["model"].unique()), generation["context"].max()
    protocol = generation[generation["context"] == prompt]
    panels = {
        f"Prefill, {prompt:,} tokens": data.query("what == 'prefill' and context == @prompt"),
        f"Decode, context {prompt:,}": data.query("what == 'decode' and context == @prompt"),
        f"{prompt:,} tokens in and {protocol['new_tokens'].iloc[0]:,} out": protocol,
    }
    fig, axes = plt.subplots(len(models), 3, figsize=(WIDTH, 0.9 + 2.1 * len(models)), squeeze=False, sharey="row")
    for row, model in zip(axes, models, strict=True):
        batch = generation[generation["model"] == model]["batch_size"].iloc[0]
        for ax, (title, rows) in zip(row, panels.items(), strict=True):
            rows = rows[(rows["model"] == model) & (rows["batch_size"] == batch)]
            speedup_panel(ax, rows.drop_duplicates(["backend", "kind", "n"]), _titled(title, model, models))
        row[0].set_ylabel(f"Speed-up over dense\n(batch {batch})")
    _explain(fig, axes, _where(tables, models), _bars(data), _signs(data))

    def sentence(rows: pd.DataFrame) -> str:
        kinds = [set(of_kind["n"]) for _, of_kind in rows.groupby("kind")]
        shared = set.intersection(*kinds) or {max(rows["n"])}
        same = rows[rows["n"] == max(shared)].drop_duplicates("kind")
        found = [
            f"{r.speedup:.2f} with {r.n} {LAYERS[r.kind]} dropped (predicted: {r.predicted:.2f})" for r in same.itertuples()
        ]
        model, dense = rows["model"].iloc[0], tables["speed"].query("kind == 'dense' and what == @GENERATION")
        share = dense[dense["model"] == model]["share_of_limit"].iloc[0]
        told = f"The speed-up of the whole generation is {', '.join(found)}. {whole_or_samples(tables, model)}"
        return f"{told} The dense generation reaches {_allowed(share)}."

    eager = protocol[protocol["backend"] == protocol["backend"].iloc[0]]
    return Drawing(fig, data, _timed_on(tables, for_each_model(eager, sentence)))


@figure("05_speedup")
def figS9_context(tables: Tables) -> Drawing:
    """Where dropping attention starts to gain more than dropping MLP: decoding over contexts and batches."""
    data = _swept(tables)
    models, batches = list(data["model"].unique()), sorted(data["batch_size"].unique())
    if not models:
        return nothing_to_show("Attention and MLP were not timed at several contexts", data)
    shape = {"figsize": (WIDTH * min(1, 0.4 * len(batches) + 0.1), 0.9 + 2.1 * len(models)), "squeeze": False}
    fig, axes = plt.subplots(len(models), len(batches), sharey="row", **shape)
    for row, model in zip(axes, models, strict=True):
        for ax, batch in zip(row, batches, strict=True):
            rows = data[(data["model"] == model) & (data["batch_size"] == batch)]
            if rows.empty:
                ax.axis("off")
                continue
            context_panel(ax, rows, _titled(f"Decode, batch {batch}", model, models))
        row[0].set_ylabel("Speed-up over dense")
    _explain(fig, axes, _where(tables, models), _bars(data), _signs(data), columns=2)

    def sentence(rows: pd.DataFrame) -> str:
        return " ".join(f"At batch {row['batch_size']}, {crossing_in_words(row)}." for row in rows.to_dict("records"))

    return Drawing(fig, data, _timed_on(tables, for_each_model(tables["crossover"].query("what == 'decode'"), sentence)))


@figure("05_speedup")
def figS10_limit(tables: Tables) -> Drawing:
    """Time of a decode step, dense and with the most attention dropped, beside what its bytes and operations would take."""
    data = tables["speed"].query("what == 'decode' and batch_size == 1 and kind in ('dense', 'attention')")
    data = data[data["room"].isna()]
    most = data.groupby("model")["n"].max()
    data = data[(data["n"] == 0) | (data["n"] == data["model"].map(most))].drop_duplicates(
        ["model", "backend", "kind", "context"]
    )
    models = list(data["model"].unique())
    if not models:
        return nothing_to_show("No single sequence was timed", data)
    width = WIDTH * min(1, 0.55 * len(models))
    fig, axes = plt.subplots(1, len(models), figsize=(width, 3.2), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        limit_panel(ax, data[data["model"] == model], _titled("Decode, batch 1", model, models), 5 if len(models) < 3 else 2)
    limit = {"bytes and operations, parts one after the other": Line2D([], [], **DOTTED)}
    _explain(fig, axes, _where(tables, models), "", limit, columns=min(2, len(models)))

    def sentence(rows: pd.DataFrame) -> str:
        dense = rows[rows["n"] == 0].sort_values("context")
        few, many = dense.iloc[0], dense.iloc[-1]
        return (
            f"With {few['context']:,} tokens in the cache, dense decoding reaches {100 * few['share_of_limit']:.0f} %, and "
            f"with {many['context']:,} it reaches {_allowed(many['share_of_limit'])}."
        )

    return Drawing(fig, data, _timed_on(tables, for_each_model(data, sentence)))


@figure("05_speedup")
def figS11_trade(tables: Tables) -> Drawing:
    """What a speed-up costs: points lost against speed-up, one line for each kind (the slope is the paper's SDR)."""
    data = tables["trade"]
    if not len(data) or data["points_lost"].isna().all():
        return nothing_to_show("No quality was measured in this run", data)
    data = data.dropna(subset=["points_lost"])
    models = list(data["model"].unique())
    fig, axes = plt.subplots(1, len(models), figsize=(WIDTH * min(1, 0.6 * len(models)), 3.0), squeeze=False)
    for ax, model in zip(axes.flat, models, strict=True):
        trade_panel(ax, data[data["model"] == model], model if len(models) > 1 else "")
    note = f"numbers: layers dropped; lower right is better\n{_bars(tables['speed'])}, 95 % over documents"
    _explain(fig, axes, _where(tables, models), note, {}, columns=3)

    def sentence(rows: pd.DataFrame) -> str:
        rows = rows[rows["sdr_low"].notna() & (rows["backend"] == rows["backend"].iloc[0])]
        shared = rows.groupby("n")["kind"].nunique()
        if not len(shared) or shared.max() < 2:
            return "No two kinds have a speed-up beyond noise at the same number dropped."
        n = shared[shared == shared.max()].index.max()
        found = [f"{r.sdr:.2f} for {LAYERS[r.kind]}" for r in rows[rows["n"] == n].itertuples()]
        return (
            f"Points lost per percent of speed-up, with {n} dropped: {', '.join(found)}. "
            f"{whole_or_samples(tables, rows['model'].iloc[0])}"
        )

    return Drawing(fig, data, _timed_on(tables, for_each_model(data, sentence)))


# ---- what they share --------------------------------------------------------------------------------------------------


def _compiled(backend: str) -> str:
    return ", compiled" if backend == "compiled" else ""


RANDOM = " (random weights)"  # the end of a shape's name


def _titled(title: str, model: str, models: list[str]) -> str:
    return title if len(models) == 1 else f"{title}\n{model.removesuffix(RANDOM)}"


def _where(tables: Tables, models: list[str]) -> str:
    """The device and the dtype, and the model if it is the only one: times mean nothing without them."""
    weights = "random weights, " if any(model.endswith(RANDOM) for model in models) else ""
    return f"{models[0]} on {machine(tables)}" if len(models) == 1 else f"{weights}on {machine(tables)}"


def machine(tables: Tables) -> str:
    """What was timed on: "AMD EPYC, 2 threads, in float32"."""
    found = tables["models"].iloc[0]
    return f"{found['device']}, in {found['dtype']}"


def _timed_on(tables: Tables, takeaway: str) -> str:
    """A takeaway and the machine whose times it tells."""
    return takeaway and f"{takeaway} Timed on {machine(tables)}."


def _bars(data: pd.DataFrame) -> str:
    """What the bars of speed-ups cover: the level that their number of repeats gives."""
    return f"bars: intervals that cover {100 * data['level'].min():.1f} % over repeats"


def _allowed(share: float) -> str:
    """A share of the limit in words, and what else is timed where it is less than half of the time."""
    more = "; overhead and cache copies are timed too" if share < 0.5 else ""
    return f"{100 * share:.0f} % of what bytes and operations allow, parts one after the other{more}"


def whole_or_samples(tables: Tables, model: str) -> str:
    """How the generation that was timed whole compares with its samples: a sentence."""
    rows = tables["protocol"].query("model == @model")
    if rows.empty:
        return "The generation is composed from samples and was not timed whole."
    found = [f"{r.speedup_whole:.2f} with {r.n} {LAYERS[r.kind]} dropped" for r in rows.itertuples() if r.n]
    longer = 1 / rows["ratio"]
    return (
        f"Timed whole, once, the speed-up is {', '.join(found)}; whole generations took {longer.min():.2f} to "
        f"{longer.max():.2f} times as long as their samples say."
    )


def _signs(data: pd.DataFrame) -> dict[str, Line2D]:
    """What else a reader meets in a panel of speed-ups."""
    signs = {"predicted from bytes and operations": Line2D([], [], **DOTTED)}
    return signs | ({"noisy timing": Line2D([], [], **RING)} if data["noisy"].astype(bool).any() else {})


def _explain(fig: Figure, axes: np.ndarray, where: str, note: str, signs: dict[str, Line2D], columns: int = 4) -> None:
    """Above the panels, what was timed on what; below them, one legend for all: some panels lack a kind or a back end."""
    fig.suptitle(f"{where}\n{note}".rstrip(), fontsize=8)
    known: dict[str, Artist] = {}
    for ax in axes.flat:
        handles, names = ax.get_legend_handles_labels()
        known |= dict(zip(names, handles, strict=True))
    known |= signs
    fig.legend([*known.values()], [*known], loc="outside lower center", ncols=columns, fontsize=7.5)


def _swept(tables: Tables) -> pd.DataFrame:
    """Decoding with attention or MLP layers dropped, at the contexts and batches where both were timed."""
    data = tables["speed"].query("what == 'decode' and kind in ('attention', 'mlp')")
    data = data[data["room"].isna() & ~data["fill"].astype(bool)]
    kinds = data.groupby(["model", "backend", "batch_size", "context", "n"])["kind"].transform("nunique")
    both = data[kinds == 2]
    crossed = tables["crossover"][["model", "n"]].drop_duplicates()
    return both.merge(crossed, on=["model", "n"])
