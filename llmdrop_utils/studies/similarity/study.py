"""Notebook 01: importance of every sub-layer on each corpus, and what follows from it."""

import itertools
import json

import numpy as np
import pandas as pd

from ...base import files, stats
from ...base.errors import NotAvailable
from ...base.store import Store
from ...measure.importance import KINDS, Importance, drop_order
from ...models.locate import LocatedModel, locate_available
from ...report.tables import Tables, write_tables
from ..profile import Profile
from ..queue import measure_all, not_run_table, one_of_many
from ..run import available_corpora, importance_of, importance_work

MAYBE_EMPTY = {  # columns of the tables that can be without rows
    "published": ["model", "corpus", "kind", "n_drop", "shared", "by_chance", "theirs", "ours"],
    "sample_agreement": ["model", "corpus", "kind", "n_samples", "groups", "correlation", "low", "high"],
    "corpora": ["model", "a", "b", "kind", "correlation", "low", "high"],
}

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


def similarity(profile: Profile, force: bool = False) -> Tables:
    """Notebook 01: importance of every attention, MLP and block of the profile's models on its corpora.

    Measures what is missing (everything if `force`), writes the tables to data/results/<run>/01_similarity and returns
    them. Raises LLMDropError if the profile's only model cannot be used; of several models, one that cannot is listed in
    the table `not_run` with the reason.
    """
    store, not_run = Store(), {}
    corpora = available_corpora(profile, not_run)
    located, missing = locate_available(profile.models)
    not_run |= missing
    work = []
    for model in located:
        with one_of_many(model, profile.several, not_run):
            work += importance_work(model, corpora, profile)
    measure_all(work, store, force, profile.several, not_run)
    work = [item for item in work if item.model.name not in not_run]
    if not work:
        raise NotAvailable("Nothing could be measured:\n" + "\n".join(not_run.values()))
    rows: dict[str, list[dict]] = {}
    provenance = []
    for _, items in itertools.groupby(work, key=lambda item: item.model):
        items = list(items)
        scores = {item.corpus: importance_of(item, store) for item in items}
        for table, more in _similarity_rows(scores, items[0].model, profile).items():
            rows.setdefault(table, []).extend({"model": items[0].model.name} | row for row in more)
        provenance += [store.get(item.keys[0])["provenance"] for item in items]
    tables = {name: pd.DataFrame(r) if r else pd.DataFrame(columns=MAYBE_EMPTY[name]) for name, r in rows.items()}
    tables["not_run"] = not_run_table(not_run)
    return write_tables(tables, files.RESULTS / profile.run / "01_similarity", provenance)


# ---- notebook 01: from scores to rows -------------------------------------------------------------------------------


def _similarity_rows(scores: dict[str, Importance], located: LocatedModel, profile: Profile) -> dict[str, list[dict]]:
    """All rows of one model, without the column `model`. `scores`: corpus -> all samples of it."""
    calibration = profile.calibration
    first = next(iter(scores))
    same_n = {corpus: s.first(calibration.n_samples) for corpus, s in scores.items()}
    draws = {  # kinds share their samples, corpora do not
        corpus: {kind: stats.bootstrap_means(s.per_sample[kind], s.weights, seed) for kind in KINDS}
        for seed, (corpus, s) in enumerate(same_n.items())
    }
    return {
        "importance": _importance_rows(same_n, draws),
        "order": [
            {"corpus": corpus, "kind": kind, "position": position, "layer": layer}
            for corpus, s in same_n.items()
            for kind in KINDS
            for position, layer in enumerate(s.order(kind))
        ],
        "distribution": [
            {"corpus": corpus, "kind": kind, "layer": layer} | dict(zip(QUANTILES, map(float, values), strict=True))
            for corpus, s in scores.items()
            for kind in KINDS
            for layer, values in enumerate(s.quantiles(kind, list(QUANTILES.values())))
        ],
        "contrast": _contrast_rows(same_n, draws),
        "depth": _depth_rows(same_n, draws),
        "corpora": _corpora_rows(same_n, draws, profile.n_drop),
        "sample_count": _sample_count_rows(scores[first], calibration.sample_counts, first),
        "sample_agreement": _sample_agreement_rows(scores[first], calibration.sample_counts, first),
        "published": _published_rows(same_n, located),
    }


