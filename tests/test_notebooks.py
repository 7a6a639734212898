"""Rules that every notebook source keeps."""

import ast
import re

import nbformat
import papermill
import pytest

from llmdrop_utils import load_profile
from llmdrop_utils.base import files
from llmdrop_utils.base.files import REFERENCE, ROOT
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.studies.page import TABLES, Page, _neighbours
from llmdrop_utils.studies.run import STUDIES

SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
FORBIDDEN = re.compile(
    r"(?m)^\s*[!%]|os\.chdir|trust_remote_code|tqdm\.(auto|notebook)|hf_[A-Za-z0-9]{20}|/(home|root|Users|tmp)/"
)


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_names():
    assert SOURCES
    assert {path.stem for path in SOURCES} == set(STUDIES)
    assert all(re.fullmatch(r"\d\d_[a-z_]+", path.stem) for path in SOURCES)


def test_every_notebook_has_its_folder():
    """Its number aside, a notebook, its study and the folder of its study have one name."""
    for name, study in STUDIES.items():
        assert study.measure.__module__ == f"llmdrop_utils.studies.{name[3:]}.study"


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


def glued_markdown(source: str) -> list[str]:
    """What builds Markdown by hand: tables and pages are made by the package (`page.table`, `page.figure`, ...)."""
    return re.findall(r"Markdown\(|\\n|\|---|\| \{|\.join\(lines\)|lines \+=|lines\.append|for \w+ in .*itertuples", source)


def test_no_cell_glues_markdown(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert glued_markdown(cell.source) == [], cell.source


@pytest.mark.parametrize(
    "source",
    ['display(Markdown("x"))', 'lines = ["|---|"]', 'print("\\n".join(a))', "for r in t.itertuples():\n    page.say(r.x)"],
)
def test_glue_is_found(source):
    assert glued_markdown(source)


def test_more_prose_than_code(notebook):
    """An essay: a cell of text for each cell of code, or more; and lines of code that mostly call the package."""
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds.count("markdown") >= 0.7 * kinds.count("code")
    assert sum(len(cell.source) for cell in notebook.cells if cell.cell_type == "markdown") > sum(
        len(cell.source) for cell in notebook.cells if cell.cell_type == "code"
    )


def test_sections(notebook):
    """A live example before the study, advice before the verdicts, every figure of the notebook."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "## What to do with your model" in text
    assert code.index("page.figure(") < code.index("page.advice()") < code.index("page.verdicts()")
    assert "$$" in text, "the core formula"
    name = re.search(r'Page\(\s*"(\w+)"', code)[1]
    assert {n for n, s in FIGURES.items() if s.notebook == name} == set(re.findall(r'page\.figure\("(\w+)"\)', code))


def test_links_to_the_neighbours():
    everywhere = lambda name: True  # noqa: E731
    before, after = "[02 drop curves](02_drop_curves.ipynb)", "[04 ablations](04_ablations.ipynb)"
    assert _neighbours("01_similarity", everywhere) == f"Next: {before}"
    assert _neighbours("12_other_transformers", everywhere) == "Previous: [11 sizes and causes](11_sizes_and_causes.ipynb)"
    assert _neighbours("03_joint_drop", everywhere) == f"Previous: {before} · Next: {after}"
    without_03 = lambda name: name != "03_joint_drop"  # noqa: E731
    assert _neighbours("03_joint_drop", without_03) == f"Previous: {before} · Next: {after}", "its own page is there"
    assert _neighbours("02_drop_curves", without_03) == f"Previous: [01 similarity](01_similarity.ipynb) · Next: {after}"
    assert _neighbours("02_drop_curves", lambda name: False) == ""


def test_which_pages_a_run_has(tmp_path, monkeypatch):
    """Those that its profile plans for its model, and those that have tables; of a committed run the latter alone."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    page = object.__new__(Page)
    page.profile = load_profile("smoke", "tiny-vit")
    page.folders = files.local(page.profile.run)
    assert [name for name in STUDIES if page._has_page(name)] == ["12_other_transformers"]
    (page.folders.tables / "03_joint_drop").mkdir(parents=True)
    assert page._has_page("03_joint_drop")
    monkeypatch.setenv(TABLES, "anywhere")
    assert [name for name in sorted(STUDIES) if page._has_page(name)] == ["03_joint_drop"]


def test_pages_link_to_pages_that_are_there():
    for run in REFERENCE.iterdir():
        folder = ROOT / "notebooks" / "rendered" / run.name
        for path in folder.glob("*.ipynb"):
            links = _neighbours(path.stem, lambda name, run=run: (run / name).is_dir())
            told = re.findall(r'"((?:Previous|Next): \[.*)"', path.read_text())
            assert told == ([links] if links else []), path
            assert all((folder / target).exists() for target in re.findall(r"\((\w+\.ipynb)\)", links)), path


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
        page = nbformat.read(path, as_version=4)
        assert path.stat().st_size < 2_000_000
        assert "widgets" not in page.metadata
        for cell in page.cells:
            if cell.cell_type == "code":
                ast.parse(cell.source)
            for output in cell.get("outputs", []):
                assert output.output_type != "error", path
                assert output.get("name") != "stderr", (path, output)
