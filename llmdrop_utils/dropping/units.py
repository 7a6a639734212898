"""A model that really lacks sub-layers: no forward, no parameters and no key-value cache of what was dropped.

Norm and sub-layer are one unit (paper, section 3). Their modules are replaced by stand-ins without parameters that add
zero to the residual stream; `layouts.FAMILIES` says which modules these are. Norms that act on the stream itself belong to
no unit, and stay; so do positions that the attention of one layer makes for all (T5). Where the plan has a linear map for a
place, all norms stay, and the map replaces the attention or MLP module between them. Layers keep their indices.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import nn

from ..base.errors import LLMDropError
from ..models.families import Anatomy, Family, not_as_stated
from .caches import watch_caches
from .maps import LinearMap
from .plan import NAMES, PLACES, DropPlan, check_plan


@contextlib.contextmanager
def skipping(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """Inside, the model, which is yielded, lacks the sub-layers of the plan; afterwards all is as it was.

    Takes about a millisecond and moves no weights: for many plans in a row. (Maps are moved to the model's device once, and
    kept there as long as they exist.) May be nested. Mode, dtype and device of what is dropped do not follow the model
    meanwhile. Raises LLMDropError for a plan that does not fit (see `check_plan`).
    """
    with _without(model, plan):
        yield model


@contextlib.contextmanager
def dropped(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """`skipping`, and what is dropped leaves the GPU meanwhile. Weights that accelerate offloads stay where they are."""
    with _without(model, plan) as modules, _on_cpu(modules, model):
        yield model


def drop(model: nn.Module, plan: DropPlan) -> nn.Module:
    """Drop the sub-layers of the plan for good, in place, which frees their memory; returns the model.

    Maps become parameters of the model, which training changes; the plan's own maps stay as they are. To keep the result,
    use `save_dropped`. `save_pretrained` would write weights that lack what the config still promises, which transformers fills
    with random numbers (`load_model` refuses to).
    """
    anatomy = check_plan(model, plan)
    swaps, lacking = _stand_ins(anatomy, plan, for_good=True)
    for block, name, _, stand_in in swaps:
        block.set_submodule(name, stand_in)
    watch_caches(anatomy, lacking)
    return model


@contextlib.contextmanager
def _without(model: nn.Module, plan: DropPlan) -> Iterator[list[nn.Module]]:
    """Swap the plan's modules for stand-ins; yields the modules."""
    anatomy = check_plan(model, plan)
    swaps, lacking = _stand_ins(anatomy, plan)
    handles = []
    try:
        for block, name, _, stand_in in swaps:
            block.set_submodule(name, stand_in)
        handles += watch_caches(anatomy, lacking)
        yield [module for _, _, module, _ in swaps]
    finally:
        for handle in handles:
            handle.remove()
        for block, name, module, _ in swaps:
            block.set_submodule(name, module)


@contextlib.contextmanager
def _on_cpu(modules: list[nn.Module], model: nn.Module) -> Iterator[None]:
    """Inside, what these modules hold on a GPU, and the model no more, is in the CPU's memory. The parameters remain the same
    objects."""
    kept = {id(tensor) for tensor in _tensors(model)}
    tensors = [part for module in modules for tensor in _tensors(module) if id(tensor) not in kept for part in _parts(tensor)]
    homes = [(tensor, tensor.device) for tensor in tensors if _on_gpu(tensor)]
    try:
        for tensor, _ in homes:
            _move(tensor, torch.device("cpu"))
        yield
    finally:
        for tensor, device in homes:
            _move(tensor, device)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor itself, or those that hold the numbers of a quantised one, whose own `data` cannot be set."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda  # what accelerate offloads is on the device "meta" between forwards


@torch.inference_mode(False)  # what is made in inference mode could never be trained again
def _move(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)


