"""Tensors that wait in a file: what a list would give, what a repair makes of it, and a disk that is full."""

import contextlib
import gc
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from derive.changing import assert_as_it_was, fresh, state

from llmdrop_utils import DropPlan, LLMDropError
from llmdrop_utils.derive import repair as repair_module
from llmdrop_utils.derive.repair import Repair, repair
from llmdrop_utils.derive.spooled import Spooled

TOKENS = torch.randint(3, 97, (40, 24), generator=torch.Generator().manual_seed(0))
PLAN = DropPlan(attention=(1,))
TESTS = Path(__file__).parents[1]


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """As on a disk that has no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_list_that_waits_in_a_file_is_a_list():
    """After any changes: tensors of other sizes and dtypes in place of others, and what goes meanwhile."""
    drawn = np.random.default_rng(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
    waiting, expected = Spooled(), []
    for _ in range(400):
        tensor = torch.tensor(drawn.normal(size=drawn.integers(1, 4, 3)) * 9).to(dtypes[drawn.integers(4)]).transpose(0, 2)
        change, index = drawn.integers(4), int(drawn.integers(len(expected) + 1))
        if change == 0 or index == len(expected):
            waiting.append(tensor)
            expected.append(tensor)
        elif change == 3:
            assert torch.equal(waiting.pop(index), expected.pop(index))
        else:
            waiting[index] = expected[index] = tensor if change == 1 else expected[index] * 2
        assert len(waiting) == len(expected)
        for one, other in zip(waiting, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_what_is_read_is_a_copy():
    waiting = Spooled([torch.zeros(2, 3)])
    waiting[0].add_(1)
    assert not waiting[0].any()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux lists what is open")
def test_its_file_ends_with_it():
    n = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one that is not closed warns
        lists = [Spooled([torch.zeros(2)]) for _ in range(3)]
        assert len(os.listdir("/proc/self/fd")) == n + 3
        del lists
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == n


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi"])
def test_a_repair_is_that_of_streams_in_memory(name, dtype, monkeypatch):
    models = [fresh(name, dtype) for _ in range(2)]
    found = []
    for model, kind in zip(models, (Spooled, list), strict=True):
        made = []
        monkeypatch.setattr(repair_module, "Spooled", lambda given, kind=kind, made=made: made.append(1) or kind(given))
        found.append(repair(model, TOKENS, DropPlan((1, 2)), Repair(sweeps=2), batch_size=3))
        assert made
    assert found[0] == found[1]
    for parameter, weight in models[0].named_parameters():
        assert torch.equal(weight, models[1].get_parameter(parameter)), parameter


@pytest.mark.parametrize("n_bytes", [4096, 100_000, 150_000])
def test_a_full_disk_leaves_the_model_as_it_was(n_bytes):
    model = fresh()
    before = state(model)
    with files_of_at_most(n_bytes), pytest.raises(LLMDropError, match=r"is full.*Set TMPDIR to a folder of a larger disk"):
        repair(model, TOKENS, PLAN)
    assert_as_it_was(model, before)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_no_room_at_all(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b", buffering=0))  # noqa: SIM115
    with pytest.raises(LLMDropError, match=r"is full.*Set TMPDIR to a folder of a larger disk"):
        repair(fresh(), TOKENS, PLAN)


def test_no_place_for_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    model = fresh()
    before = state(model)
    with pytest.raises(LLMDropError, match=r"No temporary file can be made: No such file or directory\. Set TMPDIR"):
        repair(model, TOKENS, PLAN)
    assert_as_it_was(model, before)


PEAK = """
import sys, torch, families
from llmdrop_utils import DropPlan
from llmdrop_utils.derive import repair as repair_module
if sys.argv[1] == "list":
    repair_module.Spooled = list
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
model = families.tiny("llama")
repair_module.repair(model, torch.zeros(8, 24, dtype=torch.long).random_(3, 97), DropPlan((1,)), batch_size=4)
before = peak()
repair_module.repair(model, torch.zeros(6000, 24, dtype=torch.long).random_(3, 97), DropPlan((1,)), batch_size=100)
print(peak() - before, model.config.hidden_size)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="only Linux tells the peak")
def test_memory_does_not_grow_with_all_that_is_read():
    grown = {}
    for kind in ("spooled", "list"):
        done = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True, cwd=TESTS)
        grown[kind], width = map(int, done.stdout.split())
    stream = 6000 * 24 * width * 4
    assert grown["list"] > 5 * stream
    assert grown["spooled"] < 2.5 * stream  # what the first layer reads, once, and what a batch takes
