"""Importance of each sub-layer: how much it changes the residual stream (paper, eq. 1-6).

    importance = 1 - cosine(X, Y),  Y = X + what the sub-layer adds

X is the stream that the sub-layer reads, before its norm; norm and sub-layer are one unit. For a block, X and Y are the
layer's raw input and output. One forward pass without LM head gives all three kinds.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..dropping.units import available
from ..models.families import find_anatomy, input_device
from .guard import input_for, measuring
from .metrics import BIN_EDGES, KINDS, METRICS
from .probe import Probe
from .rotary import rotary_following

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used


@dataclasses.dataclass(frozen=True, repr=False)
class Importance:
    """Importance of every attention, MLP and block of a model on one set of tokens.

    per_sample: kind -> float64 (n_samples, n_layers), mean importance over the tokens of each sample
    weights: int64 (n_samples,), tokens counted in each sample
    histogram: kind -> int64 (n_layers, n_bins), number of tokens by importance (`BIN_EDGES`)
    model: identity of the model, where `load_model` loaded it
    gone: ("attention" | "mlp" | "block", layer) of all that the model lacked, or had a map for: it cannot be dropped again.
        Also what is no attention (Mamba, a convolution): its importance stands under "attention", and no method chooses it
    """

    per_sample: dict[str, np.ndarray]
    weights: np.ndarray
    histogram: dict[str, np.ndarray]
    model: str | None = None
    gone: frozenset[tuple[str, int]] = frozenset()

    def __repr__(self) -> str:
        n_samples, n_layers = self.per_sample["block"].shape
        return f"Importance({', '.join(self.per_sample)}: {n_layers} layers, {n_samples} samples, {self.weights.sum()} tokens)"

    @property
    def importance(self) -> dict[str, np.ndarray]:
        """kind -> float64 (n_layers,): mean of 1 - cosine(X, Y) over all tokens."""
        return {kind: np.average(rows, axis=0, weights=self.weights) for kind, rows in self.per_sample.items()}

    @property
    def similarity(self) -> dict[str, np.ndarray]:
        """kind -> float64 (n_layers,): mean of cosine(X, Y) over all tokens."""
        return {kind: 1.0 - values for kind, values in self.importance.items()}

    @property
    def fingerprint(self) -> str:
        """sha256 of the scores, in hex: what a drop plan records about where it came from."""
        content = hashlib.sha256()
        for kind in sorted(self.per_sample):
            content.update(kind.encode() + np.ascontiguousarray(self.per_sample[kind], dtype=np.float64).tobytes())
        return content.hexdigest()

    def order(self, kind: str) -> tuple[int, ...]:
        """Layer indices, most droppable (least important) first; ties by lower index. Without what was dropped already."""
        return tuple(layer for layer in drop_order(self.importance[kind]) if (kind, layer) not in self.gone)

    def quantiles(self, kind: str, q: list[float]) -> np.ndarray:
        """Quantiles of importance over tokens, float64 (n_layers, len(q)), interpolated within bins (12 % wide)."""
        counts = np.cumsum(self.histogram[kind], axis=1)
        share = np.pad(counts / counts[:, -1:], ((0, 0), (1, 0)))
        return 10.0 ** np.stack([np.interp(q, layer, BIN_EDGES) for layer in share])

    def first(self, n: int) -> "Importance":
        """The same, from the first n samples (without the histogram, which is kept for all samples only)."""
        fewer = {kind: rows[:n] for kind, rows in self.per_sample.items()}
        return dataclasses.replace(self, per_sample=fewer, weights=self.weights[:n], histogram={})

    def to_json(self) -> dict:
        """Plain lists, for the store."""
        arrays = lambda values: {kind: array.tolist() for kind, array in values.items()}  # noqa: E731
        return {
            "per_sample": arrays(self.per_sample),
            "weights": self.weights.tolist(),
            "histogram": arrays(self.histogram),
            "gone": [list(place) for place in sorted(self.gone)],
        }

    @classmethod
    def from_json(cls, value: dict, model: str | None = None) -> "Importance":
        """The inverse of `to_json`; a record's key says which model it was. Old records, of whole models, have no "gone"."""
        arrays = lambda values: {kind: np.array(rows) for kind, rows in values.items()}  # noqa: E731
        gone = frozenset((kind, layer) for kind, layer in value.get("gone", []))
        return cls(arrays(value["per_sample"]), np.array(value["weights"]), arrays(value["histogram"]), model, gone)


def drop_order(importance: np.ndarray) -> tuple[int, ...]:
    """Indices of a (n,) array, least important first; ties by lower index."""
    return tuple(int(i) for i in np.argsort(importance, kind="stable"))


