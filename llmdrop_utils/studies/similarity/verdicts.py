"""Rules of notebook 01: importance."""

from collections.abc import Iterator

from ...base.stats import difference_interval
from ...report.rules import Comparison, Finding
from ...report.tables import Tables
from ...report.verdicts import advice, check, kth_least, lowest_of, span, triple
from ...sources.catalogue import exact_name


@check
def attention_most_redundant(tables: Tables) -> Iterator[Finding]:
    for model, rows in tables["contrast"].groupby("model", sort=False):
        text = []
        for other, group in rows.groupby("other", sort=False):
            worst = group.loc[group["high"].idxmax()]
            text.append(
                f"attention {group['attention'].mean():.3f} against {other} {group['compared'].mean():.3f} "
                f"(medians {group['attention_median'].mean():.3f} and {group['compared_median'].mean():.3f}; weakest on "
                f"{worst['corpus']}: {worst['difference']:.3f}, {span(worst)}; lower in "
                f"{group['layers_lower'].min()} of {worst['n_layers']} layers or more)"
            )
        compared = [
            Comparison(f"attention minus {r.other} on {r.corpus}", r.difference, r.low, r.high, below=0, form=".3f",
                       size=_samples(tables, model))
            for r in rows.itertuples()
        ]  # fmt: skip
        yield Finding(model, "; ".join(text), compared)


@check
def near_zero_attention(tables: Tables, layers: float, importance: float) -> Iterator[Finding]:
    for model, rows in tables["importance"].groupby("model", sort=False):
        compared, worst = [], []
        for corpus, of_corpus in rows.groupby("corpus", sort=False):
            last = {kind: kth_least(of_kind, layers) for kind, of_kind in of_corpus.groupby("kind", sort=False)}
            attention = triple(last["attention"], "importance")
            worst.append(last["attention"])
            shared = {"size": last["attention"]["n_samples"], "form": ".4f"}
            compared.append(Comparison(f"the last of these on {corpus}", *attention, at_most=importance, **shared))
            for other in ("mlp", "block"):
                difference = difference_interval(attention, triple(last[other], "importance"))
                compared.append(Comparison(f"attention minus {other} at this rank on {corpus}", *difference, below=0, **shared))
        most = max(worst, key=lambda row: row["importance"])
        text = f"the least important {layers:.0%} of the attention layers have an importance of at most ".replace("%", " %")
        least = worst[0]["importance"]
        mlp, block = (least - c.value for c in compared[1:3])
        others = f"the last of them is at {least:.4f}, of as many MLPs at {mlp:.4f} and of as many blocks at {block:.4f}"
        yield Finding(
            model,
            f"{text}{most['importance']:.4f} ({span(most, 4)}, on {most['corpus']}); on {worst[0]['corpus']} {others}",
            compared,
        )


@check
def deeper_more_redundant(tables: Tables, correlation: float) -> Iterator[Finding]:
    for model, rows in tables["depth"].groupby("model", sort=False):
        mean = rows.groupby("kind")["correlation"].mean()
        text = [
            f"{kind} {mean[kind]:+.2f} (over corpora {group['correlation'].min():+.2f} to {group['correlation'].max():+.2f})"
            for kind, group in rows.groupby("kind", sort=False)
        ]
        compared = [
            Comparison(
                f"{r.kind} on {r.corpus}", r.correlation, r.low, r.high, at_most=correlation, size=_samples(tables, model)
            )
            for r in rows.itertuples()
        ]
        yield Finding(model, "correlation of depth and importance: " + ", ".join(text), compared)


@check
def corpus_does_not_matter(tables: Tables, correlation: float) -> Iterator[Finding]:
    for model, rows in tables["corpora"].groupby("model", sort=False):
        text = [f"{r['kind']} {r['correlation']:.2f} ({span(r)}, {r['a']} and {r['b']})" for r in lowest_of(rows)]
        compared = [
            Comparison(f"{r.kind}, {r.a} and {r.b}", r.correlation, r.low, r.high, at_least=correlation,
                       size=_samples(tables, model))
            for r in rows.itertuples()
        ]  # fmt: skip
        yield Finding(model, "lowest correlation: " + ", ".join(text), compared)


@check
def sample_count_does_not_matter(tables: Tables, samples: int, correlation: float) -> Iterator[Finding]:
    for model, rows in tables["sample_agreement"].groupby("model", sort=False):
        nearest = min(rows["n_samples"].unique(), key=lambda n: abs(n - samples))
        of_size = rows[rows["n_samples"] == nearest]
        groups = of_size["groups"].iloc[0]
        text = [f"{r.kind} {r.correlation:.2f} ({r.low:.2f} to {r.high:.2f})" for r in of_size.itertuples()]
        compared = [
            Comparison(
                r.kind, r.correlation, r.low, r.high, at_least=correlation, size=groups, unit=f"groups of {nearest} samples"
            )
            for r in of_size.itertuples()
        ]
        yield Finding(model, f"mean correlation of {groups} groups of {nearest}: " + ", ".join(text), compared)


@check
def published_lists(tables: Tables, shared: float) -> Iterator[Finding]:
    published, importance = tables["published"], tables["importance"]
    for model in importance["model"].unique():
        rows = published[published["model"] == model] if len(published) else published
        if rows.empty:
            yield Finding(
                model,
                f"no published drop list is known for {exact_name(model)}; `make reproduce PROFILE=gpu` tests three models",
            )
            continue
        rows = rows[rows["corpus"] == rows["corpus"].iloc[0]]
        text = [f"{r.kind}-{r.n_drop} {r.shared}/{r.n_drop} (by chance {r.by_chance:.1f})" for r in rows.itertuples()]
        compared = [
            Comparison(f"{r.kind}-{r.n_drop}", r.shared / r.n_drop, r.low / r.n_drop, r.high / r.n_drop, at_least=shared,
                       size=_samples(tables, model), form=".0%")
            for r in rows.itertuples()
        ]  # fmt: skip
        yield Finding(model, ", ".join(text), compared)


def _samples(tables: Tables, model: str) -> float:
    """How many samples the importance of a model is measured on."""
    rows = tables["importance"]
    return float(rows[rows["model"] == model]["n_samples"].min())


@advice("01_similarity")
def what_to_do(tables: Tables) -> str:
    """How to choose layers on a model like these: corpus, samples, and where the savings are."""
    text = []
    agreement, corpora = tables["sample_agreement"], tables["corpora"]
    for model, contrast in tables["contrast"].groupby("model", sort=False):
        layers = contrast["n_layers"].iloc[0]
        lower = contrast[contrast["other"] == "mlp"]["layers_lower"].min()
        found = (
            f"**{model}**: begin with attention. It changes the stream less than MLP in at least {lower} of {layers} layers."
        )
        enough = agreement[
            (agreement["model"] == model) & (agreement["kind"] == "attention") & (agreement["correlation"] >= 0.95)
        ]
        if len(enough):
            found += f" {enough['n_samples'].min()} samples are enough to rank its layers (mean rank correlation 0.95 or more)."
        pairs = corpora[(corpora["model"] == model) & (corpora["kind"] == "attention")] if len(corpora) else corpora
        if len(pairs):
            worst = pairs.loc[pairs["low"].idxmin()]
            agree = f"{worst['correlation']:.2f} ({span(worst)})"
            if worst["low"] < 0.8:
                found += f" Calibrate on text like that of your users: {worst['a']} and {worst['b']} agree only by {agree}."
            else:
                found += (
                    f" The corpus hardly matters: the two that agree least, {worst['a']} and {worst['b']}, agree by {agree}."
                )
        text.append(found)
    return "\n\n".join(text)
