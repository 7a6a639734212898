"""Layers refitted one after the other, with dense and dropped stream side by side. repair.py says what is fitted and why."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..dropping.plan import DropPlan
from ..dropping.units import skipping
from ..measure.passes import replaced
from ..models.families import family_of, find_anatomy
from .moments import Moments, wide
from .sites import Sites, change, read_together, rows_of, sites_of
from .streams import Call, advance, tap


@dataclasses.dataclass(frozen=True)
class Refitted:
    """One site that was fitted: "attention input", "attention output", "mlp input" or "mlp output" of a layer."""

    layer: int
    site: str
    ridge: float  # inf: nothing was explained, so the weights stay
    explained: float  # share of the squares of what lacked, in held-out samples, that the fit explains


def held_out_of(streams: list[torch.Tensor], one_of: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Which samples are not fitted on, one of so many, drawn from all: bool (B,) for each batch."""
    sizes = [len(stream) for stream in streams]
    drawn = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    apart = torch.zeros(sum(sizes), dtype=torch.bool)
    apart[drawn[: max(1, sum(sizes) // one_of)]] = True
    return apart.split(sizes)


class Repairing:
    """One repair, layer by layer, of batches whose streams the caller holds."""

    def __init__(
        self,
        model: nn.Module,
        plan: DropPlan,
        ridges: Sequence[float],
        reference: list[nn.Module],  # the last layers of the model that is to be matched; those before are the model's own
        held_out: tuple[torch.Tensor, ...],  # of each batch: bool (B,), which samples are not fitted on
        calls: dict[int, list[Call]],
    ):
        self.model, self.plan, self.ridges, self.held_out, self.calls = model, plan, ridges, held_out, calls
        self.given: dict[nn.Module, list] = {}  # modules of the layer at hand -> what they return in each batch
        anatomy = find_anatomy(model)
        self.family = family_of(anatomy.decoder.config)
        self.blocks = [layer.block for layer in anatomy.layers]
        self.scales = [layer.scale for layer in anatomy.layers]
        self.reference = [*self.blocks[: len(self.blocks) - len(reference)], *reference]

    def go_on(self, index: int, dense: list[torch.Tensor], dropped: list[torch.Tensor]) -> None:
        """Both lists of streams go from what a layer reads to what it gives."""
        same = self.reference[index] is self.blocks[index]
        for batch, stream in enumerate(dense):
            dense[batch] = self._advance(self.reference, index, stream)
            if same and dropped[batch] is stream:  # nothing is dropped yet
                dropped[batch] = dense[batch]
            else:
                dropped[batch : batch + 1] = self._dropped(index, [dropped[batch]])

    def go_on_dropped(self, index: int, streams: list[torch.Tensor]) -> None:
        """Streams of the dropped model alone go from what a layer reads to what it gives."""
        streams[:] = self._dropped(index, streams)

    def _dropped(self, index: int, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        with skipping(self.model, self.plan):
            return [self._advance(self.blocks, index, stream) for stream in streams]

    def refit(self, index: int, dense: list[torch.Tensor], dropped: list[torch.Tensor]) -> list[Refitted]:
        """Refit one layer; both lists of streams go on, as in `go_on`."""
        with skipping(self.model, self.plan):
            sites = {kind: sites_of(self.blocks[index], self.family, kind) for kind in ("attention", "mlp")}
        call = self._call(index, dense[0])
        sites = {kind: at and read_together(self.reference[index], at, dense[0], call) for kind, at in sites.items()}
        wanted = [self._wanted(index, sites, stream) for stream in dense]
        # 1. The attention; what it gives once it is refitted is kept, so that it is computed once for all that follows.
        found = self._refit_kind(index, "attention", sites, dropped, wanted)
        if sites["attention"] is not None:
            attention = self.blocks[index].get_submodule(self.family.attention_unit[0])
            self.given = {attention: self._outputs(index, attention, dropped)}
        # 2. The MLP, and the whole layer.
        found += self._refit_kind(index, "mlp", sites, dropped, wanted)
        for batch, each in enumerate(wanted):
            dense[batch] = each["end"]
            with self._at(batch):
                dropped[batch] = self._advance(self.blocks, index, dropped[batch])
        self.given = {}
        return found

    def _refit_kind(
        self, index: int, kind: str, sites: dict, dropped: list[torch.Tensor], wanted: list[dict]
    ) -> list[Refitted]:
        if (at := sites[kind]) is None:
            return []
        found = self._refit_readers(index, kind, at, dropped, [each.pop((kind, "input"), None) for each in wanted])
        if at.output is not None:
            found += self._refit_output(index, kind, at, dropped, [each.pop((kind, "output")) for each in wanted])
        return found

    def _outputs(self, index: int, module: nn.Module, dropped: list[torch.Tensor]) -> list:
        """What a module returns in each batch, as it returns it."""
        returned = []
        handle = module.register_forward_hook(lambda module, args, output: returned.append(output))
        try:
            with skipping(self.model, self.plan):
                for stream in dropped:
                    tap(self.blocks[index], stream, self._call(index, stream), {"y": (module, "output")})
        finally:
            handle.remove()
        return returned

    @contextlib.contextmanager
    def _at(self, batch: int) -> Iterator[None]:
        """Inside, the dropped model reads this batch; modules whose outputs are known return them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(skipping(self.model, self.plan))
            for module, outputs in self.given.items():
                if outputs[batch] is not None:
                    stack.enter_context(replaced(module, functools.partial(_return, outputs[batch])))
            yield

    def _wanted(self, index: int, sites: dict[str, Sites | None], stream: torch.Tensor) -> dict:
        """What the dense model has in a layer, of one batch: what each sub-layer reads, where each kept one is to bring the
        stream, and where the layer ends."""
        block, family = self.reference[index], self.family
        taps = {
            (kind, "input"): (block.get_submodule(at.readers[0]), "input") for kind, at in sites.items() if at and at.readers
        }
        if family.mlp_input is not None:
            taps["mlp", "stream"] = (block.get_submodule(family.mlp_input), "input")
        call = self._call(index, stream)
        seen = tap(block, stream, call, taps | {"end": (block, "output")})
        for kind, at in sites.items():
            if at is not None and at.output is not None:
                seen[kind, "output"] = self._before_next(index, kind, seen)
        return seen

    def _before_next(self, index: int, kind: str, seen: dict) -> torch.Tensor:
        """The dense stream where the sub-layer reads it that is the next kept one: past all that is dropped in between."""
        if kind == "attention" and self.family.mlp_input is not None and not self._is_dropped(index, "mlp"):
            return seen["mlp", "stream"]
        stream = seen["end"]
        for after in range(index + 1, len(self.blocks)):
            if not self._is_dropped(after, "attention"):
                return stream
            block, call = self.reference[after], self._call(after, stream)
            if not self._is_dropped(after, "mlp"):
                if self.family.mlp_input is None:
                    return stream
                return tap(block, stream, call, {"stream": (block.get_submodule(self.family.mlp_input), "input")})["stream"]
            stream = advance(block, stream, call)
        return stream

    def _is_dropped(self, index: int, kind: str) -> bool:
        return index in getattr(self.plan, kind) and self.plan.map_of(kind, index) is None

    # ---- fits

    def _refit_readers(
        self, index: int, kind: str, at: Sites, dropped: list[torch.Tensor], wanted: list[torch.Tensor]
    ) -> list[Refitted]:
        """x + x S is what they read in the dense model: W' = W (I + S')."""
        if not at.readers:
            return []
        moments, maps = Moments(), [self.blocks[index].get_submodule(name) for name in at.readers]
        for batch, (stream, z) in enumerate(zip(dropped, wanted, strict=True)):
            with self._at(batch):
                x = tap(self.blocks[index], stream, self._call(index, stream), {"x": (maps[0], "input")})["x"]
            self._add(moments, x, wide(z.to(x.device)) - wide(x), self.held_out[batch])
        fit = moments.fit(self.ridges)
        if fit.matrix is not None:
            for module in maps:
                weight = rows_of(module).to(fit.matrix.dtype)
                change(module, weight @ fit.matrix.T)
        return [Refitted(index, f"{kind} input", fit.ridge, fit.explained)]

    def _refit_output(
        self, index: int, kind: str, at: Sites, dropped: list[torch.Tensor], wanted: list[torch.Tensor]
    ) -> list[Refitted]:
        """What the stream lacks is explained by what the map reads: W' = W + S'.

        A norm that follows makes gain * y / rms(y) of the map's output y, so that x / rms(y) explains what lacks / gain, but
        for the share of it that points along y: a norm takes that away.
        """
        block, moments = self.blocks[index], Moments()
        module = block.get_submodule(at.output)
        norm = None if at.norm is None else block.get_submodule(at.norm)
        for batch, (stream, target) in enumerate(zip(dropped, wanted, strict=True)):
            with self._at(batch):
                taps = {"x": (module, "input"), "stream": (block, "output")}
                if kind == "attention" and self.family.mlp_input is not None:
                    taps["stream"] = (block.get_submodule(self.family.mlp_input), "input")
                if norm is not None:
                    taps["y"] = (module, "output")
                seen = tap(block, stream, self._call(index, stream), taps)
            lacks = (wide(target.to(seen["stream"].device)) - wide(seen["stream"])) / self.scales[index]
            x = seen["x"]
            if norm is not None:
                x = wide(x) / wide(seen["y"]).square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
            self._add(moments, x, lacks, self.held_out[batch])
        fit = moments.fit(self.ridges)
        if fit.matrix is not None:
            update = fit.matrix.T
            if norm is not None:
                gain = norm(torch.ones_like(module.weight[:1, :1]).expand(1, len(update))).flatten().to(update.dtype)
                update = torch.where(gain.abs() > 1e-3 * gain.abs().max(), 1 / gain, 0.0)[:, None] * update
            change(module, update)
        return [Refitted(index, f"{kind} output", fit.ridge, fit.explained)]

    @staticmethod
    def _add(moments: Moments, x: torch.Tensor, e: torch.Tensor, held_out: torch.Tensor) -> None:
        for chosen, apart in ((~held_out, False), (held_out, True)):
            if bool(chosen.any()):
                moments.add(x[chosen], e[chosen], apart)

    def _call(self, index: int, stream: torch.Tensor) -> Call:
        return self.calls[len(stream)][index]

    def _advance(self, blocks, index: int, stream: torch.Tensor) -> torch.Tensor:
        return advance(blocks[index], stream, self._call(index, stream))


def _return(output, *args, **kwargs):
    return output
