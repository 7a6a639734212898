"""Dropped models as transformers checkpoints: the weights of what is dropped are not on disk.

`AutoModelForCausalLM.from_pretrained`, of an encoder `AutoModel.from_pretrained`, gives the dropped model after `import
llmdrop_utils`. Without it, transformers refuses: it does not know the model type, and weights have a variant in their names
(model.llmdrop.safetensors), so that no class of the base model's family finds them either. It would fill what is not on disk
with random numbers.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from ..base.errors import LLMDropError
from ..base.files import building
from ..dropping.maps import LinearMap
from ..dropping.plan import NAMES, DropPlan, check_plan
from ..dropping.units import StandIn, drop, left, mapped, skipping
from ..models.config import DECODERS, config_of, read_settings, says_dropped
from ..models.config import ENCODERS as KINDS_OF_ENCODERS
from ..models.convert import UNREADABLE, first_line
from ..models.encoder_layouts import ENCODERS
from ..models.encoders import POOLER, load_encoder_weights, load_reader
from ..models.families import find_anatomy, need_decoder, stream_width
from ..models.load import check_weights, load_tokenizer, load_weights
from ..models.locate import IMAGE_SETTINGS, LocatedModel, has_tokenizer, locate_dropped
from ..models.names import folder_identity
from . import MODEL_TYPE
from .official import drop_lists, plan_from_config

VARIANT = "llmdrop"
FORMAT = "llmdrop dropped model 1"
ABOUT = {"format", "base", "base_model_type", "scores", "maps"}  # what config.json says under "llmdrop"
OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq")


def save_dropped(model: nn.Module, tokenizer, plan: DropPlan, folder: Path | str, max_shard_size: int | str = "50GB") -> Path:
    """Write a model without the sub-layers of a plan to a new folder, in one step; returns the folder.

    Parameters
    ----------
    model: the dense model, or one that lacks what the plan drops and nothing else. It stays as it is. Of an encoder what
        `load_encoder` loads is kept: no pooler and no head.
    tokenizer: saved with its chat template; None for a model without one. Of an encoder its reader.
    folder: must not exist yet.
    max_shard_size: as in transformers' `save_pretrained`.

    Maps are stored in the model's dtype. Raises LLMDropError for a plan that does not fit and for a folder that exists, and
    DiskFull.
    """
    folder = Path(folder)
    anatomy = check_plan(model, plan)
    if not (is_encoder := anatomy.family in ENCODERS):
        need_decoder(anatomy)
    for kind, name in NAMES.items():
        built = anatomy.with_attention if kind == "attention" else range(len(anatomy))
        lacks = set(built) - set(left(anatomy, kind)) - set(getattr(plan, kind))
        if lacks:
            raise LLMDropError(
                f"The model lacks the {name} of layer {min(lacks)}, which the plan does not drop. Save it with the plan that "
                "it was dropped by."
            )
    if folder.exists():
        raise LLMDropError(f"{folder} exists already. Give a dropped model a folder of its own.")
    with skipping(model, plan), building(folder) as temporary:
        kept, weights = model, None
        if is_encoder:
            kept = anatomy.decoder
            weights = {key: weight for key, weight in kept.state_dict().items() if not POOLER.search(key)}
        PreTrainedModel.save_pretrained(kept, temporary, variant=VARIANT, max_shard_size=max_shard_size, state_dict=weights)
        if is_encoder and (pooling := getattr(model, "llmdrop_pooling", None)):
            pooling.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _describe(temporary, model, plan)
    return folder


def load_dropped(name: Path | str, dtype: torch.dtype | None = None, device: str | None = None):
    """Load a dropped model: a folder that `save_dropped` wrote, or a checkpoint of the paper's own code.

    name: a folder, or a hub id ("org/model", "org/model@commit"). dtype, device: as in `load_model`.

    Returns (model in eval mode, tokenizer or an encoder's reader; None if there is none beside the weights).
    `model.llmdrop_plan` is the plan; plans that were made for the base fit the model, too. Raises LLMDropError for a model that
    is not dropped, and for a checkpoint that is damaged or incomplete.
    """
    name, folder = locate_dropped(str(name))
    settings = read_settings(name, folder)
    if not says_dropped(settings):
        raise LLMDropError(
            f"{name} is no dropped model: its config.json says nothing of dropped layers. Load it with load_model."
        )
    try:
        config = dropped_config(settings)
        located = LocatedModel(name, folder, config.llmdrop["base"] or folder_identity(folder))
        has_reader = has_tokenizer(folder) or (folder / IMAGE_SETTINGS).exists()
        if config.model_type in ENCODERS:
            reader = load_reader(located, config) if has_reader else None
            return load_encoder_weights(located, config, dtype, device), reader
        return load_weights(located, config, dtype, device), load_tokenizer(located) if has_reader else None
    except UNREADABLE as error:
        raise LLMDropError(f"{name} could not be loaded: {first_line(error)}") from error


# ---- configuration ------------------------------------------------------------------------------------------------------


def _describe(folder: Path, model: nn.Module, plan: DropPlan) -> None:
    """Say in config.json what is dropped: in this package's words, the official code's and transformers' own schema."""
    path = folder / "config.json"
    settings = with_both_rope_forms(json.loads(path.read_text(encoding="utf-8")))
    anatomy = find_anatomy(model)
    skipped = {layer: [kind for kind in NAMES if layer in getattr(plan, kind)] for layer in range(len(anatomy))}
    (architecture,) = settings["architectures"]
    base = settings["model_type"]
    settings |= drop_lists(plan) | {
        "model_type": MODEL_TYPE,
        "architectures": [f"Dropped{architecture}"],
        "per_layer_config": {str(layer): {"skip": kinds} for layer, kinds in skipped.items() if kinds},
        "llmdrop": {
            "format": FORMAT,
            "base_model_type": base,
            "base": plan.model or getattr(model, "llmdrop_identity", None),
            "scores": plan.scores,
            "maps": [[kind, layer, linear.fingerprint, linear.bias is not None] for kind, layer, linear in plan.maps],
        },
    }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def with_both_rope_forms(settings: dict) -> dict:
    """Rotary settings under the new name and under the old ones: programs that know one form fall back to defaults silently."""
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return settings
    if "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        old = {"rope_theta": rope["rope_theta"]}
        if scaling.get("rope_type", "default") != "default":
            old["rope_scaling"] = scaling | {"type": scaling["rope_type"]}
        return settings | old
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")  # Gemma 3
    old = {"rope_theta": full["rope_theta"]} if full else {}
    return settings | old | ({"rope_local_base_freq": sliding["rope_theta"]} if sliding else {})


def dropped_config(settings: dict, **kwargs):
    """The configuration that config.json of a dropped model describes: one of the base's family, which knows its plan.

    settings: content of the file. Raises LLMDropError if it describes no dropped model.
    """
    settings = dict(settings)
    about = settings.pop("llmdrop", None)
    if isinstance(about, dict) and about.keys() >= ABOUT and about["format"] == FORMAT:
        settings["model_type"] = about["base_model_type"]
    elif about is None:  # of the paper's own code
        about = {"format": None, "base": None, "scores": None, "maps": []}
    else:
        raise LLMDropError(
            f"The config.json of the dropped model is damaged, or of another version: expected is the format {FORMAT!r}."
        )
    settings["architectures"] = [str(name).removeprefix("Dropped") for name in settings.get("architectures") or ()]
    if settings.get("rope_parameters"):
        for name in OLD_ROPE:  # they say the same
            settings.pop(name, None)
    for name in ("per_layer_config", "auto_map"):
        settings.pop(name, None)
    plan_from_config(settings)  # raises for lists that no plan can have
    base: Any = type(config_of("the dropped model", settings, DECODERS + KINDS_OF_ENCODERS))
    config = _config_class(base).from_dict(settings, **kwargs)
    (config[0] if isinstance(config, tuple) else config).llmdrop = about
    return config


@functools.cache
def _config_class(base) -> Any:
    """The family's configuration under a type of its own, for which transformers finds the class of the dropped model."""
    config = type(f"Dropped{base.__name__}", (base,), {"__module__": __name__})
    mapping, auto = MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    if base.model_type in ENCODERS:
        mapping, auto = MODEL_MAPPING, AutoModel
    dense = mapping[base]
    # It keeps name and module: transformers looks up some of its rules by them, such as those that rename weights.
    model = type(dense.__name__, (_DroppedModel, dense), {"__module__": dense.__module__, "config_class": config})
    auto.register(config, model)
    return config


# ---- model --------------------------------------------------------------------------------------------------------------


class _DroppedModel:
    """Goes before a family's class: what is dropped is not built, so that no weights are missing."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if getattr(self, "pooler", None) is not None:
            self.pooler = None  # of an encoder; it is not stored
        self.llmdrop_plan = _plan(config)
        drop(self, self.llmdrop_plan)

    @classmethod
    def from_pretrained(cls, path, *args, output_loading_info: bool = False, **kwargs):
        """Raises LLMDropError unless the weights on disk are exactly those that are kept, and the maps."""
        about = kwargs["config"].llmdrop
        kwargs |= {"variant": VARIANT if about["format"] else None, "ignore_mismatched_sizes": True}
        model, found = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if not about["format"]:
            found["unexpected_keys"] = set(found["unexpected_keys"]) - _dropped_keys(model, found["unexpected_keys"])
        check_weights(str(path), Path(path), model, found)
        model.llmdrop_identity = about["base"]
        model.llmdrop_plan = _with_loaded_maps(model)
        return (model, found) if output_loading_info else model

    def save_pretrained(self, folder, push_to_hub: bool = False, **kwargs) -> None:
        """transformers' own method, in this format: a folder that exists is written into, and `push_to_hub(...)` uses it."""
        if push_to_hub:
            raise LLMDropError("A dropped model is uploaded by model.push_to_hub(...), and not while it is saved.")
        super().save_pretrained(folder, **kwargs | {"variant": VARIANT})  # type: ignore[misc]
        _describe(Path(folder), self, self.llmdrop_plan)


def _plan(config) -> DropPlan:
    """The plan of a configuration. Its maps are placeholders, whose numbers are loaded later."""
    plan = plan_from_config(config.to_dict())
    width = stream_width(config)
    zeros = functools.partial(torch.zeros, device="cpu")  # whatever device the model is built on
    about = config.llmdrop
    maps = tuple(
        (kind, layer, LinearMap(zeros(width, width), zeros(width) if has_bias else None))
        for kind, layer, _, has_bias in about["maps"]
    )
    return dataclasses.replace(plan, model=about["base"], scores=about["scores"], maps=maps)


def _with_loaded_maps(model: nn.Module) -> DropPlan:
    """The model's plan with the maps that were loaded. The stand-ins keep the fingerprints of the maps as they were given."""
    modules = dict(mapped(find_anatomy(model)))
    for kind, layer, fingerprint, _ in model.config.llmdrop["maps"]:
        modules[kind, layer].fingerprint = fingerprint
    maps = tuple((*place, LinearMap(module.weight, module.bias)) for place, module in modules.items())
    return dataclasses.replace(model.llmdrop_plan, maps=maps)


def _dropped_keys(model: nn.Module, keys) -> set[str]:
    """Those of the names of weights that belong to what is dropped."""
    names = {id(module): name for name, module in model.named_modules()}
    gone = tuple(
        f"{names[id(layer.block)]}.{name}."
        for layer in find_anatomy(model).layers
        for name, module in layer.block.named_modules()
        if isinstance(module, StandIn | nn.Identity)
    )
    return {key for key in keys if key.startswith(gone)}
