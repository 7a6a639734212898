"""Reading documents, and the committed tables that they tell of."""

import functools
import re

import pandas as pd

from llmdrop_utils.base.files import REFERENCE, ROOT

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
MEDIUM = "cpu-medium-llama"  # the longer training

# ---- reading documents ------------------------------------------------------------------------------------------------


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    level = heading.split()[0]
    return re.split(rf"(?m)^{level} ", text.split(f"\n{heading}\n")[1])[0]


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"(?m)^```{language}\n(.*?)^```", text, re.DOTALL)


SMALLER = {  # what examples name -> what is small and needs no download
    "smollm2-135m": "tiny-llama",
    "minilm-l6": "tiny-bert",
    "vit-s-focus": "tiny-vit",
    "google-t5/t5-small": "tiny-t5",
    '"web"': '"random-words"',
    "512": "32",
    "n_drop=8": "n_drop=2",
    "limit=100": "limit=4",
    "n_samples=24": "n_samples=6",
    "[16:]": "[4:]",
    "[:16]": "[:4]",
    "2048": "64",
    "hellaswag": "openbookqa",
    "small-llama": "tiny-series",
    '"encyclopedia"': '"random-words"',
    "n_samples=16, seq_len=128": "n_samples=4, seq_len=32",
}


def examples(text: str) -> str:
    """The Python examples of a document, one after the other, on the tiny model."""
    code = "".join(code_blocks(text, "python"))
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    return code


def commands(text: str) -> list[str]:
    """Lines of shell blocks and pieces of inline code, without comments."""
    lines = "".join(code_blocks(text, "sh")).splitlines()
    without_blocks = re.sub(r"(?ms)^```.*?^```", "", text)
    inline = [" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", without_blocks)]
    return [line.split("  #")[0].strip() for line in [*lines, *inline]]


def plain(text: str) -> str:
    """One line of text: no targets of links, no numbers of lists, no emphasis."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"(?m)^\d\. ", "", text)
    return " ".join(text.replace("*", "").split())


def check_numbers(text: str, sentences: list[str], others: tuple[str, ...] = ()) -> None:
    """Raise AssertionError unless all sentences stand in the text, and no other number but those in `others` does."""
    rest = plain(text)
    for sentence in map(plain, sentences):
        assert sentence in rest, f"The tables say: {sentence}"
        rest = rest.replace(sentence, "", 1)
    for phrase in others:
        rest = rest.replace(phrase, "")
    assert not (left := re.findall(r"[^.]*\d[^.]*", rest)), f"No table is compared with: {left}"


def wrong_versions(text: str, sentences: list[str]):
    """The text with one digit of one sentence changed, for every digit."""
    text = plain(text)
    for sentence in map(plain, sentences):
        for digit in re.finditer(r"\d", sentence):
            i = digit.start()
            wrong = sentence[:i] + str((int(digit[0]) + 1) % 10) + sentence[i + 1 :]
            yield wrong, text.replace(sentence, wrong, 1)


# ---- reading tables ---------------------------------------------------------------------------------------------------


@functools.cache
def table(name: str, run: str = "cpu") -> pd.DataFrame:
    """A committed table: "02_drop_curves/reach"."""
    return pd.read_csv(REFERENCE / run / f"{name}.csv")


def row(name: str, run: str = "cpu", **where) -> pd.Series:
    """The one row of a table with these values."""
    found = table(name, run)
    for column, value in where.items():
        found = found[found[column] == value]
    assert len(found) == 1, (name, where, len(found))
    return found.iloc[0]


def only(values):
    """The value that all are."""
    (value,) = set(values)
    return value


def signed(value: float, form: str) -> str:
    """A number with a real minus sign."""
    return format(value, form).replace("-", "−")


def span(found: pd.Series, low: str = "low", high: str = "high", scale: float = 1, form: str = ".1f") -> str:
    """The ends of an interval: "(0.4 to 2.1)"."""
    return f"({signed(scale * found[low], form)} to {signed(scale * found[high], form)})"


@functools.cache
def scorecard(run: str = "cpu") -> pd.DataFrame:
    return pd.read_csv(ROOT / "figures" / run / "scorecard.csv")


def judged(run: str = "cpu") -> pd.DataFrame:
    """The rows of the scorecard with a verdict."""
    return scorecard(run)[scorecard(run)["verdict"] != "not run"]
