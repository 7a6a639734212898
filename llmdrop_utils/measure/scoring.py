"""Log-likelihoods under one model and many drop plans, with nothing computed twice that requests or plans share.

Requests share their beginnings (packing.py). Plans share the layers below the first one where they differ: a plan goes on
from the hidden states that an earlier one had there. The LM head runs on positions that predict a scored token, only.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..base.errors import LLMDropError
from ..drop.plan import DropPlan, check_plan
from ..drop.units import left, skipping
from ..models.families import Anatomy, find_anatomy
from .packing import Batch, Group, Request, pack

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # tokens in a forward pass: keeps a device busy, and intermediate results small

HEAD_ROWS = {"cpu": 1024, "cuda": 4096}  # positions whose logits are held at a time

SOFTMAX_ROWS = {"cpu": 32, "cuda": 4096}  # and those that become log-probabilities at a time: small enough for a CPU's cache


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
    model: a transformers causal language model of a family in `anatomy.FAMILIES`, in eval mode.
    requests: (context, continuation) as token ids; neither may be empty.
    plans: drop plans; `DropPlan()` is the dense model.
    max_length: tokens that the model reads at most; longer requests lose their beginning. None: what its config says.
    kl: also the divergence of each plan's next-token distribution from the first plan's.
    on_batch: called with the share of the work that is newly done, for a progress bar.

    Log-probabilities are formed in float32 whatever the model's dtype. On a GPU that runs out of memory batches are
    halved, with a message. Raises LLMDropError for plans that do not fit the model and requests that cannot be scored.
    """
    anatomy = find_anatomy(model)
    for plan in plans:
        check_plan(model, plan)
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
    device = model.get_input_embeddings().weight.device
    device = device if device.type != "meta" else torch.device("cpu")  # offloaded: accelerate moves inputs itself
    if max_length is None:
        max_length = getattr(anatomy.decoder.config, "max_position_embeddings", None) or 2048
    longest = min(max_length, max(len(context) + len(continuation) - 1 for context, continuation in requests))
    with torch.inference_mode():
        run = _Run(model, anatomy, _schedule(plans, len(anatomy)), device)
        groups = pack(list(requests), max_length, BATCH_TOKENS[device.type], share=run.can_share(longest))
        total = sum(len(group.prefix) + sum(len(b.rows) * b.width for b in group.batches) for group in groups)
        for group in groups:
            try:
                run.start(group)
            except torch.OutOfMemoryError as error:
                held = f"a beginning of {len(group.prefix)} tokens under {len(plans)} plans"
                raise LLMDropError(f"Out of GPU memory with {held}. Use fewer plans at a time.") from error
            queue = list(group.batches)
            while queue:
                batch = queue.pop(0)
                try:
                    _score_batch(run, batch, result, kl)
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


# ---- plans ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Step:
    """One plan's turn."""

    plan: DropPlan
    start: int  # first layer to compute; what comes before is as in an earlier step
    source: int | None  # that step
    keep: frozenset[int]  # layers whose input later steps start from


def _schedule(plans: Sequence[DropPlan], n_layers: int) -> list[_Step]:
    """For each plan, the earlier one that goes the same way for longest. Equal plans start after the last layer."""
    gone = [[(layer in plan.attention, layer in plan.mlp) for layer in range(n_layers)] for plan in plans]
    starts: list[int] = []
    sources: list[int | None] = []
    for i in range(len(plans)):
        same = [next((k for k in range(n_layers) if gone[i][k] != gone[j][k]), n_layers) for j in range(i)]
        starts.append(max(same, default=0))
        sources.append(int(np.argmax(same)) if starts[-1] else None)
    keep = [frozenset(starts[j] for j in range(len(plans)) if sources[j] == i) for i in range(len(plans))]
    return [_Step(*step) for step in zip(plans, starts, sources, keep, strict=True)]


# ---- one forward pass for each plan ------------------------------------------------------------------------------------


