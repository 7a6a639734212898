"""What the README says is so. Every number about results is computed here from the committed tables."""

import re

import documents
import pandas as pd
import pytest
import sentences as say
from documents import check_numbers, code_blocks, plain, section, wrong_versions

from llmdrop_utils.base import files
from llmdrop_utils.base.files import PACKAGE, ROOT
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.studies.run import STUDIES

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOUND = section(README, "## What was found")
CLAIMS = section(README, "## What is tested, and where")
LIMITS = section(README, "## Limits")

# Where results are told: the text, the sentences that tables give, and other numbers that may stand there.
TOLD = {
    "abstract": (README.split("\n## ")[0], say.counts_of_claims, ("2406.15786",)),
    "found": (
        FOUND,
        lambda: [
            *say.ladder(),
            *say.dropping(),
            *say.speed(),
            *say.served(),
            *say.on_gpu(),
            *say.methods(),
            *say.breaks(),
            *say.mended(),
            *say.encoders(),
        ],
        (
            "135M to 1.5B",
            "quantised to 4 bits (TinyLlama to 2)",
            "95 %",
            "SmolLM2-135M-Instruct",
            "4 bits (Q4_1)",
            "float32",
            "smollm2-135m",
            "bfloat16",
        ),
    ),
    "claims": (CLAIMS.split("| Claim")[0], say.longer_training, ()),
    "limits": (LIMITS, say.limits, ("1.5B", "7B or 70B")),
}


@pytest.mark.parametrize("part", TOLD)
def test_results_are_those_of_the_tables(part):
    text, sentences, others = TOLD[part]
    check_numbers(text, sentences(), others)


@pytest.mark.parametrize("part", TOLD)
def test_a_changed_number_is_seen(part):
    text, sentences, others = TOLD[part]
    seen = list(wrong_versions(text, sentences()))
    assert len(seen) > 3
    for _, wrong in seen:
        with pytest.raises(AssertionError):
            check_numbers(wrong, sentences(), others)


def test_a_new_number_is_seen():
    text, sentences, others = TOLD["found"]
    with pytest.raises(AssertionError, match="No table is compared with"):
        check_numbers(f"{text} It is 3 times as good.", sentences(), others)


def test_a_changed_table_is_seen(monkeypatch):
    table = documents.table
    monkeypatch.setattr(documents, "table", lambda name, run="cpu": table(name, run).replace({"tasks": {6: 9}}))
    text, sentences, others = TOLD["found"]
    with pytest.raises(AssertionError, match="mean of 9 tasks"):
        check_numbers(text, sentences(), others)


# ---- the table of claims ----------------------------------------------------------------------------------------------


def claim_rows() -> list[list[str]]:
    """Claim, notebook, figures, verdict, and of how many models of the ladder it is reproduced."""
    lines = [line for line in CLAIMS.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def test_claims_are_those_of_the_scorecard():
    """Every claim with a verdict, in order, with its notebook and verdicts."""
    of_ladder = say.ladder_cells()
    assert [(row[0], re.search(r"\d\d", row[1])[0], *row[3:]) for row in claim_rows()] == [
        (v.claim, v.notebook[:2], v.verdict, of_ladder.get(v.id, "")) for v in say.judged_anywhere().itertuples()
    ]


def test_a_wrong_verdict_is_seen(monkeypatch):
    card = documents.scorecard().replace("deviates", "reproduced")
    monkeypatch.setattr(documents, "scorecard", lambda run="cpu": card)
    with pytest.raises(AssertionError):
        test_claims_are_those_of_the_scorecard()


def test_figures_belong_to_the_notebook_of_the_claim():
    for _, notebook, figures, *_ in claim_rows():
        for number, name in re.findall(r"\[(\w+)\]\(figures/(?:cpu|ladder)/(\w+)\.svg\)", figures):
            assert FIGURES[name].notebook in STUDIES
            assert FIGURES[name].notebook.startswith(re.search(r"\d\d", notebook)[0]), name
            assert name.split("_")[0].removeprefix("fig").lstrip("0") == number


# ---- form, paths, costs -----------------------------------------------------------------------------------------------


def test_it_is_short():
    of_tables = [line for line in README.splitlines() if line.startswith("|")]  # the claims, one line each
    assert len(README.splitlines()) - len(of_tables) < 116
    assert len(re.findall(r"!\[", README)) == 1


def test_the_example_is_short():
    (example,) = code_blocks(README, "python")
    assert len([line for line in example.splitlines() if line]) <= 10


def test_file_tree():
    """Every name is there, and no folder of the package is left out."""
    (tree,) = code_blocks(section(README, "## File tree"), "")
    named = []
    for line in tree.splitlines():
        inside = line.startswith("  ")
        first = line.split()[0]
        assert ((PACKAGE if inside else ROOT) / first).exists(), first
        assert first.endswith("/") == ((PACKAGE if inside else ROOT) / first).is_dir()
        named += [first] if inside else []
    folders = {path.parent.name + "/" for path in PACKAGE.glob("*/*.py")}
    assert {name for name in named if name.endswith("/")} == folders


def test_places_of_results():
    """Where the README says that results go is where they go."""
    said = plain(README.split("**Where results go.**")[1].split("\n## ")[0])
    for place in ("tables", "figures", "pages"):
        assert getattr(files.local("<run>"), place).relative_to(files.OUTPUT).is_relative_to("data/results/<run>")
        assert f"`{getattr(files.committed('<run>'), place).relative_to(ROOT)}/`" in said
    assert "`data/results/<run>/`" in said


def test_costs_are_those_of_the_list_of_costs():
    costs = section((ROOT / "docs" / "costs.md").read_text(encoding="utf-8"), "## Time, memory, downloads")
    (listed,) = [line for line in costs.splitlines() if line.startswith("| `make reproduce PROFILE=cpu`, the first time")]
    downloads = sum(map(int, re.findall(r"(\d+) MB", listed.split("(0.8")[0])))
    minutes, memory = re.search(r"(\d+) minutes", listed)[0], re.search(r"\d+ GiB", listed)[0]
    (said,) = [line for line in README.splitlines() if line.startswith("make reproduce PROFILE=cpu ")]
    assert f"about {minutes} on two cores, {memory} of memory, {downloads / 1000:.1f} GB of downloads" in said
    peaks = [peak for path in (files.REFERENCE / "cpu").glob("*/provenance.json") for peak in _peaks(path)]
    assert f"{max(peaks) / 2**30:.0f} GiB" == memory


def _peaks(path):
    return pd.read_json(path).get("peak_memory_bytes", pd.Series(dtype=float)).dropna()
