"""Where files are, and how they are written: atomically, under a lock where several processes meet."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from .errors import DiskFull

ROOT = Path(__file__).resolve().parents[2]  # the repository: profiles, sources, claims, notebooks, reference results
OUTPUT = Path(os.environ.get("LLMDROP_OUTPUT", ROOT)).absolute()  # what a run writes: records, figures, rendered pages
CACHE = Path(os.environ.get("LLMDROP_CACHE", ROOT / "data" / "cache")).absolute()  # downloads, converted models
NOTEBOOKS = ROOT / "notebooks"
PROFILE_DIR = ROOT / "data" / "profiles"
REFERENCE = ROOT / "data" / "reference"
RESULTS = OUTPUT / "data" / "results"
RENDERED = OUTPUT / "notebooks" / "rendered"
FIGURE_DIR = OUTPUT / "figures"


@contextlib.contextmanager
def replacing(path: Path):
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
def locked(folder: Path):
    """Hold a lock on `folder` against other processes, for as long as the block lasts; a killed holder lets go."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def building(folder: Path):
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


def disk_error(error: OSError, path: Path) -> Exception:
    """The error to raise when writing `path` failed: a clear one for a full disk, otherwise `error` itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
    """A name for files and figure titles: "Qwen/Qwen3-8B@<commit>" -> "qwen3-8b"; "/data/my_model.gguf" -> "my_model"."""
    last = Path(re.sub(r"^([\w.-]+/[\w.-]+)@.*$", r"\1", model.rstrip("/"))).name  # a hub id without its commit
    return re.sub(r"[^a-z0-9._-]+", "-", re.sub(r"\.gguf$", "", last.lower())).strip("-.") or "model"