class _Run:
    """Passes batches through the decoder, plan by plan."""

    def __init__(self, model: torch.nn.Module, anatomy: Anatomy, steps: list[_Step], device: torch.device):
        self.model, self.anatomy, self.steps, self.device = model, anatomy, steps, device
        self.blocks = [layer.block for layer in anatomy.layers]
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def can_share(self, longest: int) -> bool:
        """Can this model read several sequences in one row?

        Not beyond a sliding window, which the masks here do not know, and not if the model computes positions or masks
        of its own (ALiBi): then a small tree gives another result than its sequences in rows of their own.
        """
        config = self.anatomy.decoder.config
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        if any(window and longest > window for window in windows):
            return False
        requests = [([1, 2, 3, 4, 5], [6]), ([1, 2, 3, 4, 7, 8], [1]), ([3, 5, 7], [6]), ([3, 5, 7, 9], [2])]
        (tree,), (alone,) = (pack(requests, 16, 64, share=share)[0].batches for share in (True, False))
        both = Batch(tree.rows + alone.rows, tree.width)
        try:
            self.start(Group([], [both]))
            states = next(self.states(both)).float()
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):  # a mask of this form is not understood
            return False
        unique, request, which, _ = both.scored()
        ends = states[torch.from_numpy(unique[which[np.argsort(request, kind="stable")]]).to(states.device)].view(4, 2, -1)
        tolerance = 64 * torch.finfo(self.dtype).eps * float(ends.abs().max())
        return bool((ends[:, 0] - ends[:, 1]).abs().max() <= tolerance)

    def start(self, group: Group) -> None:
        """Pass the prefix of a group through every plan, and hold its keys and values."""
        self.prefix: list[DynamicCache | None] = [None] * len(self.steps)
        self.n_prefix = len(group.prefix)
        if group.prefix:
            tokens = torch.tensor([group.prefix])
            positions = torch.arange(self.n_prefix)[None]
            caches = [DynamicCache() if self._has_attention(step.plan) else None for step in self.steps]
            for _ in self._plans(tokens, positions, None, caches):
                pass
            self.prefix = [cache if cache is None else _shared(cache) for cache in caches]

    def states(self, batch: Batch) -> Iterator[torch.Tensor]:
        """For each plan, the final hidden states of a batch (B * T, d), after the last norm."""
        mask = batch.mask(self.n_prefix, self.dtype)
        positions = batch.positions(self.n_prefix)
        for states in self._plans(batch.tokens(), positions, mask, self.prefix):
            yield states.flatten(0, 1)

    def log_probabilities(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """The next-token distributions of (n, d) states, some at a time: float32 (at most SOFTMAX_ROWS, vocabulary)."""
        for part in states.split(HEAD_ROWS[self.device.type]):
            for logits in self._head(part).split(SOFTMAX_ROWS[self.device.type]):
                logits = logits.float()
                yield logits.sub_(logits.logsumexp(-1, keepdim=True))  # ten times as exact as log_softmax on a CPU

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """The model's own head, with whatever it does to logits: (n, d) -> (n, vocabulary)."""
        given = self.output_type(last_hidden_state=states[None])
        with _replaced(self.anatomy.decoder, lambda *_, **__: given):
            return self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False).logits[0]

    def _plans(self, tokens, positions, mask, caches) -> Iterator[torch.Tensor]:
        kept: dict[tuple[int, int], torch.Tensor] = {}  # step, layer -> its input; the last layer's output is under n
        mask = None if mask is None else mask.to(self.device)
        for i, (step, cache) in enumerate(zip(self.steps, caches, strict=True)):
            if step.start == len(self.blocks):
                yield kept[step.source, step.start]
                continue
            with contextlib.ExitStack() as stack:
                stack.enter_context(skipping(self.model, step.plan))
                if step.source is None:
                    stack.enter_context(_hooked(self.blocks[0].register_forward_hook(self._see_output)))
                else:
                    self._go_on_from(kept[step.source, step.start], step.start, stack)
                for layer in step.keep - {len(self.blocks)}:
                    stack.enter_context(_hooked(self._keep_input(layer, kept, i)))
                states = self._decode(tokens, positions, mask, cache)
            if len(self.blocks) in step.keep:
                kept[i, len(self.blocks)] = states
            yield states

    def _has_attention(self, plan: DropPlan) -> bool:
        """Is any attention left? Without, there is nothing to hold."""
        return not set(left(self.anatomy, "attention")) <= set(plan.attention)

    def _decode(self, tokens, positions, mask, cache) -> torch.Tensor:
        given = {} if cache is None else {"past_key_values": cache}
        output = self.anatomy.decoder(
            input_ids=tokens.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=mask,
            use_cache=cache is not None,
            **given,
        )
        self.output_type = type(output)
        return output.last_hidden_state

    def _go_on_from(self, states: torch.Tensor, start: int, stack: contextlib.ExitStack) -> None:
        """Let the layers before `start` do nothing, and hand `states` to it."""
        output = (states,) if self.gives_tuple else states
        for block in self.blocks[:start]:
            stack.enter_context(_replaced(block, lambda *_, **__: output))

    def _keep_input(self, layer: int, kept: dict, i: int):
        def hook(module, args, kwargs):
            kept[i, layer] = args[0] if args else kwargs["hidden_states"]

        return self.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)

    def _see_output(self, module, args, output) -> None:
        self.gives_tuple = isinstance(output, tuple)


