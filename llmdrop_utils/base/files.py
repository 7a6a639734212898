"""Where files are, and how they are written: atomically, under a lock where several processes meet."""

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

from .errors import DiskFull, LLMDropError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # of a checkout: data, notebooks, committed figures; of an installed wheel: nothing of ours
IS_CHECKOUT = (ROOT / "notebooks").is_dir() and (ROOT / "data" / "sources.yaml").is_file()
DATA = ROOT / "data" if IS_CHECKOUT else PACKAGE / "data"  # profiles, sources, tasks, claims; a wheel carries a copy
NOTEBOOKS = ROOT / "notebooks"
PROFILE_DIR = DATA / "profiles"
REFERENCE = DATA / "reference"  # committed tables, <run>/<notebook>/*.csv


def _folder(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default).expanduser().absolute()


OUTPUT = _folder("LLMDROP_OUTPUT", ROOT if IS_CHECKOUT else Path.cwd())
RESULTS = OUTPUT / "data" / "results"  # what runs make on this machine; ignored by git
CACHE = _folder(  # downloads, converted and trained models
    "LLMDROP_CACHE", ROOT / "data" / "cache" if IS_CHECKOUT else Path(platformdirs.user_cache_dir("llmdrop"))
)


@dataclasses.dataclass(frozen=True)
class RunFolders:
    """Where the products of one run are."""

    tables: Path  # <notebook>/*.csv
    figures: Path  # figNN_name.{svg,pdf,png,csv}, scorecard.{md,csv}
    pages: Path  # executed copies of the notebooks


def local(run: str) -> RunFolders:
    """What a run makes on this machine. It never overwrites what is committed."""
    return RunFolders(RESULTS / run, RESULTS / run / "figures", RESULTS / run / "notebooks")


def committed(run: str) -> RunFolders:
    """The reference: what `make reference` keeps of a run, to be committed."""
    return RunFolders(REFERENCE / run, ROOT / "figures" / run, NOTEBOOKS / "rendered" / run)


def need_checkout(what: str) -> None:
    """Raise LLMDropError unless this is a checkout of the repository."""
    if not IS_CHECKOUT:
        raise LLMDropError(
            f"{what} needs a checkout of the repository with its notebooks, but llmdrop_utils runs from {PACKAGE}. "
            "Clone the repository and run it there; the Python API and the other commands work without one."
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; on success it takes the place of `path` in one step.

    A reader therefore sees the old file, the new file or none, never half of one, whenever the writer is killed.
    Raises DiskFull if the disk is full; `path` and everything stored before stay as they were.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        os.chmod(name, 0o644)  # mkstemp makes files private; results are for everyone who may read the folder
        try:
            yield Path(name)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder` against other processes; a killed holder lets go."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise disk_error(error, folder.parent) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` in one step if the block succeeds, and vanishes if it fails."""
    with locked(folder):
        for left in folder.parent.glob(f".{folder.name}.building*"):  # by a process that was killed
            shutil.rmtree(left)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.building"))
        try:
            yield temporary
            temporary.chmod(0o755)
            if not folder.exists():  # else another process was faster
                os.replace(temporary, folder)
        except SafetensorError as error:  # its I/O errors are no OSErrors, but name the system's number
            if f"os error {errno.ENOSPC}" in str(error):
                raise disk_error(OSError(errno.ENOSPC, str(error)), folder) from error
            raise
        except OSError as error:
            raise disk_error(error, folder) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def need_writable() -> None:
    """Raise LLMDropError unless files can be written to the cache and to the folder of results."""
    for folder in (CACHE, RESULTS):
        need_writable_folder(folder)


def need_writable_folder(folder: Path) -> None:
    """Make the folder unless it exists. Raises LLMDropError unless files can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        known = disk_error(error, folder)
        raise _no_access(error, folder) if known is error else known from error


NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # also: a file for a folder


def _no_access(error: OSError, path: Path) -> LLMDropError:
    from huggingface_hub import constants  # when it is needed: the help should cost nothing

    hub_cache = Path(constants.HF_HUB_CACHE)
    moved_by = {"LLMDROP_CACHE": CACHE, "LLMDROP_OUTPUT": OUTPUT, "HF_HOME": hub_cache}
    variable = next((name for name, folder in moved_by.items() if path.is_relative_to(folder)), None)
    instead = f", or set {variable} to a folder that can be written" if variable else ""
    return LLMDropError(f"{path} cannot be written: {error.strerror or error}. Make it writable{instead}.")


def disk_error(error: OSError, path: Path) -> Exception:
    """The error to raise when writing `path` failed: a clear one for a full disk and for what may not be written, otherwise
    `error` itself."""
    if error.errno in NO_ACCESS:
        return _no_access(error, path)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # Windows knows no quotas
        return DiskFull(
            f"The disk is full: could not write {path}. Nothing stored before is lost. Free some space, or point "
            "LLMDROP_CACHE, LLMDROP_OUTPUT and HF_HOME (the hub's cache) at a larger disk, and run the same command again."
        )
    return error


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` atomically (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def short_name(model: str) -> str:
    """A name for files and figure titles: "Qwen/Qwen3-8B@<commit>" -> "qwen3-8b"; "/data/my_model.gguf" -> "my_model".

    Letters of every alphabet stay. Different models can have one short name.
    """
    last = Path(re.sub(r"^([\w.-]+/[\w.-]+)@.*$", r"\1", model.rstrip("/"))).name  # a hub id without its commit
    text = unicodedata.normalize("NFC", re.sub(r"\.gguf$", "", last.lower()))  # some file systems take letters apart
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "model"


def without_paths(text: str) -> str:
    """A message without the paths of this machine, for what may be committed."""
    for path, name in ((CACHE, "<cache>"), (ROOT, "."), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text


def shown(path: Path) -> str:
    """A path as the user would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
