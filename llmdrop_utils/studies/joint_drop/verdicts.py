"""Rules of notebook 03: joint and iterative dropping."""

import math
from collections.abc import Iterator

from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, triple
from ..curve_rows import KEEP


@check
def joint_goes_furthest(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["further"].groupby("model", sort=False):
        if rows["is_cut"].astype(bool).any():
            reason = "90 % of next-token accuracy are retained up to the largest number that was tried, so none is the furthest"
            yield Finding(model, reason)
            continue
        compared = [
            Comparison(f"further than {r.other} by", r.difference, r.low, r.high, above=0, form="+.0f",
                       size=_samples(tables, model))
            if r.same_up_to <= max(r.joint, r.compared) else
            Comparison(f"up to {r.same_up_to} it is {r.other} drop, so they cannot be compared", math.nan, math.nan, math.nan)
            for r in rows.itertuples()
        ]  # fmt: skip
        text = f"joint drop retains 90 % of next-token accuracy up to {rows['joint'].iloc[0]:.0f} sub-layers, "
        yield Finding(model, text + ", ".join(map(str, compared)), compared)


@check
def attention_goes_first(tables: Tables, layers: float) -> Iterator[Finding]:
    for row in tables["first_mlp"].to_dict("records"):
        share, low, high = (value / row["n_layers"] for value in triple(row, "attention_before"))
        ahead = Comparison("ahead of the first MLP, of the attention layers,", share, low, high, at_least=layers, form=".1%")
        text = f"{row['attention_before']:.0f} of {row['n_layers']} attention layers stand ahead of the first MLP"
        yield Finding(row["model"], f"{text} ({row['low']:.0f} to {row['high']:.0f})", [ahead])


@check
def iterative_no_better(tables: Tables, nats: float) -> Iterator[Finding]:
    for model, rows in tables["iterative"].groupby("model", sort=False):
        compared = [
            Comparison(f"Attn-{r.n}", r.difference, r.low, r.high, at_least=-nats, form="+.3f", size=_samples(tables, model))
            for r in rows.itertuples()
        ]
        text = [f"{c}, {r.shared} of {r.n} layers shared" for c, r in zip(compared, rows.itertuples(), strict=True)]
        yield Finding(
            model, f"iterative minus one-shot, nats per token (negative: iterative is better): {'; '.join(text)}", compared
        )


def _samples(tables: Tables, model: str) -> float:
    """How many samples of held-out text there are."""
    rows = tables["text"]
    return float(rows[rows["model"] == model]["samples"].min())


@advice("03_joint_drop")
def what_to_do(tables: Tables) -> str:
    """Whether a joint or an iterative ranking is worth having for a model like these."""
    text, retained = [], tables["text"].set_index(["model", "kind", "n"])["retained"]
    pairs = tables["gaps"].query("kind == 'joint' and other == 'attention' and measure == 'text'")
    for row in tables["first_mlp"].itertuples():
        begins = f"{row.attention_before} attention layers, as attention drop does" if row.attention_before else "an MLP"
        found = f"**{row.model}**: the joint ranking begins with {begins}."
        differ = pairs[(pairs["model"] == row.model) & ~pairs["same_plan"].astype(bool)]
        if len(differ):
            first = differ.loc[differ["n"].idxmin()]
            better = "joint drop" if first["low"] > 0 else "attention drop" if first["high"] < 0 else "neither"
            best = max(retained[row.model, kind, first["n"]] for kind in ("joint", "attention"))
            found += (
                f" They differ first at {first['n']}: {better} predicts text better there, and the best retains "
                f"{100 * best:.0f} % of the next-token accuracy."
            )
            found += " So many are worth dropping only with training afterwards." if best < KEEP else ""
        compared = tables["iterative"][tables["iterative"]["model"] == row.model]
        for last in compared.tail(1).itertuples():
            gain = "helps" if last.high < 0 else "shows no gain"
            found += (
                f" Measuring again after each of {last.n} attention layers takes {last.n} passes instead of one and {gain} "
                f"({last.difference:+.3f} nats per token, {last.low:+.3f} to {last.high:+.3f})."
            )
        text.append(found)
    return "\n\n".join(text)
