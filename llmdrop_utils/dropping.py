"""A model that really lacks sub-layers: no forward, no parameters and no key-value cache of what was dropped.

Norm and sub-layer are one unit (paper, section 3). Their modules are replaced by stand-ins without parameters that add
zero to the residual stream; `anatomy.FAMILIES` says which modules these are. Layers keep their indices.
"""

import contextlib
import dataclasses
import functools
import json
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import cache_utils

from .anatomy import Anatomy, family_of, find_anatomy, not_as_stated
from .workspace import LLMDropError, write_text

FORMAT = "llmdrop drop plan 1"
NAMES = {"attention": "attention", "mlp": "MLP"}


@dataclasses.dataclass(frozen=True)
class DropPlan:
    """Which sub-layers to drop: indices of layers from zero, most droppable first.

    `n_layers` and `model` say which model the plan was made for ('sha256:...' or 'hub:org/name@commit'), `scores` is the
    fingerprint of the scores that it came from; None: unknown. Raises LLMDropError for lists that no model can have.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    n_layers: int | None = None
    model: str | None = None
    scores: str | None = None

    def __post_init__(self):
        if self.n_layers is not None:
            n_layers = _whole(self.n_layers)
            if n_layers is None or n_layers < 1:
                raise LLMDropError(f"A drop plan's n_layers must be a whole number above 0, but is {self.n_layers!r}.")
            object.__setattr__(self, "n_layers", n_layers)
        for name in ("model", "scores"):
            if not isinstance(getattr(self, name), str | None):
                raise LLMDropError(f"A drop plan's {name} must be text, but is {getattr(self, name)!r}.")
        for kind, name in NAMES.items():
            object.__setattr__(self, kind, _indices(getattr(self, kind), name))
            if self.n_layers is not None:
                _check_range(getattr(self, kind), name, self.n_layers)

    @property
    def n_drop(self) -> int:
        """Number of sub-layers that go."""
        return len(self.attention) + len(self.mlp)

    def save(self, path: Path | str) -> Path:
        """Write the plan to a JSON file, in one step."""
        return write_text(Path(path), json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "DropPlan":
        """The inverse of `save`. Raises LLMDropError if there is no such file or it holds no drop plan."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
                raise ValueError(f"it does not say that its format is {FORMAT!r}")
            return cls(**value)
        except FileNotFoundError as error:
            raise LLMDropError(f"There is no drop plan at {path}.") from error
        except (OSError, ValueError, TypeError, RecursionError, LLMDropError) as error:  # a JSON error is a ValueError
            raise LLMDropError(f"{path} is no drop plan that can be read ({error}). Make and save the plan again.") from error


def check_plan(model: nn.Module, plan: DropPlan) -> Anatomy:
    """The model's anatomy. Raises LLMDropError if the plan names layers it lacks or was made for another model."""
    anatomy = find_anatomy(model)
    for kind, name in NAMES.items():
        _check_range(getattr(plan, kind), name, len(anatomy))
    if plan.n_layers not in (None, len(anatomy)):
        raise LLMDropError(
            f"The drop plan was made for a model with {plan.n_layers} layers, but this one has {len(anatomy)}. "
            "Use the model it was made for, or make a plan for this one."
        )
    identity = getattr(model, "llmdrop_identity", None)
    if None not in (plan.model, identity) and plan.model != identity:
        raise LLMDropError(
            f"The drop plan was made for the model {plan.model}, but this one is {identity}. "
            "Use the model it was made for, or make a plan for this one."
        )
    return anatomy


