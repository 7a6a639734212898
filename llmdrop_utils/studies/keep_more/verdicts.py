"""Rules of notebook 10: what makes up for dropped attention."""

from collections.abc import Iterator

from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, span, triple
from .rows import CHOICES, ERROR, MEAN
from .study import COSINE
from .work import FOLD, HEALING, MAPS, PLAIN, REPAIR, REPAIR_HEALING, RESCALED, SCALED, WINDOW

CHANGED = [REPAIR, HEALING, REPAIR_HEALING]  # ways of ours that change what is kept


@check
def repair_regains(tables: Tables, share: float) -> Iterator[Finding]:
    rows = tables["regained"].query(f"way == '{REPAIR}' and layers == '{COSINE}' and against == '{PLAIN}'")
    for model, of_model in rows.groupby("model", sort=False):
        compared = [
            Comparison(f"{r['n']} dropped", *triple(r, "regained", ""), at_least=share, form=".0%")
            for r in of_model.to_dict("records")
        ]
        yield Finding(str(model), f"share of the loss regained: {'; '.join(map(str, compared))}", compared)


@check
def repair_beats_published(tables: Tables) -> Iterator[Finding]:
    yield from _less_lost(tables, REPAIR, (MAPS, FOLD, SCALED, RESCALED))


@check
def repair_helps_healing(tables: Tables) -> Iterator[Finding]:
    yield from _less_lost(tables, REPAIR_HEALING, (HEALING,))


def _less_lost(tables: Tables, way: str, others: tuple[str, ...]) -> Iterator[Finding]:
    rows = tables["regained"].query(f"way == '{way}' and layers == '{COSINE}'")
    for model, of_model in rows[rows["against"].isin(others)].groupby("model", sort=False):
        compared = [
            Comparison(f"{r['n']} dropped, than {r['against']}", *triple(r, "difference", "difference_"), above=0, form="+.3f")
            for r in of_model.to_dict("records")
        ]
        yield Finding(str(model), f"nats per token less lost: {'; '.join(map(str, compared))}", compared)


@check
def ranking_stays(tables: Tables, correlation: float) -> Iterator[Finding]:
    rows = tables["rankings"].query(f"kind == 'attention' and layers == '{COSINE}'")
    for model, of_model in rows[rows["way"].isin(CHANGED)].groupby("model", sort=False):
        if {*CHANGED} - {*of_model["way"]}:  # a run without healing says nothing of it
            continue
        compared = [
            Comparison(f"{r['way']}, {r['n']} dropped", *triple(r, "correlation"), at_least=correlation, size=r["samples"])
            for r in of_model.to_dict("records")
        ]
        yield Finding(str(model), f"rank correlation with the dense model: {'; '.join(map(str, compared))}", compared)


@advice("10_keep_more")
def what_to_do(tables: Tables) -> str:
    """What to do after dropping: which way keeps most, and what it does not bring back."""
    text = []
    for model, rows in tables["quality"].groupby("model", sort=False):
        of = rows.set_index(["layers", "way", "n", "measure"])["value"]
        took = tables["made"][tables["made"]["model"] == model].set_index(["layers", "way", "n"])
        for n in sorted(rows["n"].unique())[1:]:
            versions = rows[(rows["n"] == n) & (rows["measure"] == MEAN)]
            free = versions[~versions["way"].isin([WINDOW, HEALING, REPAIR_HEALING])]
            free = free[[took["parameters"].get((r.layers, r.way, n), 0) == 0 for r in free.itertuples()]]
            best = free.loc[free["value"].idxmin()]
            told = (
                f"**{model}**, {n} attention layers dropped: without training or inference cost the least is lost by "
                f"{best['way']} on layers chosen by {best['layers']}: perplexity {best['value']:.2f} times the dense model's, "
                f"instead of {of[COSINE, PLAIN, n, MEAN]:.2f}."
            )
            healed = versions[versions["way"].isin([HEALING, REPAIR_HEALING])]
            if len(healed):
                most = healed.loc[healed["value"].idxmin()]
                minutes = took.loc[(most["layers"], most["way"], n), "seconds"] / 60
                told += (
                    f" {most['way'].capitalize()}, in {minutes:.0f} minutes once layers are chosen, leaves {most['value']:.2f}."
                )
            if (COSINE, PLAIN, n, CHOICES) in of.index:
                right, error = (
                    [of[(*key, measure)] for key in ((COSINE, PLAIN, n), (best["layers"], best["way"], n), ("dense", PLAIN, 0))]
                    for measure in (CHOICES, ERROR)
                )
                told += (
                    f" Right choices go from {right[0]:.1%} to {right[1]:.1%} with that (dense {right[2]:.1%}), and the "
                    f"calibration error from {error[0]:.1%} to {error[1]:.1%} (dense {error[2]:.1%})."
                ).replace("%", " %")
            text.append(told + _next(tables, str(model), n))
    text.append("Fit on text of all the kinds that you serve: a repair helps where its text is from, and little elsewhere.")
    return "\n\n".join(text)


def _next(tables: Tables, model: str, n: int) -> str:
    """Whether importance is to be measured again before more is dropped; nothing where that was not measured."""
    if "further" not in tables:  # of an older version
        return ""
    both = tables["rankings"].query("kind == 'attention'").merge(tables["further"].drop(columns="more"), how="inner")
    both = both[(both["model"] == model) & (both["n"] == n) & both["way"].isin(CHANGED)]
    told = []
    for row in both.to_dict("records"):
        what = "either will do"
        if row["gained_low"] > 0 or row["gained_high"] < 0:
            what = "measure importance again" if row["gained"] > 0 else "keep the dense model's"
        told.append(
            f"after {row['way']} {what} (rank correlation {row['correlation']:.2f}, {span(row)}; by its own "
            f"{row['gained']:+.3f} nats per token less are lost, {row['gained_low']:+.3f} to {row['gained_high']:+.3f})"
        )
    more = f"To drop {both['more'].iloc[0]} more by the dense model's order or by the new model's own" if told else ""
    return f" {more}: {'; '.join(told)}." if told else ""
