"""Selection that sees the repair: layers are dropped one by one, each the one whose loss a repair mends best.

Damage of single layers is no sum, and what a repair can mend is another thing than what dropping costs. So each candidate is
dropped and the layers around it are refitted on a few samples (repair.py); what counts is the divergence from the dense model
that is left on other samples. The weights refitted for the best candidate stay, and the next one is looked for. With a beam,
that is done for the best few choices so far, so that a layer which costs least now does not rule out what costs less later.
With swaps, each layer is put back at last, and another one is dropped instead if that leaves less.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self, cast

import torch
from torch import nn

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan
from ..dropping.units import available, skipping
from ..measure.guard import evaluating, tokens_for
from ..measure.metrics import KINDS
from ..measure.passes import given_by
from ..measure.scoring import divergence_of
from ..models.families import find_anatomy, input_device, tensor_of
from ..selection.methods import as_plan
from ..selection.ranking import check_count, check_kind
from .model import check_whole
from .moments import wide
from .refitting import Repairing, held_out_of, read_apart
from .sites import check_changeable
from .streams import read_streams

VERSION = 1  # raise when a change alters what is chosen
CANDIDATES = 8  # looked at in each step: those that cost least when they were looked at last
BEFORE, AFTER = 1, 1  # layers before and after a candidate's own that are refitted with it
RIDGES = (0.1,)  # with few samples, a strong one
HELD_OUT = 8
ONE_JUDGES = 4  # one sample of so many is not fitted on: on these the divergence is measured


def select_with_repair(
    model: nn.Module,
    tokens: torch.LongTensor,
    kind: str,
    n_drop: int,
    candidates: int = CANDIDATES,
    batch_size: int = 4,
    beam: int = 1,
    swaps: int = 0,
    on_step: Callable[[tuple[int, ...], tuple[float, ...]], None] = lambda layers, left: None,
) -> DropPlan:
    """Drop, one after the other, the layers of a kind ("attention", "mlp", "block") that a repair makes up for best.

    Parameters
    ----------
    model: as in `repair`, but not offloaded; it stays as it is.
    tokens: LongTensor (n_samples, seq_len), of all kinds of text that the model is to serve. Three samples of four are fitted
        on; on the others the divergence from the dense model is measured.
    candidates: how many layers are looked at in each step after the first, which looks at all.
    beam: how many choices each step goes on from, the best ones. Each step after the first takes up to so many times as long.
    swaps: how often all layers of the best choice are gone through at last, from the one that was dropped first. Each is put
        back, those dropped after it are dropped anew, and then the best of the candidates takes its place, if that leaves
        less than the layer itself in this place, and less than before. No more are gone through after none was swapped.
    on_step: called after each step, and after each layer that was put back, with the layers of the best choice in the order in
        which they were dropped, and the KL that was left after each of them, in nats per token.

    Returns a plan. With a beam of one and no swaps, its first layers are the plan for fewer; otherwise another choice may have
    been the best of fewer. Takes a copy of the model, and for each choice one of the weights that were refitted for it. Raises
    LLMDropError as `repair` does.
    """
    check_kind(kind, KINDS)
    check_whole(find_anatomy(model))
    left = available(find_anatomy(model), kind)
    n_drop, candidates = check_count(n_drop, len(left), kind), whole(candidates, "The number of candidates")
    beam, swaps = whole(beam, "The beam"), whole(swaps, "The number of swaps", at_least=0)
    batch_size = whole(batch_size, "The batch size")
    tokens = tokens_for(model, tokens)
    if len(tokens) < 4:
        raise LLMDropError("The search takes 4 samples at least: three to fit on, and one to measure on. Give more samples.")
    for index, layer in enumerate(find_anatomy(model).layers):
        check_changeable(layer.block, index)
    search = _Search(model, tokens, kind, batch_size)
    paths = [_Path((), (), {}, dict.fromkeys(left, 0.0), None)]
    with evaluating(search.model), evaluating(model):
        for step in range(n_drop):
            best: list[_Path] = []
            for path in paths:
                for found in search.extend(path, path.nearest(candidates if step else None)):
                    best = _best_of([*best, found], beam)
            paths = [path.without_last() for path in best]
            on_step(paths[0].layers, paths[0].left)
        path = paths[0]
        for _ in range(swaps):
            before = path
            for chosen in before.layers:
                path = search.swapped(path, chosen, candidates)
                on_step(path.layers, path.left)
            if path is before:
                break
    return dataclasses.replace(
        as_plan(kind, path.layers), n_layers=len(find_anatomy(model)), model=getattr(model, "llmdrop_identity", None)
    )


class _Path(NamedTuple):
    """Layers that are dropped one after the other, and what was refitted for them."""

    layers: tuple[int, ...]
    left: tuple[float, ...]  # of the divergence after each, in nats per token
    weights: dict[int, dict[str, torch.Tensor]]  # of each layer those that were refitted
    costs: dict[int, float]  # what was left after each layer that may go next, when it was looked at last
    before: "_Path | None"  # without the last layer

    def nearest(self, n: int | None) -> list[int]:
        return sorted(sorted(self.costs), key=self.costs.__getitem__)[:n]

    def without_last(self) -> Self:
        return self._replace(costs={layer: cost for layer, cost in self.costs.items() if layer != self.layers[-1]})


def _best_of(paths: list[_Path], n: int) -> list[_Path]:
    """The first n of those that leave least, one for each set of layers."""
    found: dict[frozenset[int], _Path] = {}
    for path in sorted(paths, key=lambda path: (path.left[-1], path.layers)):
        found.setdefault(frozenset(path.layers), path)
    return [*found.values()][:n]


class _Search:
    """A copy of the model, refitted for the path at hand, beside the dense model."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor, kind: str, batch_size: int):
        self.dense, self.model, self.kind = model, copy.deepcopy(model), kind
        judged = held_out_of(len(tokens), ONE_JUDGES, seed=0)
        self.fitted, self.calls, self.apart = read_apart(model, tokens[~judged], batch_size, HELD_OUT, seed=0)
        self.judged, calls, _ = read_streams(model, tokens[judged], 1)  # one by one: logits of a sample are large
        self.calls |= calls
        self.texts = tokens[judged].to(input_device(model)).split(1)
        self.blocks = [layer.block for layer in find_anatomy(self.model).layers]
        self.reference = [layer.block for layer in find_anatomy(model).layers]
        self.gives_tuple, self.ends = False, list(self.judged)
        with evaluating(model):
            for index, block in enumerate(self.reference):
                args, kwargs = self.calls[1][index]
                given = [block(stream, *args, **kwargs) for stream in self.ends]
                self.gives_tuple, self.ends = isinstance(given[0], tuple), [tensor_of(each) for each in given]

    def extend(self, path: _Path, candidates: Sequence[int]) -> Iterator[_Path]:
        """The path with each candidate dropped after it; what is left then enters `path.costs`."""
        self._load(path, range(len(self.blocks)))
        now, streams = self._repairing(path.layers), _Streams(list(self.fitted), list(self.fitted), list(self.judged))
        for index in range(max(0, max(candidates) - BEFORE) + 1):
            for layer in (layer for layer in sorted(candidates) if max(0, layer - BEFORE) == index):
                yield self._extended(path, layer, _Streams(*(list(each) for each in streams)))
            now.go_on(index, streams.dense, streams.dropped)
            now.go_on_dropped(index, streams.judged)

    def swapped(self, path: _Path, layer: int, candidates: int) -> _Path:
        """The path with the best layer in the place of this one, or the path itself if none leaves less."""
        behind, without = path.layers[path.layers.index(layer) + 1 :], path
        while layer in without.layers:
            without = cast(_Path, without.before)
        for again in behind:
            (without,) = self.extend(without, [again])
        without = without._replace(costs=dict(path.costs))
        (best,) = _best_of([*self.extend(without, [*path.nearest(candidates), layer])], 1)
        return best.without_last() if best.layers[-1] != layer and best.left[-1] < path.left[-1] else path

    def _extended(self, path: _Path, layer: int, streams: "_Streams") -> _Path:
        layers = (*path.layers, layer)
        window = range(max(0, layer - BEFORE), min(len(self.blocks), layer + AFTER + 1))
        trial = self._repairing(layers)
        try:
            for index in window:
                trial.refit(index, streams.dense, streams.dropped)
                trial.go_on_dropped(index, streams.judged)
            with skipping(self.model, trial.plan):
                pairs = zip(self.texts, streams.judged, strict=True)
                logits = (self._continued(self.model, text, stream, window.stop) for text, stream in pairs)
                total = sum(float(divergence_of(*both).sum()) for both in zip(self._of_dense(), logits, strict=True))
            left = total / sum(text.numel() for text in self.texts)
            if not math.isfinite(left):
                raise LLMDropError(f"Without layer {layer} the model gives numbers that are not finite. Load it in bfloat16.")
            path.costs[layer] = left
            refitted = {index: self._refitted(index) for index in window}
            return _Path(layers, (*path.left, left), path.weights | refitted, path.costs, path)
        finally:
            self._load(path, window)

    def _load(self, path: _Path, layers: range) -> None:
        for index in layers:
            self.blocks[index].load_state_dict(self.reference[index].state_dict() | path.weights.get(index, {}))

    def _refitted(self, index: int) -> dict[str, torch.Tensor]:
        """Copies of the weights of a layer that are not the dense model's."""
        dense = self.reference[index].state_dict()
        return {n: w.clone() for n, w in self.blocks[index].state_dict().items() if not torch.equal(w, dense[n])}

    def _repairing(self, layers: Sequence[int]) -> Repairing:
        return Repairing(self.model, as_plan(self.kind, layers), RIDGES, self.reference, self.apart, self.calls)

    def _of_dense(self) -> Iterator[torch.Tensor]:
        """Log-probabilities of each judged sample. The last states are kept, not these, which are many times as large."""
        for text, stream in zip(self.texts, self.ends, strict=True):
            yield self._continued(self.dense, text, stream, len(self.blocks))

    def _continued(self, model: nn.Module, tokens: torch.Tensor, stream: torch.Tensor, start: int) -> torch.Tensor:
        """Log-probabilities (B * T, vocabulary) of a model whose layers from `start` on read this stream."""
        blocks = [layer.block for layer in find_anatomy(model).layers]
        with given_by(blocks[:start], (stream,) if self.gives_tuple else stream):
            return wide(model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)).log_softmax(-1)


class _Streams(NamedTuple):
    dense: list[torch.Tensor]  # of the samples that are fitted on
    dropped: list[torch.Tensor]
    judged: list[torch.Tensor]  # of those that are measured on, in the dropped model
