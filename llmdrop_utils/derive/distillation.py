"""Distillation: a model learns the next-token distributions of another one, its teacher (Hinton et al. 2015, arXiv:1503.02531).

The loss of a step is the divergence of the model's distributions q from those p of its teacher:

    mean over positions of KL(p || q) = sum over the vocabulary of p (log p - log q)
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan
from ..dropping.units import dropped, skipping
from ..measure.guard import tokens_for
from ..measure.passes import SOFTMAX_ROWS
from ..models.families import find_anatomy, input_device
from .model import check_whole

Applied = Callable[[nn.Module, DropPlan], AbstractContextManager]


def teacher_of(model: nn.Module, teacher: nn.Module, tokens: torch.LongTensor) -> tuple[nn.Module, Applied]:
    """The teacher of a model, and how a plan is applied to the model beside it.

    teacher: one of its own; or the model, as it is now and outside of any plan. Then the two share all weights, those of what
    is dropped, too, which stay where they are. Raises LLMDropError for a teacher of another vocabulary, for one that cannot
    read samples as long as these tokens, for one whose weights are offloaded or no plain tensors, and for a model that lacks
    what a plan dropped.
    """
    applied: Applied = dropped
    if teacher is model:
        check_whole(find_anatomy(model))
        teacher, applied = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()}), skipping
    ours, theirs = (find_anatomy(each).decoder.config.vocab_size for each in (model, teacher))
    if ours != theirs:
        what = f"The teacher knows {theirs} tokens, but this model {ours}"
        raise LLMDropError(f"{what}: no distributions to compare. Give the dense model that this one was made from.")
    tokens_for(teacher, tokens)  # it may know fewer positions
    for name, weight in teacher.named_parameters():
        if weight.is_meta or type(weight.data) is not torch.Tensor:
            raise LLMDropError(
                f"The teacher's weight {name} is offloaded or quantised, so it cannot be told which teacher it is. Load the "
                "dense model as it was stored, on one device or on several that hold it."
            )
    return teacher, applied


@torch.no_grad()
def predicted(teacher: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The teacher's logits (B, T, vocabulary), where it computes."""
    return teacher(input_ids.to(input_device(teacher)), use_cache=False).logits


class Divergence(torch.autograd.Function):
    """Mean KL(target || logits), a float32 scalar, of (..., vocabulary) logits: float64 if they are.

    Values and gradients, (q - p) / n, are formed together for some positions at a time. Autograd would hold all logits of a
    batch several times over in float32, and take five times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wide, rows = torch.promote_types(logits.dtype, torch.float32), SOFTMAX_ROWS[logits.device.type]
        gradient, n = torch.empty_like(logits, memory_format=torch.contiguous_format), logits[..., 0].numel()
        total = torch.zeros((), dtype=wide, device=logits.device)
        for ours, theirs, out in zip(*(t.flatten(0, -2).split(rows) for t in (logits, target, gradient)), strict=True):
            log_q, log_p = (part - part.logsumexp(-1, keepdim=True) for part in (ours.to(wide), theirs.to(wide)))
            p = log_p.exp()
            total += torch.where(p == 0, 0, p * (log_p - log_q)).sum()  # what both rule out adds nothing
            out.copy_((log_q.exp() - p) / n)
        ctx.save_for_backward(gradient)
        return total / n

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * above[0], None