class _SharedLayer(DynamicLayer):
    """Keys and values of a prefix (1, heads, P, d), put before those of every row; nothing is added to them."""

    def update(self, key_states, value_states, *args, **kwargs):
        rows = len(key_states)
        return tuple(
            torch.cat([prefix.expand(rows, -1, -1, -1), new], dim=-2)
            for prefix, new in ((self.keys, key_states), (self.values, value_states))
        )


def _shared(cache: DynamicCache) -> DynamicCache:
    for layer in cache.layers:
        if type(layer) is DynamicLayer:  # nothing else has keys that are of use here
            layer.__class__ = _SharedLayer
    return cache


@contextlib.contextmanager
def _hooked(handle):
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _replaced(module: torch.nn.Module, forward: Callable):
    """Give one module another forward."""
    before = module.__dict__.get("forward")  # accelerate puts its own there
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


# ---- from states to numbers --------------------------------------------------------------------------------------------


def _score_batch(run: _Run, batch: Batch, result: Scores, kl: bool) -> None:
    """Add what a batch says to `result`, once all plans are through."""
    unique, request, which, target = batch.scored()
    logprob = np.zeros((len(run.steps), len(target)))
    hits = np.zeros((len(run.steps), len(target)), dtype=bool)
    divergence = np.zeros((len(run.steps), len(target)))
    first: list[torch.Tensor] = []  # log-probabilities of the first plan
    for i, states in enumerate(run.states(batch)):
        chosen = states[torch.from_numpy(unique).to(states.device)]
        start = 0
        for piece, logprobs in enumerate(run.log_probabilities(chosen)):
            here = (which >= start) & (which < start + len(logprobs))
            index, token = (torch.from_numpy(x[here]).to(logprobs.device) for x in (which - start, target))
            logprob[i, here] = logprobs[index, token].cpu().numpy()
            hits[i, here] = (logprobs.argmax(-1)[index] == token).cpu().numpy()
            if kl and i == 0:
                first.append(logprobs)
            elif kl:
                difference = torch.nn.functional.kl_div(logprobs, first[piece], log_target=True, reduction="none").sum(-1)
                divergence[i, here] = difference[index].cpu().numpy()
            start += len(logprobs)
    for i in range(len(run.steps)):
        np.add.at(result.logprob[i], request, logprob[i])
        np.add.at(result.hits[i], request, hits[i])
        if kl:
            np.add.at(result.kl[i], request, divergence[i])
