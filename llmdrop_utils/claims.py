"""The paper's claims, and a verdict for each from the tables of a run.

data/claims.yaml lists the claims and their rules. A check reads the tables of its notebook and judges each model;
a claim is reproduced if it holds for all of them. The scorecard lists every claim, run or not.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import yaml

from .tables import Tables, read_tables
from .workspace import ROOT, replacing, write_text

REPRODUCED, DEVIATES, NOT_RUN = "reproduced", "deviates", "not run"
Finding = tuple[str, bool | None, str]  # model, does the claim hold (None: could not be tested), the numbers
CHECKS: dict[str, Callable[[Tables], Iterator[Finding]]] = {}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line of the scorecard."""

    id: str
    claim: str
    where: str
    notebook: str
    verdict: str  # REPRODUCED, DEVIATES or NOT_RUN
    evidence: str  # the numbers, or why it was not run and what would run it
    rule: str


def load_claims() -> list[dict]:
    """data/claims.yaml."""
    return yaml.safe_load((ROOT / "data" / "claims.yaml").read_text(encoding="utf-8"))


def judge(results: Path, notebook: str | None = None) -> list[Verdict]:
    """The verdict on every claim (or on those of one notebook) from the tables under `results`, data/results/<run>."""
    verdicts = []
    for claim in load_claims():
        if notebook not in (None, claim["notebook"]):
            continue
        verdict, evidence = _judge(claim, read_tables(results / claim["notebook"]))
        shown = {key: claim[key] for key in ("id", "claim", "where", "notebook", "rule")}
        verdicts.append(Verdict(**shown, verdict=verdict, evidence=evidence))
    return verdicts


def _judge(claim: dict, tables: Tables) -> tuple[str, str]:
    if "check" not in claim:
        return NOT_RUN, f"notebook {claim['notebook']} is not part of the series yet"
    if not tables:
        return NOT_RUN, f"notebook {claim['notebook']} has not been run: `make reproduce NOTEBOOKS={claim['notebook'][:2]}`"
    findings = list(CHECKS[claim["check"]](tables))
    findings += [(row.what, None, row.reason) for row in tables["not_run"].itertuples()]
    tested = [holds for _, holds, _ in findings if holds is not None]
    named = len(findings) > 1  # a single model needs no name in each line
    evidence = "; ".join(
        (f"{model}: " if named else "") + ("" if holds is not None else "not run: ") * named + text
        for model, holds, text in findings
    )
    if not tested:
        return NOT_RUN, evidence or "this run has nothing to compare: see the corpora and sample counts of its profile"
    return (REPRODUCED if all(tested) else DEVIATES), evidence


def write_scorecard(verdicts: list[Verdict], folder: Path, run: str, about: str) -> Path:
    """Write figures/<run>/scorecard.md (to read) and scorecard.csv (to compute with)."""
    table = pd.DataFrame([dataclasses.asdict(v) for v in verdicts])
    with replacing(folder / "scorecard.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return write_text(folder / "scorecard.md", f"# Scorecard: {run}\n\n{about}\n\n{as_markdown(verdicts, totals=True)}")


def as_markdown(verdicts: list[Verdict], totals: bool = False) -> str:
    """The verdicts as a table, with the rules below it."""
    counts = [f"{sum(v.verdict == kind for v in verdicts)} {kind}" for kind in (REPRODUCED, DEVIATES, NOT_RUN)]
    lines = [", ".join(counts) + f", of {len(verdicts)} claims.", ""] if totals else []
    lines += ["| Claim | Where | Notebook | Verdict | Evidence |", "|---|---|---|---|---|"]
    for v in verdicts:
        cells = [v.claim, v.where, v.notebook, f"**{v.verdict}**", v.evidence]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "How each verdict is reached:", ""]
    lines += [f"- *{v.claim}* {v.rule}" for v in verdicts if v.verdict != NOT_RUN]
    return "\n".join(lines) + "\n"


# ---- the rules of notebook 01 ---------------------------------------------------------------------------------------


def check(function: Callable[[Tables], Iterator[Finding]]):
    """Register a rule under its name, for `check:` in data/claims.yaml."""
    CHECKS[function.__name__] = function
    return function


