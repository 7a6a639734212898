"""Run the notebooks headless: python -m llmdrop_utils.driver {reproduce,figures,reference} (or through make).

For each notebook: measure what it needs and no record holds (here, where progress can be seen), execute it with
papermill, and keep a rendered copy. A notebook that fails leaves `*.failed.ipynb` and no fresh rendered copy, and is run
again the next time. One whose inputs did not change is not run again.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path

from .profiles import Profile, description_of, load_profile, short_name
from .store import RESULTS
from .tables import REFERENCE, distance_from_reference, keep_as_reference, read_tables
from .workspace import OUTPUT, ROOT, LLMDropError, disk_error, write_text

NOTEBOOKS = ROOT / "notebooks"
RENDERED = OUTPUT / "notebooks" / "rendered"
FIGURE_DIR = OUTPUT / "figures"


def reproduce(profile: Profile, notebooks: str | None = None, force: bool = False, parameters: dict | None = None) -> None:
    """Run the notebooks (all, or those whose numbers `notebooks` lists: "01 02") and write figures and scorecard.

    parameters: further parameters for the notebooks, by name; each must be declared by every notebook that is run.
    Raises LLMDropError, naming the first notebook that failed and where it is kept.
    """
    from .studies import STUDIES

    chosen = choose_notebooks(notebooks)
    parameters = {"PROFILE": profile.name, "MODEL": profile.model or ""} | (parameters or {})
    for notebook in chosen:
        check_parameters(notebook, parameters)
    for notebook in chosen:
        name, rendered = notebook.stem, RENDERED / profile.run / notebook.name
        done = RESULTS / profile.run / f"{name}.done"
        inputs = _inputs(notebook, parameters, profile)
        if not force and done.exists() and done.read_text() == _state(inputs, rendered, profile):
            print(f"{name}: up to date ({_shown(rendered)})")
            continue
        print(f"{name}: measuring and rendering")
        done.unlink(missing_ok=True)
        tables = STUDIES[name](profile, force) if name in STUDIES else {}
        run_notebook(notebook, rendered, parameters)
        if not len(tables.get("not_run", ())):  # what could not be run is tried again the next time
            write_text(done, _state(inputs, rendered, profile))
        print(f"{name}: done ({_shown(rendered)})")
    _report(profile)


def choose_notebooks(numbers: str | None) -> list[Path]:
    """Notebook sources in order. Raises LLMDropError for a number that no notebook has."""
    available = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    wanted = re.split(r"[\s,]+", numbers.strip()) if numbers and numbers.strip() else list(available)
    wanted = [number.zfill(2) for number in wanted]
    for number in wanted:
        if number not in available:
            have = ", ".join(path.stem for path in available.values())
            raise LLMDropError(f"There is no notebook {number!r}. There are: {have}. Give numbers, such as NOTEBOOKS=01.")
    return [available[number] for number in dict.fromkeys(wanted)]


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Raise LLMDropError if a notebook does not declare one of the parameters (papermill itself only warns)."""
    import papermill

    declared = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        if name not in declared:
            raise LLMDropError(f"The notebook {notebook.name} has no parameter {name!r}. It declares: {', '.join(declared)}.")


def run_notebook(source: Path, rendered: Path, parameters: dict) -> None:
    """Execute a notebook and put the executed copy at `rendered`, without anything that changes from run to run.

    Raises LLMDropError if a cell fails; what was executed is then kept beside `rendered` as *.failed.ipynb.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    check_parameters(source, parameters)
    failed = rendered.with_suffix(".failed.ipynb")
    partial = rendered.with_suffix(".partial.ipynb")
    rendered.parent.mkdir(parents=True, exist_ok=True)
    for path in (rendered, failed):  # no older copy may pass for this run's
        path.unlink(missing_ok=True)
    # The kernel talks over local sockets; ipykernel's and the debugger's notes about that are not for the reader.
    environment = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONWARNINGS": "ignore", "TQDM_MININTERVAL": "10"}
    os.environ |= environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            papermill.execute_notebook(
                str(source),
                str(partial),
                parameters,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(ROOT),
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
            )
        except papermill.PapermillExecutionError as error:
            partial.replace(failed)
            raise LLMDropError(
                f"{source.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                f"What was executed is kept in {_shown(failed)}."
            ) from None
        except (DeadKernelError, OSError) as error:
            if partial.exists():
                partial.replace(failed)
            if isinstance(error, OSError):
                raise disk_error(error, partial) from error
            raise LLMDropError(
                f"The kernel of {source.name} died; the system may have stopped it for want of memory. "
                f"What was executed is kept in {_shown(failed)}."
            ) from error
    page = nbformat.read(partial, as_version=4)
    _strip(page, parameters)
    write_text(rendered, nbformat.writes(page) + "\n")
    partial.unlink()


def _strip(page, parameters: dict) -> None:
    """Remove what differs from run to run and from machine to machine: times, papermill's notes, paths."""
    page.metadata = {"kernelspec": page.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in page.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag in ("parameters", "injected-parameters")]
        cell.metadata = {"tags": tags} if tags else {}
        if "injected-parameters" in tags:
            cell.id = "injected-parameters"
            model = str(parameters.get("MODEL", ""))
            if model and Path(model).exists():
                cell.source = cell.source.replace(model, short_name(model))


