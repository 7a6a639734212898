"""The command line: llmdrop {reproduce,plan,figures,reference,drop,train}, or python -m llmdrop_utils.

Every command imports what it needs when it runs, so that the help costs nothing.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from .base.errors import LLMDropError
from .base.files import local, need_writable, shown


def main(arguments: list[str] | None = None) -> int:
    """Run one command; every LLMDropError is one message and exit code 1."""
    options = _parser().parse_args(arguments)
    try:
        options.action(options)
        return 0
    except LLMDropError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was measured is stored, and the same command goes on from there", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmdrop", description="Find, drop and study redundant layers of transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, *, of_profile: bool = False, of_notebooks: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(action=run)
        if of_profile:
            sub.add_argument("--profile", default="auto", help="a file in data/profiles, or auto (default): gpu or cpu")
            sub.add_argument("--model", default=None, help="only this model: a name, hub id, directory or .gguf file")
        if of_notebooks:
            sub.add_argument("--notebooks", default=None, help="only these, by number: '01' or '01 02'")
        return sub

    run = command("reproduce", _reproduce, "measure, run the notebooks, write figures and scorecard",
                  of_profile=True, of_notebooks=True)  # fmt: skip
    run.add_argument("--force", nargs="?", const="1", default="", help="measure again what is stored (0, no or false: do not)")
    run.add_argument("--tidy", action="store_true", help="remove each converted model once it is done (models run one by one)")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a notebook parameter")
    command("plan", _plan, "say what a run would download, need and take, without doing any of it",
            of_profile=True, of_notebooks=True)  # fmt: skip
    figures = command("figures", _figures, "redraw from the committed results, without a model")
    figures.add_argument("--run", default=None, help="only this run (default: all that are committed)")
    figures.add_argument("--pages", action="store_true", help="also render the committed notebooks anew (needs the model)")
    command("reference", _reference, "keep tables, figures and pages of a run as the reference, to be committed",
            of_profile=True)  # fmt: skip
    take = command("drop", _drop, "drop the most redundant layers of a model, and write what is left for other programs")
    take.add_argument("model", help="a name, hub id, directory or .gguf file")
    take.add_argument("--kind", choices=("attention", "mlp", "block", "joint"), default="attention", help="default: attention")
    take.add_argument("-n", type=int, default=None, metavar="N", help="how many layers to drop")
    take.add_argument("--keep", type=float, default=None, metavar="SHARE", help="instead of -n: the share of the dense model's "
                      "next-token accuracy to keep, such as 0.98")  # fmt: skip
    take.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    take.add_argument("--format", nargs="+", default=["transformers"], metavar="FORMAT",
                      help="transformers, gguf (or gguf-q8_0, gguf-q4_k_m, ...), vllm, mlx; default: transformers")  # fmt: skip
    take.add_argument("--repair", action="store_true", help="refit what is kept, in closed form: no cost in inference")
    take.add_argument("--heal", default=None, metavar="BUDGET", help="distil the dense model into what is kept: 10min, or a "
                      "number of tokens")  # fmt: skip
    train = command("train", _train, "train a small series of checkpoints by its recipe in data/sources.yaml")
    train.add_argument("name", help="a trained series of data/sources.yaml")
    train.add_argument("--seed", type=int, default=0, help="of weights and order of text (default 0)")
    return parser


def _profile(options: argparse.Namespace):
    from .studies.profile import load_profile

    return load_profile(choose_profile(options.profile), _given(options.model))


def _given(model: str | None) -> str | None:
    """The model of the command line. make -C changes the folder, so a relative path may begin where make was called."""
    from .models.names import local_path

    called_from = os.environ.get("LLMDROP_CALLED_FROM")
    if model and called_from and local_path(model) is None and (path := local_path(model, Path(called_from))):
        return str(path)
    return model or None


def _reproduce(options: argparse.Namespace) -> None:
    from .reproduce import reproduce

    parameters = {name: _literal(value) for name, value in options.p}
    force = options.force.strip().lower() not in ("", "0", "no", "n", "false", "off")
    reproduce(_profile(options), options.notebooks, force, parameters, options.tidy)


def _plan(options: argparse.Namespace) -> None:
    from .forecast import forecast

    print(forecast(_profile(options), options.notebooks))


def _figures(options: argparse.Namespace) -> None:
    from .reproduce import redraw

    redraw(options.run, options.pages)


def _reference(options: argparse.Namespace) -> None:
    from .reproduce import keep_as_reference
    from .studies.gather import runs_of

    profile = _profile(options)
    for run in dict.fromkeys([*(each.run for each in runs_of(profile).values()), profile.run]):
        if run != profile.run and not local(run).tables.is_dir():
            print(f"{run}: not run, so there is nothing to keep")
            continue
        kept = keep_as_reference(run)
        print("kept in " + ", ".join(shown(folder) for folder in (kept.tables, kept.figures, kept.pages)))


def _drop(options: argparse.Namespace) -> None:
    from .export.take_away import healing_of, take_away

    called_from = os.environ.get("LLMDROP_CALLED_FROM")
    to = Path(called_from, options.to) if called_from else options.to
    healing = None if options.heal is None else healing_of(options.heal)
    take_away(_given(options.model) or "", options.kind, to, options.n, options.keep, options.format, options.repair, healing)


def _train(options: argparse.Namespace) -> None:
    from .models.training import train_series

    need_writable()
    print(f"kept in {train_series(options.name, options.seed)}")


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


def _literal(value: str):
    """A number or true/false given on the command line as such, anything else as text."""
    try:
        return json.loads(value)
    except ValueError:
        return value
