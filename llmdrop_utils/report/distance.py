"""How far the tables and verdicts of a run are from the committed ones."""

import fnmatch
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..base import files
from ..base.stats import rank_correlation
from .tables import Column, Declaration, Key, read_tables

SAME = 1e-3  # tables that differ by less, relative to each value, are summed up in one line
NEAR_ZERO = 0.01  # of the largest value of a column: what is smaller has no relative difference
ROUNDING = 1e-5  # relative: tables have six digits
GROUP = ("model", "kind")  # values are ranked within these


def compare(reference: pd.DataFrame, here: pd.DataFrame, columns: tuple[Column, ...]) -> dict:
    """How far a table is from the reference. Rows are matched by their keys, and all other columns compared.

    rows, missing, extra: rows in both, in the reference alone, in this run alone
    values, undefined: numbers in both, and in one of them alone
    relative, relative_at: the largest difference relative to the reference, and where; NaN and "" if there is none
    absolute, absolute_at: the same for values near zero, as it is; beyond: whether it is above `SAME` of the largest value
    correlation: the lowest rank correlation of a column, within a model and kind; NaN where fewer than four values differ
    with_interval, outside: values that have an interval in the reference, and those that are outside it here
    texts, changed: cells that are no numbers, and those that differ
    """
    keys = [column.name for column in columns if isinstance(column, Key)]
    old, new = by_key(reference, keys), by_key(here, keys)
    common = old.index.intersection(new.index, sort=False)
    row: dict = dict.fromkeys(("values", "undefined", "with_interval", "outside", "texts", "changed"), 0)
    row |= {
        "relative": np.nan,
        "relative_at": "",
        "absolute": np.nan,
        "absolute_at": "",
        "beyond": False,
        "correlation": np.nan,
    }
    row |= {"rows": len(common), "missing": len(old) - len(common), "extra": len(new) - len(common)}
    models = old["model"].unique() if "model" in keys else []
    only = models[0] if len(models) == 1 else None  # it is not named beside each value
    where = lambda name, key: f"{name}, {key}".replace(f", {only}", "", 1)  # noqa: E731
    values = values_of(columns, [*old.columns, *(name for name in new.columns if name not in old.columns)])
    numbers = [(name, column) for name, column in values if column.form or _is_end(column, columns)]
    ranked = [name for name, column in numbers if column.low] or [n for n, column in numbers if not column.form.endswith("d")]
    for name, column in values:
        a, b = (side[name].reindex(common) if name in side else pd.Series(np.nan, common) for side in (old, new))
        if (name, column) not in numbers:
            row["texts"] += len(common)
            row["changed"] += int((a.fillna("").astype(str) != b.fillna("").astype(str)).sum())
            continue
        a, b = a.astype(float), b.astype(float)
        row["undefined"] += int((a.isna() != b.isna()).sum())
        a, b = a[a.notna() & b.notna()], b[a.notna() & b.notna()]
        if a.empty:
            continue
        # 1. Differences, relative to the value or, near zero, as they are.
        row["values"] += len(a)
        difference = (a - b).abs().where(a != b, 0.0)  # of two infinities too
        largest = a.abs().where(np.isfinite(a), 0.0).max()
        near = a.abs() < NEAR_ZERO * largest if largest else a == 0
        row["beyond"] |= bool((difference[near] > SAME * largest).any())
        for kind, found in (("relative", difference[~near] / a[~near].abs()), ("absolute", difference[near])):
            found = found.fillna(np.inf)  # a finite value in place of an infinite one
            if len(found) and not found.max() <= row[kind]:
                row |= {kind: found.max(), f"{kind}_at": where(name, found.idxmax())}
        # 2. Ranks.
        if name in ranked:
            groups = [old.loc[a.index, key] for key in GROUP if key in keys]
            for one in [one for _, one in a.groupby(groups)] if groups else [a]:
                if one.nunique() > 3:
                    correlation = float(rank_correlation(one.to_numpy(), b[one.index].to_numpy()))
                    row["correlation"] = np.fmin(row["correlation"], correlation)
        # 3. The reference's interval.
        if column.low and {column.low, column.high} <= set(old.columns):
            low, high = (old.loc[a.index, end].astype(float) for end in (column.low, column.high))
            slack = ROUNDING * np.maximum(low.abs(), high.abs())
            row["with_interval"] += int(low.notna().sum())
            row["outside"] += int(((b < low - slack) | (b > high + slack)).sum())
    return row


def distance_from_reference(run: str, declared: Mapping[str, Declaration]) -> pd.DataFrame | None:
    """`compare` for every declared table of the notebooks that were run and are committed: notebook, table, and its fields.

    declared: notebook -> its tables. None if nothing comparable is committed.
    """
    rows = []
    for notebook in _in_both(run, declared):
        old, new = (read_tables(folders.tables / notebook) for folders in (files.committed(run), files.local(run)))
        for name, columns in declared[notebook].items():
            if name in old or name in new:
                empty = pd.DataFrame(columns=[column.name for column in columns])
                found = compare(old.get(name, empty), new.get(name, empty), columns)
                rows.append({"notebook": notebook, "table": name} | found)
    return pd.DataFrame(rows) if rows else None


