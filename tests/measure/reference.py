"""What the tests of scoring share: requests, plans, and plain forwards to compare with.

Each request is scored alone, and dropped sub-layers have output projections set to zero.
"""

import copy
import functools
from collections.abc import Sequence

import families
import numpy as np
import torch
from torch import nn

from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.measure.packing import Request
from llmdrop_utils.measure.scoring import Scores

DENSE = DropPlan()
# Of three layers: none, the last, the first, all attention, all of a layer; one twice, and others that begin like one before.
PLANS = (
    DropPlan(attention=(2,)),
    DENSE,
    DropPlan(attention=(2,), mlp=(2,)),
    DropPlan((1, 2), (0,)),
    DropPlan(attention=(0, 1, 2)),
    DropPlan(attention=(2,)),
    DropPlan((1,), (0,)),
    DropPlan(n_layers=3),
    DropPlan(mlp=(0, 1, 2)),
)


def some(n: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = some(8, 1)
QUESTION = some(9, 2)
REQUESTS: list[Request] = [
    *((PREFIX + some(5, seed), some(4, 10 + seed)) for seed in range(3, 7)),
    (PREFIX + some(5, 3), [*some(4, 13), 5]),
    (PREFIX[:7], [PREFIX[7], 9]),  # scores a token that others only read
    *((QUESTION, some(3, seed)) for seed in range(20, 23)),
    (QUESTION, some(3, 20)),
    (QUESTION[:4], [QUESTION[4]]),
    ([7], [8]),
    (some(1, 30), some(12, 31)),
]


@functools.cache
def model_of(name: str, window: int | None = None) -> nn.Module:
    return families.tiny(name, **({} if window is None else {"sliding_window": window}))


def silenced(name: str, model: nn.Module, plan: DropPlan) -> nn.Module:
    """A copy whose output projections are zero where the plan drops."""
    model = copy.deepcopy(model)
    families.silence(name, model, plan.attention, plan.mlp)
    return model


@torch.no_grad()
def distributions(model: nn.Module, requests: list[Request]) -> list[torch.Tensor]:
    """For each request, the log-probabilities (n, vocabulary) where its n tokens are predicted."""
    found = []
    for context, continuation in requests:
        logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0].double()
        found.append(logits.log_softmax(-1)[len(context) - 1 : -1])
    return found


def plain(name: str, model: nn.Module, plans: Sequence[DropPlan], requests: list[Request]) -> Scores:
    known = {
        gone: distributions(silenced(name, model, DropPlan(*gone)), requests) for gone in {(p.attention, p.mlp) for p in plans}
    }
    by_plan = [known[plan.attention, plan.mlp] for plan in plans]
    targets = [torch.tensor(continuation) for _, continuation in requests]

    def each(number) -> np.ndarray:
        return np.array([[float(number(*x)) for x in zip(by_plan[0], found, targets, strict=True)] for found in by_plan])

    return Scores(
        logprob=each(lambda first, q, target: q.gather(1, target[:, None]).sum()),
        hits=each(lambda first, q, target: (q.argmax(-1) == target).sum()),
        kl=each(lambda first, q, target: (first.exp() * (first - q)).sum()),
        length=np.array([len(target) for target in targets]),
    )


def compare(found: Scores, expected: Scores) -> None:
    np.testing.assert_allclose(found.logprob, expected.logprob, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.hits, expected.hits)
    np.testing.assert_array_equal(found.length, expected.length)


def snapshot(model: nn.Module) -> tuple:
    return (
        [(n, id(m), m.training, "forward" in vars(m)) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(p), p.data_ptr(), p.numpy(force=True).tobytes()) for n, p in model.named_parameters(remove_duplicate=False)],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )
