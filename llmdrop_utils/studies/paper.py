"""The paper's own numbers: the only reader of data/paper_claims.json."""

import functools
import json
import re

from ..base import files
from ..models.locate import LocatedModel
from ..sources.catalogue import catalogue

KINDS = {"Baseline": "dense", "Attn Drop": "attention", "MLP Drop": "mlp", "Block Drop": "block"}
LIST_KINDS = {"Attn": "attention", "MLP": "mlp", "Block": "block"}


@functools.cache
def _content() -> dict:
    return json.loads((files.DATA / "paper_claims.json").read_text(encoding="utf-8"))


# Models of a single table each, which no profile has: name in this file -> repository on the hub.
OF_ONE_TABLE = {"metamath-mistral-7b": "meta-math/MetaMath-Mistral-7B", "llama-2-7b-32k": "togethercomputer/LLaMA-2-7B-32K"}


def numbers(*tables: str) -> list[dict]:
    """The numbers of some tables ("T1"), of all of them if none is named: id, where, model, method, n_drop, what, value."""
    return [c for c in _content()["claims"] if not tables or c["id"].split(".")[0] in tables]


def drop_lists(model: str | None) -> list[tuple[str, list[int]]]:
    """(kind, layers) of each drop list that the authors published for a model ("mistralai/Mistral-7B-v0.1")."""
    lists = [entry for entry in _content()["published_drop_lists"] if entry["model"] == model]
    return [(LIST_KINDS[entry["method"]], entry["layers"]) for entry in lists if entry["method"] in LIST_KINDS]


def name_in_tables(model: LocatedModel) -> str | None:
    """The model's name in the paper's tables, in small letters, if it is one of the paper's, or has the shape of one."""
    name = name_in_catalogue(model.name, model.identity)
    return name and name.removesuffix("-v0.1")


def name_in_catalogue(name: str, identity: str) -> str | None:
    """Which of the paper's models one with weights from the hub is ("hub:<repository>@<commit>"), or a shape of."""
    for known, source in catalogue()["models"].items():
        if ("hub" in source and identity.startswith(f"hub:{source['hub']}@")) or name == f"random:{known}":
            return known
    return next((known for known, hub in OF_ONE_TABLE.items() if identity.startswith(f"hub:{hub}@")), None)


def model_of(claim: dict) -> str:
    """The model that a number is about, as data/sources.yaml names it: "Mistral-7B (as captioned)" is "mistral-7b-v0.1"."""
    name = claim["model"].split(" (")[0].split("/")[-1].lower()
    return next((known for known in catalogue()["models"] if known.removesuffix("-v0.1") == name), name)


def value_of(claim: dict) -> float:
    """A printed value as a number: "> 99" is 99."""
    return float(re.findall(r"-?\d+(?:\.\d+)?", str(claim["value"]))[0])


def rows_for(model: LocatedModel) -> list[dict]:
    """What Tables 1 to 3 print for a model: kind, n, what, paper."""
    name = name_in_tables(model)
    return [
        {"kind": KINDS[c["method"]], "n": c["n_drop"], "what": c["what"], "paper": c["value"]}
        for c in numbers("T1", "T2", "T3")
        if c["model"].lower() == name and c["method"] in KINDS
    ]
