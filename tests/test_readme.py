"""What the README says is so."""

import re

import pandas as pd

from llmdrop_utils.anatomy import FAMILIES
from llmdrop_utils.workspace import ROOT

README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_verdicts_are_those_of_the_scorecard():
    """The rows of the table of claims, against the committed scorecard, in order."""
    scorecard = pd.read_csv(ROOT / "figures" / "cpu" / "scorecard.csv")
    tested = list(scorecard[scorecard["notebook"] < "04"]["verdict"])
    table = README.split("## What is tested, and where")[1].split("**How to read")[0]
    rows = [line for line in table.splitlines() if re.search(r"\| (\[0[1-3] |0[1-3] )", line)]
    assert [row.rstrip(" |").split("| ")[-1].split(":")[0] for row in rows] == tested


def test_example_runs(monkeypatch):
    """The Python example, on the tiny model."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    for old, new in {"smollm2-135m": "tiny-llama", '"web"': '"random-words"', "512": "32"}.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert names["scores"].similarity["attention"].shape == (6,)


def test_every_family_is_named():
    letters = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())  # noqa: E731
    said = letters(re.search(r"Known families: (.*?)\. Another", README, re.DOTALL)[1])
    for family in FAMILIES:
        assert letters(re.sub(r"(_text|_moe|(?<!ol)moe|_?v?\d)+$", "", family)) in said, family


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)):
        assert re.search(rf"(?m)^{target}:", makefile) or target == "alone", target
