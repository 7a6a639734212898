"""Folders are layers: imports go down only, nothing imports in a circle, and a file tells one story."""

import re
from pathlib import Path

import pytest

from llmdrop_utils.base import imports
from llmdrop_utils.base.files import PACKAGE

# From the top to the bottom. Files that are in no folder (the command line and what it runs) stand above all folders.
LAYERS = ["studies", "report", "export", "derive", "selection", "measure", "dropping", "models", "sources", "base"]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "data" not in path.relative_to(PACKAGE).parts)


def layer(path: Path) -> int:
    """Height of a file's folder; the topmost is 0."""
    parts = path.relative_to(PACKAGE).parts
    return 0 if len(parts) == 1 else LAYERS.index(parts[0]) + 1


def upward(paths: list[Path]) -> list[str]:
    """Imports that do not go down, or stay within a folder."""
    named = lambda path: path.relative_to(PACKAGE).as_posix()  # noqa: E731
    return [f"{named(a)} -> {named(b)}" for a in paths for b in imports.imports_of(a) if layer(b) < layer(a)]


def circles(paths: list[Path]) -> list[str]:
    """Files that import themselves through others."""
    return [path.name for path in paths if path in {file for b in imports.imports_of(path) for file in imports.made_of(b)}]


def test_every_folder_is_a_layer():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} <= set(LAYERS)


def test_imports_go_down():
    assert upward(FILES) == []


def test_no_import_circle():
    assert circles(FILES) == []


@pytest.mark.parametrize(
    ("where", "line", "upwards", "in_a_circle"),
    [
        ("measure/planted.py", "from ..studies.run import Run", 1, 0),
        ("base/planted.py", "def f():\n    from llmdrop_utils.models import load", 1, 0),
        ("base/planted.py", "import llmdrop_utils.sources.fetch", 1, 0),
        ("base/planted.py", "from .errors import LLMDropError\nfrom . import planted", 0, 1),
        ("selection/planted.py", "from ..measure.importance import Importance", 0, 0),
    ],
)
def test_planted_imports_are_found(where, line, upwards, in_a_circle):
    path = PACKAGE / where
    path.write_text(f"{line}\n")
    try:
        imports.imports_of.cache_clear()
        assert len(upward([path])) == upwards
        assert len(circles([path])) == in_a_circle
    finally:
        path.unlink()
        imports.imports_of.cache_clear()


def test_what_a_module_is_made_of():
    made = {path.relative_to(PACKAGE).as_posix() for path in imports.made_of(PACKAGE / "base" / "store.py")}
    assert {"base/store.py", "base/files.py", "base/errors.py"} <= made
    assert not [path for path in made if not path.startswith("base/")]


def test_files_are_short():
    assert [path.name for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 320] == []


def test_data_is_read_by_its_reader_alone():
    """The paper's numbers, the catalogue, tasks and claims each have one reader."""
    readers = {"paper_claims.json": ["studies/paper.py"], "claims.yaml": ["report/verdicts.py"],
               "sources.yaml": ["sources/catalogue.py"], "tasks.yaml": ["sources/task_data.py"]}  # fmt: skip
    for name, expected in readers.items():
        opens = [path for path in FILES if re.search(rf'DATA / "{name}"\)?\.?(read_text|open)?', path.read_text())]
        found = [p.relative_to(PACKAGE).as_posix() for p in opens if p.name != "reproduce.py"]  # which hashes them all
        assert found == expected, name
