"""Which code and which machine produced a value, and how much memory it took."""

import contextlib
import functools
import importlib.metadata
import platform
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from . import files


@functools.cache
def code_provenance() -> dict:
    """Which code and which machine: git commit, versions, processor, devices."""
    import torch

    packages = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "accelerate")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def peak_memory(interval: float = 0.05) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the most bytes that this process has held in memory since the block began.

    The resident memory is looked at every `interval` seconds, which every operating system allows; a shorter peak can be
    missed.
    """
    import psutil  # when it is needed: on Linux it is itself built on a module that other systems lack

    process, peak, done = psutil.Process(), [0], threading.Event()

    def look() -> int:
        peak[0] = max(peak[0], process.memory_info().rss)
        return peak[0]

    def watch() -> None:
        while not done.wait(interval):
            look()

    look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield look
    finally:
        done.set()
        watcher.join()


def _processor() -> str:
    """Name of the processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    """HEAD of the repository, with "+changes" if tracked files differ from it; None outside a checkout."""
    if not files.IS_CHECKOUT:
        return None
    run = functools.partial(subprocess.run, cwd=files.ROOT, capture_output=True, text=True)
    try:
        head = run(["git", "rev-parse", "HEAD"])
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "--", "llmdrop_utils", "data"])
    except OSError:  # git is not installed
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
