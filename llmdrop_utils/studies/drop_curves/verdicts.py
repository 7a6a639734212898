"""Rules of notebook 02: quality against the number of dropped sub-layers."""

from collections.abc import Iterator

from ...report.rules import Comparison, Finding
from ...report.style import KIND_NAMES
from ...report.tables import Tables
from ...report.verdicts import advice, check, percent, triple

OTHERS = {"mlp": "of the MLPs", "block": "of the blocks"}
DOCUMENTS = "documents of each task"


@check
def quarter_of_attention_keeps_quality(tables: Tables, layers: float, retained: float, near: float) -> Iterator[Finding]:
    for model, rows in tables["average"].groupby("model", sort=False):
        n_layers = tables["models"].set_index("model")["n_layers"][model]
        tried = rows[(rows["kind"] == "attention")]
        if tried.empty:
            yield Finding(model, "this profile drops no attention layers for the tasks")
            continue
        larger_first = tried.sort_values("n", ascending=False)  # of two that are as near
        row = larger_first.loc[(larger_first["n"] - n_layers * layers).abs().idxmin()]
        if abs(row["n"] / n_layers - layers) > near:
            wanted = f"{layers:.0%}".replace("%", " %")
            yield Finding(model, f"no number near {wanted} of its {n_layers} attention layers was dropped for the tasks")
            continue
        if row["retained"] != row["retained"]:
            yield Finding(model, "the dense model is not above guessing, so there is nothing to retain")
            continue
        share = Comparison(f"Attn-{row['n']} retains", *triple(row, "retained", "retained_"), at_least=retained, form=".1%",
                           size=_documents(tables, model), unit=DOCUMENTS)  # fmt: skip
        yield Finding(
            model,
            f"Attn-{row['n']} of {n_layers} retains {100 * row['retained']:.1f} % ({percent(row, 'retained')}) of what lies "
            f"above guessing in the mean over {row['tasks']} tasks",
            [share],
        )


@check
def attention_beats_mlp_and_block(tables: Tables) -> Iterator[Finding]:
    gaps = tables["gaps"].query("kind == 'attention' and measure == 'tasks'")
    for model in tables["average"]["model"].unique():
        rows = gaps[gaps["model"] == model]
        if rows.empty:
            yield Finding(model, "this profile drops no two kinds at equal n for the tasks")
            continue
        compared = [
            Comparison(f"Attn-{r.n} minus {KIND_NAMES[r.other]}-{r.n}", 100 * r.difference, 100 * r.low, 100 * r.high, above=0,
                       form="+.1f", size=_documents(tables, model), unit=DOCUMENTS)
            for r in rows.itertuples()
        ]  # fmt: skip
        yield Finding(model, f"points of the mean score: {'; '.join(map(str, compared))}", compared)


@check
def half_of_attention(tables: Tables, points: float) -> Iterator[Finding]:
    for model, rows in tables["average"].groupby("model", sort=False):
        n_layers = tables["models"].set_index("model")["n_layers"][model]
        half = rows[(rows["kind"] == "attention") & (rows["n"] * 2 == n_layers)]
        if "70b" not in model.lower() or half.empty:
            yield Finding(model, "the claim is about a 70B model: `make reproduce PROFILE=gpu` runs it")
            continue
        row = half.iloc[0]
        loss = Comparison(f"Attn-{row['n']} of {n_layers} loses, in points,", *triple(row, "points_lost", "points_lost_"),
                          at_most=points, size=_documents(tables, model), unit=DOCUMENTS)  # fmt: skip
        yield Finding(model, str(loss), [loss])


def _documents(tables: Tables, model: str) -> float:
    """Of the task with the fewest."""
    rows = tables["tasks"]
    return float(rows[rows["model"] == model]["documents"].min())


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
