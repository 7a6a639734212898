"""Wrong changes that the tests must notice: `.venv/bin/python tests/mutations.py [--list] [--only WORD ...]`.

Each edit gives tables, keys, statistics or verdicts another meaning and still runs. It is applied to a copy of the repository,
where the fast tests that should notice it are run. An edit that no test notices has survived: write the test. An edit whose old
text is not found exactly once is stale: make it anew. The exit status is 1 if an edit of `REVIEW` or more than two others
survive, if one is stale or does not run, or if its tests fail without it.

The copy's tests run in forks of one process that has imported what takes long, but nothing of the package (Linux and macOS).
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from mutation_edits import EDITS, REVIEW, Edit

ROOT = Path(__file__).resolve().parents[1]
SLOW_TO_IMPORT = ("lm_eval.models.huggingface", "lm_eval.tasks", "matplotlib.pyplot", "nbformat", "pandas", "pydantic")
SLOW_TO_IMPORT += ("scipy.stats", "seaborn", "transformers.models.llama.modeling_llama", "_pytest.assertion.rewrite")
BROKEN = 3  # pytest's exit status for an internal error
TIMEOUT = 200  # seconds of the processor: an edit that runs on is noticed
SURVIVORS = 2  # that are no reason to fail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the edits and stop")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="edits whose name or file holds one of these")
    arguments = parser.parse_args()
    chosen = [
        edit for edit in EDITS if not arguments.only or any(word in f"{edit.name} {edit.where}" for word in arguments.only)
    ]
    if stale := [edit for edit in chosen if (ROOT / edit.file).read_text(encoding="utf-8").count(edit.old) != 1]:
        print("\n".join(f"stale     {edit.where}: {edit.name}" for edit in stale))
        return 1
    if arguments.list:
        print("\n".join(f"{edit.where}: {edit.name}" for edit in chosen))
        return 0

    with tempfile.TemporaryDirectory(prefix="llmdrop-mutations-") as temporary:
        prepare(temporary)
        copy = Path(temporary) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "cache", "results", "__pycache__"))
        # 1. Without an edit all tests pass: otherwise they tell nothing.
        passes = {tests: run(copy, tests.split()) == 0 for tests in dict.fromkeys(edit.tests for edit in chosen)}
        # 2. One edit at a time.
        outcomes = {}
        for edit in chosen:
            started = time.monotonic()
            with edited(copy / edit.file, edit):
                status = run(copy, edit.tests.split()) if passes[edit.tests] else None
            outcomes[edit] = {0: "survived", 1: "killed", None: "untested"}.get(status, "broken")
            print(f"{outcomes[edit]:8}  {time.monotonic() - started:5.1f} s  {edit.where}: {edit.name}", flush=True)

    # 3. What is left to do.
    count = lambda outcome: sum(found == outcome for found in outcomes.values())  # noqa: E731
    print(f"\n{count('killed')} of {len(chosen)} edits killed.")
    if untested := [tests for tests, passed in passes.items() if not passed]:
        print(f"Without any edit some tests fail, so these edits are untested: {', '.join(untested)}")
    for outcome in ("survived", "broken", "untested"):
        print("".join(f"{outcome}: {edit.where}: {edit.name}\n" for edit in chosen if outcomes[edit] == outcome), end="")
    of_review = any(outcomes[edit] == "survived" for edit in chosen if edit in REVIEW)
    return int(of_review or count("survived") > SURVIVORS or count("broken") + count("untested") > 0)


def prepare(temporary: str) -> None:
    """Import what every test needs, but nothing of the package, so that forks need not."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"  # tests/conftest.py names a stand-in, but the hub's library has then read its settings
    os.environ["HF_HOME"] = f"{temporary}/hub"
    sys.dont_write_bytecode = True  # an edit within the second would be taken for the text before it
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    for name in SLOW_TO_IMPORT:
        __import__(name)
    assert "llmdrop_utils" not in sys.modules


@contextlib.contextmanager
def edited(path: Path, edit: Edit):
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(edit.old, edit.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def run(copy: Path, tests: list[str]) -> int:
    """pytest's exit status for fast tests of the copy, in a fork: 0 all passed, 1 one failed or runs on, others do not run."""
    child = os.fork()
    if child == 0:
        status = BROKEN
        try:
            signal.setitimer(signal.ITIMER_PROF, TIMEOUT)
            os.chdir(copy)
            sys.path[:0] = [str(copy), str(copy / "tests")]
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            import llmdrop_utils

            if Path(llmdrop_utils.__file__).is_relative_to(copy):
                status = pytest.main(["-x", "-m", "not slow and not real", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return 1 if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
