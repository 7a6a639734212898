"""Notebook 12, what is measured: importance in encoders and encoder-decoders; and under each of several plans what embeddings
are worth, or what a target costs."""

import dataclasses

import numpy as np

from ...dropping.plan import DropPlan
from ...dropping.units import skipping
from ...measure.embeddings import (
    VERSION,
    cosines,
    guessed_label,
    nearest_has_label,
    rank_agreement,
    retrieval_ranks,
)
from ...measure.encoding import embed, prepare
from ...measure.importance import VERSION as IMPORTANCE_VERSION
from ...measure.importance import measure_importance
from ...measure.targets import VERSION as TARGETS_VERSION
from ...measure.targets import prepare_pairs, score_targets
from ...models.encoder_decoders import load_located_other
from ...sources.images import fingerprint_images, load_images
from ...sources.pairs import fingerprint_texts, load_pairs
from ..work import METRIC, Work

COSINE, AGREEMENT = "cosine with dense", "rank agreement"
FIRST, RANK, NEAREST = "found first", "reciprocal rank", "nearest neighbour"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Samples of one corpus or one set of images.

    Of n passages come the first halves and then the second halves; images have labels.
    """

    name: str
    inputs: tuple  # texts, or pixels uint8 (height, width, 3)
    labels: np.ndarray | None  # of images
    groups: np.ndarray  # int: of each passage, or image; samples of one group are drawn together

    @classmethod
    def of_passages(cls, corpus: str, n: int, words: int, skip: int) -> "DataSet":
        """n passages, after the first `skip`."""
        firsts, seconds = zip(*load_pairs(corpus, n, words, skip), strict=True)
        return cls(corpus, (*firsts, *seconds), None, np.arange(n))

    @classmethod
    def of_images(cls, name: str, n: int, skip: int) -> "DataSet":
        """n images, after the first `skip`."""
        images = load_images(name, n, skip)
        return cls(name, tuple(images.pixels), images.labels, images.groups)

    @property
    def fingerprint(self) -> str:
        """sha256 of the samples and their labels, in hex."""
        if self.labels is None:
            return fingerprint_texts(self.inputs)
        return fingerprint_texts([fingerprint_images(self.inputs), *map(str, self.labels)])

    @property
    def chances(self) -> dict[str, float]:
        """What is found by guessing: by a random order of n passages, or by a random other image."""
        n = len(self.groups)
        if self.labels is not None:
            return {NEAREST: guessed_label(self.labels)}
        return {FIRST: 1 / n, RANK: float((1 / np.arange(1, n + 1)).mean())}

    def compare(self, dense: np.ndarray, other: np.ndarray) -> dict[str, list[float]]:
        """Measure -> a number for each passage, or image, from embeddings of all inputs (n_inputs, width).

        A passage has the mean of its halves; what is looked for is its second half, by its first.
        """
        kept = {COSINE: cosines(dense, other), AGREEMENT: rank_agreement(dense, other)}
        if self.labels is not None:
            found = kept | {NEAREST: nearest_has_label(other, self.labels)}
        else:
            n = len(self.groups)
            ranks = retrieval_ranks(other[:n], other[n:])
            found = {measure: each.reshape(2, n).mean(0) for measure, each in kept.items()}
            found |= {FIRST: ranks == 1, RANK: 1 / ranks}
        return {measure: np.asarray(each, dtype=np.float64).tolist() for measure, each in found.items()}


def given_to(model, reader, data: DataSet) -> dict:
    """What a model reads of a data set; of an encoder-decoder the first halves of passages, and as targets the second ones."""
    if not model.config.is_encoder_decoder:
        return prepare(reader, data.inputs)
    n = len(data.groups)
    return prepare_pairs(reader, data.inputs[:n], data.inputs[n:])


def given_by(model, reader, data: DataSet, batch_size: int = 16) -> np.ndarray:
    """What a model gives for it: an embedding of each input, float64 (n_inputs, width); of an encoder-decoder what each target
    costs, in nats per token, (n,)."""
    if not model.config.is_encoder_decoder:
        return embed(model, reader, data.inputs, batch_size)
    return score_targets(model, given_to(model, reader, data), batch_size).nll


@dataclasses.dataclass(frozen=True)
class EncoderWork(Work):
    """What is measured while an encoder or an encoder-decoder reads a data set."""

    data: DataSet
    batch_size: int

    def loaded(self):
        return load_located_other(self.model, self.dtype)

    @property
    def tokens_to_pass(self) -> int:
        return len(self.data.inputs)

    @property
    def about(self) -> dict:
        return {"data": self.data.name, "samples": len(self.data.inputs), "samples_sha256": self.data.fingerprint}


@dataclasses.dataclass(frozen=True)
class EncoderImportanceWork(EncoderWork):
    """Importance of all sub-layers."""

    @property
    def keys(self) -> list[dict]:
        return [self._key("encoder importance", IMPORTANCE_VERSION, read=self.data.fingerprint, metric=METRIC)]

    def measure(self, model, tokenizer, update) -> list[dict]:
        scores = measure_importance(model, given_to(model, tokenizer, self.data), self.batch_size, metric=METRIC)
        update(len(self.data.inputs))
        return [scores.to_json()]


@dataclasses.dataclass(frozen=True)
class UnderPlans(EncoderWork):
    """What is measured under each of several plans."""

    plans: tuple[DropPlan, ...]

    def _keys(self, what: str, version: int) -> list[dict]:
        return [self._key(what, version, read=self.data.fingerprint, plan=plan.key.to_json()) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        return len(self.data.inputs) * len(self.plans)


@dataclasses.dataclass(frozen=True)
class EmbeddingWork(UnderPlans):
    """What is found by the embeddings under each of several plans, and how they compare with the dense model's."""

    @property
    def keys(self) -> list[dict]:
        return self._keys("embeddings", VERSION)

    def measure(self, model, tokenizer, update) -> list[dict]:
        dense = embed(model, tokenizer, self.data.inputs, self.batch_size)
        values = []
        for plan in self.plans:
            with skipping(model, plan):
                other = embed(model, tokenizer, self.data.inputs, self.batch_size) if plan.n_drop else dense
            values.append(self.data.compare(dense, other))
            update(len(self.data.inputs))
        return values


@dataclasses.dataclass(frozen=True)
class TargetWork(UnderPlans):
    """What targets cost an encoder-decoder under each of several plans, given their sources."""

    @property
    def keys(self) -> list[dict]:
        return self._keys("targets", TARGETS_VERSION)

    def measure(self, model, tokenizer, update) -> list[dict]:
        given, values = given_to(model, tokenizer, self.data), []
        for plan in self.plans:
            with skipping(model, plan):
                scores = score_targets(model, given, self.batch_size)
            values.append({"nll": scores.nll.tolist(), "tokens": scores.tokens.tolist()})
            update(len(self.data.inputs))
        return values
