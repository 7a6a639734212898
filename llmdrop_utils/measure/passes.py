"""Forward passes under many drop plans, in which nothing that plans share is computed twice.

Plans share the layers below the first one where they differ: a plan continues from the hidden states that an earlier one
computed up to there. The LM head runs only on the positions that are asked for.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..dropping.plan import DropPlan
from ..dropping.units import left, skipping
from ..models.families import find_anatomy, input_device, stream_of
from .guard import NotFinite, normalizer
from .packing import Batch, Group, pack

HEAD_ROWS = {"cpu": 1024, "cuda": 4096}  # positions whose logits are held at a time

SOFTMAX_ROWS = {"cpu": 32, "cuda": 4096}  # and those that become log-probabilities at a time: small enough for a CPU's cache


# ---- which plan starts where --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One plan's turn."""

    plan: DropPlan
    start: int  # first layer to compute; what comes before is as in an earlier step
    source: int | None  # that step
    keep: frozenset[int]  # layers whose input later steps start from


def schedule(plans: Sequence[DropPlan], n_layers: int) -> list[Step]:
    """For each plan, the earlier one whose first layers are the same for longest. Equal plans start after the last layer.

    With 4 layers, the plans attention (3,), attention (2,) and attention (2, 3) start at layers 0, 2 and 3; the third
    continues from the second.
    """
    states = [[plan.state_of(layer) for layer in range(n_layers)] for plan in plans]
    starts: list[int] = []
    sources: list[int | None] = []
    for i in range(len(plans)):
        same = [next((k for k in range(n_layers) if states[i][k] != states[j][k]), n_layers) for j in range(i)]
        starts.append(max(same, default=0))
        sources.append(int(np.argmax(same)) if starts[-1] else None)
    keep = [frozenset(starts[j] for j in range(len(plans)) if sources[j] == i) for i in range(len(plans))]
    return [Step(*step) for step in zip(plans, starts, sources, keep, strict=True)]


# ---- one forward pass for each plan ------------------------------------------------------------------------------------


class Passes:
    """Passes batches through a model's decoder, plan by plan."""

    def __init__(self, model: torch.nn.Module, plans: Sequence[DropPlan]):
        self.model, self.device, self.anatomy = model, input_device(model), find_anatomy(model)
        self.steps = schedule(plans, len(self.anatomy))
        self.blocks = [layer.block for layer in self.anatomy.layers]
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def can_share(self, longest: int) -> bool:
        """Can this model read several sequences in one row?

        Not beyond a sliding window, which these masks do not know, and not if the model computes positions or masks
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
        """Pass the prefix of a group through every plan, and keep its keys and values."""
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
        """The next-token distributions of (n, d) states, some at a time: float32 (at most SOFTMAX_ROWS, vocabulary).

        Raises NotFinite, with the row, for what is no distribution.
        """
        start = 0
        for part in states.split(HEAD_ROWS[self.device.type]):
            for logits in self._head(part).split(SOFTMAX_ROWS[self.device.type]):
                logits = logits.float()
                try:
                    yield logits.sub_(normalizer(logits))  # ten times as exact as log_softmax on a CPU
                except NotFinite as error:
                    raise NotFinite(start + error.row) from None
                start += len(logits)

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """The model's own head, with whatever it does to logits: (n, d) -> (n, vocabulary)."""
        given = self.output_type(last_hidden_state=states[None])
        with replaced(self.anatomy.decoder, lambda *_, **__: given):
            return self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False).logits[0]

    def _plans(self, tokens, positions, mask, caches) -> Iterator[torch.Tensor]:
        kept: dict[tuple[int | None, int], torch.Tensor] = {}  # step, layer -> its input; the last layer's output is under n
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
                    self._continue_from(kept[step.source, step.start], step.start, stack)
                for layer in step.keep - {len(self.blocks)}:
                    stack.enter_context(_hooked(self._keep_input(layer, kept, i)))
                states = self._decode(tokens, positions, mask, cache)
            if len(self.blocks) in step.keep:
                kept[i, len(self.blocks)] = states
            yield states

    def _has_attention(self, plan: DropPlan) -> bool:
        """Does any layer keep its attention? Otherwise there is nothing to cache."""
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

    def _continue_from(self, states: torch.Tensor, start: int, stack: contextlib.ExitStack) -> None:
        """Let the layers before `start` do nothing, and hand `states` to it."""
        stack.enter_context(given_by(self.blocks[:start], (states,) if self.gives_tuple else states))

    def _keep_input(self, layer: int, kept: dict, i: int):
        def hook(module, args, kwargs):
            kept[i, layer] = stream_of(args, kwargs)

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
        if type(layer) is DynamicLayer:  # the others have no keys, or not those of every token
            layer.__class__ = _SharedLayer
    return cache


@contextlib.contextmanager
def _hooked(handle):
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def given_by(blocks: Sequence[torch.nn.Module], output):
    """Inside, these layers compute nothing and return `output`: hidden states, in a tuple if that is what they return."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced(block, lambda *_, **__: output))
        yield


@contextlib.contextmanager
def replaced(module: torch.nn.Module, forward: Callable):
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