def left(anatomy: Anatomy, kind: str) -> list[int]:
    """Indices of the layers whose "attention", "cross_attention" or "mlp" is in its place now: neither dropped nor replaced by
    a map."""
    module = lambda layer: layer.block.get_submodule(layer.family.units[kind][0])  # noqa: E731
    return [index for index in anatomy.having(kind) if not isinstance(module(anatomy.layers[index]), StandIn)]


def available(anatomy: Anatomy, kind: str) -> list[int]:
    """Indices of the layers that have something of this kind to drop: "attention", "cross_attention", "mlp" or "block".

    A block can be dropped if its parts can, so none whose attention is another mixer.
    """
    if kind != "block":
        return left(anatomy, kind)
    parts = {*left(anatomy, "attention"), *left(anatomy, "cross_attention"), *left(anatomy, "mlp")}
    return sorted(parts & set(anatomy.with_attention))


def mapped(anatomy: Anatomy) -> Iterator[tuple[tuple[str, int], "Mapped"]]:
    """Places ("attention" or "mlp", layer) in which a linear map stands now, and the modules with their parameters."""
    for index, layer in enumerate(anatomy.layers):
        for kind, unit in layer.family.units.items():
            if not layer.has(kind):
                continue
            if isinstance(module := layer.block.get_submodule(unit[0]), Mapped):
                yield (kind, index), module


# ---- stand-ins ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """What a layer expects of the module that stands here."""

    returns: int  # how many values; attention: output and weights; some MLPs: output and router scores
    term: str = ""  # the module inside of it that makes the term, where it adds the stream (its second input) itself
    full: bool = False  # the layer adds in place, so that the output needs its full shape
    hands_on: bool = False  # the second value are the positions that later layers read as well: as given, or as made here
    maker: nn.Module | None = None  # what makes them, if that is here


class StandIn(nn.Module):
    """Stands in the place of an attention or MLP module, and returns what the layer expects."""

    def __init__(self, place: "Place"):
        super().__init__()
        self.returns = place.returns
        self.hands_on = place.hands_on
        self.__dict__["maker"] = place.maker  # no child: what it holds keeps its name here
        for name, module in place.maker.named_children() if place.maker else ():
            self.add_module(name, module)
        self.term = place.term
        if self.term:  # where the term is seen, as in the module that stood here
            self.add_module(self.term, nn.Identity())

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        output = self.output(hidden_states)
        if self.term:
            output = args[0] + self.get_submodule(self.term)(output)
        if self.hands_on:
            return output, self._positions(hidden_states, **kwargs), *[None] * (self.returns - 2)
        return output if self.returns == 1 else (output, *[None] * (self.returns - 1))

    def _positions(self, x: torch.Tensor, position_bias=None, mask=None, past_key_values=None, **kwargs) -> torch.Tensor | None:
        """What is added to the scores of attention: (1, heads, T, past + T), as given, or as made here."""
        if position_bias is not None or self.maker is None:
            return position_bias
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        n_keys = past + x.shape[1] if mask is None else mask.shape[-1]
        return self.maker.compute_bias(x.shape[1], n_keys, device=x.device, past_seen_tokens=past)


class Dropped(StandIn):
    """Adds zero."""

    def __init__(self, place: Place):
        super().__init__(place)
        self.full = place.full  # for other layers a single zero is cheaper

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x) if self.full else x.new_zeros(())

    def extra_repr(self) -> str:
        return "adds nothing"


