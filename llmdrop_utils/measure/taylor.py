"""What the loss would change by, to first order, if a sub-layer were dropped: the gradient of a gate at its output."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..models.families import Anatomy, find_anatomy, input_device, tensor_of
from .guard import frozen, tokens_for

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used


def measure_taylor(
    model: nn.Module,
    tokens: torch.LongTensor,
    batch_size: int = 4,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
) -> dict[str, np.ndarray]:
    """|dL/dg| for a gate g = 1 before the term that a sub-layer adds, x + g a: mean over samples (after Molchanov et al. 2017).

    L is the mean loss of next tokens in a sample, in nats. Dropping sets g to zero, so -dL/dg is the first-order estimate of
    what it does to L. A block has one gate for both of its terms.

    Returns kind ("attention", "mlp", "block") -> float64 (n_layers,). Takes a forward and a backward pass, with the activations
    of a batch in memory. The model is left as it was. Raises LLMDropError for wrong input and for gradients that are infinite.
    """
    anatomy = find_anatomy(model)
    tokens, batch_size = tokens_for(model, tokens), whole(batch_size, "The batch size")
    if tokens.shape[1] < 2:
        raise LLMDropError("A loss takes samples of at least 2 tokens: one to read, and one to predict.")
    sums = np.zeros((2, len(anatomy)))
    both = np.zeros(len(anatomy))
    start = 0
    with frozen(model):
        while start < len(tokens):
            batch = tokens[start : start + batch_size]
            try:
                found = _slopes(model, anatomy, batch.to(input_device(model)))
            except torch.OutOfMemoryError as error:
                if batch_size == 1:
                    what = f"the gradients of a single sample of {tokens.shape[1]} tokens"
                    raise LLMDropError(f"Out of GPU memory with {what}. Use shorter samples.") from error
                batch_size //= 2
                torch.cuda.empty_cache()
                print(f"out of GPU memory: going on with a batch of {batch_size}", file=sys.stderr)
                continue
            sums += np.abs(found).sum(-1)
            both += np.abs(found.sum(0)).sum(-1)
            start += len(batch)
            on_batch(batch.numel())
    if not (np.isfinite(sums).all() and np.isfinite(both).all()):
        raise LLMDropError("The gradients of this model are not finite. Load it in bfloat16 or float32.")
    return {"attention": sums[0] / len(tokens), "mlp": sums[1] / len(tokens), "block": both / len(tokens)}


def _slopes(model: nn.Module, anatomy: Anatomy, batch: torch.Tensor) -> np.ndarray:
    """dL/dg of attention and MLP in each layer, of each sample: float64 (2, n_layers, batch)."""
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    gates = torch.ones(2, len(anatomy), len(batch), dtype=wide, device=batch.device, requires_grad=True)
    with _gated(anatomy, gates):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].to(wide)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:].to(logits.device), reduction="none").mean(1)
    (gradient,) = torch.autograd.grad(losses.sum(), gates)  # of each sample, since samples share no gate
    return gradient.double().cpu().numpy()


@contextlib.contextmanager
def _gated(anatomy: Anatomy, gates: torch.Tensor) -> Iterator[None]:
    """Inside, what attention and MLP of each layer add is multiplied by a gate: gates (2, n_layers, batch)."""

    def gate(row: int, index: int):
        def hook(module, args, output):
            term = tensor_of(output)
            if not term.ndim:  # dropped
                return output
            factor = gates[row, index].to(term.device, term.dtype)
            factor = factor.repeat_interleave(len(term) // len(factor))  # some families put all tokens in one row each
            gated = term * factor.view(-1, *[1] * (term.ndim - 1))
            return (gated, *output[1:]) if isinstance(output, tuple) else gated

        return hook

    handles = [
        module.register_forward_hook(gate(row, index))
        for index, layer in enumerate(anatomy.layers)
        for row, module in enumerate((layer.attention, layer.mlp))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
