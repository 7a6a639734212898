"""Hooks that reduce each sub-layer's input and output to one number per token, during the forward pass."""

import numpy as np
import torch

from ..base.errors import LLMDropError
from ..models.families import Anatomy, family_of, stream_of, table_of, tensor_of
from .metrics import BIN_EDGES, KINDS, METRICS, dots


class Probe:
    """Hooks that reduce each sub-layer's input and output to one number per token, during the forward pass.

    Holds no more of the hidden states than the layer at hand needs. On leaving, all hooks are removed, errors included.
    """

    def __init__(self, anatomy: Anatomy, metric: str):
        self.anatomy = anatomy
        self.takes = family_of(anatomy.decoder.config).takes
        self.dtype_read = next(p.dtype for p in anatomy.decoder.parameters() if p.is_floating_point())  # of pixels
        self.metric = METRICS[metric]
        self.handles: list = []
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
            self.handles += [norm.register_forward_hook(self._after_norm) for norm in layer.stream_norms or ()]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        self.block_input = self.mlp_input = None

    def run(self, given: torch.Tensor, mask: torch.Tensor | None, device: torch.device) -> bool:
        """Pass a batch of tokens (B, T), or of pixels (B, channels, height, width), through the model without its head; False
        if the GPU ran out of memory."""
        self.shape: torch.Size | None = None
        self.values: dict[tuple[str, int], torch.Tensor] = {}
        self.sums.clear()
        self.normed.clear()  # by a batch that did not fit into memory
        dtype = self.dtype_read if given.is_floating_point() else given.dtype
        inputs = {self.takes[0]: given.to(device, dtype), "use_cache": False}
        if mask is not None:
            inputs |= {"attention_mask": mask.to(device), "position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(device)}
        try:
            self.anatomy.decoder(**{name: value for name, value in inputs.items() if name in self.takes})
        except torch.OutOfMemoryError:
            self.values.clear()
            self.block_input = self.mlp_input = None
            return False
        return True

    def finish(self, mask: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means over tokens (kinds, B, layers), tokens per sample (B,), histograms (kinds, layers, bins) of the batch.

        The tokens of an image are its patches, and those that the model adds to them.
        """
        assert self.shape is not None  # (B, T): a layer ran
        if not self.checked:
            self._check_sums()
        values = _fetch([self.values[kind, layer] for kind in KINDS for layer in range(len(self.anatomy))])
        values = values.view(len(KINDS), -1, *self.shape).double()
        counted = torch.ones(self.shape, dtype=torch.bool) if mask is None else mask.bool()
        bad = ~torch.isfinite(values[:, :, counted])
        if bad.any():
            layer, kind = (int(i) for i in bad.any(-1).T.nonzero()[0])  # the first layer with such values
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
        self.block_input = self.mlp_input = stream_of(args, kwargs)  # the MLP's stream, unless it reads its own (below)
        self.shape = self.block_input.shape[:-1]

    def _enter_mlp(self, module, args, kwargs) -> None:
        self.mlp_input = stream_of(args, kwargs)

    def _after_norm(self, module, args, output) -> None:
        if not self.checked:
            self.normed.append((_first_rows(args[0]), _first_rows(output)))

    def _after_attention(self, index: int, scale: float):
        def hook(module, args, output):
            self._record("attention", index, self.block_input, tensor_of(output), scale)

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
            self.block_input = self.mlp_input = None  # not held while the next layer's input is still being made

        return hook

    def _record(self, kind: str, index: int, x: torch.Tensor, y: torch.Tensor, scale: float) -> None:
        x = x.to(y.device)
        y = y if y.ndim else y.expand_as(x)  # a sub-layer that was dropped adds a single zero
        # Stays on its device until the batch is done: fetching it now would stall a GPU at every sub-layer.
        self.values[kind, index] = self.metric(*dots(x, y, scale, y_is_sum=kind == "block")).float()
        self.dtype = y.dtype
        if not self.checked:  # a copy: some models later add into this tensor
            self.seen[kind] = (_first_rows(x), _first_rows(y) * scale)

    def _add_sums(self, index: int, output: torch.Tensor) -> None:
        """Add up the parts of a layer, which `_check_sums` looks at once the batch is done."""
        (x, attention), (mlp_stream, mlp) = (
            (part.to(output.device) for part in self.seen[kind]) for kind in ("attention", "mlp")
        )
        tolerance = 8 * torch.finfo(self.dtype).eps * torch.stack([x, attention, output]).abs().max()
        sums = [("stream + attention + MLP", x + attention + mlp, "the layer's output", output)]
        if self.anatomy.layers[index].mlp_input is not None:
            sums.append(("stream + attention", x + attention, "what the MLP reads", mlp_stream))
        if self.anatomy.layers[index].stream_norms:
            (after_attention, normed), (after_mlp, last) = self.normed
            tolerance = 8 * torch.finfo(self.dtype).eps * torch.stack([x, attention, mlp_stream, mlp]).abs().max()
            sums = [
                ("stream + attention", x + attention, "what the norm after attention reads", after_attention),
                ("the norm after attention", normed, "what the MLP reads", mlp_stream),
                ("stream + MLP", mlp_stream + mlp, "what the norm after the MLP reads", after_mlp),
                ("the norm after the MLP", last, "the layer's output", output),
            ]
        for name, value, whole_name, whole in sums:
            self.sums.append((index, name, whole_name, torch.stack([(value - whole).abs().max(), tolerance])))

    def _check_sums(self) -> None:
        """x + attention + MLP must be the layer's output; otherwise `layouts.FAMILIES` is wrong about this model.

        Likewise, an MLP that comes after attention must read x + attention. Where norms act on the stream, each must read the
        sum before it and give what comes next.
        """
        found = _fetch([pair for *_, pair in self.sums]).tolist() if self.sums else []
        for (index, name, whole_name, _), (error, tolerance) in zip(self.sums, found, strict=True):
            if np.isfinite(error) and error > tolerance:
                raise LLMDropError(
                    f"Layer {index} of this {self.anatomy.family} model does not add up: {name} differs from {whole_name} by "
                    f"{error:.3g} (at most {tolerance:.3g} is rounding). Its entry in {table_of(self.anatomy.family)} is wrong "
                    "for this model."
                )


def _fetch(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape, stacked in the CPU's memory: one transfer where all are on the same device."""
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return torch.stack(tensors).cpu()


def _first_rows(x: torch.Tensor) -> torch.Tensor:
    """The first tokens of (..., d), copied, in float64."""
    return x.reshape(-1, x.shape[-1])[:8].clone().double()
