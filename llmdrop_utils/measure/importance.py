"""Importance of each sub-layer: how much it changes the residual stream (paper, eq. 1-6).

    importance = 1 - cosine(X, Y),  Y = X + what the sub-layer adds

X is the stream that the sub-layer reads, before its norm; norm and sub-layer are one unit. For a block, X and Y are the
layer's raw input and output. One forward pass without LM head gives all three kinds.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..dropping.units import available
from ..models.families import Anatomy, find_anatomy, input_device
from .guard import as_mask, input_for, measuring
from .metrics import BIN_EDGES, METRICS
from .probe import Probe
from .rotary import rotary_following
from .targets import pairs_for

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used


@dataclasses.dataclass(frozen=True, repr=False)
class Importance:
    """Importance of every attention, MLP and block of a model on one set of tokens.

    per_sample: kind -> float64 (n_samples, n_layers), mean importance over the tokens of each sample; of an encoder-decoder
        "cross_attention" too, which is NaN in the layers of its encoder
    weights: int64 (n_samples,), tokens counted in each sample; of an encoder-decoder (n_samples, n_layers): those of the source
        in the layers of the encoder, those of the target in the layers of the decoder
    histogram: kind -> int64 (n_layers, n_bins), number of tokens by importance (`BIN_EDGES`)
    model: identity of the model, where `load_model` loaded it
    gone: (kind, layer) of all that the model lacked, or had a map for: it cannot be dropped again. Also what is no attention
        (Mamba, a convolution): its importance stands under "attention", and no method chooses it
    """

    per_sample: dict[str, np.ndarray]
    weights: np.ndarray
    histogram: dict[str, np.ndarray]
    model: str | None = None
    gone: frozenset[tuple[str, int]] = frozenset()

    def __repr__(self) -> str:
        n_samples, n_layers = self.per_sample["block"].shape
        n_tokens = (self.weights if self.weights.ndim == 1 else self.weights[:, [0, -1]]).sum()
        return f"Importance({', '.join(self.per_sample)}: {n_layers} layers, {n_samples} samples, {n_tokens} tokens)"

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
        with np.errstate(invalid="ignore"):  # a layer that has none of this kind
            share = np.pad(counts / counts[:, -1:], ((0, 0), (1, 0)))
        return 10.0 ** np.stack([np.interp(q, layer, BIN_EDGES) for layer in share])

    def first(self, n: int) -> "Importance":
        """The same, from the first n samples (without the histogram, which is kept for all samples only)."""
        fewer = {kind: rows[:n] for kind, rows in self.per_sample.items()}
        return dataclasses.replace(self, per_sample=fewer, weights=self.weights[:n], histogram={})

    def to_json(self) -> dict:
        """Plain lists, for the store."""
        arrays = lambda values: {kind: array.tolist() for kind, array in values.items()}  # noqa: E731
        nothing = np.array(None)  # JSON has no NaN
        known = {kind: np.where(np.isnan(rows), nothing, rows) for kind, rows in self.per_sample.items()}
        return {
            "per_sample": arrays(known),
            "weights": self.weights.tolist(),
            "histogram": arrays(self.histogram),
            "gone": [list(place) for place in sorted(self.gone)],
        }

    @classmethod
    def from_json(cls, value: dict, model: str | None = None) -> "Importance":
        """The inverse of `to_json`; a record's key says which model it was. Old records, of whole models, have no "gone"."""
        gone = frozenset((kind, layer) for kind, layer in value.get("gone", []))
        per_sample = {kind: np.array(rows, dtype=np.float64) for kind, rows in value["per_sample"].items()}
        histogram = {kind: np.array(rows) for kind, rows in value["histogram"].items()}
        return cls(per_sample, np.array(value["weights"]), histogram, model, gone)


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
    model: a transformers causal language model, encoder or encoder-decoder of a family in `layouts.FAMILIES`,
        `encoder_layouts.ENCODERS` or `encoder_decoder_layouts.ENCODER_DECODERS`, of any dtype, on any device or several,
        offloaded or not. It is left as it was.
    tokens: LongTensor (n_samples, seq_len), or other integers of that shape, or what a tokenizer returns with its mask. For a
        vision encoder pixels, float (n_samples, channels, height, width), or what an image processor returns; its tokens are
        the patches of an image and those that the model adds (a class token, registers). For an encoder-decoder sources and
        targets, as `prepare_pairs` makes them; layers of the encoder read the source, those of the decoder the target.
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
    anatomy, batch_size = find_anatomy(model), whole(batch_size, "The batch size")
    if metric not in METRICS:
        raise LLMDropError(f"Unknown metric {metric!r}. The metrics are: {', '.join(METRICS)}.")
    halves = _halves(model, anatomy, tokens, attention_mask, metric)
    if any(half.mask is not None for half in halves) and rotary_following(model):
        batch_size = 1  # samples of other lengths would change each other
    n_samples, device, start = len(halves[0].given), input_device(model), 0
    with measuring(model), contextlib.ExitStack() as stack:
        for half in halves:
            stack.enter_context(half.probe)
        while start < n_samples:
            rows = slice(start, start + batch_size)
            if not _read(halves, rows, device):
                if batch_size == 1:
                    raise LLMDropError(f"Out of GPU memory with a single {_described(halves)}. Use smaller ones.")
                batch_size //= 2
                torch.cuda.empty_cache()
                print(f"out of GPU memory: going on with a batch of {batch_size}", file=sys.stderr)
                continue
            for half in halves:
                half.finish(rows)
            start += len(halves[0].given[rows])
            on_batch(sum(half.probe.n_tokens for half in halves))
    kinds = halves[-1].probe.kinds
    there = {kind: available(anatomy, kind) for kind in kinds}
    gone = frozenset((kind, layer) for kind in kinds for layer in range(len(anatomy)) if layer not in there[kind])
    per_sample = {kind: np.concatenate([half.of_kind(kind, half.means, np.nan) for half in halves], 1) for kind in kinds}
    histogram = {kind: np.concatenate([half.of_kind(kind, half.histogram, 0) for half in halves], 0) for kind in kinds}
    weights = halves[0].weights
    if len(halves) > 1:
        weights = np.concatenate([np.tile(half.weights[:, None], len(half.anatomy)) for half in halves], 1)
    return Importance(per_sample, weights, histogram, getattr(model, "llmdrop_identity", None), gone)


