"""Derived models: folders like those of any other model, and a `derived.json` that says from which model and how.

A derived model has the shape of its base, and other weights. Repair, healing and quantisation make such models. Because the
shape is the same, a drop plan that was made for the base is accepted on what is derived from it.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ..base.errors import LLMDropError
from ..base.files import building
from ..dropping.plan import DropPlan, check_plan
from ..dropping.units import left
from ..models.families import Anatomy, find_anatomy, need_decoder
from ..models.locate import DERIVED_FORMAT, LocatedModel, derived_hash, locate_folder
from ..models.names import folder_identity, local_label
from ..sources.texts import fingerprint


def save_derived(model: torch.nn.Module, tokenizer, folder: Path | str, base: LocatedModel, recipe: dict) -> LocatedModel:
    """Write a model whose weights were changed to a new folder, in one step, and locate it.

    Parameters
    ----------
    model: the whole model, outside of `dropped`: what is dropped is not stored, so it belongs in a drop plan.
    tokenizer: None for a model without one.
    folder: must not exist yet.
    base: the model that the weights come from. It may be derived itself; its own bases are recorded too.
    recipe: what was done, as plain JSON. With `base`, it should be enough to do it again.

    Raises LLMDropError if the model is no decoder, lacks sub-layers or comes from another base, and if the folder exists.
    """
    folder = Path(folder)
    try:
        recipe = json.loads(json.dumps(recipe, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise LLMDropError(f"A recipe must be plain JSON: numbers, text, lists and mappings ({error}).") from error
    _check(model, base)
    bases = (base.identity, *base.bases)
    with building(folder) as temporary:
        if folder.exists():
            raise LLMDropError(f"{folder} exists already. Give a derived model a folder of its own.")
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        digest = derived_hash(bases, recipe, folder_identity(temporary))
        about = {"format": DERIVED_FORMAT, "base": bases[0], "bases": bases[1:], "recipe": recipe, "hash": digest}
        (temporary / "derived.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return locate_folder(local_label(folder.absolute()), folder)


def recipe_of(method: str, version: int, model: torch.nn.Module, tokens: torch.Tensor, plan: DropPlan, **settings) -> dict:
    """What every recipe of weights that were changed under a plan says, as plain JSON, and the method's own settings."""
    check_plan(model, plan)
    return {
        "method": method,
        "version": version,
        "plan": plan.key.to_json(),
        "tokens": fingerprint(tokens),
        "dtype": str(model.dtype).removeprefix("torch."),
        **settings,
    }


@contextlib.contextmanager
def layers_restored(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the weights of the decoder layers may be changed; afterwards, errors included, they are as they were.

    Raises LLMDropError for a model with layers that are offloaded.
    """
    layers = torch.nn.ModuleList([layer.block for layer in find_anatomy(model).layers])
    if any(weight.is_meta for weight in layers.parameters()):
        raise LLMDropError(
            "Weights of this model are offloaded, so they could not be put back after a change. Load the whole model on one "
            "device, or on several that hold it."
        )
    kept = {name: weight.detach().to("cpu", copy=True) for name, weight in layers.state_dict().items()}
    try:
        yield
    finally:
        layers.load_state_dict(kept)


def lacking(anatomy: Anatomy) -> tuple[int, str] | None:
    """A layer and its sub-layer, "attention" or "MLP", that is dropped or replaced now; None: the model is whole."""
    for kind, name in (("attention", "attention"), ("mlp", "MLP")):
        built = anatomy.with_attention if kind == "attention" else range(len(anatomy))
        if lacks := sorted(set(built) - set(left(anatomy, kind))):
            return lacks[0], name
    return None


def check_whole(anatomy: Anatomy) -> None:
    """Raise LLMDropError for a model that lacks a sub-layer now: it cannot show what the dense model does."""
    if lacks := lacking(anatomy):
        raise LLMDropError(
            f"The {lacks[1]} of layer {lacks[0]} is dropped already, so this is not the dense model. Give the whole model, "
            "outside of `dropped`, with the plan beside it."
        )


def _check(model: torch.nn.Module, base: LocatedModel) -> None:
    need_decoder(anatomy := find_anatomy(model))  # `locate_folder` and `load_located` take no other
    if lacks := lacking(anatomy):
        raise LLMDropError(
            f"The {lacks[1]} of layer {lacks[0]} is dropped, so its weights could not be stored. Save the whole model, outside "
            "of `dropped`, and save the drop plan beside it."
        )
    known = getattr(model, "llmdrop_identity", None)
    if known not in (None, base.identity):
        raise LLMDropError(f"The model was loaded from {known}, but the base is {base.identity}. Give the model's own base.")
