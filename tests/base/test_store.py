"""Records survive kills, full disks and changed inputs."""

import pytest

from llmdrop_utils import LLMDropError
from llmdrop_utils.base import files
from llmdrop_utils.base.provenance import code_provenance
from llmdrop_utils.base.store import Store

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


def test_provenance_names_code_and_machine():
    provenance = code_provenance()
    assert {"git_commit", "versions", "platform", "processor", "gpus", "cpu_threads"} == set(provenance)
    assert {"torch", "transformers", "python"} <= set(provenance["versions"])
