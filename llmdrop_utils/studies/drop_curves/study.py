"""Notebook 02: quality against the number of dropped attention, MLP or block layers."""

from ...base import files
from ...report.tables import Tables, write_tables
from ..curves import SINGLE, collect, measure, paper_name, paper_rows
from ..profile import Profile
from ..queue import not_run_table


def drop_curves(profile: Profile, force: bool = False) -> Tables:
    """Notebook 02: quality of each of the profile's models with n attention, MLP or block layers dropped.

    Measures what is missing (everything if `force`), writes the tables to data/results/<run>/02_drop_curves and returns
    them. Raises LLMDropError if the profile's only model, its corpus or all of its tasks cannot be used; of several models
    or tasks, one that cannot is listed in the table `not_run`.
    """
    measured, provenance, not_run = measure(profile, force, SINGLE)
    tables = collect(
        measured, lambda m: m.model_rows() | m.text_rows() | m.task_rows() | {"paper": paper_rows(paper_name(m.model))}
    )
    tables["not_run"] = not_run_table(not_run)
    return write_tables(tables, files.RESULTS / profile.run / "02_drop_curves", provenance)
