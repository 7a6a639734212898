"""What a user writes for a model, what it stands for, and what the model is called in tables and in names of files.

Two different models are never called the same: a local one is called by its folder or file and a piece of its content, as
final-3f2a9c1b, and one of the hub by organisation, name and revision.
"""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from ..base.errors import LLMDropError
from ..base.files import short_name
from ..sources.catalogue import catalogue
from ..sources.fetch import remembered_sha256

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
PIECE = 8  # hexadecimal digits of a hash: enough to tell the models of one machine apart


def plain_name(model: str | os.PathLike[str]) -> str:
    """A model's name without what is only a way of writing it: spaces around it, a slash at its end, the page of the hub.

    "org/model/" -> "org/model"; "https://huggingface.co/org/model/tree/v2" -> "org/model@v2". A path may be a `Path`. Raises
    LLMDropError for what is no name, and for an address that is no page of a model.
    """
    if not isinstance(model, str | os.PathLike) or not (model := os.fspath(model).strip()):
        raise LLMDropError(
            f"Expected a model: a name of data/sources.yaml, a hub id, a folder or a .gguf file; found {model!r}."
        )
    if re.match(r"https?://|(www\.)?(huggingface\.co|hf\.co)/", model):
        return _id_of_page(model)
    return model.rstrip("/") if HUB_ID.fullmatch(model.rstrip("/")) else model


def _id_of_page(address: str) -> str:
    try:
        page = urlsplit(address if "://" in address else f"https://{address}")
    except ValueError as error:
        raise LLMDropError(f"{address} is no address: {error}.") from None
    hosts = {"huggingface.co", "www.huggingface.co", "hf.co", urlsplit(constants.ENDPOINT).netloc}
    parts = [unquote(part) for part in page.path.split("/") if part]
    hub_id = "/".join(parts[:2])
    if page.netloc in hosts and len(parts) >= 2 and parts[0] not in ("datasets", "spaces", "docs", "collections"):
        if len(parts) == 2:
            return hub_id
        if len(parts) == 4 and parts[2] in ("tree", "commit"):
            return hub_id if parts[3] == "main" else f"{hub_id}@{parts[3]}"
        raise LLMDropError(f"{address} is a part of a model's pages. Give the hub id {hub_id}, or {hub_id}@<revision>.")
    raise LLMDropError(
        f"{address} is no page of a model on the hub. Give a hub id such as Qwen/Qwen3-8B, or download the model and give its "
        "folder or .gguf file."
    )


def is_named(model: str) -> bool:
    """Does data/sources.yaml say what a name stands for? Then no folder of that name is meant; write ./name for a folder."""
    return any(model in catalogue()[kind] for kind in ("models", "encoders", "series")) or model.startswith("random:")


def local_path(model: str, base: Path | None = None) -> Path | None:
    """The folder or .gguf file that a name stands for; None if it stands for none.

    base: where a relative path begins; None: the working directory.
    """
    if not model or is_named(model):
        return None
    path = Path(os.path.abspath((base or Path()) / os.path.expanduser(model)))
    # os.path, unlike Path, says no to what can be no path: a text that is too long, or holds a null character.
    is_file = path.suffix.lower() == ".gguf" and os.path.isfile(path)
    return path if is_file or os.path.isdir(path) else None


def gguf_files(path: Path) -> list[Path]:
    """The files of a GGUF model, in order: all shards of the set that a file belongs to, or the file itself.

    path: a file, or a folder that holds one model. Raises LLMDropError if a shard is missing, or if a folder holds several
    models.
    """
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        sets = {SHARD.sub(r"\g<stem>-\g<count>", file.name): file for file in reversed(inside)}
        if len(sets) > 1:
            names = ", ".join(sorted(file.name for file in sets.values()))
            raise LLMDropError(f"{path} holds several models as GGUF ({names}). Give the path of one of these files.")
        return gguf_files(next(iter(sets.values())))
    shard = SHARD.fullmatch(path.name)
    if shard is None or not 1 <= int(shard["number"]) <= int(shard["count"]):
        return [path]
    shards = [f"{shard['stem']}-{i:05}-of-{shard['count']}{shard['suffix']}" for i in range(1, int(shard["count"]) + 1)]
    if missing := [name for name in shards if not (path.parent / name).is_file()]:
        raise LLMDropError(
            f"{path.name} is one of {len(shards)} shards of a model, but {path.parent} lacks {', '.join(missing)}. "
            "Put all shards into one folder."
        )
    return [path.parent / name for name in shards]


def holds_gguf(folder: Path) -> bool:
    """Does a folder hold a model as GGUF, and nothing else that could be one?"""
    names = [file.name.lower() for file in folder.iterdir()]
    return "config.json" not in names and any(name.endswith(".gguf") for name in names)


def folder_identity(folder: Path) -> str:
    """ "sha256:<hash of config and weights>"."""
    content = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        content.update(f"{file.name} {remembered_sha256(file)}\n".encode())
    return f"sha256:{content.hexdigest()}"


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders in a folder that hold a model and whose names state a step of training, in no order."""
    inside = (path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in inside if step_of(path.name) is not None and (path / "config.json").exists()]


def step_of(name: str) -> int | None:
    """The step of training that a name states: "step1000", "step-1000", "checkpoint-1000", "iter_0001000"."""
    found = re.search(r"(?:step|checkpoint|iter)[-_]?(\d+)", name)
    return int(found[1]) if found else None


# ---- what a model is called ---------------------------------------------------------------------------------------------


def label(model: str) -> str:
    """What a model is called in names of files; no two different models are called the same.

    "smollm2-135m" -> "smollm2-135m"; "Qwen/Qwen3-8B@v1" -> "qwen--qwen3-8b@v1"; "/data/my_model.gguf" -> "my_model-3f2a9c1b".
    """
    model = plain_name(model)
    if (path := local_path(model)) is not None:
        return local_label(path)
    if model.startswith("random:"):
        return f"random-{_exact(model.removeprefix('random:'))}"
    if is_named(model) or not (hub_id := HUB_ID.fullmatch(model)):
        return _exact(model)
    name, revision = hub_id["id"].lower().replace("/", "--"), hub_id["revision"]  # the hub allows no "--" in a name
    if revision is None:
        return name
    is_commit = re.fullmatch(r"[0-9a-f]{40}", revision)
    return f"{name}@{revision[:PIECE] if is_commit else _exact(revision)}"


def local_label(path: Path) -> str:
    """What a local model is called: by its folder or file, and a piece of its content. path: absolute."""
    name = SHARD.sub(r"\g<stem>", path.name)  # all shards are one model
    return f"{short_name(name)}-{_content(path)[:PIECE]}"


def _content(path: Path) -> str:
    """A hash of what is at a path: of a model its identity, of a series that of all its models. Hexadecimal."""
    try:
        if path.is_file() or holds_gguf(path):
            return hashlib.sha256("".join(remembered_sha256(part) for part in gguf_files(path)).encode()).hexdigest()
        models = [folder for folder in (path, *sorted(checkpoints_in(path))) if (folder / "config.json").exists()]
        identities = [folder_identity(folder).removeprefix("sha256:") for folder in models]
    except (OSError, LLMDropError):  # no model that can be used: whoever locates it says why
        identities = []
    if len(identities) == 1:
        return identities[0]
    return hashlib.sha256("".join(identities or [str(path)]).encode()).hexdigest()


def _exact(text: str) -> str:
    """A text as a name of a file, with a hash where that loses something: "a/b" and "a b" are not called the same."""
    slug = short_name(text.replace("/", "-"))
    return slug if slug == text else f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:PIECE]}"
