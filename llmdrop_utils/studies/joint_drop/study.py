"""Notebook 03: attention and MLP dropped in one ranking, and one by one."""

from ...base import files
from ...report.tables import Tables, write_tables
from ..curves import SINGLE, collect, measure
from ..profile import Profile
from ..queue import not_run_table


def joint_drop(profile: Profile, force: bool = False) -> Tables:
    """Notebook 03: attention and MLP dropped in one ranking, against single kinds; and iterative against one-shot dropping.

    As `drop_curves`, in data/results/<run>/03_joint_drop.
    """
    measured, provenance, not_run = measure(profile, force, (*SINGLE, "joint"))
    tables = collect(measured, lambda m: m.model_rows() | m.text_rows() | m.task_rows() | m.joint_rows() | m.iterative_rows())
    tables["not_run"] = not_run_table(not_run)
    return write_tables(tables, files.RESULTS / profile.run / "03_joint_drop", provenance)
