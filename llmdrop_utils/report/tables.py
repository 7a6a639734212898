"""Tables of a run: what figures and verdicts are made from. Small CSV files, committed as reference where they matter.

A study declares the columns of its tables once (`table`), with the heading and the number format that a reader sees. What
it writes must have these columns and no others, so figures and verdicts can rely on them.
"""

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from ..base.files import replacing
from ..sources.catalogue import exact_name

Tables = dict[str, pd.DataFrame]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its name in the CSV (`shared_*` stands for several), and how a reader sees it."""

    name: str
    heading: str
    form: str = ""  # of numbers, as in format(value, form): ".3f", ",d", ".1%"
    low: str = ""  # columns with the ends of its 95 % interval, shown behind it
    high: str = ""


@dataclasses.dataclass(frozen=True)
class Key(Column):
    """A column that says which row it is. The keys of a row together are unique; what is no key is a value."""


Declaration = Mapping[str, tuple[Column, ...]]  # table -> its columns


def table(*columns: str | Column) -> tuple[Column, ...]:
    """The columns of a table, in order. A string holds names of columns that need no format of their own.

    They are keys, but for the ends of intervals: a value has a `Column`, and a key that needs a format a `Key`.

    table("model kind", Key("n", "Dropped", "d"), Column("score", "Score", ".2f", "low", "high"), "low high")
    """
    ends = {end for column in columns if isinstance(column, Column) for end in (column.low, column.high)}
    listed: list[Column] = []
    for column in columns:
        if isinstance(column, Column):
            listed.append(column)
        else:
            kind = {name: Column if name in ends else Key for name in column.split()}
            listed += [kind[name](name, name.replace("_", " ").capitalize()) for name in kind]
    return tuple(listed)


def frame(name: str, rows: Iterable[dict] | pd.DataFrame, declared: Declaration) -> pd.DataFrame:
    """Rows as a table with the declared columns, also if there are no rows. Raises ValueError if the columns differ."""
    content = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    patterns = [column.name for column in declared[name]]
    if content.empty:
        return pd.DataFrame(columns=[pattern for pattern in patterns if "*" not in pattern])
    unknown = [column for column in content.columns if not any(fnmatch.fnmatch(column, pattern) for pattern in patterns)]
    lacking = [pattern for pattern in patterns if "*" not in pattern and pattern not in content.columns]
    if unknown or lacking:
        raise ValueError(f"The table {name!r} is not as declared: it has {unknown} besides, and lacks {lacking}.")
    return content


def with_exact_names(rows: pd.DataFrame) -> pd.DataFrame:
    """A table as it is shown: models under their exact names."""
    return rows.assign(model=rows["model"].map(exact_name)) if "model" in rows and len(rows) else rows


def models_measured(record: Path, between: str = " in ") -> list[str]:
    """The models in a provenance.json, each with its dtype: "SmolLM2-135M-Instruct (Q4_1) in float32"."""
    entries = json.loads(record.read_text(encoding="utf-8"))
    # Stages of a series are called "<series>, <stage>": the series will do.
    return list(dict.fromkeys(f"{exact_name(entry['model'].split(',')[0])}{between}{entry['dtype']}" for entry in entries))


# Columns that hold lists of layers ("3 12"): text, even where each list has a single layer.
LISTS = {"plans": ("attention", "mlp"), "published": ("theirs", "ours"), "exceptions": ("layers",),
         "rankings": ("dense_next", "own_next")}  # fmt: skip


def read_tables(folder: Path) -> Tables:
    """The tables of one notebook. Empty cells are missing numbers; text such as "None" stays text."""

    def read(path: Path) -> pd.DataFrame:
        return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(LISTS.get(path.stem, ()), str))

    return {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}


def write_tables(tables: Tables, folder: Path, provenance: list[dict]) -> Tables:
    """Write tables as CSV (six digits: what rounding between machines leaves alone) and how they came about as JSON.

    Returns them as read back, so that figures drawn from memory and from the files are the same to the byte.
    """
    for name, content in tables.items():
        with replacing(folder / f"{name}.csv") as temporary:
            content.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    with replacing(folder / "provenance.json") as temporary:
        temporary.write_text(json.dumps(provenance, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return read_tables(folder)
