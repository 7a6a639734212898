"""Rules that every notebook source keeps."""

import ast
import re

import nbformat
import papermill
import pytest

from llmdrop_utils.base.files import REFERENCE, ROOT
from llmdrop_utils.studies import STUDIES

SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
FORBIDDEN = re.compile(
    r"(?m)^\s*[!%]|os\.chdir|trust_remote_code|tqdm\.(auto|notebook)|hf_[A-Za-z0-9]{20}|/(home|root|Users|tmp)/"
)


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_names():
    assert SOURCES
    assert {path.stem for path in SOURCES} >= set(STUDIES)
    assert all(re.fullmatch(r"\d\d_[a-z_]+", path.stem) for path in SOURCES)


def test_clean_source(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert not FORBIDDEN.search(cell.source), cell.source
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            assert len(cell.source.splitlines()) <= 25
            assert not re.search(r"(?m)^(def|class) ", cell.source), "functions belong into the package"


def test_first_cell_tells_the_reader(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    for word in ("**Question", "**Claims", "**Reads", "**Writes", "**Cost", "minutes", "memory"):
        assert word in first.source


def test_one_parameters_cell_and_it_is_the_first(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code[:1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_parameters_are_typed_and_explained(path):
    declared = papermill.inspect_notebook(str(path))
    assert {"PROFILE", "MODEL"} <= set(declared)
    for parameter in declared.values():
        assert parameter["inferred_type_name"] != "None"
        assert parameter["help"]


def test_committed_pages_are_clean():
    for path in [p for run in REFERENCE.iterdir() for p in (ROOT / "notebooks" / "rendered" / run.name).glob("*.ipynb")]:
        if ".failed" in path.name or ".partial" in path.name:  # a user's own, not committed
            continue
        page = nbformat.read(path, as_version=4)
        assert path.stat().st_size < 2_000_000
        assert "widgets" not in page.metadata
        for cell in page.cells:
            if cell.cell_type == "code":
                ast.parse(cell.source)
            for output in cell.get("outputs", []):
                assert output.output_type != "error", path
                assert output.get("name") != "stderr", (path, output)
