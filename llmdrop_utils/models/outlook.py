"""What is known of a model before it is fetched: its download, its shape, what converting it takes, and its identity.

`outlook` goes through the same kinds of names as `locate_model`, but fetches, converts and makes nothing.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ..base.errors import LLMDropError, NotAvailable
from ..sources.catalogue import catalogue
from ..sources.sizes import Download, Hub, packaged, stored_commit, unpacked_files
from .cache_shape import cache_geometry
from .config import DECODERS, check_settings, config_of, other_kind, read_config
from .convert import UNREADABLE, converted_folder, first_line, generated_folder
from .families import family_of, find_anatomy, halves_of, stream_width
from .locate import (
    adapter_error,
    check_folder,
    check_reader,
    locate_model,
    looks_local,
    may_be_local,
    not_on_hub,
    shape_of,
    unknown_model,
)
from .names import HUB_ID, folder_identity, gguf_files, holds_gguf, is_named, local_label, local_path, plain_name
from .packaged import kept_folder


@dataclasses.dataclass(frozen=True)
class Shape:
    """What memory and time follow from."""

    parameters: int
    layers: int
    width: int  # numbers per token in the residual stream
    vocabulary: int
    cache: int  # numbers per token in the cache, of all layers

    @classmethod
    def of_config(cls, config, parameters: int | None = None, name: str = "the model") -> "Shape":
        """The shape of a transformers configuration; parameters are counted on the device "meta" unless they are known.

        Raises LLMDropError for an unknown or refused family, and for a configuration that no model can be built from.
        """
        text = config.get_text_config()
        family_of(text)
        try:
            geometry = cache_geometry(text)
            if parameters is None:
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config)
                parameters = sum(weight.numel() for weight in model.parameters())
            return cls(parameters, len(geometry), stream_width(text), text.vocab_size, sum(n for n, _ in geometry))
        except Exception as error:  # whatever a family raises
            raise LLMDropError(f"No model can be built as the config.json of {name} says: {first_line(error)}.") from error

    @classmethod
    def of_encoder(cls, config) -> "Shape":
        """The shape of an encoder's configuration, without its pooler, or of an encoder-decoder's: no cache, and no vocabulary
        if it reads images.

        Raises LLMDropError for an unknown family, and for a configuration that no model can be built from.
        """
        is_pair = config.is_encoder_decoder
        (halves_of if is_pair else family_of)(config)
        try:
            with torch.device("meta"):
                model = (AutoModelForSeq2SeqLM if is_pair else AutoModel).from_config(config)
            parameters = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("pooler."))
            layers = len(find_anatomy(model)) if is_pair else config.num_hidden_layers
            return cls(parameters, layers, config.hidden_size, getattr(config, "vocab_size", 0), 0)
        except Exception as error:  # whatever a family raises
            raise LLMDropError(
                f"No {config.model_type} model can be built as its config.json says: {first_line(error)}."
            ) from error

    @classmethod
    def of_settings(
        cls, settings: Any, parameters: int | None = None, name: str = "the model", kinds: tuple[str, ...] = DECODERS
    ) -> "Shape | None":
        """The shape of the content of a config.json; None for a kind of model that transformers does not know.

        parameters: of the whole model, if they are known. Raises LLMDropError for settings that describe no model, or one that
        is of none of these kinds.
        """
        check_settings(name, settings)
        if settings["model_type"] not in CONFIG_MAPPING:
            return None
        config = config_of(name, settings, kinds)
        if kinds != DECODERS:
            return cls.of_encoder(config)
        return cls.of_config(config, parameters if config.model_type == settings["model_type"] else None, name)

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


def outlook(name: str, hub: Hub, kinds: tuple[str, ...] = DECODERS) -> Outlook:
    """What is known of a model (`name` and `kinds`: whatever `locate_model` takes).

    Raises LLMDropError for an unknown name and for one that the hub does not have, or not in a form that is read.
    """
    name = plain_name(name)
    source = catalogue()["models"].get(name) or catalogue()["encoders"].get(name)
    if source is not None and (kind := source.get("kind", "decoder")) not in kinds:
        raise other_kind(name, kind, kinds)
    if source is not None and "hub" not in source:
        return _generated(name, source, kinds) if "generated" in source else _packaged(name, source, kinds)
    if source is not None:
        return _on_hub(name, source["hub"], source["revision"], hub, kinds)
    if name.startswith("random:"):
        settings, folder, _ = shape_of(name)
        identity = locate_model(name).identity if folder.exists() else None
        return Outlook(name, Download("generated"), Shape.of_settings(settings), identity, is_random=True)
    if (path := local_path(name)) is not None:
        return _gguf(path) if path.is_file() or holds_gguf(path) else _local(path, kinds)
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None or is_named(name) or looks_local(name):
        locate_model(name)  # says what is wrong
        raise unknown_model(name)
    try:
        found = _on_hub(name, hub_id["id"], hub_id["revision"], hub, kinds)
        if hub.away and not found.download.is_stored and may_be_local(name):
            raise NotAvailable(hub.away)
        return found
    except LLMDropError as error:
        raise not_on_hub(name, error) from error


def _packaged(name: str, source: dict, kinds: tuple[str, ...]) -> Outlook:
    settings = source.get("shape", source.get("config"))
    shape = Shape.of_settings(settings, kinds=kinds) if settings else None
    unpacked = [unpacked_files(package) for package in source["packages"]]
    parts = [path for paths in unpacked for path in paths or []]
    folder = kept_folder(parts, name) if None not in unpacked else None
    identity = folder_identity(folder) if folder and folder.exists() else None
    return Outlook(name, packaged(source["packages"]), shape, identity, 0 if identity or not shape else 4 * shape.parameters)


def _generated(name: str, source: dict, kinds: tuple[str, ...]) -> Outlook:
    folder = generated_folder(name, source["generated"])
    shape = Shape.of_settings(source["generated"]["config"], kinds=kinds)
    return Outlook(name, Download("generated"), shape, folder_identity(folder) if folder.exists() else None)


def _local(folder: Path, kinds: tuple[str, ...]) -> Outlook:
    check_folder(folder.name, folder, kinds)
    check_reader(folder.name, folder)
    config = read_config(folder.name, folder, kinds)
    shape = Shape.of_encoder(config) if kinds != DECODERS else Shape.of_config(config, name=folder.name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Outlook(local_label(folder), Download("local", size), shape, folder_identity(folder))


def _gguf(path: Path) -> Outlook:
    import gguf

    parts, name = gguf_files(path), local_label(path)
    try:
        tensors = [tensor for part in parts for tensor in gguf.GGUFReader(part).tensors]
    except UNREADABLE as error:
        raise LLMDropError(f"{path.name} is not a GGUF file, or it is damaged: {first_line(error)}.") from error
    parameters = sum(int(tensor.n_elements) for tensor in tensors)
    layers = {tensor.name.split(".")[1] for tensor in tensors if tensor.name.startswith("blk.")}
    folder = converted_folder(parts, name)
    shape, identity = Shape.guess(parameters, len(layers) or 32), folder_identity(folder) if folder.exists() else None
    size = sum(part.stat().st_size for part in parts)
    return Outlook(name, Download("local", size), shape, identity, 0 if identity else 4 * parameters, is_guess=True)


def _on_hub(name: str, repository: str, revision: str | None, hub: Hub, kinds: tuple[str, ...]) -> Outlook:
    download = hub.download(repository, revision)
    known = next((n for n, source in catalogue()["models"].items() if source.get("hub") == repository), name)
    settings = catalogue()["shapes"].get(known)
    if hub.away:
        stored = f"hub:{repository}@{stored_commit(repository, revision)}"
        return _without_hub(name, download, settings or hub.config(repository, revision), stored, kinds)
    found = hub.describe(repository, revision)
    if any(file.startswith("adapter_") for file in found.sizes):
        raise adapter_error(name, None)
    weights = {file: n for file, n in found.sizes.items() if re.fullmatch(r"(?!consolidated)[^/]+\.safetensors", file)}
    if found.sizes and not weights:
        raise LLMDropError(
            f"{name} has no *.safetensors on the hub. Only safetensors and GGUF are read; pickled weights (*.bin, *.pt) can "
            "run code when loaded. Convert them once where you trust them: model.save_pretrained(...)."
        )
    settings = settings or hub.config(repository, found.commit)
    shape = Shape.of_settings(settings, found.parameters, name, kinds) if settings is not None else None
    identity = f"hub:{repository}@{found.commit}" if found.commit else None
    parameters = found.parameters or sum(weights.values()) // 2
    if shape is None and parameters:
        return Outlook(name, download, Shape.guess(parameters), identity, is_guess=True)
    return Outlook(name, download, shape, identity)


def _without_hub(name: str, download: Download, settings: dict | None, identity: str, kinds: tuple[str, ...]) -> Outlook:
    """What is known of a model of the hub that cannot be asked: its copy on this machine, or only its shape."""
    shape = Shape.of_settings(settings, name=name, kinds=kinds) if settings is not None else None
    if download.is_stored:
        return Outlook(name, download, shape, identity)
    if shape is not None:
        size = 2 * shape.parameters  # the hub holds weights in 16 bits as a rule
        download = dataclasses.replace(download, total=size, missing=size, unpacked=size, is_estimate=True)
    return Outlook(name, download, shape)
