"""Rules of notebook 03: joint and iterative dropping."""

from collections.abc import Iterator

from ...report.tables import Tables
from ...report.verdicts import Finding, advice, check
from ..curve_rows import KEEP


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
        found = [f"{r.other} {r.difference:+.2f} ({r.low:+.2f} to {r.high:+.2f})" for r in rows.itertuples()]
        text = f"Joint-{counts[-1]} minus the same number of one kind, nats per token of held-out text: " + ", ".join(found)
        yield model, bool((rows["low"] > 0).all()), text


@check
def attention_goes_first(tables: Tables, layers: float) -> Iterator[Finding]:
    for row in tables["first_mlp"].itertuples():
        text = f"{row.attention_before} of {row.n_layers} attention layers stand ahead of the first MLP"
        yield row.model, bool(row.low >= row.n_layers * layers), f"{text} ({row.low:.0f} to {row.high:.0f})"


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
