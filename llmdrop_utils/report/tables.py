"""Tables of a run: what figures and verdicts are made from. Small CSV files, committed as reference where they matter."""

import json
import shutil
from pathlib import Path

import pandas as pd

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import replacing
from ..base.stats import rank_correlation

Tables = dict[str, pd.DataFrame]


def read_tables(folder: Path) -> Tables:
    """The tables of one notebook. Empty cells are missing numbers; text such as "None" stays text."""
    return {path.stem: pd.read_csv(path, keep_default_na=False, na_values=[""]) for path in sorted(folder.glob("*.csv"))}


def write_tables(tables: Tables, folder: Path, provenance: list[dict]) -> Tables:
    """Write tables as CSV (six digits: what rounding between machines leaves alone) and how they came about as JSON.

    Returns them as read back, so that figures drawn from memory and from the files are the same to the byte.
    """
    for name, table in tables.items():
        with replacing(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    with replacing(folder / "provenance.json") as temporary:
        temporary.write_text(json.dumps(provenance, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return read_tables(folder)


def without_paths(text: str) -> str:
    """A message without the paths of this machine, for what may be committed."""
    for path, name in ((files.CACHE, "<cache>"), (files.ROOT, "."), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text


def keep_as_reference(run: str) -> Path:
    """Copy the tables of a run to data/reference, to be committed.

    Raises LLMDropError if there are none, or if they were not all measured by committed code.
    """
    source, target = files.RESULTS / run, files.REFERENCE / run
    if not source.is_dir():
        raise LLMDropError(f"There are no results of the run {run!r} to keep: run `make reproduce` first.")
    for record in source.glob("*/provenance.json"):
        commits = {entry["git_commit"] for entry in json.loads(record.read_text(encoding="utf-8"))}
        if not all(commit and not commit.endswith("+changes") for commit in commits):
            raise LLMDropError(
                f"The results of the run {run!r} come from code that is not committed ({', '.join(map(str, commits))}). "
                "Commit first, then measure again: make reproduce FORCE=1 (and delete what was trained in data/cache/series)."
            )
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.done")))


COMPARED = [  # notebook, table, what makes a row, the value
    ("01_similarity", "importance", ["model", "kind", "corpus", "layer"], "importance"),
    ("02_drop_curves", "text", ["model", "kind", "corpus", "n"], "perplexity"),
    ("02_drop_curves", "tasks", ["model", "kind", "task", "n"], "value"),
    ("07_training_stages", "importance", ["model", "seed", "kind", "position", "layer"], "importance"),
]


def distance_from_reference(run: str) -> pd.DataFrame | None:
    """How far the values measured in this run are from the committed ones; None if nothing comparable is committed.

    One row per table, model and kind: number of values compared, largest difference relative to the reference, and the
    rank correlation of the two.
    """
    rows = []
    for notebook, table, keys, column in COMPARED:
        paths = [folder / run / notebook / f"{table}.csv" for folder in (files.REFERENCE, files.RESULTS)]
        if not all(path.exists() for path in paths):
            continue
        pair = [pd.read_csv(path).set_index(keys)[column] for path in paths]
        both = pd.concat(pair, axis=1, join="inner", keys=["reference", "here"])
        for (model, kind), group in both.groupby(["model", "kind"], sort=False):
            relative = float((group["here"] / group["reference"] - 1).abs().max())
            correlation = float(rank_correlation(group["reference"].to_numpy(), group["here"].to_numpy()))
            rows.append(
                {
                    "table": table,
                    "model": model,
                    "kind": kind,
                    "values": len(group),
                    "largest relative difference": relative,
                    "rank correlation": correlation,
                }
            )
    return pd.DataFrame(rows) if rows else None
