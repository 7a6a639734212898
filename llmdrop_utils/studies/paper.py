"""The paper's own numbers: the only reader of data/paper_claims.json."""

import functools
import json

from ..base import files
from ..models.locate import LocatedModel
from ..sources.catalogue import catalogue

KINDS = {"Baseline": "dense", "Attn Drop": "attention", "MLP Drop": "mlp", "Block Drop": "block"}
LIST_KINDS = {"Attn": "attention", "MLP": "mlp", "Block": "block"}


@functools.cache
def _content() -> dict:
    return json.loads((files.DATA / "paper_claims.json").read_text(encoding="utf-8"))


def numbers(*tables: str) -> list[dict]:
    """The numbers of some tables ("T1"), of all of them if none is named: id, where, model, method, n_drop, what, value."""
    return [c for c in _content()["claims"] if not tables or c["id"].split(".")[0] in tables]


def drop_lists(model: str | None) -> list[tuple[str, list[int]]]:
    """(kind, layers) of each drop list that the authors published for a model ("mistralai/Mistral-7B-v0.1")."""
    lists = [entry for entry in _content()["published_drop_lists"] if entry["model"] == model]
    return [(LIST_KINDS[entry["method"]], entry["layers"]) for entry in lists if entry["method"] in LIST_KINDS]


def name_in_tables(model: LocatedModel) -> str | None:
    """The model's name in the paper's tables, in small letters, if it is one of the paper's, or has the shape of one."""
    for name, source in catalogue()["models"].items():
        is_this = "hub" in source and model.identity.startswith(f"hub:{source['hub']}@")
        if is_this or model.name == f"random:{name}":
            return name.removesuffix("-v0.1")
    return None


def rows_for(model: LocatedModel) -> list[dict]:
    """What Tables 1 to 3 print for a model: kind, n, what, paper."""
    name = name_in_tables(model)
    return [
        {"kind": KINDS[c["method"]], "n": c["n_drop"], "what": c["what"], "paper": c["value"]}
        for c in numbers("T1", "T2", "T3")
        if c["model"].lower() == name and c["method"] in KINDS
    ]
