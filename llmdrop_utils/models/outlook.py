"""What is known of a model before it is fetched: its download, its shape, what converting it takes, and its identity.

`outlook` goes through the same kinds of names as `locate_model`, but fetches, converts and makes nothing.
"""

import dataclasses
import math
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import short_name
from ..sources.catalogue import catalogue
from ..sources.sizes import Download, Hub, packaged, stored_commit, unpacked_files
from .convert import CONVERSION
from .families import cache_geometry, stream_width
from .locate import HUB_ID, folder_identity, locate_model

HASHED = 20e9  # bytes of a local model that are read to know its identity; a larger one is read when it is used


@dataclasses.dataclass(frozen=True)
class Shape:
    """What memory and time follow from."""

    parameters: int
    layers: int
    width: int  # numbers per token in the residual stream
    vocabulary: int
    cache: int  # numbers per token in the cache, of all layers

    @classmethod
    def of_config(cls, config, parameters: int | None = None) -> "Shape":
        """The shape of a transformers configuration; parameters are counted on the device "meta" unless they are known."""
        text = config.get_text_config()
        geometry = cache_geometry(text)
        if parameters is None:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            parameters = sum(weight.numel() for weight in model.parameters())
        return cls(parameters, len(geometry), stream_width(text), text.vocab_size, sum(n for n, _ in geometry))

    @classmethod
    def of_settings(cls, settings: dict, parameters: int | None = None) -> "Shape | None":
        """The shape of the content of a config.json; None for one that transformers does not know."""
        more = dict(settings)
        try:
            return cls.of_config(AutoConfig.for_model(more.pop("model_type"), **more), parameters)
        except Exception:  # whatever an unknown kind of configuration raises
            return None

    @classmethod
    def guess(cls, parameters: int, layers: int = 32) -> "Shape":
        """What a model of this size is usually like: 12 width² parameters in a layer, grouped queries, 128 k tokens."""
        width = round(math.sqrt(parameters / layers / 12))
        return cls(parameters, layers, width, 128_000, layers * width // 2)


@dataclasses.dataclass(frozen=True)
class Outlook:
    """A model that is not fetched yet, or perhaps is."""

    name: str
    download: Download
    shape: Shape | None  # None: unknown
    identity: str | None = None  # as results are stored under; None: known only once its files are stored
    converted: int = 0  # bytes that converting it to float32 adds on disk
    is_random: bool = False
    is_guess: bool = False  # the shape is guessed from the number of parameters


def outlook(name: str, hub: Hub) -> Outlook:
    """What is known of a model (`name`: whatever `locate_model` takes).

    Raises LLMDropError for an unknown name and for one that the hub does not have, or not in a form that is read.
    """
    source, path = catalogue()["models"].get(name), Path(name).expanduser()
    if source is not None and "hub" not in source:
        return _generated(name, source) if "generated" in source else _packaged(name, source)
    if source is not None:
        return _on_hub(name, source["hub"], source["revision"], hub)
    if name.startswith("random:") and name.removeprefix("random:") in catalogue()["shapes"]:
        shape = Shape.of_settings(catalogue()["shapes"][name.removeprefix("random:")])
        made = _made(f"{name.replace(':', '-')}-*")
        return Outlook(name, Download("generated"), shape, locate_model(name).identity if made else None, is_random=True)
    if name and path.is_dir():
        return _local(name, path)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(name, path)
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None or name in catalogue()["series"] or path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        locate_model(name)  # says what is wrong
        raise LLMDropError(f"Unknown model {name!r}.")
    return _on_hub(name, hub_id["id"], hub_id["revision"], hub)


def _packaged(name: str, source: dict) -> Outlook:
    shape = Shape.of_settings(source["shape"]) if "shape" in source else None
    folder = _made(f"{name}-gguf{CONVERSION}-*")
    stored = all(unpacked_files(package) is not None for package in source["packages"])
    identity = folder_identity(folder) if folder and stored else None
    return Outlook(name, packaged(source["packages"]), shape, identity, 0 if folder or shape is None else 4 * shape.parameters)


def _generated(name: str, source: dict) -> Outlook:
    folder = _made(f"{name}-{'[0-9a-f]' * 12}")
    shape = Shape.of_settings(source["generated"]["config"])
    return Outlook(name, Download("generated"), shape, folder_identity(folder) if folder else None)


def _local(name: str, folder: Path) -> Outlook:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not size or not (folder / "config.json").exists():
        locate_model(name)  # says what is wrong
    try:
        shape = Shape.of_config(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    except Exception:  # an unknown kind of configuration
        shape = None
    identity = folder_identity(folder) if size <= HASHED else None
    return Outlook(short_name(name), Download("local", size), shape or Shape.guess(size // 2), identity, is_guess=shape is None)


def _gguf(name: str, path: Path) -> Outlook:
    import gguf

    reader = gguf.GGUFReader(path)
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    layers = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}
    folder = _made(f"{short_name(name)}-gguf{CONVERSION}-*")
    shape, identity = Shape.guess(parameters, len(layers) or 32), folder_identity(folder) if folder else None
    converted = 0 if folder else 4 * parameters
    return Outlook(short_name(name), Download("local", path.stat().st_size), shape, identity, converted, is_guess=True)


def _on_hub(name: str, repository: str, revision: str | None, hub: Hub) -> Outlook:
    download = hub.download(repository, revision)
    known = next((n for n, source in catalogue()["models"].items() if source.get("hub") == repository), name)
    settings = catalogue()["shapes"].get(known)
    if hub.away:
        stored = f"hub:{repository}@{stored_commit(repository, revision)}"
        return _without_hub(name, download, settings or hub.config(repository, revision), stored)
    found = hub.describe(repository, revision)
    weights = {file: n for file, n in found.sizes.items() if re.fullmatch(r"(?!consolidated)[^/]+\.safetensors", file)}
    if found.sizes and not weights:
        raise LLMDropError(
            f"{name} has no *.safetensors on the hub. Only safetensors and GGUF are read; pickled weights (*.bin, *.pt) can "
            "run code when loaded. Convert them once where you trust them: model.save_pretrained(...)."
        )
    settings = settings or hub.config(repository, found.commit)
    shape = Shape.of_settings(settings, found.parameters) if settings else None
    identity = f"hub:{repository}@{found.commit}" if found.commit else None
    parameters = found.parameters or sum(weights.values()) // 2
    if shape is None and parameters:
        return Outlook(name, download, Shape.guess(parameters), identity, is_guess=True)
    return Outlook(name, download, shape, identity)


def _without_hub(name: str, download: Download, settings: dict | None, identity: str) -> Outlook:
    """What is known of a model of the hub that cannot be asked: its copy on this machine, or only its shape."""
    shape = Shape.of_settings(settings) if settings else None
    if download.is_stored:
        return Outlook(name, download, shape, identity)
    if shape is not None:
        size = 2 * shape.parameters  # the hub holds weights in 16 bits as a rule
        download = dataclasses.replace(download, total=size, missing=size, unpacked=size, is_estimate=True)
    return Outlook(name, download, shape)


def _made(pattern: str) -> Path | None:
    """A folder of the cache that was made on this machine."""
    return next(iter(sorted((files.CACHE / "models").glob(pattern))), None)
