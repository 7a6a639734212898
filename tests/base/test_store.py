"""Records survive kills, full disks and changed inputs."""

import json
import subprocess
import sys

import pytest

from llmdrop_utils import LLMDropError, load_profile, studies
from llmdrop_utils.base import files
from llmdrop_utils.base.provenance import code_provenance
from llmdrop_utils.base.store import Store
from llmdrop_utils.studies import curves
from llmdrop_utils.studies.similarity import study

KEY = {"measurement": "demo", "model": "sha256:1", "dtype": "float32"}


def test_round_trip_and_misses(tmp_path):
    store = Store(tmp_path)
    assert store.get(KEY) is None
    store.put(KEY, {"x": [0.1, 2.0]}, {"seconds": 3})
    assert store.get(dict(reversed(KEY.items()))) == {"key": KEY, "value": {"x": [0.1, 2.0]}, "provenance": {"seconds": 3}}
    for field in KEY:
        assert store.get(KEY | {field: "other"}) is None, field
    assert store.get(KEY | {"version": 2}) is None


def test_damaged_record_is_measured_again(tmp_path, capsys):
    store = Store(tmp_path)
    store.put(KEY, {"x": 1}, {})
    store.path(KEY).write_text(store.path(KEY).read_text()[:20])
    assert store.get(KEY) is None
    assert "is damaged and is measured again" in capsys.readouterr().err


def test_full_disk_keeps_the_old_record(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(KEY, {"x": 1}, {})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.Path, "write_text", full)
    with pytest.raises(LLMDropError, match="The disk is full: could not write"):
        store.put(KEY, {"x": 2}, {})
    assert store.get(KEY)["value"] == {"x": 1}
    assert [p.suffix for p in store.path(KEY).parent.iterdir()] == [".json"]


KILLED = """
import os, signal
from llmdrop_utils import load_profile, studies
from llmdrop_utils.base.store import Store
put, die, written = Store.put, lambda *_: os.kill(os.getpid(), signal.SIGKILL), []

def put_and_die(self, *arguments):
    if len(written) == {after}:
        os.replace = die  # what would make the record visible
    put(self, *arguments)
    written.append(1)

Store.put = put_and_die
studies.{study}(load_profile("smoke"))
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
    store = kill_while_writing(tmp_path, monkeypatch, "similarity", after)

    measured = []
    measure = studies.work.measure_importance
    monkeypatch.setattr(studies.work, "measure_importance", lambda *a, **k: measured.append(1) or measure(*a, **k))
    monkeypatch.setattr(study, "Store", lambda: store)
    monkeypatch.setattr(files, "RESULTS", tmp_path / "data" / "results")
    after = studies.similarity(load_profile("smoke"))
    assert len(measured) == left
    assert len(studies.similarity(load_profile("smoke"))) == len(after)
    assert len(measured) == left, "a finished run measures nothing"
    forced = studies.similarity(load_profile("smoke"), force=True)
    assert len(measured) == left + 2
    for name, table in after.items():
        assert table.equals(forced[name]), name


def test_kill_9_in_the_drop_curves(tmp_path, monkeypatch):
    """Killed among the values of a task: the scores, the text and the task's first values are not measured again."""
    monkeypatch.setattr(files, "RESULTS", tmp_path / "whole")
    monkeypatch.setattr(curves, "Store", lambda: Store(tmp_path / "whole" / "records"))
    whole = studies.drop_curves(load_profile("smoke"))
    kinds = {kind: len(list((tmp_path / "whole" / "records" / kind).iterdir())) for kind in ("importance", "text", "task")}
    assert kinds["task"] > 4
    before = kinds["importance"] + kinds["text"]
    store = kill_while_writing(tmp_path / "killed", monkeypatch, "drop_curves", before + 2)

    measured = {"score_text": 0, "measure_importance": 0, "score_task": 0}

    def count(name):
        function = getattr(studies.work, name)

        def counted(*arguments, **more):
            measured[name] += len(arguments[3]) if name == "score_task" else 1  # plans of a task
            return function(*arguments, **more)

        monkeypatch.setattr(studies.work, name, counted)

    for name in measured:
        count(name)
    monkeypatch.setattr(curves, "Store", lambda: store)
    after = studies.drop_curves(load_profile("smoke"))
    assert measured == {"score_text": 0, "measure_importance": 0, "score_task": kinds["task"] - 2}
    for name, table in whole.items():
        assert table.equals(after[name]), name


def test_provenance_names_code_and_machine():
    provenance = code_provenance()
    assert {"git_commit", "versions", "platform", "processor", "gpus", "cpu_threads"} == set(provenance)
    assert {"torch", "transformers", "python"} <= set(provenance["versions"])
