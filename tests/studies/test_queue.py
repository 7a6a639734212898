"""What a killed run had measured is not measured again, and tables come out the same."""

import json
import subprocess
import sys

import pytest

from llmdrop_utils import load_profile
from llmdrop_utils.base import files
from llmdrop_utils.base.store import Store
from llmdrop_utils.studies import work
from llmdrop_utils.studies.run import STUDIES

pytestmark = pytest.mark.slow

KILLED = """
import os, signal
from llmdrop_utils import load_profile
from llmdrop_utils.base.store import Store
from llmdrop_utils.studies.run import STUDIES
put, die, written = Store.put, lambda *_: os.kill(os.getpid(), signal.SIGKILL), []

def put_and_die(self, *arguments):
    if len(written) == {after}:
        os.replace = die  # what would make the record visible
    put(self, *arguments)
    written.append(1)

Store.put = put_and_die
STUDIES["{study}"](load_profile("smoke"))
"""


def kill_while_writing(tmp_path, monkeypatch, study, after):
    """Run a study in a process that is killed while it writes the record after the first `after`; returns the store."""
    monkeypatch.setenv("LLMDROP_OUTPUT", str(tmp_path))
    code = KILLED.format(study=study, after=after)
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    store = Store(tmp_path / "data" / "results" / "records")
    records = list(store.folder.rglob("*.json"))
    assert len(records) == after
    for path in records:
        json.loads(path.read_text())
    return store


@pytest.mark.parametrize(("after", "left"), [(1, 1), (0, 2)])
def test_kill_9_loses_nothing_and_corrupts_nothing(tmp_path, monkeypatch, after, left):
    """A run killed by the system goes on where it stopped: what was measured is not measured again."""
    kill_while_writing(tmp_path, monkeypatch, "01_similarity", after)

    measured = []
    measure = work.measure_importance
    monkeypatch.setattr(work, "measure_importance", lambda *a, **k: measured.append(1) or measure(*a, **k))
    monkeypatch.setattr(files, "RESULTS", tmp_path / "data" / "results")
    after = STUDIES["01_similarity"](load_profile("smoke"))
    assert len(measured) == left
    assert len(STUDIES["01_similarity"](load_profile("smoke"))) == len(after)
    assert len(measured) == left, "a finished run measures nothing"
    forced = STUDIES["01_similarity"](load_profile("smoke"), force=True)
    assert len(measured) == left + 2
    for name, table in after.items():
        assert table.equals(forced[name]), name


def test_kill_9_in_the_drop_curves(tmp_path, monkeypatch):
    """Killed among the values of a task: the scores, the text and the task's first values are not measured again."""
    monkeypatch.setattr(files, "RESULTS", tmp_path / "whole")
    whole = STUDIES["02_drop_curves"](load_profile("smoke"))
    written = sorted((tmp_path / "whole" / "records").rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    kinds = [path.parent.name for path in written]
    killed_at = kinds.index("task") + 2
    assert set(kinds[:killed_at]) == {"importance", "text", "task"}
    assert kinds[killed_at] == "task"
    kill_while_writing(tmp_path / "killed", monkeypatch, "02_drop_curves", killed_at)

    measured = {"importance": 0, "text": 0, "task": 0}
    functions = {"importance": "measure_importance", "text": "score_text", "task": "score_task"}
    # One for each plan; text is scored under the dense plan as well, which has no record.
    records = {"importance": lambda _: 1, "text": lambda given: len(given[2]) - 1, "task": lambda given: len(given[3])}

    def count(kind, name):
        function = getattr(work, name)

        def counted(*arguments, **more):
            measured[kind] += records[kind](arguments)
            return function(*arguments, **more)

        monkeypatch.setattr(work, name, counted)

    for kind, name in functions.items():
        count(kind, name)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "killed" / "data" / "results")
    after = STUDIES["02_drop_curves"](load_profile("smoke"))
    assert measured == {kind: kinds[killed_at:].count(kind) for kind in functions}
    for name, table in whole.items():
        assert table.equals(after[name]), name
