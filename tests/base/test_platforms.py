"""The package runs where POSIX modules are missing."""

import subprocess
import sys

from llmdrop_utils.base.files import ROOT

POSIX = ("fcntl", "resource", "termios", "pwd", "grp")
# On Linux some libraries import these modules themselves, so they are refused to this package alone ...
REFUSED = f"""
import builtins, importlib, pkgutil, llmdrop_utils
honest = builtins.__import__
def refuse(name, globals=None, *more, **named):
    if name.split(".")[0] in {POSIX} and (globals or {{}}).get("__name__", "").startswith("llmdrop_utils"):
        raise ImportError(f"{{name}} is not portable")
    return honest(name, globals, *more, **named)
builtins.__import__ = refuse
for module in pkgutil.walk_packages(llmdrop_utils.__path__, "llmdrop_utils."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in llmdrop_utils.__all__:
    getattr(llmdrop_utils, name)
"""
# ... and to everybody for what the command line and the measurements of a plain model import.
BLOCKED = f"""
import sys
sys.modules |= dict.fromkeys({POSIX})  # None: importing it raises ImportError, as on Windows
import llmdrop_utils
from llmdrop_utils import cli, load_model, measure_importance, dropped, select, perplexity, DropPlan
try:
    cli.main(["--help"])
except SystemExit as end:
    sys.exit(end.code)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_no_module_imports_what_windows_lacks():
    done = run(REFUSED)
    assert done.returncode == 0, done.stderr


def test_import_with_posix_modules_blocked():
    done = run(BLOCKED)
    assert done.returncode == 0, done.stderr
    assert "reproduce" in done.stdout


def test_help_needs_no_environment():
    """`make help` runs before anything is installed."""
    done = subprocess.run(["make", "help", "PYTHON=/nowhere/python"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "make reproduce" in done.stdout
