"""Rules of notebook 03: joint and iterative dropping."""

from collections.abc import Iterator

from ...report.tables import Tables
from ...report.verdicts import Finding, check


@check
def joint_goes_furthest(tables: Tables) -> Iterator[Finding]:
    gaps = tables["gaps"].query("kind == 'joint' and measure == 'text'")
    for model in tables["text"]["model"].unique():
        rows = gaps[(gaps["model"] == model) & ~gaps["same_plan"].astype(bool)]
        # High ratios: from where joint no longer is attention drop under another name.
        counts = sorted(set(rows[rows["other"] == "attention"]["n"]))
        if not counts:
            yield model, None, "the joint ranking drops attention alone up to the largest number tried"
            continue
        rows = rows[rows["n"] == counts[-1]]
        text = [f"{r.other} {r.difference:+.2f} ({r.low:+.2f} to {r.high:+.2f})" for r in rows.itertuples()]
        text = f"Joint-{counts[-1]} minus the same number of one kind, nats per token of held-out text: " + ", ".join(text)
        yield model, bool((rows["low"] > 0).all()), text


@check
def attention_goes_first(tables: Tables) -> Iterator[Finding]:
    for row in tables["first_mlp"].itertuples():
        text = f"{row.attention_before} of {row.n_layers} attention layers go before the first MLP"
        yield row.model, bool(row.low >= row.n_layers / 4), f"{text} ({row.low:.0f} to {row.high:.0f})"


@check
def iterative_no_better(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["iterative"].groupby("model", sort=False):
        text = [
            f"Attn-{r.n}: {r.difference:+.3f} nats per token ({r.low:+.3f} to {r.high:+.3f}; {r.shared} of {r.n} layers shared)"
            for r in rows.itertuples()
        ]
        yield (
            model,
            bool((rows["high"] >= 0).all()),
            "iterative minus one-shot (negative: iterative is better): " + ", ".join(text),
        )
