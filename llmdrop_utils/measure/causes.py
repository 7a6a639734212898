"""What may make an attention layer redundant: properties of each layer, measured in one pass over the calibration text.

The paper's abstract (TMLR version) names three causes: sparse attention patterns, over-smoothed token embeddings, and outputs
of small magnitude. Beside them stand what else is said to matter: growth of the residual stream, sliding windows, depth, and
what the weights alone allow. They are properties that go with redundancy; none of them is an intervention.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan, check_plans
from ..dropping.units import left, skipping
from ..models.cache_shape import cache_geometry
from ..models.families import Anatomy, family_of, find_anatomy, input_device, stream_of, tensor_of
from .guard import measuring, tokens_for
from .metrics import dots
from .weights import value_output_norm

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used

# Measured on text, by sample.
SINK = "sink"  # weight on the first token of the sample, mean over heads and over all queries but the first (Xiao et al. 2024)
ENTROPY = "entropy"  # of the attention weights, in nats, mean over the same
RANK = "rank"  # effective rank of the layer's input: low where token embeddings are over-smoothed
OUTPUT = "output"  # |attention output| / |stream|, mean over tokens
STREAM = "stream"  # log10 of the stream's mean square at the layer's input, mean over tokens: pre-norm streams grow
OF_TEXT = (SINK, ENTROPY, RANK, OUTPUT, STREAM)

# Known without a forward pass.
DISTANCE = "distance"  # layers between this one and the last
SLIDING = "sliding"  # 1 if the layer sees a sliding window, 0 if it sees all tokens
WEIGHTS = "weights"  # how much the layer's weights amplify: Frobenius norm of all heads' value-output maps, input norm included
OF_LAYER = (DISTANCE, SLIDING, WEIGHTS)


@dataclasses.dataclass(frozen=True)
class Causes:
    """Properties of every attention layer.

    per_sample: name in `OF_TEXT` -> float64 (n_samples, n_layers); NaN where a model does not tell its attention weights
    of_layer: name in `OF_LAYER` -> float64 (n_layers,); NaN where a family's weights are not named as in Llama
    """

    per_sample: dict[str, np.ndarray]
    of_layer: dict[str, np.ndarray]

    def to_json(self) -> dict:
        """Plain lists, for the store; None for NaN, which JSON does not have."""
        plain = lambda array: np.where(np.isnan(array), np.array(None), array).tolist()  # noqa: E731
        arrays = lambda values: {name: plain(array) for name, array in values.items()}  # noqa: E731
        return {"per_sample": arrays(self.per_sample), "of_layer": arrays(self.of_layer)}

    @classmethod
    def from_json(cls, value: dict) -> "Causes":
        """The inverse of `to_json`."""
        arrays = lambda values: {name: np.array(rows, dtype=float) for name, rows in values.items()}  # noqa: E731
        return cls(arrays(value["per_sample"]), arrays(value["of_layer"]))


def measure_causes(
    model: nn.Module, tokens: torch.LongTensor, on_sample: Callable[[int], None] = lambda n_tokens: None
) -> Causes:
    """Measure all of `OF_TEXT` and `OF_LAYER` on tokens (n_samples, seq_len), one sample per forward pass.

    The model attends eagerly meanwhile, so that its attention weights can be seen, and is left as it was. Numbers are formed
    in float32 or better whatever its dtype. Raises LLMDropError for wrong input, for samples of a single token, and for a
    model that lacks attention in some layer.
    """
    anatomy, tokens = find_anatomy(model), _several_tokens(model, tokens)
    if anatomy.other_mixers:
        raise LLMDropError(f"Causes cannot be measured on this {anatomy.family} model: {anatomy.other_mixers}.")
    if len(left(anatomy, "attention")) < len(anatomy):
        raise LLMDropError("Causes are measured on a model that has all its attention layers: give the dense model.")
    found: dict[str, list[list[float]]] = {name: [] for name in OF_TEXT}
    with measuring(model), _eager(model), _watched(anatomy) as seen:
        for sample in tokens:
            anatomy.decoder(input_ids=sample[None].to(input_device(model)), use_cache=False)
            for name in OF_TEXT:
                found[name].append([seen[layer][name] for layer in range(len(anatomy))])
            on_sample(sample.numel())
        of_layer = _of_layer(anatomy)
    return Causes({name: np.array(rows) for name, rows in found.items()}, of_layer)


def final_rank(
    model: nn.Module,
    tokens: torch.LongTensor,
    plans: Sequence[DropPlan],
    on_sample: Callable[[int], None] = lambda n_tokens: None,
) -> np.ndarray:
    """Effective rank of the states that the LM head reads, under each plan: float64 (n_plans, n_samples).

    Low where the model cannot tell tokens apart any more. Raises LLMDropError for wrong input and plans that do not fit.
    """
    anatomy, tokens, plans = find_anatomy(model), _several_tokens(model, tokens), check_plans(model, plans)
    ranks = np.zeros((len(plans), len(tokens)))
    with measuring(model):
        for i, plan in enumerate(plans):
            with skipping(model, plan):
                for j, sample in enumerate(tokens):
                    output = anatomy.decoder(input_ids=sample[None].to(input_device(model)), use_cache=False)
                    ranks[i, j] = effective_rank(output.last_hidden_state[0])
                    on_sample(sample.numel())
    return ranks


def effective_rank(vectors: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007) of (n, d) vectors scaled to unit length.

    1 if all point the same way, n if all are orthogonal. Scaled, since norms do so before a sub-layer reads them: otherwise the
    few tokens with huge activations would decide.
    """
    unit = nn.functional.normalize(vectors.double(), dim=-1)
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


