"""Rules of notebook 01: importance."""

from collections.abc import Iterator

from ...report.tables import Tables
from ...report.verdicts import Finding, advice, check, lowest_of, span


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
                f"{group['layers_lower'].min()} to {group['layers_lower'].max()} of {worst['n_layers']} layers)"
            )
        yield model, bool((rows["high"] < 0).all()), "; ".join(text)


@check
def near_zero_attention(tables: Tables, layers: float, cosine: float) -> Iterator[Finding]:
    order = tables["order"].query("kind == 'attention'")
    distribution = tables["distribution"].query("kind == 'attention'")
    for model, rows in order.merge(distribution, on=["model", "corpus", "layer"]).groupby("model", sort=False):
        worst = {}
        for corpus, group in rows.groupby("corpus", sort=False):
            worst[corpus] = group[group["position"] < max(1, int(layers * len(group)))]["q95"].max()
        corpus = max(worst, key=lambda name: worst[name])
        text = f"95 % of tokens keep a cosine above {1 - worst[corpus]:.3f} in these layers, or more (least on {corpus})"
        yield model, worst[corpus] < 1 - cosine, text


@check
def deeper_more_redundant(tables: Tables, correlation: float) -> Iterator[Finding]:
    for model, rows in tables["depth"].groupby("model", sort=False):
        mean = rows.groupby("kind")["correlation"].mean()
        holds = bool((mean <= correlation).all() and (rows["high"] < 0).all())
        text = [
            f"{kind} {mean[kind]:+.2f} (over corpora {group['correlation'].min():+.2f} to {group['correlation'].max():+.2f})"
            for kind, group in rows.groupby("kind", sort=False)
        ]
        yield model, holds, "correlation of depth and importance: " + ", ".join(text)


@check
def corpus_does_not_matter(tables: Tables, correlation: float) -> Iterator[Finding]:
    for model, rows in tables["corpora"].groupby("model", sort=False):
        lowest = lowest_of(rows)
        text = [f"{r['kind']} {r['correlation']:.2f} ({span(r)}, {r['a']} and {r['b']})" for r in lowest]
        yield model, all(r["low"] >= correlation for r in lowest), "lowest correlation: " + ", ".join(text)


@check
def sample_count_does_not_matter(tables: Tables, samples: int, correlation: float) -> Iterator[Finding]:
    for model, rows in tables["sample_agreement"].groupby("model", sort=False):
        nearest = min(rows["n_samples"].unique(), key=lambda n: abs(n - samples))
        lowest = lowest_of(rows[rows["n_samples"] == nearest])
        text = [f"{r['kind']} {r['correlation']:.2f} (single groups {span(r)})" for r in lowest]
        holds = all(r["correlation"] >= correlation for r in lowest)
        yield model, holds, f"mean correlation of {lowest[0]['groups']} groups of {nearest}: " + ", ".join(text)


@check
def published_lists(tables: Tables, shared: float) -> Iterator[Finding]:
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
        yield model, bool((rows["shared"] >= shared * rows["n_drop"]).all()), ", ".join(text)


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
