"""An installed package, in an empty folder: the Python API and the commands that need no notebooks work."""

import os
import shutil
import subprocess
import sys

import pytest
from documents import examples

from llmdrop_utils.base.files import ROOT

pytestmark = pytest.mark.slow

# Before the examples: this is the installed package, and it brings its data.
INSTALLED = """
from llmdrop_utils.base import files
from llmdrop_utils.report.verdicts import load_claims
from llmdrop_utils.studies.paper import numbers

assert str(files.PACKAGE).startswith({site!r}), files.PACKAGE
assert not files.IS_CHECKOUT
assert len(numbers()) == 732 and load_claims()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that runs the interpreter on an installed wheel, in an empty folder; and where the wheel is installed."""
    top = tmp_path_factory.mktemp("wheel")
    source, site = top / "source", top / "site"
    for folder in ("llmdrop_utils", "data"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("cache", "results", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(top), str(source)], check=True)
    (wheel,) = top.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (top / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMDROP")}
    environment |= {"PYTHONPATH": str(site), "LLMDROP_CACHE": str(top / "cache")}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=top / "empty", env=environment, capture_output=True, text=True, check=False)

    return run, site


@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_examples_of_the_documents(installed, document):
    run, site = installed
    done = run("-c", INSTALLED.format(site=str(site)) + examples((ROOT / document).read_text(encoding="utf-8")))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 1, "the perplexity that the first example prints"


def test_commands(installed):
    run, _ = installed
    assert "reproduce" in run("-m", "llmdrop_utils", "--help").stdout
    trained = run("-m", "llmdrop_utils", "train", "tiny-series")
    assert trained.returncode == 0, trained.stderr
    assert "kept in " in trained.stdout


@pytest.mark.parametrize(
    "command",
    [["reproduce", "--profile", "smoke"], ["plan", "--profile", "smoke"], ["figures"], ["reference", "--profile", "smoke"]],
)
def test_what_needs_a_checkout_says_so(installed, command):
    run, _ = installed
    done = run("-m", "llmdrop_utils", *command)
    assert done.returncode == 1
    assert "needs a checkout of the repository" in done.stderr
    assert "Traceback" not in done.stderr
