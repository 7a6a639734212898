"""What dropping costs an encoder: how its embeddings compare with the dense model's, and what can still be found by them.

Every measure is one number for each sample, so that means and intervals over samples come from `base/stats.py`. Similarity is
the cosine of two embeddings. All functions take float arrays (n_samples, width) and return float64 (n_samples,).
"""

import numpy as np

from ..base.errors import LLMDropError
from ..base.stats import rank_correlation

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used


def cosines(dense: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The cosine of each embedding with the dense model's of the same sample."""
    return (_unit(dense) * _unit(other)).sum(1)


def rank_agreement(dense: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Do the samples keep their order of similarity? For each, Spearman's correlation of its similarities to all others.

    That is what a search depends on: an embedding may turn, as long as its neighbours stay its neighbours. 0 where all
    others are equally similar. Raises LLMDropError for fewer than three samples, whose others have no order.
    """
    n = len(dense)
    if n < 3:
        raise LLMDropError(f"Ranks of similarities need three samples or more, but there {'is 1' if n == 1 else f'are {n}'}.")
    others = ~np.eye(n, dtype=bool)
    before, after = (_similarities(each, each)[others].reshape(n, n - 1) for each in (dense, other))
    return rank_correlation(before, after)


def retrieval_ranks(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The place of each query's own candidate (the one at its index) among all, by similarity: 1 if it is the nearest.

    Of candidates that are equally similar it has the middle place, so that embeddings that are all the same find nothing: of 3
    candidates each has place 2.
    """
    similar = _similarities(queries, candidates)
    own = np.diag(similar)[:, None]
    return 1 + (similar > own).sum(1) + ((similar == own).sum(1) - 1) / 2


def nearest_has_label(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Does the most similar other sample have the same label (leave-one-out 1-NN)? 1 or 0; of several nearest the share."""
    similar = _similarities(embeddings, embeddings)
    np.fill_diagonal(similar, -np.inf)
    nearest = similar == similar.max(1, keepdims=True)
    same = labels[:, None] == labels[None, :]
    return (nearest & same).sum(1) / nearest.sum(1)


def guessed_label(labels: np.ndarray) -> float:
    """How often a random other sample has the same label: what 1-NN accuracy is compared with."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def _similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines (n, m). Rounded, so that equal embeddings are equally similar; no dtype of a model resolves 1e-12."""
    return np.round(_unit(a) @ _unit(b).T, 12)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """Scaled to unit length in float64. An embedding of zeros is similar to nothing."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise LLMDropError(
            "Some embeddings are not finite: this model produces infinities or NaN in this dtype. Load it in float32."
        )
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