class Mapped(StandIn):
    """Adds W x + b."""

    @torch.inference_mode(False)  # as in `LinearMap.tensors`
    def __init__(self, place: Place, linear: LinearMap, like: torch.Tensor, for_good: bool):
        super().__init__(place)
        self.fingerprint = linear.fingerprint  # of the map as it was given; training changes the parameters, not this
        device = like.device if like.device.type != "meta" else torch.device("cpu")  # offloaded by accelerate
        if for_good:
            pair = (None if t is None else t.to(device, like.dtype, copy=True) for t in (linear.weight, linear.bias))
        else:
            pair = linear.tensors(device, like.dtype)
        for name, tensor in zip(("weight", "bias"), pair, strict=True):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=for_good))

    def output(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (None if t is None else t.to(x.device, x.dtype) for t in (self.weight, self.bias))
        return nn.functional.linear(x, weight, bias)

    def extra_repr(self) -> str:
        return f"adds a linear map of {len(self.weight)}"


Swap = tuple[nn.Module, str, nn.Module, nn.Module]  # block, name, module, what stands in for it


def _stand_ins(anatomy: Anatomy, plan: DropPlan, for_good: bool = False) -> tuple[list[Swap], dict[str, frozenset[int]]]:
    """What to swap; and by kind, the indices of all layers that then lack their sub-layer.

    Changes nothing yet. A plan may meet a model that lacks sub-layers already: only what is still there is swapped.
    """
    swaps: list[Swap] = []
    lacking: dict[str, set[int]] = {kind: set() for kind in PLACES}
    for index, layer in enumerate(anatomy.layers):
        child = functools.partial(_child, anatomy, layer.block)
        kept: set[str] = set()  # modules that something still reads or writes
        idle: list[str] = []  # and those that a dropped unit leaves idle
        for kind, unit in layer.family.units.items():
            if not layer.has(kind):  # `check_plan` refuses to drop another mixer
                kept.update(unit)
                continue
            now, planned, linear = child(unit[0]), index in getattr(plan, kind), plan.map_of(kind, index)
            if isinstance(now, StandIn):
                _check_standing(now, linear, kind, index)
                stand_in = now
            elif planned:
                like = _weights(now, layer.block)
                place = _place(layer.family, kind, now)
                stand_in = Dropped(place) if linear is None else Mapped(place, linear, like, for_good)
                swaps.append((layer.block, unit[0], now, stand_in))
            else:
                kept.update(unit)
                continue
            lacking[kind].add(index)
            if isinstance(stand_in, Mapped):
                kept.update(unit[1:])  # its norms
            else:
                idle += unit[1:]
        names = dict.fromkeys(name for name in idle if name not in kept)  # a set, in order
        swaps += [(layer.block, name, child(name), nn.Identity()) for name in names if not isinstance(child(name), nn.Identity)]
    return swaps, {kind: frozenset(layers) for kind, layers in lacking.items()}


def _place(family: Family, kind: str, now: nn.Module) -> Place:
    unit, term = family.units[kind], family.term(kind)
    inside = term.removeprefix(f"{unit[0]}.") if term.startswith(f"{unit[0]}.") else ""
    if kind != "mlp":
        name = family.position_bias
        return Place(family.attention_returns, inside, hands_on=bool(name), maker=_part(now, name) if name else None)
    return Place(2 if family.mlp_returns_router and hasattr(now, "router") else 1, inside, family.mlp_is_added_to)


def _part(attention: nn.Module, name: str) -> nn.Module | None:
    """A copy of an attention that holds only its child of this name, the very same; None if it has none."""
    if not hasattr(attention, name):
        return None
    part = copy.copy(attention)
    part._modules = {name: getattr(attention, name)}
    return part


def _weights(module: nn.Module, block: nn.Module) -> torch.Tensor:
    """Weights that tell a module's dtype and device; of the block, where its own are quantised to integers."""
    return next(p for p in (*module.parameters(), *block.parameters()) if p.is_floating_point())


def _check_standing(now: StandIn, linear: LinearMap | None, kind: str, layer: int) -> None:
    """A map cannot take a place whose norms may be missing, nor that of another map."""
    if linear is not None and getattr(now, "fingerprint", None) != linear.fingerprint:
        raise LLMDropError(
            f"The drop plan has a map for the {NAMES[kind]} of layer {layer}, which is dropped already. "
            f"Use the plan on a model that has this {NAMES[kind]}."
        )


def _child(anatomy: Anatomy, block: nn.Module, name: str) -> nn.Module:
    try:
        return block.get_submodule(name)
    except AttributeError as error:
        raise not_as_stated(anatomy.family, error) from error
