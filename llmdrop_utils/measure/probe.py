"""Hooks that reduce each sub-layer's input and output to one number per token, during the forward pass."""

import itertools

import numpy as np
import torch

from ..base.errors import LLMDropError
from ..models.families import Anatomy, stream_of, table_of, tensor_of
from .metrics import BIN_EDGES, KINDS, METRICS, dots


class Probe:
    """Hooks that reduce each sub-layer's input and output to one number per token, during the forward pass.

    Holds no more of the hidden states than the layer at hand needs. On leaving, all hooks are removed, errors included.
    first: what the first layer is called in messages, if that is not layer 0.
    """

    def __init__(self, anatomy: Anatomy, metric: str, first: int = 0):
        self.anatomy, self.first = anatomy, first
        self.takes = anatomy.layers[0].family.takes
        self.kinds = (*KINDS, "cross_attention") if anatomy.having("cross_attention") else KINDS
        self.dtype_read = next(p.dtype for p in anatomy.decoder.parameters() if p.is_floating_point())  # of pixels
        self.metric = METRICS[metric]
        self.handles: list = []
        self.eps = 0.0  # the coarsest rounding: T5 keeps a part of its MLPs in float32
        self.checked = False  # the sum of parts is compared with the whole in the first batch
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # kind -> a few rows of x and of what is added
        self.normed: list[tuple[torch.Tensor, torch.Tensor]] = []  # a few rows of what each norm on the stream reads and gives
        self.sums: list[tuple[int, str, str, torch.Tensor]] = []  # layer, parts, whole; how far they are apart, and may be

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
            if layer.cross_attention is not None and layer.cross_input is not None:
                hook = self._after_cross_attention(index, layer.scale)
                self.handles.append(layer.cross_input.register_forward_pre_hook(self._enter_cross_attention, with_kwargs=True))
                self.handles.append(layer.cross_attention.register_forward_hook(hook))
            self.handles += [norm.register_forward_hook(self._after_norm) for norm in layer.stream_norms or ()]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        self._forget()

    def _forget(self) -> None:
        self.block_input: torch.Tensor | None = None
        self.cross_input: torch.Tensor | None = None
        self.mlp_input: torch.Tensor | None = None

    def run(self, given: torch.Tensor, mask: torch.Tensor | None, device: torch.device, **more):
        """Pass a batch of tokens (B, T), or of pixels (B, channels, height, width), through the model without its head.

        more: what else it takes. Returns its output; None if the GPU ran out of memory.
        """
        self.shape: torch.Size | None = None
        self.values: dict[tuple[str, int], torch.Tensor] = {}
        self.sums.clear()
        self.normed.clear()  # by a batch that did not fit into memory
        dtype = self.dtype_read if given.is_floating_point() else given.dtype
        inputs = {self.takes[0]: given.to(device, dtype), "use_cache": False}
        if mask is not None:
            inputs |= {"attention_mask": mask.to(device), "position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(device)}
        inputs |= more
        try:
            return self.anatomy.decoder(**{name: value for name, value in inputs.items() if name in self.takes})
        except torch.OutOfMemoryError:
            self.values.clear()
            self._forget()
            return None

    def finish(self, mask: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over tokens (kinds, B, layers), tokens per sample (B,), histograms (kinds, layers, bins) of the batch.

        The tokens of an image are its patches, and those that the model adds to them.
        """
        assert self.shape is not None  # (B, T): a layer ran
        if not self.checked:
            self._check_sums()
        values = _fetch([self.values[kind, layer] for kind in self.kinds for layer in range(len(self.anatomy))])
        values = values.view(len(self.kinds), -1, *self.shape).double()
        counted = torch.ones(self.shape, dtype=torch.bool) if mask is None else mask.bool()
        bad = ~torch.isfinite(values[:, :, counted])
        if bad.any():
            layer, kind = (int(i) for i in bad.any(-1).T.nonzero()[0])  # the first layer with such values
            raise LLMDropError(
                f"The {self.kinds[kind]} of layer {self.first + layer} gives values that are not finite in {self.dtype}. "
                "Load the model in bfloat16 or float32 (float16 overflows in some models)."
            )
        weights = counted.sum(1)
        means = torch.where(counted, values, 0.0).sum(-1) / weights.clamp(min=1)
        bins = torch.bucketize(values[:, :, counted].clamp(min=1e-30).log10(), torch.tensor(BIN_EDGES[1:-1]))
        counts = torch.zeros(*values.shape[:2], len(BIN_EDGES) - 1, dtype=torch.long)
        counts.scatter_add_(-1, bins, torch.ones_like(bins))
        self.checked = True
        return means.transpose(1, 2).numpy(), weights.numpy(), counts.numpy()

    @property
    def n_tokens(self) -> int:
        """How many tokens the last batch had, padding included."""
        return 0 if self.shape is None else self.shape.numel()

    def _enter_block(self, module, args, kwargs) -> None:
        stream = stream_of(args, kwargs)
        self.block_input = self.cross_input = self.mlp_input = stream  # theirs too, unless they read their own (below)
        self.shape = stream.shape[:-1]

    def _enter_cross_attention(self, module, args, kwargs) -> None:
        self.cross_input = stream_of(args, kwargs)

    def _enter_mlp(self, module, args, kwargs) -> None:
        self.mlp_input = stream_of(args, kwargs)

    def _after_norm(self, module, args, output) -> None:
        if not self.checked:
            self.normed.append((_first_rows(args[0]), _first_rows(output)))

    def _after_attention(self, index: int, scale: float):
        def hook(module, args, output):
            self._record("attention", index, self.block_input, tensor_of(output), scale)

        return hook

    def _after_cross_attention(self, index: int, scale: float):
        def hook(module, args, output):
            self._record("cross_attention", index, self.cross_input, tensor_of(output), scale)

        return hook

    def _after_mlp(self, index: int, scale: float):
        def hook(module, args, output):
            self._record("mlp", index, self.mlp_input, tensor_of(output), scale)

        return hook

    def _leave_block(self, index: int):
        def hook(module, args, output):
            output = tensor_of(output)
            self._record("block", index, self.block_input, output, 1.0)
            if not self.checked:
                self._add_sums(index, _first_rows(output))
                self.seen.clear()
                self.normed.clear()
            self._forget()  # not held while the next layer's input is still being made

        return hook

    def _record(self, kind: str, index: int, x: torch.Tensor, y: torch.Tensor, scale: float) -> None:
        x = x.to(y.device)
        y = y if y.ndim else y.expand_as(x)  # a sub-layer that was dropped adds a single zero
        # Stays on its device until the batch is done: fetching it now would stall a GPU at every sub-layer.
        self.values[kind, index] = self.metric(*dots(x, y, scale, y_is_sum=kind == "block")).float()
        self.dtype = y.dtype
        self.eps = max(self.eps, torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps)
        if not self.checked:  # a copy: some models later add into this tensor
            self.seen[kind] = (_first_rows(x), _first_rows(y) * scale)

    def _add_sums(self, index: int, output: torch.Tensor) -> None:
        """Add up the parts of a layer, which `_check_sums` looks at once the batch is done."""
        layer = self.anatomy.layers[index]
        seen = {kind: tuple(part.to(output.device) for part in pair) for kind, pair in self.seen.items()}
        steps = [("attention", "attention", *seen["attention"])]
        if "cross_attention" in seen:
            steps.append(("cross-attention", "the cross-attention", *seen["cross_attention"]))
        steps.append(("MLP", "the MLP", *seen["mlp"]))
        x, terms = steps[0][2], [term for *_, term in steps]
        eps = 8 * self.eps
        tolerance = eps * torch.stack([x, *terms[:-1], output]).abs().max()
        if layer.stream_norms:
            tolerance = eps * torch.stack([part for step in steps for part in step[2:]]).abs().max()
            sums = self._post_norm_sums(steps, output)
        else:
            sums = [(f"stream + {' + '.join(name for name, *_ in steps)}", sum(terms, x), "the layer's output", output)]
            for (name, _, stream, term), (_, reader, read, _) in itertools.pairwise(steps):
                if layer.mlp_input is not None:
                    sums.append((f"stream + {name}", stream + term, f"what {reader} reads", read))
        for name, value, whole_name, whole in sums:
            self.sums.append((index, name, whole_name, torch.stack([(value - whole).abs().max(), tolerance])))

    def _post_norm_sums(self, steps: list[tuple], output: torch.Tensor) -> list[tuple]:
        """The same where a norm on the stream comes after each part."""
        sums, readers = [], [(f"what {reader} reads", stream) for _, reader, stream, _ in steps[1:]]
        for (name, part, stream, term), (given, normed), after in zip(
            steps, self.normed, [*readers, ("the layer's output", output)], strict=True
        ):
            sums.append((f"stream + {name}", stream + term, f"what the norm after {part} reads", given))
            sums.append((f"the norm after {part}", normed, *after))
        return sums

    def _check_sums(self) -> None:
        """x + attention + MLP must be the layer's output; otherwise `layouts.FAMILIES` is wrong about this model.

        Likewise, an MLP that comes after attention must read x + attention. Where norms act on the stream, each must read the
        sum before it and give what comes next.
        """
        found = _fetch([pair for *_, pair in self.sums]).tolist() if self.sums else []
        for (index, name, whole_name, _), (error, tolerance) in zip(self.sums, found, strict=True):
            if np.isfinite(error) and error > tolerance:
                raise LLMDropError(
                    f"Layer {self.first + index} of this {self.anatomy.family} model does not add up: {name} differs from "
                    f"{whole_name} by {error:.3g} (at most {tolerance:.3g} is rounding). Its entry in "
                    f"{table_of(self.anatomy.family)} is wrong for this model."
                )


def _fetch(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape, stacked in the CPU's memory: one transfer where all are on the same device."""
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return torch.stack(tensors).cpu()


def _first_rows(x: torch.Tensor) -> torch.Tensor:
    """The first tokens of (..., d), copied, in float64."""
    return x.reshape(-1, x.shape[-1])[:8].clone().double()
