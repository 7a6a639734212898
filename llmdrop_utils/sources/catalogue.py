"""The catalogue of models, texts and tasks: data/sources.yaml."""

import functools

import yaml

from ..base import files


@functools.cache
def catalogue() -> dict:
    """data/sources.yaml: {"models": {name: source}, "encoders": {name: source}, "shapes": {name: config}, ...}."""
    return yaml.safe_load((files.DATA / "sources.yaml").read_text(encoding="utf-8"))


def exact_name(model: str) -> str:
    """How figures, tables and scorecard call a model: with instruct or base, quantised or not.

    "smollm2-135m" -> "SmolLM2-135M-Instruct (Q4_1)", "random:llama-2-13b" -> "Llama-2-13B shape (random weights)"; what
    comes after a comma stays. A name that the catalogue does not have, a hub id for example, is exact itself.
    """
    name, comma, part = model.removeprefix("random:").partition(", ")
    title = (catalogue()["models"] | catalogue()["encoders"]).get(name, {}).get("title", name)
    shape = f"{title.removesuffix(' base')} shape (random weights)"
    return (shape if model.startswith("random:") else title) + comma + part
