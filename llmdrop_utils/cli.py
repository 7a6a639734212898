"""The command line: llmdrop {reproduce,figures,reference}, or python -m llmdrop_utils."""

import argparse
import json
import sys

from .base.errors import LLMDropError
from .report.notebooks import shown
from .report.tables import keep_as_reference
from .reproduce import redraw, reproduce
from .studies.profile import load_profile


def choose_profile(name: str) -> str:
    """`auto` is gpu where CUDA is present, otherwise cpu; says which and why."""
    if name != "auto":
        return name
    import torch

    if torch.cuda.is_available():
        print(f"Profile gpu: CUDA is present ({torch.cuda.get_device_name()}). Another choice: PROFILE=cpu.")
        return "gpu"
    print("Profile cpu: there is no CUDA device. Another choice: PROFILE=smoke.")
    return "cpu"


def main(arguments: list[str] | None = None) -> int:
    """The command line; every LLMDropError is one message and exit code 1."""
    parser = argparse.ArgumentParser(prog="llmdrop", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("reproduce", help="measure, run the notebooks, write figures and scorecard")
    run.add_argument("--notebooks", default=None, help="only these, by number: '01' or '01 02'")
    run.add_argument("--force", action="store_true", help="measure again even if results are stored")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a notebook parameter")
    redo = commands.add_parser("figures", help="redraw from the committed reference results, without a model")
    redo.add_argument("--run", default=None, help="only this run (default: all that are committed)")
    keep = commands.add_parser("reference", help="keep the tables of a run as reference results, to be committed")
    for command in (run, keep):
        command.add_argument("--profile", default="auto", help="smoke, cpu, gpu, h200, or auto (default)")
        command.add_argument("--model", default=None, help="only this model: a name, hub id, directory or .gguf file")
    options = parser.parse_args(arguments)
    try:
        if options.command == "figures":
            redraw(options.run)
            return 0
        profile = load_profile(choose_profile(options.profile), options.model or None)
        if options.command == "reference":
            print(f"kept in {shown(keep_as_reference(profile.run))}")
        else:
            parameters = {name: _literal(value) for name, value in options.p}
            reproduce(profile, options.notebooks, options.force, parameters)
    except LLMDropError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was measured is stored, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _literal(value: str):
    """A number or true/false given on the command line as such, anything else as text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


if __name__ == "__main__":
    sys.exit(main())