def measure_importance(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    batch_size: int = 4,
    attention_mask: torch.Tensor | None = None,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
    metric: str = "cosine",
) -> Importance:
    """Importance of every attention, MLP and block, in one forward pass without LM head (paper, eq. 1-6).

    Parameters
    ----------
    model: a transformers causal language model or encoder of a family in `layouts.FAMILIES` or `encoder_layouts.ENCODERS`, of
        any dtype, on any device or several, offloaded or not. It is left as it was.
    tokens: LongTensor (n_samples, seq_len), or other integers of that shape, or what a tokenizer returns with its mask. For a
        vision encoder pixels, float (n_samples, channels, height, width), or what an image processor returns; its tokens are
        the patches of an image and those that the model adds (a class token, registers).
    batch_size: samples per forward pass. On a GPU that runs out of memory it is halved, with a message.
    attention_mask: (n_samples, seq_len), nonzero where a token counts; None counts all. Padding may be on either side:
        positions are counted from the first token that counts.
    on_batch: called after each batch with the number of tokens done, for a progress bar.
    metric: "cosine", 1 - cosine(X, Y); the baseline "relative magnitude", |Y - X| / |Y| (paper, Table 7); or another of
        `metrics.METRICS`.

    Whatever the dtype of the model, products are formed in float32, cosines and means in float64: bfloat16 has only four
    values in [0.99, 1]. What a dropped model lacks adds nothing and has importance zero; a map in its place has that of what
    it adds. Raises LLMDropError for wrong input and if the model produces infinities.
    """
    anatomy = find_anatomy(model)
    if attention_mask is None and isinstance(tokens, Mapping):
        tokens, attention_mask = tokens.get("input_ids", tokens.get("pixel_values")), tokens.get("attention_mask")
    given, batch_size = input_for(model, tokens), whole(batch_size, "The batch size")
    attention_mask = None if attention_mask is None else _as_mask(attention_mask, given)
    if metric not in METRICS:
        raise LLMDropError(f"Unknown metric {metric!r}. The metrics are: {', '.join(METRICS)}.")
    if attention_mask is not None:
        attention_mask = attention_mask.to("cpu", torch.long)
        if rotary_following(model):
            batch_size = 1  # samples of other lengths would change each other
    n_samples, n_bins = len(given), len(BIN_EDGES) - 1
    means = np.zeros((len(KINDS), n_samples, len(anatomy)))
    weights = np.zeros(n_samples, dtype=np.int64)
    histogram = np.zeros((len(KINDS), len(anatomy), n_bins), dtype=np.int64)
    device = input_device(model)
    start = 0
    with measuring(model), Probe(anatomy, metric) as probe:
        while start < n_samples:
            rows = slice(start, start + batch_size)
            mask = None if attention_mask is None else attention_mask[rows]
            if not probe.run(given[rows], mask, device):
                if batch_size == 1:
                    what = f"image of {tuple(given.shape[1:])}" if given.ndim == 4 else f"sample of {given.shape[1]} tokens"
                    raise LLMDropError(f"Out of GPU memory with a single {what}. Use smaller ones.")
                batch_size //= 2
                torch.cuda.empty_cache()
                print(f"out of GPU memory: going on with a batch of {batch_size}", file=sys.stderr)
                continue
            means[:, rows], weights[rows], counts = probe.finish(mask)
            histogram += counts
            start += len(given[rows])
            on_batch(probe.shape.numel())
    there = {kind: available(anatomy, kind) for kind in KINDS}
    gone = frozenset((kind, layer) for kind in KINDS for layer in range(len(anatomy)) if layer not in there[kind])
    by_kind = lambda array: {kind: array[k] for k, kind in enumerate(KINDS)}  # noqa: E731
    return Importance(by_kind(means), weights, by_kind(histogram), getattr(model, "llmdrop_identity", None), gone)


def _as_mask(given: object, tokens: torch.Tensor) -> torch.Tensor:
    try:
        mask = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LLMDropError(f"The attention mask must have the shape of the tokens {tuple(tokens.shape)}: {error}.") from None
    if tokens.is_floating_point():
        raise LLMDropError("Images have no padding: leave the attention mask away.")
    if mask.shape != tokens.shape or not bool(mask.bool().any(1).all()):
        raise LLMDropError(
            f"The attention mask must have the shape of the tokens {tuple(tokens.shape)} and leave at least one token "
            f"in each sample; found {tuple(mask.shape)}."
        )
    return mask