def _importance_rows(scores, draws) -> list[dict]:
    rows = []
    for corpus, s in scores.items():
        for kind in KINDS:
            low, high = stats.interval(draws[corpus][kind])
            for layer, value in enumerate(s.importance[kind]):
                rows.append({"corpus": corpus, "kind": kind, "layer": layer, "n_samples": len(s.weights),
                             "importance": value, "low": low[layer], "high": high[layer]})  # fmt: skip
    return rows


def _contrast_rows(scores, draws) -> list[dict]:
    """Mean importance over layers of attention minus that of MLP or block, paired by sample."""
    rows = []
    for corpus, s in scores.items():
        for other in ("mlp", "block"):
            attention, compared = s.importance["attention"], s.importance[other]
            low, high = stats.interval((draws[corpus]["attention"] - draws[corpus][other]).mean(1))
            rows.append(
                {
                    "corpus": corpus,
                    "other": other,
                    "attention": attention.mean(),
                    "compared": compared.mean(),
                    "attention_median": np.median(attention),
                    "compared_median": np.median(compared),
                    "difference": (attention - compared).mean(),
                    "low": low,
                    "high": high,
                    "layers_lower": int((attention < compared).sum()),
                    "n_layers": len(attention),
                }
            )
    return rows


def _depth_rows(scores, draws) -> list[dict]:
    """Rank correlation of depth and importance over all layers but the last, which the paper excepts.

    Negative where deeper layers are more redundant.
    """
    rows = []
    for corpus, s in scores.items():
        for kind in KINDS:
            depth = np.arange(s.importance[kind].size - 1)
            low, high = stats.interval(stats.rank_correlation(depth, draws[corpus][kind][:, :-1]))
            correlation = float(stats.rank_correlation(depth, s.importance[kind][:-1]))
            rows.append({"corpus": corpus, "kind": kind, "correlation": correlation, "low": low, "high": high})
    return rows


def _corpora_rows(scores, draws, n_drop: list[int]) -> list[dict]:
    """Agreement of two corpora: rank correlation of importance, and how many of the n most droppable they share."""
    rows = []
    for a, b in itertools.combinations(scores, 2):
        for kind in KINDS:
            correlation = float(stats.rank_correlation(scores[a].importance[kind], scores[b].importance[kind]))
            low, high = stats.interval(stats.rank_correlation(draws[a][kind], draws[b][kind]))
            orders = scores[a].order(kind), scores[b].order(kind)
            shared = {f"shared_{n}": stats.overlap(*orders, n) for n in n_drop if n <= len(orders[0])}
            rows.append({"a": a, "b": b, "kind": kind, "correlation": correlation, "low": low, "high": high} | shared)
    return rows


def _sample_count_rows(scores: Importance, counts: list[int], corpus: str) -> list[dict]:
    """Importance from the first n samples (Fig. 10)."""
    return [
        {"corpus": corpus, "kind": kind, "n_samples": n, "layer": layer, "importance": value}
        for n in counts
        for kind in KINDS
        for layer, value in enumerate(scores.first(n).importance[kind])
    ]


def _sample_agreement_rows(scores: Importance, counts: list[int], corpus: str) -> list[dict]:
    """Rank correlation between a group of n samples and all the others, over three disjoint groups or more."""
    rows = []
    for n in (n for n in counts if 3 * n <= len(scores.weights)):
        for kind in KINDS:
            values = stats.group_agreement(scores.per_sample[kind], scores.weights, n)
            rows.append({"corpus": corpus, "kind": kind, "n_samples": n, "groups": len(values),
                         "correlation": values.mean(), "low": values.min(), "high": values.max()})  # fmt: skip
    return rows


def _published_rows(scores: dict[str, Importance], located: LocatedModel) -> list[dict]:
    """Our n most droppable layers against the drop lists that the authors published for this model."""
    claims = json.loads((files.ROOT / "data" / "paper_claims.json").read_text(encoding="utf-8"))
    rows = []
    for published in claims["published_drop_lists"]:
        kind = {"Attn": "attention", "MLP": "mlp", "Block": "block"}.get(published["method"])
        if published["model"] != located.published_lists or kind is None:
            continue
        theirs = published["layers"]
        for corpus, s in scores.items():
            ours = drop_order(s.importance[kind])[: len(theirs)]
            rows.append({"corpus": corpus, "kind": kind, "n_drop": len(theirs), "shared": len({*ours} & {*theirs}),
                         "by_chance": len(theirs) ** 2 / s.importance[kind].size,
                         "theirs": " ".join(map(str, theirs)), "ours": " ".join(map(str, ours))})  # fmt: skip
    return rows
