"""Importance of each sub-layer: how much it changes the residual stream (paper, eq. 1-6).

    importance = 1 - cosine(X, Y),  Y = X + what the sub-layer adds

X is the stream that the sub-layer reads, before its norm; norm and sub-layer are one unit. For a block, X and Y are the
layer's raw input and output. One forward pass without LM head gives all three kinds.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable

import numpy as np
import torch

from .anatomy import Anatomy, find_anatomy
from .dropping import left
from .workspace import LLMDropError

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used
KINDS = ("attention", "mlp", "block")

# Importance of single tokens is counted in bins of equal width in log10, from 1e-7 (the resolution of float32) to 2.
BIN_EDGES = np.linspace(-7.0, np.log10(2.0), 147)
# Rows are handled in pieces that stay in a CPU's cache, or that keep a GPU busy; temporary memory is this many floats.
PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclasses.dataclass(frozen=True, repr=False)
class Importance:
    """Importance of every attention, MLP and block of a model on one set of tokens.

    per_sample: kind -> float64 (n_samples, n_layers), mean importance over the tokens of each sample
    weights: int64 (n_samples,), tokens counted in each sample
    histogram: kind -> int64 (n_layers, n_bins), number of tokens by importance (`BIN_EDGES`)
    model: identity of the model, where `load_model` loaded it
    gone: ("attention" | "mlp" | "block", layer) of all that the model lacked already, which cannot be dropped again
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
        """Layer indices, most droppable (least important) first; ties by lower index. What is gone already is left out."""
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
        }

    @classmethod
    def from_json(cls, value: dict, model: str | None = None) -> "Importance":
        """The inverse of `to_json`; a record's key says which model it was."""
        arrays = lambda values: {kind: np.array(rows) for kind, rows in values.items()}  # noqa: E731
        return cls(arrays(value["per_sample"]), np.array(value["weights"]), arrays(value["histogram"]), model)


def drop_order(importance: np.ndarray) -> tuple[int, ...]:
    """Indices of a (n,) array, least important first; ties by lower index."""
    return tuple(int(i) for i in np.argsort(importance, kind="stable"))


def measure_importance(
    model: torch.nn.Module,
    tokens: torch.LongTensor,
    batch_size: int = 4,
    attention_mask: torch.Tensor | None = None,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
    metric: str = "cosine",
) -> Importance:
    """Importance of every attention, MLP and block, in one forward pass without LM head (paper, eq. 1-6).

    Parameters
    ----------
    model: a transformers causal language model of a family in `anatomy.FAMILIES`, of any dtype, on any device or
        several, offloaded or not. It is left as it was.
    tokens: LongTensor (n_samples, seq_len).
    batch_size: samples per forward pass. On a GPU that runs out of memory it is halved, with a message.
    attention_mask: (n_samples, seq_len), nonzero where a token counts; None counts all. Padding may be on either side:
        positions are counted from the first token that counts.
    on_batch: called after each batch with the number of tokens done, for a progress bar.
    metric: "cosine", 1 - cosine(X, Y); or the baseline "relative magnitude", |Y - X| / |Y| (paper, Table 7).

    Whatever the dtype of the model, products are formed in float32, cosines and means in float64: bfloat16 has only four
    values in [0.99, 1]. What is gone from a dropped model adds nothing and has importance zero. Raises LLMDropError for wrong
    input and if the model produces infinities.
    """
    anatomy = find_anatomy(model)
    _check(anatomy, tokens, attention_mask, batch_size)
    if metric not in METRICS:
        raise LLMDropError(f"Unknown metric {metric!r}. The metrics are: {', '.join(METRICS)}.")
    if attention_mask is not None:
        attention_mask = attention_mask.to("cpu", torch.long)
    n_samples, n_bins = len(tokens), len(BIN_EDGES) - 1
    means = np.zeros((len(KINDS), n_samples, len(anatomy)))
    weights = np.zeros(n_samples, dtype=np.int64)
    histogram = np.zeros((len(KINDS), len(anatomy), n_bins), dtype=np.int64)
    device = model.get_input_embeddings().weight.device
    device = device if device.type != "meta" else torch.device("cpu")  # offloaded: accelerate moves inputs itself
    start = 0
    with torch.inference_mode(), _evaluating(model), _Probe(anatomy, metric) as probe:
        while start < n_samples:
            rows = slice(start, start + batch_size)
            mask = None if attention_mask is None else attention_mask[rows]
            if not probe.run(tokens[rows], mask, device):
                if batch_size == 1:
                    raise LLMDropError(
                        f"Out of GPU memory with a single sample of {tokens.shape[1]} tokens. Use shorter samples."
                    )
                batch_size //= 2
                torch.cuda.empty_cache()
                print(f"out of GPU memory: going on with a batch of {batch_size}", file=sys.stderr)
                continue
            means[:, rows], weights[rows], counts = probe.finish(mask)
            histogram += counts
            start += len(tokens[rows])
            on_batch(tokens[rows].numel())
    there = {kind: left(anatomy, kind) for kind in ("attention", "mlp")}
    there["block"] = sorted({*there["attention"], *there["mlp"]})
    gone = frozenset((kind, layer) for kind in KINDS for layer in range(len(anatomy)) if layer not in there[kind])
    by_kind = lambda array: {kind: array[k] for k, kind in enumerate(KINDS)}  # noqa: E731
    return Importance(by_kind(means), weights, by_kind(histogram), getattr(model, "llmdrop_identity", None), gone)


