"""A drop plan: which sub-layers of which model are dropped, and which linear maps stand in their place."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..base.checks import as_whole
from ..base.errors import LLMDropError
from ..base.files import write_text
from ..models.families import Anatomy, find_anatomy, stream_width
from .maps import LinearMap, load_maps, save_maps, weights_path

FORMAT = "llmdrop drop plan 1"

NAMES = {"attention": "attention", "mlp": "MLP"}
PLACES = NAMES | {"cross_attention": "cross-attention"}  # the last one in encoder-decoders alone


class PlanKey(NamedTuple):
    """What a plan drops, in whatever order it does: plans with equal keys give equal models."""

    attention: tuple[int, ...]  # sorted
    mlp: tuple[int, ...]
    maps: tuple[tuple[str, int, str], ...] = ()  # (kind, layer, fingerprint), sorted
    cross_attention: tuple[int, ...] = ()  # sorted

    def to_json(self) -> dict:
        """Plain lists, for the store. "maps" and "cross_attention" only if there are some: keys of records without them never
        change."""
        lists = {"attention": list(self.attention), "mlp": list(self.mlp)}
        if self.cross_attention:
            lists["cross_attention"] = list(self.cross_attention)
        return lists | ({"maps": [list(entry) for entry in self.maps]} if self.maps else {})

    @classmethod
    def from_json(cls, value: dict) -> "PlanKey":
        """The inverse of `to_json`."""
        maps = tuple(tuple(entry) for entry in value.get("maps", []))
        return cls(tuple(value["attention"]), tuple(value["mlp"]), maps, tuple(value.get("cross_attention", [])))


@dataclasses.dataclass(frozen=True)
class DropPlan:
    """Which sub-layers to drop: indices of layers from zero, most droppable first.

    In an encoder-decoder the layers of the decoder are counted on from those of the encoder, and have cross-attention as well.
    `n_layers` and `model` say which model the plan was made for ('sha256:...' or 'hub:org/name@commit'), `scores` is the
    fingerprint of the scores that it came from; None: unknown. `maps` puts linear maps in some of the dropped places; it is
    given as {("attention" | "mlp", layer): LinearMap}. Raises LLMDropError for what no model can have.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    n_layers: int | None = None
    model: str | None = None
    scores: str | None = None
    maps: tuple[tuple[str, int, LinearMap], ...] = ()  # sorted by kind and layer
    cross_attention: tuple[int, ...] = ()

    def __post_init__(self):
        if self.n_layers is not None:
            n_layers = as_whole(self.n_layers)
            if n_layers is None or n_layers < 1:
                raise LLMDropError(f"A drop plan's n_layers must be a whole number above 0, but is {self.n_layers!r}.")
            object.__setattr__(self, "n_layers", n_layers)
        for name in ("model", "scores"):
            if not isinstance(getattr(self, name), str | None):
                raise LLMDropError(f"A drop plan's {name} must be text, but is {getattr(self, name)!r}.")
        for kind, name in PLACES.items():
            object.__setattr__(self, kind, _indices(getattr(self, kind), name))
            if self.n_layers is not None:
                _check_range(getattr(self, kind), name, self.n_layers)
        object.__setattr__(self, "maps", _entries(self.maps))
        for kind, layer, _ in self.maps:
            if layer not in getattr(self, kind):
                raise LLMDropError(
                    f"The drop plan has a map for the {NAMES[kind]} of layer {layer}, but its {NAMES[kind]} drop list is "
                    f"{list(getattr(self, kind))}. A map stands only where something is dropped: add the layer to the list."
                )

    @property
    def n_drop(self) -> int:
        """Number of sub-layers that are dropped."""
        return len(self.attention) + len(self.mlp) + len(self.cross_attention)

    @property
    def key(self) -> PlanKey:
        """What the plan drops, whatever the order, the model and the scores."""
        maps = tuple((kind, layer, linear.fingerprint) for kind, layer, linear in self.maps)
        return PlanKey(tuple(sorted(self.attention)), tuple(sorted(self.mlp)), maps, tuple(sorted(self.cross_attention)))

    def map_of(self, kind: str, layer: int) -> LinearMap | None:
        """The map in this place; None if nothing stands there, or the sub-layer itself."""
        return next((linear for k, i, linear in self.maps if (k, i) == (kind, layer)), None)

    def state_of(self, layer: int) -> tuple[str, str]:
        """What stands for attention and MLP of a layer: "kept", "dropped" or a map's fingerprint."""

        def state(kind: str) -> str:
            linear = self.map_of(kind, layer)
            return linear.fingerprint if linear else "dropped" if layer in getattr(self, kind) else "kept"

        return state("attention"), state("mlp")

    def save(self, path: Path | str) -> Path:
        """Write the plan to a JSON file, and its maps to a .safetensors file beside it; each in one step."""
        path = Path(path)
        value = {"format": FORMAT} | {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del value["maps"]
        if not self.cross_attention:
            del value["cross_attention"]
        if self.maps:
            save_maps(weights_path(path), {(kind, layer): linear for kind, layer, linear in self.maps})
            value["maps"] = self.key.maps
        return write_text(path, json.dumps(value, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "DropPlan":
        """The inverse of `save`. Raises LLMDropError if there is no such file or it holds no drop plan."""
        path = Path(path)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
                raise ValueError(f"it does not say that its format is {FORMAT!r}")
            if "maps" in value:
                fingerprints = {(kind, layer): fingerprint for kind, layer, fingerprint in value["maps"]}
                value["maps"] = load_maps(weights_path(path), fingerprints)
            return cls(**value)
        except FileNotFoundError as error:
            raise LLMDropError(f"There is no drop plan at {path}.") from error
        except (OSError, ValueError, TypeError, RecursionError, LLMDropError) as error:  # a JSON error is a ValueError
            raise LLMDropError(f"{path} is no drop plan that can be read ({error}). Make and save the plan again.") from error


def check_plan(model: nn.Module, plan: DropPlan) -> Anatomy:
    """The model's anatomy. Raises LLMDropError if the plan does not fit the model.

    It fits if the model has its layers, if its maps are as wide as the model's stream, and if it was made for this model or,
    where this one is derived (its kept weights were changed), for one of those that it is derived from.
    """
    anatomy = find_anatomy(model)
    if not isinstance(plan, DropPlan):
        raise LLMDropError(f"Expected a drop plan, found {plan!r}. Make one: DropPlan(attention=(3,)), select(...).")
    for kind, name in PLACES.items():
        _check_range(getattr(plan, kind), name, len(anatomy))
    _check_cross_attention(anatomy, plan)
    if missing := sorted(set(plan.attention) - set(anatomy.with_attention)):
        raise LLMDropError(
            f"The attention drop list holds layer {missing[0]}, but that layer of this {anatomy.family} model has another "
            f"mixer of tokens in its place, which cannot be dropped. The layers that have attention: {anatomy.with_attention}."
        )
    if plan.n_layers not in (None, len(anatomy)):
        raise LLMDropError(
            f"The drop plan was made for a model with {plan.n_layers} layers, but this one has {len(anatomy)}. "
            "Use the model it was made for, or make a plan for this one."
        )
    identity, bases = getattr(model, "llmdrop_identity", None), getattr(model, "llmdrop_bases", ())
    if None not in (plan.model, identity) and plan.model not in (identity, *bases):
        raise LLMDropError(
            f"The drop plan was made for the model {plan.model}, but this one is {identity}. "
            "Use the model it was made for, or make a plan for this one."
        )
    width = stream_width(anatomy.decoder.config)
    for kind, layer, linear in plan.maps:
        if linear.width != width:
            raise LLMDropError(
                f"The map for the {NAMES[kind]} of layer {layer} is {linear.width} numbers wide, but this model's residual "
                f"stream is {width} wide. Fit a map to this model."
            )
        family = anatomy.layers[layer].family
        if not {"attention": family.attention_is_one_module, "mlp": family.mlp_is_one_module}[kind]:
            other = " Use a plan with maps for attention only." if family.attention_is_one_module else ""
            raise LLMDropError(
                f"The layers of the family {anatomy.family} have no module of its own for the {NAMES[kind]}, so no map can "
                f"stand in its place (layer {layer}).{other}"
            )
    return anatomy


def _check_cross_attention(anatomy: Anatomy, plan: DropPlan) -> None:
    """Raise LLMDropError unless each layer whose cross-attention is to be dropped has one."""
    there = anatomy.having("cross_attention")
    if missing := sorted(set(plan.cross_attention) - set(there)):
        others = f"The layers that have it are those of the decoder: {there}." if there else "Only an encoder-decoder has it."
        raise LLMDropError(
            f"The cross-attention drop list holds layer {missing[0]}, but that layer of this {anatomy.family} model has no "
            f"cross-attention. {others}"
        )


def check_plans(model: nn.Module, plans: Sequence[DropPlan] | DropPlan) -> tuple[DropPlan, ...]:
    """The plans (one alone is a list of one), each of which fits the model. Raises LLMDropError otherwise, and for none."""
    given = (plans,) if isinstance(plans, DropPlan) else tuple(plans)
    if not given:
        raise LLMDropError("There is no drop plan to measure under. DropPlan() is the dense model.")
    for plan in given:
        check_plan(model, plan)
    return given


def _indices(values, name: str) -> tuple[int, ...]:
    try:
        given = tuple(values)
    except TypeError:
        given = (None,)
    indices = tuple(index for value in given if (index := as_whole(value)) is not None)
    if len(indices) < len(given):
        raise LLMDropError(f"The {name} drop list must hold whole numbers, the indices of layers, but is {values!r}.")
    if min(indices, default=0) < 0:
        raise LLMDropError(f"The {name} drop list holds layer {min(indices)}, but layers are counted from 0.")
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise LLMDropError(f"The {name} drop list holds layer {twice[0]} more than once. List every layer once.")
    return indices


def _entries(maps) -> tuple[tuple[str, int, LinearMap], ...]:
    """Maps as sorted entries, from a mapping of (kind, layer) or from such entries."""
    if isinstance(maps, Mapping):
        maps = tuple((*place, linear) if isinstance(place, tuple) else (place, linear) for place, linear in maps.items())
    entries = []
    for entry in maps if isinstance(maps, tuple | list) else (maps,):
        if not isinstance(entry, tuple | list) or len(entry) != 3 or not isinstance(entry[2], LinearMap):
            raise LLMDropError(f"A drop plan's maps must be {{(kind, layer): LinearMap}}, but hold {entry!r}.")
        kind, layer, linear = entry
        if kind not in NAMES:
            raise LLMDropError(f"A map stands in the place of 'attention' or 'mlp', not of {kind!r}.")
        (layer,) = _indices([layer], NAMES[kind])
        entries.append((kind, layer, linear))
    places = [entry[:2] for entry in entries]
    if len(set(places)) < len(places):
        raise LLMDropError("A drop plan has two maps for one place: give each place one map.")
    return tuple(sorted(entries, key=lambda entry: entry[:2]))


def _check_range(indices: tuple[int, ...], name: str, n_layers: int) -> None:
    if max(indices, default=0) >= n_layers:
        raise LLMDropError(
            f"The {name} drop list holds layer {max(indices)}, but this model has {n_layers} layers (0-{n_layers - 1})."
        )
