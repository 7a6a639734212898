"""What the README says is so."""

import re

import pandas as pd

from llmdrop_utils.base.files import ROOT
from llmdrop_utils.models.families import FAMILIES

NOTEBOOKS = ("01", "02", "03", "05", "06", "07")
README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_verdicts_are_those_of_the_scorecard():
    """The rows of the table of claims, against the committed scorecard, in order."""
    scorecard = pd.read_csv(ROOT / "figures" / "cpu" / "scorecard.csv")
    tested = list(scorecard[scorecard["notebook"].str[:2].isin(NOTEBOOKS)]["verdict"])
    table = README.split("## What is tested, and where")[1].split("**How to read")[0]
    rows = [line for line in table.splitlines() if re.search(r"\| \[?0\d ", line)]
    assert [row.rstrip(" |").split("| ")[-1].split(":")[0] for row in rows] == tested


def test_examples_run():
    """The Python examples, one after the other, on the tiny model."""
    code = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    smaller = {
        "smollm2-135m": "tiny-llama",
        '"web"': '"random-words"',
        "512": "32",
        "n_drop=8": "n_drop=2",
        "limit=100": "limit=4",
        "n_samples=24": "n_samples=6",
        "[16:]": "[4:]",
        "2048": "64",
        "hellaswag": "openbookqa",
        "small-llama": "tiny-series",
        '"encyclopedia"': '"random-words"',
        "n_samples=16, seq_len=128": "n_samples=4, seq_len=32",
    }
    for old, new in smaller.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert names["scores"].similarity["attention"].shape == (6,)
    assert names["faster"].kv_bytes * 6 == names["dense"].kv_bytes * 4


def test_every_family_is_named():
    letters = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())  # noqa: E731
    said = letters(re.search(r"Known families: (.*?)\. Another", README, re.DOTALL)[1])
    for family in FAMILIES:
        assert letters(re.sub(r"(_text|_moe|(?<!ol)moe|_?v?\d)+$", "", family)) in said, family


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)):
        assert re.search(rf"(?m)^{target}:", makefile) or target == "alone", target