@check
def attention_most_redundant(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["contrast"].groupby("model", sort=False):
        text = []
        for other, group in rows.groupby("other", sort=False):
            worst = group.loc[group["high"].idxmax()]
            text.append(
                f"attention {group['attention'].mean():.3f} against {other} {group['compared'].mean():.3f} "
                f"(medians {group['attention_median'].mean():.3f} and {group['compared_median'].mean():.3f}; weakest on "
                f"{worst['corpus']}: {worst['difference']:.3f}, {_interval(worst)}; lower in "
                f"{group['layers_lower'].min()} to {group['layers_lower'].max()} of {worst['n_layers']} layers)"
            )
        yield model, bool((rows["high"] < 0).all()), "; ".join(text)


@check
def near_zero_attention(tables: Tables) -> Iterator[Finding]:
    order = tables["order"].query("kind == 'attention'")
    distribution = tables["distribution"].query("kind == 'attention'")
    for model, rows in order.merge(distribution, on=["model", "corpus", "layer"]).groupby("model", sort=False):
        worst = {}
        for corpus, group in rows.groupby("corpus", sort=False):
            worst[corpus] = group[group["position"] < max(1, len(group) // 4)]["q95"].max()
        corpus = max(worst, key=worst.get)
        text = f"95 % of tokens keep a cosine above {1 - worst[corpus]:.3f} in these layers, or more (least on {corpus})"
        yield model, worst[corpus] < 0.1, text


@check
def deeper_more_redundant(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["depth"].groupby("model", sort=False):
        mean = rows.groupby("kind")["correlation"].mean()
        holds = bool((mean <= -0.5).all() and (rows["high"] < 0).all())
        text = [
            f"{kind} {mean[kind]:+.2f} (over corpora {group['correlation'].min():+.2f} to {group['correlation'].max():+.2f})"
            for kind, group in rows.groupby("kind", sort=False)
        ]
        yield model, holds, "correlation of depth and importance: " + ", ".join(text)


@check
def corpus_does_not_matter(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["corpora"].groupby("model", sort=False):
        lowest = _lowest(rows)
        text = [f"{r['kind']} {r['correlation']:.2f} ({_interval(r)}, {r['a']} and {r['b']})" for r in lowest]
        yield model, all(r["low"] >= 0.8 for r in lowest), "lowest correlation: " + ", ".join(text)


@check
def sample_count_does_not_matter(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["sample_agreement"].groupby("model", sort=False):
        nearest = min(rows["n_samples"].unique(), key=lambda n: abs(n - 4))
        lowest = _lowest(rows[rows["n_samples"] == nearest])
        text = [f"{r['kind']} {r['correlation']:.2f} (single groups {_interval(r)})" for r in lowest]
        holds = all(r["correlation"] >= 0.9 for r in lowest)
        yield model, holds, f"mean correlation of {lowest[0]['groups']} groups of {nearest}: " + ", ".join(text)


@check
def published_lists(tables: Tables) -> Iterator[Finding]:
    published, importance = tables["published"], tables["importance"]
    for model in importance["model"].unique():
        rows = published[published["model"] == model] if len(published) else published
        if rows.empty:
            yield (
                model,
                None,
                f"no published drop list is known for {model}; `make reproduce PROFILE=gpu` tests three models",
            )
            continue
        rows = rows[rows["corpus"] == rows["corpus"].iloc[0]]
        text = [f"{r.kind}-{r.n_drop} {r.shared}/{r.n_drop} (by chance {r.by_chance:.1f})" for r in rows.itertuples()]
        yield model, bool((rows["shared"] >= 0.75 * rows["n_drop"]).all()), ", ".join(text)


# ---- the rules of notebooks 02 and 03 -------------------------------------------------------------------------------


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
        yield model, bool(row["retained"] >= 0.99), f"{text} ({_percent(row, 'retained')})"


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


# ---- the rules of notebooks 05 and 06 -------------------------------------------------------------------------------


@check
def half_of_attention_is_faster(tables: Tables) -> Iterator[Finding]:
    layers = tables["models"].set_index("model")["n_layers"]
    rows = tables["speed"].query("what == 'generation from samples' and kind == 'attention' and context == 2048")
    for model in layers.index:
        half = rows[(rows["model"] == model) & (2 * rows["n"] == layers[model])]
        if "llama-2-70b" not in model or half.empty:
            text = "the claim is about Llama-2-70B on a GPU: `make reproduce PROFILE=h200 NOTEBOOKS=05` times its shape"
            if len(half):
                row = half.iloc[0]
                text += f" (Attn-{row['n']} of {layers[model]} here: {row['speedup']:.2f} x)"
            yield model, None, text
            continue
        text = [f"{r.backend} {r.speedup:.2f} x ({r.speedup_low:.2f} to {r.speedup_high:.2f})" for r in half.itertuples()]
        holds = bool((half["speedup_high"] >= 1.484).any() and not half["noisy"].astype(bool).all())
        yield model, holds, f"Attn-{half.iloc[0]['n']} of {layers[model]}, 2,048 tokens in and out: " + ", ".join(text)


@check
def attention_is_best_trade(tables: Tables) -> Iterator[Finding]:
    trade = tables["trade"]
    for model in tables["models"]["model"]:
        rows = trade[(trade["model"] == model) & trade["sdr"].notna()] if len(trade) else trade
        attention = rows[rows["kind"] == "attention"].set_index(["backend", "n"]) if len(rows) else rows
        pairs = [
            (attention.loc[r.backend, r.n], r)
            for r in rows.itertuples()
            if r.kind in ("mlp", "block") and (r.backend, r.n) in attention.index
        ]
        if not pairs:
            yield model, None, "this run has no quality and speed of two kinds at equal n"
            continue
        text, judged = [], []
        for a, r in pairs:
            known = a["sdr_high"] == a["sdr_high"] and r.sdr_low == r.sdr_low
            judged += [a["sdr_high"] < r.sdr_low] if known else []
            found = f"attention {a['sdr']:.2f} ({a['sdr_low']:.2f} to {a['sdr_high']:.2f}), {r.kind} {r.sdr:.2f} "
            found += f"({r.sdr_low:.2f} to {r.sdr_high:.2f})"
            text.append(f"n = {r.n}, {r.backend}: {found if known else f'against {r.kind} a speed-up is within noise'}")
        yield model, all(judged) if judged else None, "points lost per percent of speed-up: " + "; ".join(text)


@check
def cache_shrinks_in_proportion(tables: Tables) -> Iterator[Finding]:
    for row in tables["paper"].query("n > 0").itertuples():
        exact = row.counted_bytes == row.formula_bytes
        share = row.counted_bytes * row.n_layers == row.dense_bytes * (row.n_layers - row.n)
        left, dense = row.counted_bytes / 2**30, row.dense_bytes / 2**30
        text = f"Attn-{row.n} leaves {left:g} of {dense:g} GiB (the paper prints {row.paper_gib:g})"
        yield row.model, bool(exact and share), text
    for model, rows in tables["caches"].groupby("model", sort=False):
        if not rows["full_attention"].astype(bool).all():
            yield model, None, "its sliding windows hold a fixed number of tokens, so the share depends on which layers go"
            continue
        exact = (rows["counted_bytes"] == rows["formula_bytes"]).all()
        share = (rows["counted_bytes"] * rows["n_layers"] == rows["dense_bytes"] * (rows["n_layers"] - rows["n"])).all()
        yield model, bool(exact and share), f"{len(rows)} caches, each to the byte as the formula says"


# ---- words ----------------------------------------------------------------------------------------------------------


def _percent(row: pd.Series, name: str) -> str:
    return f"{100 * row[f'{name}_low']:.1f} to {100 * row[f'{name}_high']:.1f} %"


def _lowest(rows: pd.DataFrame) -> list[pd.Series]:
    """For each kind, the row with the lowest correlation."""
    return [of_kind.loc[of_kind["correlation"].idxmin()] for _, of_kind in rows.groupby("kind", sort=False)]


def _interval(row: pd.Series) -> str:
    return f"{row['low']:.2f} to {row['high']:.2f}" if abs(row["low"]) >= 0.1 else f"{row['low']:.3f} to {row['high']:.3f}"
