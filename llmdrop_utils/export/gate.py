"""The parity gate: what another program predicts from an export, beside the dense model with its terms set to zero."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan, check_plan
from ..models.families import input_device, stream_of, tensor_of
from . import llamacpp

PROMPTS = (
    "The history of science is the study of how people came to know the world. Its first chapters were written",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return",
    "In 1998 the town had 12,450 inhabitants; by 2004 it had",
)
N_TOKENS = 64
TOP = 5
EXACT = 0.002  # nats: of the same numbers in float32


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far an export is from the reference."""

    log_probability: float  # largest difference among the reference's 5 most likely tokens, nats
    divergence: float  # KL of the export from the reference, mean over prompts, nats
    equal_tokens: int | None = None  # greedy tokens after the first prompt that are the reference's own
    followed: float | None = None  # by how much less likely than the best the least likely of them is, in the reference; nats
    cached_bytes: int | None = None  # keys and values of one token


@contextlib.contextmanager
def silenced(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """Inside, the terms of what the plan drops are computed and then set to zero (or to the map), by hooks.

    The whole model runs, with its caches, and no module is replaced: it shares nothing with `dropped`. Maps read what the
    attention reads in families whose norms come first.
    """
    anatomy = check_plan(model, plan)
    handles: list = []
    for index, layer in enumerate(anatomy.layers):
        for kind, module in (("attention", layer.attention), ("mlp", layer.mlp)):
            if index in getattr(plan, kind):
                handles.append(module.register_forward_hook(_instead(plan.map_of(kind, index)), with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _instead(linear):
    def hook(module, args, kwargs, output):
        x = stream_of(args, kwargs)
        if linear is None:
            term = torch.zeros_like(tensor_of(output))
        else:
            weight, bias = linear.tensors(x.device, x.dtype)
            term = nn.functional.linear(x, weight, bias)
        return (term, *output[1:]) if isinstance(output, tuple) else term

    return hook


@torch.inference_mode()
def compare(path: Path, model: nn.Module, tokenizer, plan: DropPlan, n_context: int, exact: bool) -> Parity:
    """Compare a GGUF file, opened in llama.cpp, with the model whose terms are silenced.

    n_context: how many tokens the model may see. exact: llama.cpp keeps keys and values in float32.

    Raises LLMDropError if llama.cpp cannot run the file.
    """
    prompts = [tokenizer(text)["input_ids"][: n_context - N_TOKENS] for text in PROMPTS]
    found = llamacpp.answers(path, prompts, N_TOKENS, exact=exact)
    greedy = found.continuations[0]
    with silenced(model, plan):
        difference, divergence = _distance(model, prompts, list(map(torch.from_numpy, found.logits)))
        scores = _log_probabilities(model, prompts[0] + greedy)[len(prompts[0]) - 1 : -1]
    behind = scores.max(-1).values - scores.gather(1, torch.tensor(greedy)[:, None])[:, 0]
    equal = int(np.argmax(np.append((behind > 0).numpy(), True)))
    return Parity(difference, divergence, equal, float(behind.max()), found.cached_bytes)


@torch.inference_mode()
def compare_logits(
    read: Callable[[list[list[int]]], list[torch.Tensor]], model: nn.Module, tokenizer, plan: DropPlan
) -> Parity:
    """Compare what a reader gives after each prompt, (vocabulary,), with the model whose terms are silenced."""
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    logits = read(prompts)
    with silenced(model, plan):
        return Parity(*_distance(model, prompts, logits))


def _distance(model: nn.Module, prompts: list[list[int]], logits: list[torch.Tensor]) -> tuple[float, float]:
    """The largest difference among the likeliest tokens, and the mean divergence."""
    differences, divergences = [], []
    for prompt, found in zip(prompts, logits, strict=True):
        expected = _log_probabilities(model, prompt)[-1]
        theirs = torch.log_softmax(found[: len(expected)].double(), -1)
        top = expected.topk(TOP).indices
        differences.append(float((expected - theirs)[top].abs().max()))
        divergences.append(float((expected.exp() * (expected - theirs)).sum()))
    return max(differences), float(np.mean(divergences))


def _log_probabilities(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """float64 (tokens, vocabulary)."""
    ids = torch.tensor([tokens], device=input_device(model))
    return torch.log_softmax(model(ids).logits[0].double().cpu(), -1)


def check(what: str, found: float, limit: float) -> None:
    """Raise LLMDropError unless an export predicts what the reference does, within `limit` nats."""
    if not found <= limit:  # nan fails
        raise LLMDropError(
            f"{what} does not predict what the model with these layers set to zero does: it is {found:.2g} nats away, "
            f"and at most {limit:g} is allowed. It was deleted."
        )
