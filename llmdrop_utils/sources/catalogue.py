"""The catalogue of models, texts and tasks: data/sources.yaml."""

import functools

import yaml

from ..base import files


@functools.cache
def catalogue() -> dict:
    """data/sources.yaml: {"models": {name: source}, "shapes": {name: config}, "corpora": {name: source}, ...}."""
    return yaml.safe_load((files.DATA / "sources.yaml").read_text(encoding="utf-8"))
