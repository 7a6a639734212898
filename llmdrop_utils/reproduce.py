"""Run the series of notebooks: measure what each needs, render it, report.

A notebook that fails leaves `*.failed.ipynb` and no fresh rendered copy, and is run again the next time. One whose inputs did
not change is not run again.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from .base import files
from .base.errors import LLMDropError
from .base.files import write_text
from .report.notebooks import check_parameters, choose_notebooks, run_notebook, shown
from .report.tables import distance_from_reference, read_tables
from .studies.profile import Profile, description_of


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
        name, rendered = notebook.stem, files.RENDERED / profile.run / notebook.name
        done = files.RESULTS / profile.run / f"{name}.done"
        inputs = _inputs(notebook, parameters, profile)
        if not force and done.exists() and done.read_text() == _state(inputs, rendered, profile):
            print(f"{name}: up to date ({shown(rendered)})")
            continue
        print(f"{name}: measuring and rendering")
        done.unlink(missing_ok=True)
        tables = STUDIES[name](profile, force) if name in STUDIES else {}
        run_notebook(notebook, rendered, parameters)
        if not len(tables.get("not_run", ())):  # what could not be run is tried again the next time
            write_text(done, _state(inputs, rendered, profile))
        print(f"{name}: done ({shown(rendered)})")
    _report(profile)


def redraw(run: str | None = None) -> None:
    """Redraw every figure and scorecard from the committed reference results: no model, no measurement.

    Raises LLMDropError if there are no reference results of that run.
    """
    from .report.style import FIGURES, draw

    runs = [run] if run else sorted(path.name for path in files.REFERENCE.glob("*") if path.is_dir())
    if not runs or not all((files.REFERENCE / r).is_dir() for r in runs):
        have = ", ".join(sorted(path.name for path in files.REFERENCE.glob("*"))) or "none"
        raise LLMDropError(f"There are no reference results of {run or 'any run'} in data/reference (there: {have}).")
    for name in runs:
        for figure, spec in FIGURES.items():
            if tables := read_tables(files.REFERENCE / name / spec.notebook):
                draw(figure, tables, files.FIGURE_DIR / name)
        _judge(files.REFERENCE / name, name)
        print(f"{name}: figures and scorecard redrawn from data/reference/{name} ({shown(files.FIGURE_DIR / name)})")


def _judge(results: Path, run: str) -> list:
    """Write the scorecard of the tables under `results`; returns the verdicts."""
    from .report.verdicts import judge, write_scorecard

    verdicts = judge(results)
    write_scorecard(verdicts, files.FIGURE_DIR / run, run, _about(results, run))
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
    verdicts = _judge(files.RESULTS / profile.run, profile.run)
    print(f"\nFigures and scorecard: {shown(files.FIGURE_DIR / profile.run)}")
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

    from .models.load import default_dtype
    from .studies import models_of

    located, not_run = models_of(notebook.stem, profile)
    facts = [parameters, dataclasses.asdict(profile), [model.identity for model in located], sorted(not_run)]
    facts += [
        str(default_dtype()),
        *(version(package) for package in ("torch", "transformers", "tokenizers", "matplotlib", "lm_eval")),
    ]
    content = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    package, data = (files.ROOT / "llmdrop_utils").rglob("*.py"), (files.ROOT / "data").glob("*.*")
    tokenizers = [file for model in located for file in sorted(model.folder.glob("*token*"))]
    for path in [notebook, *sorted(package), *sorted(data), *tokenizers]:
        content.update(path.read_bytes())
    return content.hexdigest()


def _state(inputs: str, rendered: Path, profile: Profile) -> str:
    """The inputs, and a hash of all that the notebook made: a product that is missing or changed is made again."""
    from .report.style import FIGURES

    figures = [
        file
        for name, spec in FIGURES.items()
        if spec.notebook == rendered.stem
        for file in sorted((files.FIGURE_DIR / profile.run).glob(f"{name}.*"))
    ]
    content = hashlib.sha256()
    for path in [rendered, *figures, *sorted((files.RESULTS / profile.run / rendered.stem).glob("*"))]:
        content.update(path.name.encode() + (path.read_bytes() if path.exists() else b""))
    return f"{inputs} {content.hexdigest()}\n"
