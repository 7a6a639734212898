"""Atomic writes, locks, and paths."""

import errno
import mmap
import multiprocessing
import time
from pathlib import Path

import pytest

from llmdrop_utils.base import files
from llmdrop_utils.base.errors import DiskFull, LLMDropError, NotAvailable, each_available
from llmdrop_utils.base.provenance import peak_memory


def test_replacing_leaves_the_old_file_if_the_block_fails(tmp_path):
    files.write_text(tmp_path / "a", "old")

    def fail():
        with files.replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_building(tmp_path):
    with files.building(tmp_path / "model") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "x").read_text() == "1"


def _hold(folder: Path, order: Path) -> None:
    with files.locked(folder):
        order.write_text(order.read_text() + "in ")
        time.sleep(0.2)
        order.write_text(order.read_text() + "out ")


def test_a_lock_holds_against_other_processes(tmp_path):
    order = tmp_path / "order"
    order.write_text("")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_hold, args=(tmp_path / "x", order)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert order.read_text() == "in out in out "


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(number, tmp_path):
    assert isinstance(files.disk_error(OSError(number, "x"), tmp_path), DiskFull)
    other = OSError(errno.ENOENT, "x")
    assert files.disk_error(other, tmp_path) is other


def test_local_results_are_apart_from_what_is_committed():
    mine, kept = files.local("cpu"), files.committed("cpu")
    assert all(path.is_relative_to(files.RESULTS) for path in (mine.tables, mine.figures, mine.pages))
    assert not {mine.tables, mine.figures, mine.pages} & {kept.tables, kept.figures, kept.pages}


def test_messages_lose_the_paths_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    text = f"{tmp_path / 'cache'}/a and {files.ROOT}/b and {Path.home()}/c"
    assert files.without_paths(text) == "<cache>/a and ./b and ~/c"


class TestEachAvailable:
    """One of several may be unavailable."""

    def get(self, thing):
        if thing in ("away", "full", "wrong"):
            raise {"away": NotAvailable, "full": DiskFull, "wrong": LLMDropError}[thing](f"{thing}!")
        return thing.upper()

    def test_several(self):
        assert each_available(["a", "away", "b"], self.get, "things") == (["A", "B"], {"away": "away!"})

    def test_one_alone_is_an_error(self):
        with pytest.raises(NotAvailable, match="^away!$"):
            each_available(["away"], self.get, "things")
        assert each_available(["away"], self.get, "things", several=True) == ([], {"away": "away!"})

    def test_none_of_several(self):
        with pytest.raises(NotAvailable, match="None of these things is available:\naway!\nwrong!"):
            each_available(["away", "wrong"], self.get, "things")

    def test_a_full_disk_stops_everything(self):
        with pytest.raises(DiskFull):
            each_available(["a", "full"], self.get, "things")

    def test_mistakes_are_raised(self):
        with pytest.raises(LLMDropError, match="wrong!"):
            each_available(["a", "wrong"], self.get, "things", reason=NotAvailable)


def test_peak_memory_sees_what_is_freed_again():
    with peak_memory(interval=0.01) as peak:
        before = peak()
        with mmap.mmap(-1, 200_000_000) as block:  # pages of its own, whatever the allocator keeps
            block.write(bytes(200_000_000))
            time.sleep(0.1)
        assert peak() > before + 150_000_000
