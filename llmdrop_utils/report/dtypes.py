"""How much a dtype moves each number of a run, and each verdict: what no interval covers.

The run "cpu" stands beside "cpu-bfloat16" or "cpu-float32", whichever was measured in the other dtype (profiles of these names
extend `cpu`), and "ladder-<model>" beside "ladder-float32-<model>". On other processors numbers move as well: `distance.py`
tells by how much.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..base import files
from ..base.files import replacing
from ..models.load import DTYPES
from .distance import by_key, dtypes_of, values_of
from .tables import Declaration, Key, read_tables


def other_dtype(run: str, notebook: str, tables: Path) -> tuple[str, Path] | None:
    """The dtype and the tables of the same notebook in the other dtype, if both were measured.

    Beside committed tables stand committed ones; beside those of this machine its own, or else committed ones.
    """
    here = dtypes_of(tables / notebook)
    places = [files.committed] if tables == files.committed(run).tables else [files.local, files.committed]
    for name in (name for name in DTYPES if here and name != here):
        for folders in (place(beside) for beside in _runs_beside(run, name) for place in places):
            there = folders.tables / notebook
            if there.is_dir() and dtypes_of(there) == name and _models(there) == _models(tables / notebook):
                return name, there
    return None


def _models(tables: Path) -> set[str]:
    """Means over several models move with the models, whatever their dtype: only the same ones are compared."""
    return {entry["model"] for entry in json.loads((tables / "provenance.json").read_text(encoding="utf-8"))}


def _runs_beside(run: str, dtype: str) -> list[str]:
    """What the same run in another dtype may be called: cpu-float32, or ladder-float32-gemma3-270m for ladder-gemma3-270m."""
    profiles = [path.stem for path in files.PROFILE_DIR.glob("*.yaml") if run.startswith(f"{path.stem}-")]
    return [f"{run}-{dtype}", *(f"{profile}-{dtype}-{run.removeprefix(f'{profile}-')}" for profile in profiles)]


def moves(here: Path, there: Path, columns: Declaration) -> pd.DataFrame:
    """How far each number with an interval moves from the tables in `here` to those in `there`: a row for each.

    table, row (its keys), column, here, low, high, there, difference (there minus here), inside (the interval of here).
    """
    rows, (old, new) = [], (read_tables(here), read_tables(there))
    for name, declared in columns.items():
        if name not in old or name not in new:
            continue
        keys = [column.name for column in declared if isinstance(column, Key)]
        a, b = by_key(old[name], keys), by_key(new[name], keys)
        for column, its in values_of(declared, list(a.columns)):
            if not its.low or not {column, its.low, its.high} <= {*a.columns} & {*b.columns}:
                continue
            for key in a.index.intersection(b.index, sort=False):
                value, low, high = (float(a.loc[key, c]) for c in (column, its.low, its.high))
                moved = float(b.loc[key, column])
                if np.isfinite([value, low, high, moved]).all():
                    rows.append({"table": name, "row": key, "column": column, "here": value, "low": low, "high": high,
                                 "there": moved, "difference": moved - value, "inside": low <= moved <= high})  # fmt: skip
    return pd.DataFrame(rows)


def write_dtypes(run: str, tables: Path, folder: Path, declared: Mapping[str, Declaration]) -> str | None:
    """Write dtypes.csv to `folder` (`moves` of all notebooks measured in both dtypes); returns sentences for the scorecard.

    None, and no file, if no notebook was.
    """
    found, lines = [], []
    for notebook, columns in sorted(declared.items()):
        if (other := other_dtype(run, notebook, tables)) is None:
            continue
        dtype, there = other
        rows = moves(tables / notebook, there, columns)
        if rows.empty:
            continue
        found.append(rows.assign(notebook=notebook, dtype_here=dtypes_of(tables / notebook), dtype_there=dtype))
        relative = (rows["difference"] / (rows["high"] - rows["low"]).where(lambda width: width > 0)).abs()
        lines.append(
            f"{notebook} in {dtype}: of {len(rows):,} numbers {100 * rows['inside'].mean():.0f} % stay inside their 95 % "
            f"interval, and half move by less than {relative.median():.2f} of the interval's width"
        )
    (folder / "dtypes.csv").unlink(missing_ok=True)
    if not found:
        return None
    with replacing(folder / "dtypes.csv") as temporary:
        pd.concat(found).to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return f"The same in another dtype ([dtypes.csv](dtypes.csv)): {'; '.join(lines)}."