# ---- hooks ----------------------------------------------------------------------------------------------------------------


def _several_tokens(model: nn.Module, tokens: object) -> torch.LongTensor:
    found = tokens_for(model, tokens)
    if found.shape[1] < 2:
        raise LLMDropError("Causes need samples of at least 2 tokens: a single one attends to itself alone.")
    return found


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Inside, attention is computed with weights that can be seen."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _watched(anatomy: Anatomy) -> Iterator[dict[int, dict[str, float]]]:
    """Yields layer -> name in `OF_TEXT` -> value of the sample that was read last."""
    seen: dict[int, dict[str, float]] = {i: dict.fromkeys(OF_TEXT, float("nan")) for i in range(len(anatomy))}
    streams: dict[int, torch.Tensor] = {}
    family, handles = family_of(anatomy.decoder.config), []

    def enter(index: int):
        def hook(module, args, kwargs) -> None:
            streams[index] = stream = stream_of(args, kwargs)[0]
            squares, _, _ = dots(stream, stream, 1.0, y_is_sum=False)
            seen[index][STREAM] = float((squares[squares > 0] / stream.shape[-1]).log10().mean())
            seen[index][RANK] = effective_rank(stream)

        return hook

    def weights(index: int):
        def hook(module, args, output) -> None:
            if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], torch.Tensor):
                seen[index] |= _of_weights(output[1][0])

        return hook

    def term(index: int, scale: float):
        def hook(module, args, output) -> None:
            xx, _, aa = dots(streams.pop(index), tensor_of(output)[0], scale, y_is_sum=False)
            seen[index][OUTPUT] = float((aa / xx)[xx > 0].sqrt().mean())  # a padding token's embedding may be zero

        return hook

    try:
        for index, layer in enumerate(anatomy.layers):
            attention = layer.block.get_submodule(family.attention_unit[0])
            handles += [
                layer.block.register_forward_pre_hook(enter(index), with_kwargs=True),
                attention.register_forward_hook(weights(index)),
                layer.attention.register_forward_hook(term(index, layer.scale)),
            ]
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _of_weights(weights: torch.Tensor) -> dict[str, float]:
    """Sink and entropy of attention weights (heads, queries, keys), over all queries but the first, which sees itself only."""
    later = weights[:, 1:].float()
    return {SINK: float(later[..., 0].mean()), ENTROPY: float(torch.special.entr(later).sum(-1).mean())}


# ---- what is known without a forward pass -----------------------------------------------------------------------------------


def _of_layer(anatomy: Anatomy) -> dict[str, np.ndarray]:
    windows = [window for _, window in cache_geometry(anatomy.decoder.config)]
    return {
        DISTANCE: np.arange(len(anatomy))[::-1].astype(float),
        SLIDING: np.array([float(window is not None) for window in windows]),
        WEIGHTS: np.array([value_output_norm(layer.block, anatomy.decoder.config) for layer in anatomy.layers]),
    }