def redraw(run: str | None = None) -> None:
    """Redraw every figure and scorecard from the committed reference results: no model, no measurement.

    Raises LLMDropError if there are no reference results of that run.
    """
    from .figures import FIGURES, draw

    runs = [run] if run else sorted(path.name for path in REFERENCE.glob("*") if path.is_dir())
    if not runs or not all((REFERENCE / r).is_dir() for r in runs):
        have = ", ".join(sorted(path.name for path in REFERENCE.glob("*"))) or "none"
        raise LLMDropError(f"There are no reference results of {run or 'any run'} in data/reference (there: {have}).")
    for name in runs:
        for figure, spec in FIGURES.items():
            if tables := read_tables(REFERENCE / name / spec.notebook):
                draw(figure, tables, FIGURE_DIR / name)
        _judge(REFERENCE / name, name)
        print(f"{name}: figures and scorecard redrawn from data/reference/{name} ({_shown(FIGURE_DIR / name)})")


def _judge(results: Path, run: str) -> list:
    """Write the scorecard of the tables under `results`; returns the verdicts."""
    from .claims import judge, write_scorecard

    verdicts = judge(results)
    write_scorecard(verdicts, FIGURE_DIR / run, run, _about(results, run))
    return verdicts


def _about(results: Path, run: str) -> str:
    """What a run is about: its profile's description, and what was measured."""
    lines = [description_of(run)]
    for record in sorted(results.glob("*/provenance.json")):
        entries = json.loads(record.read_text(encoding="utf-8"))
        # Stages of a series are called "<series>, <stage>": the series will do.
        models = dict.fromkeys(f"{entry['model'].split(',')[0]} in {entry['dtype']}" for entry in entries)
        texts = [f"{e['corpus']} ({e['tokens'][0]} x {e['tokens'][1]} tokens)" for e in entries if "corpus" in e]
        tasks = [f"{e['task']} ({e['num_fewshot'] or 0}-shot)" for e in entries if "task" in e]
        on = f"; on {', '.join(dict.fromkeys(texts + tasks))}" if texts + tasks else ""
        lines.append(f"{record.parent.name}: {', '.join(models)}{on}.")
    return "\n".join(lines)


def _report(profile: Profile) -> None:
    """Scorecard and distance from the reference, at the end of a run."""
    verdicts = _judge(RESULTS / profile.run, profile.run)
    print(f"\nFigures and scorecard: {_shown(FIGURE_DIR / profile.run)}")
    print(profile.description)
    for verdict in verdicts:
        if verdict.verdict != "not run":
            print(f"  {verdict.verdict:10}  {verdict.claim}")
    others = [v for v in verdicts if v.verdict == "not run"]
    print(f"  {len(others)} more claims were not run; scorecard.md says why.")
    distance = distance_from_reference(profile.run)
    if distance is None:
        print(f"There are no committed reference results for the run {profile.run!r} to compare with.")
    else:
        print(f"Distance from the committed results (data/reference/{profile.run}):")
        print(distance.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def _inputs(notebook: Path, parameters: dict, profile: Profile) -> str:
    """A hash of all that a rendered notebook depends on: code, data files, parameters, models, libraries, dtype."""
    from importlib.metadata import version

    from .models import default_dtype
    from .studies import models_of

    located, not_run = models_of(notebook.stem, profile)
    facts = [parameters, dataclasses.asdict(profile), [model.identity for model in located], sorted(not_run)]
    facts += [
        str(default_dtype()),
        *(version(package) for package in ("torch", "transformers", "tokenizers", "matplotlib", "lm_eval")),
    ]
    content = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    package, data = (ROOT / "llmdrop_utils").rglob("*.py"), (ROOT / "data").glob("*.*")
    tokenizers = [file for model in located for file in sorted(model.folder.glob("*token*"))]
    for path in [notebook, *sorted(package), *sorted(data), *tokenizers]:
        content.update(path.read_bytes())
    return content.hexdigest()


def _state(inputs: str, rendered: Path, profile: Profile) -> str:
    """The inputs, and a hash of all that the notebook made: a product that is missing or changed is made again."""
    from .figures import FIGURES

    figures = [
        file
        for name, spec in FIGURES.items()
        if spec.notebook == rendered.stem
        for file in sorted((FIGURE_DIR / profile.run).glob(f"{name}.*"))
    ]
    content = hashlib.sha256()
    for path in [rendered, *figures, *sorted((RESULTS / profile.run / rendered.stem).glob("*"))]:
        content.update(path.name.encode() + (path.read_bytes() if path.exists() else b""))
    return f"{inputs} {content.hexdigest()}\n"


def _shown(path: Path) -> str:
    """A path as the user would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


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
    parser = argparse.ArgumentParser(prog="python -m llmdrop_utils.driver", description=__doc__.split("\n\n")[0])
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
            print(f"kept in {_shown(keep_as_reference(profile.run))}")
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
