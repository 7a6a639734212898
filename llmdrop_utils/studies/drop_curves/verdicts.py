"""Rules of notebook 02: quality against the number of dropped sub-layers."""

from collections.abc import Iterator

from ...report.tables import Tables
from ...report.verdicts import Finding, check, percent


@check
def quarter_of_attention_keeps_quality(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["average"].groupby("model", sort=False):
        n_layers = tables["models"].set_index("model")["n_layers"][model]
        tried = rows[(rows["kind"] == "attention")]
        if tried.empty:
            yield model, None, "this profile drops no attention layers for the tasks"
            continue
        row = tried.loc[(tried["n"] - n_layers / 4).abs().idxmin()]
        text = f"Attn-{row['n']} of {n_layers} retains {100 * row['retained']:.1f} % of the mean over {row['tasks']} tasks"
        yield model, bool(row["retained"] >= 0.99), f"{text} ({percent(row, 'retained')})"


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
def half_of_attention(tables: Tables) -> Iterator[Finding]:
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
            bool(row["points_lost_low"] <= 2.4),
            f"{text} ({row['points_lost_low']:.1f} to {row['points_lost_high']:.1f})",
        )


@check
def larger_models_lose_less(tables: Tables) -> Iterator[Finding]:
    average = tables["average"].query("kind == 'attention'")
    layers = tables["models"].set_index("model")["n_layers"]
    for small, large in (("llama-2-13b", "llama-2-70b"), ("llama-3-8b", "llama-3-70b")):
        if not {small, large} <= set(average["model"]):
            yield f"{small} and {large}", None, "both are needed: `make reproduce PROFILE=gpu` runs them"
            continue
        share = {}
        for model in (small, large):
            rows = average[average["model"] == model].sort_values("n")
            holds = rows["retained"].to_numpy() >= 0.95
            share[model] = rows["n"][: holds.argmin() if not holds.all() else len(holds)].max() / layers[model]
        text = ", ".join(f"{model} keeps 95 % up to {100 * value:.0f} % of its attention" for model, value in share.items())
        yield f"{small} and {large}", bool(share[large] > share[small]), text
