"""Rules of notebook 04: ways to choose what is dropped."""

from collections.abc import Iterator

import pandas as pd

from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, triple
from .rows import CONTINUATION, COSINE, TASKS, TEXT

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
        most = rows[rows["n"] == rows["n"].max()].to_dict("records")
        compared = [Comparison(f"{r['method']} minus cosine", *_difference(r), below=0, form="+.3f") for r in most]
        told = "; ".join(map(str, compared))
        yield Finding(model, f"without {most[0]['n']} attention layers, minus nats per token of text: {told}", compared)


@check
def residual_matters(tables: Tables) -> Iterator[Finding]:
    text = _text(tables).query("method == 'without residual'")
    for model in tables["models"]["model"]:
        rows = text[text["model"] == model].to_dict("records")
        compared = [
            Comparison(f"{r['n']} of {r['kind']}: without residual minus with it", *_difference(r), below=0, form="+.3f")
            for r in rows
        ]
        told = "; ".join(map(str, compared))
        yield Finding(
            model, f"minus nats per token of text: {told}" if rows else "nothing was ranked without residual", compared
        )


def _difference(row: dict) -> tuple[float, float, float]:
    return triple(row, "difference", "difference_")


@advice("04_ablations")
def what_to_do(tables: Tables) -> str:
    """Which method to take, how many samples of what, and what another choice would gain."""
    text = []
    for model in tables["models"]["model"]:
        quality = tables["quality"].query("model == @model and kind == 'attention'")
        rows = quality[quality["method"] != COSINE]
        better = {name: of.groupby("method")["outcome"].agg(set) for name, of in rows.groupby("measure")}
        tested = [name for name in (TEXT, TASKS, CONTINUATION) if name in better]
        everywhere = set.intersection(*({m for m, found in better[name].items() if "better" in found} for name in tested))
        worse = sorted({m for found in better.values() for m, outcomes in found.items() if "worse" in outcomes})
        found = f"better than cosine in {' and '.join(tested)} at once: {', '.join(sorted(everywhere)) or 'no method'}."
        found += f" Worse in one of them at least: {', '.join(worse) or 'none'}."
        text.append(f"**{model}**: {found} {_samples(tables['calibration'].query('model == @model'))}")
    text.append(
        "Rank by cosine, in one pass, on a few samples of text like that which the model will read. Look for a better order "
        "step by step only where one of the measures that you care about is shown to gain."
    )
    return "\n\n".join(text)


def _samples(rows: pd.DataFrame) -> str:
    """How few samples choose layers that are not shown to be worse."""
    few = rows[rows["varied"] == "samples"]
    enough = [int(setting) for setting, of in few.groupby("setting") if (of["difference_low"] <= 0).all()]
    others = rows[rows["varied"] == "corpus"]
    costly = sorted({r.setting for r in others.itertuples() if r.difference_low > 0})
    told = f"{min(enough)} samples choose layers that are not seen to be worse than all do." if enough else ""
    return f"{told} Layers that these corpora choose cost more on text of the first: {', '.join(costly) or 'none'}.".strip()
