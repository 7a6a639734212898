"""Notebook 02: quality against the number of dropped attention, MLP or block layers."""

from ...report.tables import Column, Key, Tables, table
from .. import curve_rows, paper
from ..curves import SINGLE, Tasks, Text, collect, measure_curves, rank_layers
from ..profile import Calibration
from ..run import Run, study
from .across import ACROSS, across_corpora

TABLES = curve_rows.TABLES | {
    "across": ACROSS,
    "paper": table("model kind", Key("n", "Dropped", "d"), Key("what", "What"), Column("paper", "The paper's number")),
}


@study("02_drop_curves", needs=[Calibration, Text, Tasks], tables=TABLES)
def drop_curves(run: Run) -> Tables:
    """Notebook 02: quality of each of the profile's models with n attention, MLP or block layers dropped."""
    scoring, tasks = rank_layers(run)
    measured = measure_curves(run, scoring, tasks, SINGLE)
    across, across_work = across_corpora(run, [m.model for m in measured])
    rows = collect(measured, lambda m: {"paper": paper.rows_for(m.model)}, TABLES) | {"across": across}
    return run.write(rows, [*run.measured(scoring), *(item for m in measured for item in m.work), *across_work])
