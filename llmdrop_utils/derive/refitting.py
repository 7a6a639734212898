"""Layers refitted one after the other, with dense and dropped stream side by side. repair.py says what is fitted and why."""

import collections
import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from typing import NamedTuple, Self, cast

import torch
from torch import nn

from ..dropping.plan import DropPlan
from ..dropping.units import skipping
from ..measure.passes import replaced
from ..models.families import family_of, find_anatomy
from .moments import Moments, wide
from .sites import Sites, change, read_together, rows_of, sites_of
from .streams import Call, advance, read_streams, tap


@dataclasses.dataclass(frozen=True)
class Refitted:
    """One site that was fitted: "attention input", "attention output", "mlp input" or "mlp output" of a layer."""

    layer: int
    site: str
    ridge: float  # inf: nothing was explained, so the weights stay
    explained: float  # share of the squares of what lacked, in held-out samples, that the fit explains


def held_out_of(n_samples: int, one_of: int, seed: int) -> torch.Tensor:
    """Which samples are not fitted on, one of so many, drawn from all: bool (n_samples,)."""
    drawn = torch.randperm(n_samples, generator=torch.Generator().manual_seed(seed))
    apart = torch.zeros(n_samples, dtype=torch.bool)
    apart[drawn[: max(1, n_samples // one_of)]] = True
    return apart


def read_apart(
    model: nn.Module, tokens: torch.Tensor, batch_size: int, one_of: int, seed: int, to_the_end: bool = True
) -> tuple[list[torch.Tensor], dict[int, list[Call]], list[bool]]:
    """As `read_streams`, with samples that are not fitted on in batches of their own; and which batches these are."""
    apart = held_out_of(len(tokens), one_of, seed)
    fitted, calls, _ = read_streams(model, tokens[~apart], batch_size, to_the_end=to_the_end)
    held_out, more, _ = read_streams(model, tokens[apart], batch_size, to_the_end=to_the_end)
    return [*fitted, *held_out], calls | more, [False] * len(fitted) + [True] * len(held_out)


Batches = MutableSequence[torch.Tensor]  # one of each batch


class Repairing:
    """One repair, layer by layer, of batches whose streams the caller holds."""

    def __init__(
        self,
        model: nn.Module,
        plan: DropPlan,
        ridges: Sequence[float],
        reference: Sequence[nn.Module],  # the layers of the model that is to be matched
        held_out: Sequence[bool],  # of each batch: is it not fitted on?
        calls: dict[int, list[Call]],
        calls_of_reference: dict[int, list[Call]] | None = None,  # None: the same
        batches: Callable[[Iterable[torch.Tensor]], Batches] = list,  # makes what holds what is read of all tokens
    ):
        self.model, self.plan, self.ridges, self.reference = model, plan, ridges, reference
        self.held_out, self.calls, self.calls_of_reference = held_out, calls, calls_of_reference or calls
        self.batches = batches
        # What modules return, where it is known: those of the layer at hand that are refitted, and attentions of the dense
        # model that a layer before had to compute.
        self.given: dict[nn.Module, _Given] = {}
        anatomy = find_anatomy(model)
        self.family = family_of(anatomy.decoder.config)
        self.blocks = [layer.block for layer in anatomy.layers]
        self.scales = [layer.scale for layer in anatomy.layers]

    def go_on(self, index: int, dense: Batches, dropped: Batches) -> None:
        """Both lists of streams go from what a layer reads to what it gives."""
        comes_first = self.reference[index] is self.blocks[index]  # before all that is dropped or refitted
        with skipping(self.model, self.plan):
            for batch, stream in enumerate(dense):
                dense[batch] = given = advance(self.reference[index], stream, self._call_of_reference(index, stream))
                dropped[batch] = given if comes_first else self._advance(index, dropped[batch])

    def go_on_dropped(self, index: int, streams: list[torch.Tensor]) -> None:
        """Streams of the dropped model alone go from what a layer reads to what it gives."""
        with skipping(self.model, self.plan):
            streams[:] = [self._advance(index, stream) for stream in streams]

    def refit(self, index: int, dense: Batches, dropped: Batches) -> list[Refitted]:
        """Refit one layer; both lists of streams go on, as in `go_on`."""
        found: list[Refitted] = []
        _return_freed_memory()
        with skipping(self.model, self.plan):
            sites = {kind: sites_of(self.blocks[index], self.family, kind) for kind in ("attention", "mlp")}
            sites = read_together(self.reference[index], sites, dense[0], self._call_of_reference(index, dense[0]))
            wanted: dict[tuple[str, str], Batches] = collections.defaultdict(lambda: self.batches(()))
            for batch in range(len(dense)):
                for what, tensor in self._wanted(index, sites, dense, batch).items():
                    wanted[what].append(tensor)
            for kind, at in sites.items():
                if at is not None and at.readers:
                    found += self._refit_readers(index, kind, at, dropped, wanted.pop((kind, "input")))
                if at is not None and at.output is not None:
                    found += self._refit_output(index, kind, at, dropped, wanted.pop((kind, "output")))
            for batch, stream in enumerate(dropped):
                with self._at(batch):
                    dropped[batch] = self._advance(index, stream)
        for module in (*self.blocks[index].modules(), *self.reference[index].modules()):
            self.given.pop(module, None)
        return found

    @contextlib.contextmanager
    def _at(self, batch: int) -> Iterator[None]:
        """Inside, modules whose outputs are known for this batch return them."""
        with contextlib.ExitStack() as stack:
            for module, given in self.given.items():
                if batch < len(given):
                    stack.enter_context(replaced(module, functools.partial(given.of, batch)))
            yield

    def _wanted(self, index: int, sites: dict[str, Sites | None], dense: Batches, batch: int) -> dict:
        """What the dense model has in a layer, of one batch, whose stream goes on: what each sub-layer reads, and where each
        kept one is to bring the stream."""
        block, family, stream = self.reference[index], self.family, dense[batch]
        readers = {kind: block.get_submodule(at.readers[0]) for kind, at in sites.items() if at and at.readers}
        taps = {(kind, "input"): (module, "input") for kind, module in readers.items()} | {("layer", "end"): (block, "output")}
        if family.mlp_input is not None:
            taps["mlp", "stream"] = (block.get_submodule(family.mlp_input), "input")
        with self._at(batch):
            seen = tap(block, stream, self._call_of_reference(index, stream), taps)
        dense[batch], before_mlp = seen.pop(("layer", "end")), seen.pop(("mlp", "stream"), None)
        for kind, at in sites.items():
            if at is not None and at.output is not None:
                is_next = kind == "attention" and before_mlp is not None and not self._is_dropped(index, "mlp")
                seen[kind, "output"] = before_mlp if is_next else self._before_next(index, dense[batch], batch)
        return seen

    def _before_next(self, index: int, stream: torch.Tensor, batch: int) -> torch.Tensor:
        """The dense stream, from the end of a layer on, where the next kept sub-layer reads it: past all that is dropped."""
        for after in range(index + 1, len(self.blocks)):
            if not self._is_dropped(after, "attention"):
                return stream
            block, call = self.reference[after], self._call_of_reference(after, stream)
            if not self._is_dropped(after, "mlp"):
                if self.family.mlp_input is None:
                    return stream
                attention = block.get_submodule(self.family.attention_unit[0])
                taps = {
                    "attention": (attention, "returned"),
                    "stream": (block.get_submodule(self.family.mlp_input), "input"),
                }
                seen = tap(block, stream, call, taps)
                if attention not in self.given:
                    self.given[attention] = _Given(self.batches(()))
                if batch == len(self.given[attention]):  # that layer has it computed, too, in each sweep the same
                    self.given[attention].append(_light(seen["attention"]))
                return seen["stream"]
            stream = advance(block, stream, call)
        return stream

    def _is_dropped(self, index: int, kind: str) -> bool:
        return index in getattr(self.plan, kind) and self.plan.map_of(kind, index) is None

    # ---- fits

    def _refit_readers(self, index: int, kind: str, at: Sites, dropped: Batches, wanted: Batches) -> list[Refitted]:
        """x + x S is what they read in the dense model: W' = W (I + S')."""
        _return_freed_memory()
        moments, maps = Moments(), [self.blocks[index].get_submodule(name) for name in at.readers]
        for batch, stream in enumerate(dropped):
            z = wanted.pop(0)  # what is read no more takes no memory
            with self._at(batch):
                x = tap(self.blocks[index], stream, self._call(index, stream), {"x": (maps[0], "input")})["x"]
            moments.add(x, wide(z.to(x.device)) - wide(x), self.held_out[batch])
        fit = moments.fit(self.ridges)
        if fit.matrix is not None:
            for module in maps:
                weight = rows_of(module).to(fit.matrix.dtype)
                change(module, weight @ fit.matrix.T)
        return [Refitted(index, f"{kind} input", fit.ridge, fit.explained)]

    def _refit_output(self, index: int, kind: str, at: Sites, dropped: Batches, wanted: Batches) -> list[Refitted]:
        """What the stream lacks is explained by what the map reads: W' = W + S'.

        A norm that follows makes gain * y / rms(y) of the map's output y, so that x / rms(y) explains what lacks / gain, but
        for the share of it that points along y: a norm takes that away.
        """
        _return_freed_memory()
        block, moments = self.blocks[index], Moments()
        module, unit = block.get_submodule(at.output), block.get_submodule(at.unit)
        norm = None if at.norm is None else block.get_submodule(at.norm)
        is_before_mlp = kind == "attention" and self.family.mlp_input is not None
        taps = {
            "x": (module, "input"),
            "y": (module, "returned"),
            "unit": (unit, "returned"),
            "stream": (block.get_submodule(self.family.mlp_input), "input") if is_before_mlp else (block, "output"),
        }
        read, returned = self.batches(()), []  # what the map reads, and what its unit returns
        for batch, stream in enumerate(dropped):
            with self._at(batch):
                seen = tap(block, stream, self._call(index, stream), taps)
            lacks = (wide(wanted.pop(0).to(seen["stream"].device)) - wide(seen["stream"])) / self.scales[index]
            x = seen["x"]
            if norm is not None:
                rms = wide(seen["y"]).square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
                x = wide(x) / rms.reshape(*x.shape[:-1], 1)
            moments.add(x, lacks, self.held_out[batch])
            read.append(seen["x"])
            returned.append(_Returned.of(seen["unit"], seen["y"]))
        fit = moments.fit(self.ridges)
        if fit.matrix is not None:
            update = fit.matrix.T
            if norm is not None:
                gain = norm(torch.ones_like(module.weight[:1, :1]).expand(1, len(update))).flatten().to(update.dtype)
                update = torch.where(gain.abs() > 1e-3 * gain.abs().max(), 1 / gain, 0.0)[:, None] * update
            change(module, update)
        if all(returned):  # what follows in this layer reads it
            self.given[unit] = given = _Given(self.batches(()))
            for each in returned:
                given.append(cast(_Returned, each).anew(module(read.pop(0))))
        return [Refitted(index, f"{kind} output", fit.ridge, fit.explained)]

    def _call(self, index: int, stream: torch.Tensor) -> Call:
        return self.calls[len(stream)][index]

    def _call_of_reference(self, index: int, stream: torch.Tensor) -> Call:
        return self.calls_of_reference[len(stream)][index]

    def _advance(self, index: int, stream: torch.Tensor) -> torch.Tensor:
        return advance(self.blocks[index], stream, self._call(index, stream))


class _Returned(NamedTuple):
    """What a module returns whose first value is the very output of a linear map."""

    shape: torch.Size
    others: tuple | None  # None: it returns that value alone

    @classmethod
    def of(cls, returned: object, output: torch.Tensor) -> Self | None:
        """None if something else is done with the map's output before it is returned."""
        shape = output.shape
        if isinstance(returned, tuple):
            return cls(shape, _light(returned)[1:]) if returned[0] is output else None
        return cls(shape, None) if returned is output else None

    def anew(self, output: torch.Tensor) -> object:
        """The same after the map was changed."""
        output = output.reshape(self.shape)
        return output if self.others is None else (output, *self.others)


class _Given:
    """What a module returns in each batch: a tensor, or a tuple that begins with one."""

    def __init__(self, tensors: Batches):
        self.tensors, self.others = tensors, list[tuple | None]()  # None: a tensor alone

    def __len__(self) -> int:
        return len(self.tensors)

    def append(self, returned) -> None:
        tensor, others = (returned[0], returned[1:]) if isinstance(returned, tuple) else (returned, None)
        self.tensors.append(tensor)
        self.others.append(others)

    def of(self, batch: int, *args, **kwargs):
        """It in place of the module itself, whatever that reads."""
        tensor, others = self.tensors[batch], self.others[batch]
        return tensor if others is None else (tensor, *others)


def _light(returned):
    """What attention returns without its weights (B, heads, T, T), which no layer reads: they would fill the memory."""
    if not isinstance(returned, tuple):
        return returned
    return tuple(None if isinstance(each, torch.Tensor) and each.ndim == 4 else each for each in returned)


def _return_freed_memory() -> None:
    """To the system, where glibc keeps it: what is held of a layer lies between what is not, and leaves gaps of many pages."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