def changed_verdicts(run: str) -> pd.DataFrame:
    """The claims whose verdict is another than in the committed scorecard: id, claim, verdict_reference, verdict_here."""
    old, new = (folders.figures / "scorecard.csv" for folders in (files.committed(run), files.local(run)))
    if not (old.exists() and new.exists()):
        return pd.DataFrame(columns=["id", "claim", "verdict_reference", "verdict_here"])
    wanted = ["id", "claim", "notebook", "verdict"]
    suffixes = ("_reference", "_here")
    both = pd.read_csv(old)[["id", "verdict"]].merge(pd.read_csv(new)[wanted], on="id", suffixes=suffixes)
    ran = both["notebook"].map(lambda notebook: (files.local(run).tables / notebook).is_dir())
    return both[ran & (both["verdict_reference"] != both["verdict_here"])].drop(columns="notebook").reset_index(drop=True)


def describe_distance(run: str, declared: Mapping[str, Declaration]) -> str:
    """The distance in a few lines: a line for each table that differs, and the verdicts that changed."""
    distance = distance_from_reference(run, declared)
    if distance is None:
        return f"There are no committed reference results for the run {run!r} to compare with."
    lines = [f"Distance from the committed results (data/reference/{run}):", *_conditions(run, declared)]
    same = distance.apply(_is_same, axis=1)
    lines += [f"{row.notebook[:2]} {row.table}: {_sentence(row)}" for row in distance[~same].itertuples()]
    if same.any():
        count, values = f"{same.sum()} of" if not same.all() else "All", distance.loc[same, "values"].sum()
        lines.append(f"{count} {len(same)} tables ({values:,} numbers) agree to {100 * SAME:g} %.")
    changed = changed_verdicts(run)
    lines += [f"Now {row.verdict_here}, was {row.verdict_reference}: {row.claim}" for row in changed.itertuples()]
    lines += [] if len(changed) else ["No verdict differs."]
    return "\n  ".join(lines)


# ---- parts ------------------------------------------------------------------------------------------------------------------


def by_key(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The table, indexed by the text of its keys: "model, web, attention, 2". Of rows with one key, the first."""
    cells = [[_text(value) for value in table[key]] if key in table else [""] * len(table) for key in keys]
    indexed = table.set_index(pd.Index([", ".join(texts) for texts in zip(*cells, strict=True)], dtype=object))
    return indexed[~indexed.index.duplicated()]


def _text(value: object) -> str:
    """Of a key: 2 and 2.0 are one."""
    if pd.isna(value):
        return ""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return f"{float(value):.15g}" if is_number else str(value)  # type: ignore[arg-type]


def values_of(columns: tuple[Column, ...], names: list[str]) -> list[tuple[str, Column]]:
    """Names of columns that are no keys, each with its declaration."""
    return [
        (name, column)
        for column in columns
        if not isinstance(column, Key)
        for name in names
        if fnmatch.fnmatch(name, column.name)
    ]


def _is_end(column: Column, columns: tuple[Column, ...]) -> bool:
    return any(column.name in (other.low, other.high) for other in columns)


def _in_both(run: str, declared: Mapping[str, Declaration]) -> list[str]:
    tables = [folders.tables for folders in (files.committed(run), files.local(run))]
    return [notebook for notebook in sorted(declared) if all((folder / notebook).is_dir() for folder in tables)]


def _conditions(run: str, declared: Mapping[str, Declaration]) -> Iterator[str]:
    """What else was other than in the reference: notebooks, dtype, device."""
    both = _in_both(run, declared)
    committed, local = files.committed(run).tables, files.local(run).tables
    if left := [notebook for notebook in declared if notebook not in both and (committed / notebook).is_dir()]:
        yield f"Not run here: {', '.join(left)}."
    differs: dict[tuple[str, str], list[str]] = {}
    for notebook in both:
        for of in (dtypes_of, _devices):
            pair = of(local / notebook), of(committed / notebook)
            if pair[0] != pair[1]:
                differs.setdefault(pair, []).append(notebook[:2])
    for (here, reference), notebooks in differs.items():
        yield f"Measured in {here}, the reference in {reference} (notebooks {', '.join(notebooks)})."


def dtypes_of(folder: Path) -> str:
    return " and ".join(sorted({entry["dtype"] for entry in _provenance(folder)}))


def _devices(folder: Path) -> str:
    return " and ".join(sorted({", ".join(entry["gpus"]) or entry["processor"] for entry in _provenance(folder)}))


def _provenance(folder: Path) -> list[dict]:
    path = folder / "provenance.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _is_same(row: pd.Series) -> bool:
    exact = not any(row[name] for name in ("missing", "extra", "undefined", "changed", "beyond"))
    return exact and not row["relative"] > SAME


def _sentence(row) -> str:
    parts = [f"{row.values:,} numbers"]
    if row.relative > SAME:
        parts.append(f"off by up to {100 * row.relative:.2g} % ({row.relative_at})")
    if row.beyond:
        parts.append(f"near zero by up to {row.absolute:.2g} ({row.absolute_at})")
    if row.correlation < 1:
        parts.append(f"rank correlation {row.correlation:.3f} or more")
    if row.outside:
        parts.append(f"{row.outside} of {row.with_interval} outside the reference's intervals")
    for count, one, several in (
        (row.undefined, "number on one side only", "numbers on one side only"),
        (row.changed, f"of {row.texts} texts differs", f"of {row.texts} texts differ"),
        (row.missing, "row missing", "rows missing"),
        (row.extra, "row more", "rows more"),
    ):
        if count:
            parts.append(f"{count} {one if count == 1 else several}")
    return "; ".join(parts) + "."