class _Probe:
    """Hooks that reduce each sub-layer's input and output to one number per token, as the forward pass goes by.

    Holds no more of the hidden states than the layer at hand. All hooks go when the block is left, errors included.
    """

    def __init__(self, anatomy: Anatomy, metric: str):
        self.anatomy = anatomy
        self.metric = METRICS[metric]
        self.handles: list = []
        self.checked = False  # the sum of parts is compared with the whole in the first batch
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # kind -> a few rows of x and of what is added

    def __enter__(self):
        for index, layer in enumerate(self.anatomy.layers):
            self.handles += [
                layer.block.register_forward_pre_hook(self._enter_block, with_kwargs=True),
                layer.attention.register_forward_hook(self._after_attention(index, layer.scale)),
                layer.mlp.register_forward_hook(self._after_mlp(index, layer.scale)),
                layer.block.register_forward_hook(self._leave_block(index)),
            ]
            if layer.mlp_input is not None:
                self.handles.append(layer.mlp_input.register_forward_pre_hook(self._enter_mlp, with_kwargs=True))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        self.block_input = self.mlp_input = None

    def run(self, tokens: torch.Tensor, mask: torch.Tensor | None, device: torch.device) -> bool:
        """Pass a batch of tokens (B, T) through the decoder; False if a GPU's memory did not suffice."""
        self.shape = tokens.shape
        self.values: dict[tuple[str, int], torch.Tensor] = {}
        padding = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            padding = {"attention_mask": mask.to(device), "position_ids": positions.to(device)}
        try:
            self.anatomy.decoder(input_ids=tokens.to(device), use_cache=False, **padding)
        except torch.OutOfMemoryError:
            self.values.clear()
            self.block_input = self.mlp_input = None
            return False
        return True

    def finish(self, mask: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over tokens (kinds, B, layers), tokens per sample (B,), histograms (kinds, layers, bins) of the batch."""
        by_kind = [[self.values[kind, layer].cpu() for layer in range(len(self.anatomy))] for kind in KINDS]
        values = torch.stack([torch.stack(rows) for rows in by_kind]).view(len(KINDS), -1, *self.shape).double()
        counted = torch.ones(self.shape, dtype=torch.bool) if mask is None else mask.bool()
        bad = ~torch.isfinite(values[:, :, counted])
        if bad.any():
            layer, kind = (int(i) for i in bad.any(-1).T.nonzero()[0])  # the first layer that goes wrong
            raise LLMDropError(
                f"The {KINDS[kind]} of layer {layer} gives values that are not finite in {self.dtype}. "
                "Load the model in bfloat16 or float32 (float16 overflows in some models)."
            )
        weights = counted.sum(1)
        means = torch.where(counted, values, 0.0).sum(-1) / weights.clamp(min=1)
        bins = torch.bucketize(values[:, :, counted].clamp(min=1e-30).log10(), torch.tensor(BIN_EDGES[1:-1]))
        counts = torch.zeros(*values.shape[:2], len(BIN_EDGES) - 1, dtype=torch.long)
        counts.scatter_add_(-1, bins, torch.ones_like(bins))
        self.checked = True
        return means.transpose(1, 2).numpy(), weights.numpy(), counts.numpy()

    def _enter_block(self, module, args, kwargs) -> None:
        self.block_input = self.mlp_input = _stream(args, kwargs)  # the MLP's stream, unless it reads its own (below)

    def _enter_mlp(self, module, args, kwargs) -> None:
        self.mlp_input = _stream(args, kwargs)

    def _after_attention(self, index: int, scale: float):
        def hook(module, args, output):
            self._record("attention", index, self.block_input, _tensor(output), scale)

        return hook

    def _after_mlp(self, index: int, scale: float):
        def hook(module, args, output):
            self._record("mlp", index, self.mlp_input, _tensor(output), scale)

        return hook

    def _leave_block(self, index: int):
        def hook(module, args, output):
            output = _tensor(output)
            self._record("block", index, self.block_input, output, 1.0)
            if not self.checked:
                self._check_sum(index, _first_rows(output))
                self.seen.clear()
            self.block_input = self.mlp_input = None  # not held while the next layer's input is still being made

        return hook

    def _record(self, kind: str, index: int, x: torch.Tensor, y: torch.Tensor, scale: float) -> None:
        x = x.to(y.device)
        y = y if y.ndim else y.expand_as(x)  # a sub-layer that was dropped adds a single zero
        # Stays on its device until the batch is done: fetching it here would stall a GPU at every sub-layer.
        self.values[kind, index] = self.metric(*_dots(x, y, scale, y_is_sum=kind == "block")).float()
        self.dtype = y.dtype
        if not self.checked:  # a copy: some models go on to add into this tensor
            self.seen[kind] = (_first_rows(x), _first_rows(y) * scale)

    def _check_sum(self, index: int, output: torch.Tensor) -> None:
        """x + attention + MLP must be the layer's output; otherwise `anatomy.FAMILIES` is wrong about this model.

        Likewise, an MLP that comes after attention must read x + attention.
        """
        (x, attention), (mlp_stream, mlp) = (
            (part.to(output.device) for part in self.seen[kind]) for kind in ("attention", "mlp")
        )
        tolerance = 8 * torch.finfo(self.dtype).eps * float(torch.stack([x, attention, output]).abs().max())
        sums = [("stream + attention + MLP", x + attention + mlp, "the layer's output", output)]
        if self.anatomy.layers[index].mlp_input is not None:
            sums.append(("stream + attention", x + attention, "what the MLP reads", mlp_stream))
        for name, value, whole_name, whole in sums:
            error = float((value - whole).abs().max())
            if np.isfinite(error) and error > tolerance:
                raise LLMDropError(
                    f"Layer {index} of this {self.anatomy.family} model does not add up: {name} differs from {whole_name} by "
                    f"{error:.3g} (at most {tolerance:.3g} is rounding). Its entry in FAMILIES in llmdrop_utils/anatomy.py "
                    "is wrong for this model."
                )


def _dots(x: torch.Tensor, y: torch.Tensor, scale: float, y_is_sum: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x.x, x.a and a.a, each float64 (tokens,), for x (..., d) and a = scale * y, or a = y - x if `y_is_sum`."""
    width = x.shape[-1]
    x, y = x.reshape(-1, width), y.reshape(-1, width)
    step = max(1, PIECE.get(x.device.type, PIECE["cuda"]) // width)
    dots = torch.empty(3, len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), step):
        p, q = x[start : start + step].to(_at_least_float32(x)), y[start : start + step].to(_at_least_float32(y))
        a = q - p if y_is_sum else q
        for row, (u, v) in zip(dots, ((p, p), (p, a), (a, a)), strict=True):
            row[start : start + step] = (u * v).sum(-1)
    xx, xa, aa = dots
    return (xx, xa, aa) if y_is_sum else (xx, xa * scale, aa * scale**2)


def _one_minus_cosine(xx: torch.Tensor, xa: torch.Tensor, aa: torch.Tensor) -> torch.Tensor:
    """1 - cosine(x, x + a).

    Written with a instead of x + a, so that rounding does not grow as the cosine nears 1:
    sin^2 = (|x|^2 |a|^2 - (x.a)^2) / (|x|^2 |x + a|^2), 1 - cos = sin^2 / (1 + cos). A zero vector has cosine 0.
    """
    product = xx * (xx + 2 * xa + aa).clamp(min=0)
    cosine = ((xx + xa) / product.sqrt()).clamp(-1, 1)
    sine2 = ((xx * aa - xa * xa) / product).clamp(0, 1)
    importance = torch.where(cosine > 0, sine2 / (1 + cosine), 1 - cosine)
    return torch.where(product == 0, 1.0, importance)


def _relative_magnitude(xx: torch.Tensor, xa: torch.Tensor, aa: torch.Tensor) -> torch.Tensor:
    """|a| / |x + a|; 1 where both are zero vectors."""
    ratio = (aa / (xx + 2 * xa + aa).clamp(min=0)).sqrt()
    return torch.where(ratio.isnan(), 1.0, ratio)


METRICS = {"cosine": _one_minus_cosine, "relative magnitude": _relative_magnitude}


def _at_least_float32(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _first_rows(x: torch.Tensor) -> torch.Tensor:
    """The first tokens of (..., d), copied, in float64."""
    return x.reshape(-1, x.shape[-1])[:8].clone().double()


def _tensor(output) -> torch.Tensor:
    """Modules of some families return a tuple; `output[0]` on a tensor would silently be the first sample."""
    return output[0] if isinstance(output, tuple) else output


def _stream(args: tuple, kwargs: dict) -> torch.Tensor:
    """The residual stream among a module's inputs: the first one, or the keyword that transformers gives it."""
    return args[0] if args else kwargs["hidden_states"]


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module):
    """Without dropout while measuring; the mode is put back."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _check(anatomy: Anatomy, tokens: torch.Tensor, mask: torch.Tensor | None, batch_size: int) -> None:
    if batch_size < 1:
        raise LLMDropError(f"The batch size must be 1 or more, but is {batch_size}.")
    if tokens.ndim != 2 or not len(tokens) or tokens.is_floating_point():
        raise LLMDropError(f"Expected token ids (n_samples, seq_len), found {tokens.dtype} {tuple(tokens.shape)}.")
    config = anatomy.decoder.config
    longest = getattr(config, "max_position_embeddings", None)  # GPT-2 calls it n_positions, and transformers maps it
    if longest is not None and tokens.shape[1] > longest:
        raise LLMDropError(f"Samples of {tokens.shape[1]} tokens are too long for this model, which knows {longest} positions.")
    vocabulary = config.vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise LLMDropError(
            f"Token ids run from {low} to {high}, but this model knows 0 to {vocabulary - 1}: were they made with "
            "another model's tokenizer?"
        )
    if mask is not None and (mask.shape != tokens.shape or not bool(mask.bool().any(1).all())):
        raise LLMDropError(
            f"The attention mask must have the shape of the tokens {tuple(tokens.shape)} and leave at least one token "
            f"in each sample; found {tuple(mask.shape)}."
        )
