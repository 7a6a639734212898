"""Log-likelihoods under one model and many drop plans, with nothing computed twice that requests or plans share.

Requests share their beginnings (packing.py), and plans share the layers below the first one where they differ (passes.py).
The LM head runs only on positions that predict a scored token.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan, check_plans
from ..dropping.units import skipping
from ..models.families import find_anatomy, need_decoder, position_limit
from .guard import NotFinite, measuring, not_finite_error
from .packing import Batch, Group, Request, pack
from .passes import Passes
from .rotary import short_below

# Tokens per forward pass: enough to keep a device busy, few enough to keep intermediate results small.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model says about each request, under each plan."""

    logprob: np.ndarray  # float64 (n_plans, n_requests): sum of log-probabilities of the continuation's tokens, in nats
    hits: np.ndarray  # int64 (n_plans, n_requests): how many of them were the most probable token
    kl: np.ndarray  # float64 (n_plans, n_requests): sum of KL(first plan || plan) where they are predicted; NaN if not asked
    length: np.ndarray  # int64 (n_requests,): tokens of the continuation

    def answers(self, plan: int) -> list[tuple[float, bool]]:
        """As lm-eval wants them: log-probability, and whether greedy decoding would say the same."""
        return list(zip(self.logprob[plan].tolist(), (self.hits[plan] == self.length).tolist(), strict=True))


def score(
    model: torch.nn.Module,
    requests: Sequence[Request],
    plans: Sequence[DropPlan] = (DropPlan(),),
    max_length: int | None = None,
    kl: bool = False,
    on_batch: Callable[[float], None] = lambda share: None,
) -> Scores:
    """Score each request's continuation under each plan, as lm-eval's `loglikelihood` does.

    Parameters
    ----------
    model: a transformers causal language model of a family in `layouts.FAMILIES`, in any mode: it is measured in eval mode.
    requests: (context, continuation) as token ids; neither may be empty.
    plans: drop plans; `DropPlan()` is the dense model.
    max_length: tokens that the model reads at most; longer requests lose their beginning. None: what its config says.
    kl: also the divergence of each plan's next-token distribution from the first plan's.
    on_batch: called with the share of the work that is newly done, for a progress bar.

    Log-probabilities are formed in float32 whatever the model's dtype. On a GPU that runs out of memory batches are
    halved, with a message. A token that the model rules out (a logit of -inf) has log-probability -inf. Raises LLMDropError
    for plans that do not fit the model, for requests that cannot be scored, and for logits that are NaN or +inf.
    """
    anatomy = find_anatomy(model)
    need_decoder(anatomy)
    plans = check_plans(model, plans)
    vocabulary = anatomy.decoder.config.vocab_size
    for context, continuation in requests:
        if not context or not continuation:
            raise LLMDropError("A request has an empty context or continuation: there is nothing to score.")
        if not all(0 <= token < vocabulary for token in (*context, *continuation)):
            raise LLMDropError(f"A request holds token ids outside 0 to {vocabulary - 1}: another model's tokenizer?")
    shape = (len(plans), len(requests))
    length = np.array([len(continuation) for _, continuation in requests], dtype=np.int64)
    result = Scores(np.zeros(shape), np.zeros(shape, dtype=np.int64), np.full(shape, 0.0 if kl else np.nan), length)
    if not requests:
        return result
    if max_length is None:
        max_length = position_limit(anatomy.decoder.config) or 2048
    longest = min(max_length, max(len(context) + len(continuation) - 1 for context, continuation in requests))
    with measuring(model):
        passes = Passes(model, plans)
        share, batch_tokens = passes.can_share(longest), BATCH_TOKENS[passes.device.type]
        groups = pack(list(requests), max_length, batch_tokens, share=share, alone_from=short_below(model))
        total = sum(len(group.prefix) + sum(len(b.rows) * b.width for b in group.batches) for group in groups)
        for group in groups:
            try:
                passes.start(group)
            except torch.OutOfMemoryError as error:
                held = f"a beginning of {len(group.prefix)} tokens under {len(plans)} plans"
                raise LLMDropError(f"Out of GPU memory with {held}. Use fewer plans at a time.") from error
            queue = list(group.batches)
            while queue:
                batch = queue.pop(0)
                try:
                    _score_batch(passes, group, batch, result, kl)
                except torch.OutOfMemoryError as error:
                    if len(batch.rows) == 1:
                        raise LLMDropError(f"Out of GPU memory with a single sequence of {batch.width} tokens.") from error
                    torch.cuda.empty_cache()
                    print(f"out of GPU memory: going on with a batch of {len(batch.rows) // 2} rows", file=sys.stderr)
                    queue[:0] = batch.halves()
                    continue
                on_batch(len(batch.rows) * batch.width / total)
            on_batch(len(group.prefix) / total)
    return result


# ---- from states to numbers --------------------------------------------------------------------------------------------


def _score_batch(passes: Passes, group: Group, batch: Batch, result: Scores, kl: bool) -> None:
    """Add what a batch of a group says to `result`, once it is computed under all plans."""
    unique, request, which, target = batch.scored()
    logprob = np.zeros((len(passes.steps), len(target)))
    hits = np.zeros((len(passes.steps), len(target)), dtype=bool)
    divergence = np.zeros((len(passes.steps), len(target)))
    first: list[torch.Tensor] = []  # log-probabilities of the first plan
    for i, states in enumerate(passes.states(batch)):
        chosen = states[torch.from_numpy(unique).to(states.device)]
        start = 0
        distributions = passes.log_probabilities(chosen)
        for piece, logprobs in enumerate(_refusing(distributions, passes, passes.steps[i].plan, group, batch, unique)):
            inside = (which >= start) & (which < start + len(logprobs))
            index, token = (torch.from_numpy(x[inside]).to(logprobs.device) for x in (which - start, target))
            logprob[i, inside] = logprobs[index, token].cpu().numpy()
            hits[i, inside] = (logprobs.argmax(-1)[index] == token).cpu().numpy()
            if kl and i == 0:
                first.append(logprobs)
            elif kl:
                divergence[i, inside] = divergence_of(first[piece], logprobs)[index].cpu().numpy()
            start += len(logprobs)
    for i in range(len(passes.steps)):
        np.add.at(result.logprob[i], request, logprob[i])
        np.add.at(result.hits[i], request, hits[i])
        if kl:
            np.add.at(result.kl[i], request, divergence[i])


def divergence_of(first: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL(first || other) of each row of log-probabilities (n, vocabulary): (n,). What `first` rules out adds nothing."""
    each = torch.nn.functional.kl_div(logprobs, first, log_target=True, reduction="none")
    if bool((total := each.sum(-1)).isnan().any()):  # 0 x infinity
        total = each.masked_fill(first == -torch.inf, 0.0).sum(-1)
    return total


def _refusing(distributions, passes: Passes, plan: DropPlan, group: Group, batch: Batch, unique: np.ndarray) -> Iterator:
    """The same distributions, with one clear error where there is none. unique: positions that predict, in the batch."""
    try:
        yield from distributions
    except NotFinite as error:
        row, index = divmod(int(unique[error.row]), batch.width)
        tokens, parents = batch.rows[row].tokens, batch.rows[row].parents
        path: list[int] = []
        while index >= 0:
            path.append(tokens[index])
            index = parents[index]
        under = f" under the plan that drops attention {list(plan.attention)} and MLP {list(plan.mlp)}" if plan.n_drop else ""
        with skipping(passes.model, plan):
            raise not_finite_error(passes.model, [*group.prefix, *path[::-1]], under) from None
