"""Rules of notebook 02: quality against the number of dropped sub-layers."""

from collections.abc import Iterator

from ...report.tables import Tables
from ...report.verdicts import Finding, advice, check, percent

OTHERS = {"mlp": "of the MLPs", "block": "of the blocks"}


@check
def quarter_of_attention_keeps_quality(tables: Tables, layers: float, retained: float) -> Iterator[Finding]:
    for model, rows in tables["average"].groupby("model", sort=False):
        n_layers = tables["models"].set_index("model")["n_layers"][model]
        tried = rows[(rows["kind"] == "attention")]
        if tried.empty:
            yield model, None, "this profile drops no attention layers for the tasks"
            continue
        row = tried.loc[(tried["n"] - n_layers * layers).abs().idxmin()]
        text = f"Attn-{row['n']} of {n_layers} retains {100 * row['retained']:.1f} % of the mean over {row['tasks']} tasks"
        yield model, bool(row["retained"] >= retained), f"{text} ({percent(row, 'retained')})"


@check
def attention_beats_mlp_and_block(tables: Tables) -> Iterator[Finding]:
    gaps = tables["gaps"].query("kind == 'attention' and measure == 'tasks'")
    for model in tables["average"]["model"].unique():
        rows = gaps[gaps["model"] == model]
        if rows.empty:
            yield model, None, "this profile drops no two kinds at equal n for the tasks"
            continue
        text = [
            f"Attn-{r.n} − {r.other}-{r.n}: {100 * r.difference:+.1f} points ({100 * r.low:+.1f} to {100 * r.high:+.1f})"
            for r in rows.itertuples()
        ]
        yield model, bool((rows["low"] > 0).all()), "; ".join(text)


@check
def half_of_attention(tables: Tables, points: float) -> Iterator[Finding]:
    for model, rows in tables["average"].groupby("model", sort=False):
        n_layers = tables["models"].set_index("model")["n_layers"][model]
        half = rows[(rows["kind"] == "attention") & (rows["n"] * 2 == n_layers)]
        if "70b" not in model.lower() or half.empty:
            yield model, None, "the claim is about a 70B model: `make reproduce PROFILE=gpu` runs it"
            continue
        row = half.iloc[0]
        text = f"Attn-{row['n']} of {n_layers} loses {row['points_lost']:.1f} points"
        yield (
            model,
            bool(row["points_lost_low"] <= points),
            f"{text} ({row['points_lost_low']:.1f} to {row['points_lost_high']:.1f})",
        )


@check
def larger_models_lose_less(tables: Tables, retained: float) -> Iterator[Finding]:
    average = tables["average"].query("kind == 'attention'")
    layers = tables["models"].set_index("model")["n_layers"]
    for small, large in (("llama-2-13b", "llama-2-70b"), ("llama-3-8b", "llama-3-70b")):
        if not {small, large} <= set(average["model"]):
            yield f"{small} and {large}", None, "both are needed: `make reproduce PROFILE=gpu` runs them"
            continue
        share = {}
        for model in (small, large):
            rows = average[average["model"] == model].sort_values("n")
            holds = rows["retained"].to_numpy() >= retained
            share[model] = rows["n"][: holds.argmin() if not holds.all() else len(holds)].max() / layers[model]
        text = ", ".join(
            f"{model} keeps {100 * retained:.0f} % up to {100 * value:.0f} % of its attention" for model, value in share.items()
        )
        yield f"{small} and {large}", bool(share[large] > share[small]), text


@advice("02_drop_curves")
def what_to_do(tables: Tables) -> str:
    """How many attention layers can be dropped from a model like these, and which."""
    text = []
    average, plans = tables["average"], tables["plans"].set_index(["model", "kind", "n"])
    for model, reach in tables["reach"].groupby("model", sort=False):
        by_kind = reach.set_index("kind")
        attention = by_kind.loc["attention"]
        tried = [n for kind, n in plans.loc[model].index if kind == "attention" and n <= attention["low"]]
        others = ", ".join(f"{by_kind['n'][kind]} {name}" for kind, name in OTHERS.items() if kind in by_kind.index)
        if not tried:
            text.append(f"**{model}**: keep all attention layers: dropping a single one may cost 10 % of next-token accuracy.")
            continue
        layers = str(plans["attention"][model, "attention", max(tried)]).replace(" ", ", ")
        found = (
            f"**{model}**: {max(tried)} attention layers can be dropped with 90 % of the next-token accuracy retained, by the "
            f"lower end of the interval (by its mean: {attention['n']}; for comparison: {others}). They are layers {layers}: "
            f"`DropPlan(attention=[{layers}])`."
        )
        rows = average[(average["model"] == model) & (average["kind"] == "attention")]
        for row in rows[rows["n"] == rows["n"].min()].to_dict("records"):
            found += (
                f" Tasks lose {row['points_lost']:.1f} points with {row['n']} dropped ({row['points_lost_low']:.1f} to "
                f"{row['points_lost_high']:.1f})."
            )
        text.append(found + " Notebook 05 says what this gains in speed.")
    return "\n\n".join(text)
