"""Rules of notebook 04: ways to choose what is dropped."""

from collections.abc import Iterator

import pandas as pd

from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, triple
from .rows import TEXT

BASELINES = ("relative magnitude", "reverse order", "random")  # of Table 7


def _text(tables: Tables) -> pd.DataFrame:
    quality = tables["quality"]
    return quality[quality["measure"] == TEXT]


@check
def cosine_beats_baselines(tables: Tables) -> Iterator[Finding]:
    text = _text(tables).query("kind == 'attention'")
    for model in tables["models"]["model"]:
        rows = text[(text["model"] == model) & text["method"].isin(BASELINES)]
        if rows.empty:
            yield Finding(model, "none of relative magnitude, reverse order and random was tried")
            continue
        most = rows[rows["n"] == rows["n"].max()]
        yield _beside_cosine(model, most, f"without {most['n'].iloc[0]} attention layers, minus nats per token of text")


@check
def residual_matters(tables: Tables) -> Iterator[Finding]:
    text = _text(tables).query("method == 'without residual'")
    for model in tables["models"]["model"]:
        rows = text[text["model"] == model]
        if rows.empty:
            yield Finding(model, "nothing was ranked without residual")
            continue
        yield _beside_cosine(model, rows, "minus nats per token of text")


def _beside_cosine(model: str, rows: pd.DataFrame, of: str) -> Finding:
    """Differences from cosine, which are to lie below zero. Where both choose the same layers there is nothing to compare."""
    same = rows["outcome"] == "the same layers"
    compared = [
        Comparison(
            f"{r['method']}, {r['n']} of {r['kind']}, minus cosine",
            *triple(r, "difference", "difference_"),
            below=0,
            form="+.3f",
        )
        for r in rows[~same].to_dict("records")
    ]
    told = [*map(str, compared), *(f"{r.method}, {r.n} of {r.kind}: the same layers" for r in rows[same].itertuples())]
    return Finding(model, f"{of}: {'; '.join(told)}", compared)


@advice("04_ablations")
def what_to_do(tables: Tables) -> str:
    """Which method to take, how many samples of what, and what another choice would gain."""
    text = []
    for model in tables["models"]["model"]:
        quality = tables["quality"].query("model == @model and kind == 'attention'")
        told = {outcome: quality[quality["outcome"] == outcome] for outcome in ("better", "worse")}
        tested = quality.groupby("n")["measure"].agg(lambda of: tuple(dict.fromkeys(of)))
        most = {n: measures for n, measures in tested.items() if len(measures) == tested.map(len).max()}
        everywhere = {
            f"{method} ({n} dropped)"
            for n, measures in most.items()
            for method, rows in told["better"][told["better"]["n"] == n].groupby("method")
            if len(rows) == len(measures)
        }
        measures = " and ".join(next(iter(most.values())))
        worse = sorted(set(told["worse"]["method"]))
        found = f"better than cosine in {measures} at once: {', '.join(sorted(everywhere)) or 'no method'}."
        found += f" Worse in one of them at least: {', '.join(worse) or 'none'}."
        text.append(f"**{model}**: {found} {_samples(tables['calibration'].query('model == @model'))}")
    text.append(
        "Rank by cosine, in one pass, on a few samples of text like that which the model will read. Look for a better order "
        "step by step only where one of the measures that you care about is shown to gain."
    )
    return "\n\n".join(text)


def _samples(rows: pd.DataFrame) -> str:
    """From how few samples on layers are not seen to be worse, and which corpora choose worse ones."""
    few = rows[rows["varied"] == "samples"]
    worse = {int(setting) for setting, of in few.groupby("setting") if (of["difference_low"] > 0).any()}
    enough = sorted(count for count in map(int, few["setting"].unique()) if count > max(worse, default=0))
    told = []
    if enough:
        told.append(f"Layers chosen on {enough[0]} sample{'s' * (enough[0] > 1)} are not seen to be worse than on all.")
    if len(others := rows[rows["varied"] == "corpus"]):
        costly = sorted({r.setting for r in others.itertuples() if r.difference_low > 0})
        told.append(f"Corpora whose choice costs more on text of the first: {', '.join(costly) or 'none'}.")
    return " ".join(told)