class _Half:
    """A stack of layers, what it reads, and what is found: all of a model; or of an encoder-decoder the encoder, and then the
    decoder."""

    def __init__(self, anatomy: Anatomy, metric: str, given: torch.Tensor, mask: torch.Tensor | None, first: int = 0):
        self.anatomy, self.given, self.mask = anatomy, given, mask
        self.probe = Probe(anatomy, metric, first)
        shape = len(self.probe.kinds), len(anatomy)
        self.means = np.zeros((shape[0], len(given), shape[1]))
        self.weights = np.zeros(len(given), dtype=np.int64)
        self.histogram = np.zeros((*shape, len(BIN_EDGES) - 1), dtype=np.int64)

    def mask_of(self, rows: slice) -> torch.Tensor | None:
        return None if self.mask is None else self.mask[rows]

    def finish(self, rows: slice) -> None:
        """Take over what the probe has seen of these samples."""
        self.means[:, rows], self.weights[rows], counts = self.probe.finish(self.mask_of(rows))
        self.histogram += counts

    def of_kind(self, kind: str, found: np.ndarray, nothing: float) -> np.ndarray:
        """What was found of a kind; `nothing` everywhere if these layers have none."""
        kinds = self.probe.kinds
        return found[kinds.index(kind)] if kind in kinds else np.full_like(found[0], nothing)


def _halves(model: torch.nn.Module, anatomy: Anatomy, tokens: Any, mask: torch.Tensor | None, metric: str) -> list[_Half]:
    if anatomy.encoder is not None:
        if mask is not None:
            raise LLMDropError("Give the attention mask of an encoder-decoder with its source, as prepare_pairs does.")
        pairs, n = pairs_for(model, tokens), anatomy.n_source
        encoder = dataclasses.replace(anatomy, decoder=anatomy.encoder, layers=anatomy.layers[:n], encoder=None)
        decoder = dataclasses.replace(anatomy, layers=anatomy.layers[n:], encoder=None)
        return [
            _Half(encoder, metric, pairs.source, pairs.source_mask),
            _Half(decoder, metric, pairs.target, pairs.target_mask, first=n),
        ]
    if mask is None and isinstance(tokens, Mapping):
        tokens, mask = tokens.get("input_ids", tokens.get("pixel_values")), tokens.get("attention_mask")
    given = input_for(model, tokens)
    return [_Half(anatomy, metric, given, None if mask is None else as_mask(mask, given).to("cpu", torch.long))]


def _read(halves: list[_Half], rows: slice, device: torch.device) -> bool:
    """Pass samples through all halves, of which the second reads what the first gives; False if the GPU ran out of memory."""
    more: dict[str, torch.Tensor] = {}
    for half in halves:
        mask = half.mask_of(rows)
        output = half.probe.run(half.given[rows], mask, device, **more)
        if output is None:
            return False
        if mask is not None and half is not halves[-1]:
            more = {"encoder_hidden_states": output.last_hidden_state, "encoder_attention_mask": mask.to(device)}
    return True


def _described(halves: list[_Half]) -> str:
    """One sample, for messages."""
    given = halves[0].given
    if len(halves) > 1:
        return f"pair of {given.shape[1]} and {halves[1].given.shape[1]} tokens"
    return f"image of {tuple(given.shape[1:])}" if given.ndim == 4 else f"sample of {given.shape[1]} tokens"