@contextlib.contextmanager
def skipping(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """Inside, the sub-layers of the plan are gone from the model, which is yielded; afterwards all is as it was.

    Takes about a millisecond and moves no weights: for many plans in a row. May be nested. Mode, dtype and device of what
    is gone do not follow the model meanwhile. Raises LLMDropError for a plan that does not fit (see `check_plan`).
    """
    with _without(model, plan):
        yield model


@contextlib.contextmanager
def dropped(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """`skipping`, and what is gone leaves the GPU meanwhile. Weights that accelerate offloads stay where they are."""
    with _without(model, plan) as modules, _on_cpu(modules):
        yield model


def drop(model: nn.Module, plan: DropPlan) -> nn.Module:
    """Drop the sub-layers of the plan for good, in place, which frees their memory; returns the model.

    To keep the result, save the plan. `save_pretrained` would write weights that lack what the config still promises, which
    transformers fills with random numbers (`load_model` refuses to).
    """
    anatomy = check_plan(model, plan)
    swaps, gone = _stand_ins(anatomy, plan)
    for block, name, _, stand_in in swaps:
        setattr(block, name, stand_in)
    _watch_caches(anatomy, gone)
    return model


@contextlib.contextmanager
def _without(model: nn.Module, plan: DropPlan) -> Iterator[list[nn.Module]]:
    """Swap the plan's modules for stand-ins; yields the modules."""
    anatomy = check_plan(model, plan)
    swaps, gone = _stand_ins(anatomy, plan)
    handles = []
    try:
        for block, name, _, stand_in in swaps:
            setattr(block, name, stand_in)
        handles += _watch_caches(anatomy, gone)
        yield [module for _, _, module, _ in swaps]
    finally:
        for handle in handles:
            handle.remove()
        for block, name, module, _ in swaps:
            setattr(block, name, module)


@contextlib.contextmanager
def _on_cpu(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, what these modules hold on a GPU is in the CPU's memory. The parameters remain the same objects."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    homes = [(tensor, tensor.device) for tensor in tensors if _on_gpu(tensor)]
    try:
        for tensor, _ in homes:
            _move(tensor, torch.device("cpu"))
        yield
    finally:
        for tensor, device in homes:
            _move(tensor, device)


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda  # what accelerate offloads is on the device "meta" between forwards


@torch.inference_mode(False)  # what is made in inference mode could never be trained again
def _move(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)


def left(anatomy: Anatomy, kind: str) -> list[int]:
    """Indices of the layers that have their "attention", or their "mlp", now."""
    family = family_of(anatomy.decoder.config)
    name = {"attention": family.attention_unit, "mlp": family.mlp_unit}[kind][0]
    blocks = enumerate(layer.block for layer in anatomy.layers)
    return [index for index, block in blocks if not isinstance(block.get_submodule(name), Dropped)]


class Dropped(nn.Module):
    """Stands for a sub-layer: gives zero, in the structure that the layer expects."""

    def __init__(self, in_pair: bool, full: bool):
        super().__init__()
        self.in_pair = in_pair  # attention: output and weights; some MLPs: output and router scores
        self.full = full  # a layer that adds in place needs the full shape; for the others a single zero is cheaper

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        zero = torch.zeros_like(hidden_states) if self.full else hidden_states.new_zeros(())
        return (zero, None) if self.in_pair else zero

    def extra_repr(self) -> str:
        return "adds nothing"


def _stand_ins(anatomy: Anatomy, plan: DropPlan) -> tuple[list[tuple[nn.Module, str, nn.Module, nn.Module]], frozenset[int]]:
    """What to swap (layer, name, module, stand-in), and the indices of all layers that then lack attention.

    Changes nothing yet. A plan may meet a model that lacks sub-layers already: only what is still there is swapped.
    """
    family = family_of(anatomy.decoder.config)
    swaps, lacks_attention = [], set()
    for index, layer in enumerate(anatomy.layers):
        child = functools.partial(_child, anatomy, layer.block)
        units = []
        for unit, planned, in_pair, full in (
            (family.attention_unit, index in plan.attention, True, False),
            (family.mlp_unit, index in plan.mlp, family.mlp_returns_router, family.mlp_is_added_to),
        ):
            is_gone = isinstance(child(unit[0]), Dropped)
            units.append((unit, is_gone or planned))
            if planned and not is_gone:
                swaps.append((layer.block, unit[0], child(unit[0]), Dropped(in_pair, full)))
        kept = {name for unit, goes in units if not goes for name in unit}
        passed = {name: None for unit, goes in units if goes for name in unit[1:] if name not in kept}  # a set, in order
        swaps += [
            (layer.block, name, child(name), nn.Identity()) for name in passed if not isinstance(child(name), nn.Identity)
        ]
        if units[0][1]:
            lacks_attention.add(index)
    return swaps, frozenset(lacks_attention)


def _child(anatomy: Anatomy, block: nn.Module, name: str) -> nn.Module:
    try:
        return block.get_submodule(name)
    except AttributeError as error:
        raise not_as_stated(anatomy.family, error) from error


class NoCache(getattr(cache_utils, "DummyLayer", object)):  # transformers 5.17 has none; later ones look for it
    """Stands for the cache of an attention that was dropped; a cache takes its length from the layers that are left."""

    # Masks are made for the first layer that is True (sliding) or False (full); this is neither.
    is_sliding = "neither"
    is_compileable = is_croppable = is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, index: int):
        self.index = index

    def __repr__(self) -> str:
        return "NoCache"

    def update(self, *args, **kwargs):
        raise LLMDropError(
            f"This cache was used while the attention of layer {self.index} was dropped, so it holds nothing for it. "
            "Start with a new cache."
        )

    def get_max_length(self) -> int:
        return -1

    def _nothing(self, *args, **kwargs) -> None:
        pass

    offload = prefetch = reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _nothing


def _watch_caches(anatomy: Anatomy, gone: frozenset[int]) -> list:
    """Hooks by which every cache that the decoder takes or makes has no room for the attention that is gone."""
    if not gone:
        return []
    n_layers = len(anatomy)
    return [
        anatomy.decoder.register_forward_pre_hook(functools.partial(_fit_given, gone, n_layers), with_kwargs=True),
        anatomy.decoder.register_forward_hook(functools.partial(_fit_returned, gone, n_layers)),
    ]


def _fit_given(gone: frozenset[int], n_layers: int, decoder: nn.Module, args: tuple, kwargs: dict):
    cache = _find_cache((*args, *kwargs.values()))
    if len(gone) < n_layers:
        _fit(cache, gone, n_layers)
        return None
    if cache is not None:  # no layer would know how many tokens the cache has seen
        raise LLMDropError(
            f"The attention of all {n_layers} layers is dropped, so nothing is left to cache. Pass use_cache=False (to "
            "generate() as well) and no past_key_values."
        )
    return args, {**kwargs, "use_cache": False}


def _fit_returned(gone: frozenset[int], n_layers: int, decoder: nn.Module, args: tuple, output) -> None:
    _fit(_find_cache(output.values() if isinstance(output, dict) else output), gone, n_layers)


def _find_cache(values: Iterable) -> cache_utils.Cache | None:
    return next((value for value in values if isinstance(value, cache_utils.Cache)), None)


def _fit(cache: cache_utils.Cache | None, gone: frozenset[int], n_layers: int) -> None:
    """Put `NoCache` where attention is gone."""
    if cache is None:
        return
    if cache.layer_class_to_replicate is not None:  # it grows as layers come by; those that are gone would not come
        cache.layers += [cache.layer_class_to_replicate() for _ in range(len(cache.layers), n_layers)]
    for index in gone:
        if not isinstance(cache.layers[index], NoCache):
            cache.layers[index] = NoCache(index)


def _whole(value) -> int | None:
    """An int from an int or a NumPy integer; None from anything else, truth values included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _indices(values, name: str) -> tuple[int, ...]:
    try:
        given = tuple(values)
    except TypeError:
        given = (None,)
    indices = tuple(_whole(value) for value in given)
    if None in indices:
        raise LLMDropError(f"The {name} drop list must hold whole numbers, the indices of layers, but is {values!r}.")
    if min(indices, default=0) < 0:
        raise LLMDropError(f"The {name} drop list holds layer {min(indices)}, but layers are counted from 0.")
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise LLMDropError(f"The {name} drop list holds layer {twice[0]} more than once. List every layer once.")
    return indices


def _check_range(indices: tuple[int, ...], name: str, n_layers: int) -> None:
    if max(indices, default=0) >= n_layers:
        raise LLMDropError(
            f"The {name} drop list holds layer {max(indices)}, but this model has {n_layers} layers (0-{n_layers - 1})."
        )
