"""Run the series of notebooks: measure what each needs, render it, report.

A notebook that fails leaves `*.failed.ipynb` and no fresh rendered copy, and is run again the next time. One whose inputs did
not change is not run again.
"""

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

from .base import files
from .base.errors import DiskFull, LLMDropError, NotApplicable, NotAvailable, each_available
from .base.files import RunFolders, shown, write_text
from .base.imports import made_of
from .models.config import DECODERS
from .models.load import load_tokenizer
from .models.locate import forget_converted
from .models.names import label
from .report.distance import describe_distance
from .report.notebooks import check_parameters, choose_notebooks, run_notebook
from .report.style import FIGURES, draw
from .report.tables import read_tables
from .report.verdicts import NOT_RUN, load_claims
from .scorecard import declared, judge_run
from .studies.gather import state_of
from .studies.page import TABLES
from .studies.profile import Profile, description_of, profile_names
from .studies.run import STUDIES


def reproduce(
    profile: Profile, notebooks: str | None = None, force: bool = False, parameters: dict | None = None, tidy: bool = False
) -> None:
    """Run the notebooks (all, or those whose numbers `notebooks` lists: "01 02") and write figures and scorecard.

    Everything goes to data/results/<run>; what is committed stays as it is. A notebook whose section the profile lacks is not
    run. Of a profile that runs its models one by one, each model is a run of its own, and one that fails leaves the others to
    go on; what compares them is run last. parameters: further parameters for the notebooks, by name; each must be declared by
    every notebook that is run. tidy: remove each converted model once its run is done, so that one at a time is on disk. Raises
    LLMDropError, naming the first notebook that failed and where it is kept.
    """
    files.need_checkout("Running the notebooks")
    files.need_writable()
    chosen, given = choose_notebooks(notebooks), parameters
    parameters = {"PROFILE": profile.name, "MODEL": profile.model or ""} | (parameters or {})
    for source in chosen:
        check_parameters(source, parameters)
    failed = _reproduce_each(profile, notebooks, force, given, tidy) if profile.one_by_one else []
    folders = files.local(profile.run)
    _forget_other_models(profile, folders, [source for source in chosen if not _lacking(source.stem, profile)])
    for source in chosen:
        name, rendered = source.stem, folders.pages / source.name
        if reason := _lacking(name, profile):
            print(f"{name}: not run. {reason}")
            continue
        if not force and is_up_to_date(source, profile, parameters):
            print(f"{name}: up to date ({shown(rendered)})")
            continue
        done, inputs = folders.tables / f"{name}.done", _inputs(source, parameters, profile)
        print(f"{name}: measuring and rendering")
        _check_tokenizer(name, profile)
        done.unlink(missing_ok=True)
        try:
            tables = STUDIES[name](profile, force) if name in STUDIES else {}
        except NotApplicable as reason:
            print(f"{name}: not run. {reason}")
            continue
        run_notebook(source, rendered, parameters)
        if not len(tables.get("not_run", ())):  # what could not be run is tried again the next time
            write_text(done, _state(inputs, name, folders))
        print(f"{name}: done ({shown(rendered)})")
    _report(profile, folders)
    if failed:
        raise LLMDropError("\n".join(failed))


def _reproduce_each(profile: Profile, notebooks: str | None, force: bool, parameters: dict | None, tidy: bool) -> list[str]:
    """Run each model of a profile by itself; returns what failed, for a reason other than that a model cannot be had.

    Raises NotAvailable if none could be run.
    """
    failed: list[str] = []

    def run_one(model: str) -> None:
        print(f"\n{label(model)}, one of {len(profile.models)} models")
        try:
            reproduce(profile.of(model), notebooks, force, parameters)
        except LLMDropError as error:
            print(f"{label(model)}: not run to the end. {error}")
            if not isinstance(error, NotAvailable | DiskFull):
                failed.append(f"{label(model)}: {error}")
            raise
        finally:
            if tidy:
                forget_converted(model)

    each_available(profile.models, run_one, "models")
    print(f"\n{profile.name}: the models beside each other")
    return failed


def is_up_to_date(source: Path, profile: Profile, parameters: dict) -> bool:
    """Is a notebook rendered from what it would be rendered from now? Says so without measuring, but locates its models."""
    folders = files.local(profile.run)
    done = folders.tables / f"{source.stem}.done"
    if not done.exists():
        return False
    return done.read_text(encoding="utf-8") == _state(_inputs(source, parameters, profile), source.stem, folders)


def _check_tokenizer(notebook: str, profile: Profile) -> None:
    """Raise LLMDropError before work starts, if a run's only model has no tokenizer: the live examples load it."""
    if notebook in STUDIES and STUDIES[notebook].kinds == DECODERS and not profile.several:
        located, _ = STUDIES[notebook].models(profile)
        for model in located[-1:]:  # of a series the last stage, whose tokenizer serves all
            if not model.is_random:
                load_tokenizer(model)


def _forget_other_models(profile: Profile, folders: RunFolders, chosen: list[Path]) -> None:
    """Remove what a run made of models that have other weights now: a branch of the hub moved, or a source was changed.

    Otherwise one scorecard would be about two models. What was measured of them stays in the store.
    """
    located = [model for source in chosen if source.stem in STUDIES for model in STUDIES[source.stem].models(profile)[0]]
    now = {model.name: model.identity for model in located}
    for record in sorted(folders.tables.glob("*/provenance.json")):
        name = record.parent.name
        entries = json.loads(record.read_text(encoding="utf-8"))
        if changed := {e["model"] for e in entries if now.get(e["model"], e.get("model_identity")) != e.get("model_identity")}:
            print(f"{name}: removed, since {', '.join(sorted(changed))} has other weights now")
            for path in [folders.pages / f"{name}.ipynb", folders.tables / f"{name}.done", *_figures_of(name, folders)]:
                path.unlink(missing_ok=True)
            shutil.rmtree(record.parent)


def _figures_of(notebook: str, folders: RunFolders) -> list[Path]:
    names = [name for name, spec in FIGURES.items() if spec.notebook == notebook]
    return [file for name in names for file in sorted(folders.figures.glob(f"{name}.*"))]


def _lacking(notebook: str, profile: Profile) -> str | None:
    """Why a profile does not run a notebook at all: it has no section for it, runs it for each model, or it is for others."""
    if profile.one_by_one and not (notebook in STUDIES and STUDIES[notebook].compares):
        return "Each model has a run of its own for it."
    try:
        for section in STUDIES[notebook].needs if notebook in STUDIES else ():
            profile.section(section)
    except NotAvailable as reason:
        return str(reason)
    return STUDIES[notebook].passes_over(profile.model) if notebook in STUDIES else None


def redraw(run: str | None = None, pages: bool = False) -> None:
    """Redraw every figure and scorecard of what is committed: no measurement, and no model.

    pages: also render the committed notebooks anew, from the committed tables; their live examples need the model. Raises
    LLMDropError if there are no reference results of that run.
    """
    files.need_checkout("Redrawing what is committed")
    runs = [run] if run else sorted(path.name for path in files.REFERENCE.glob("*") if path.is_dir())
    if not runs or not all((files.REFERENCE / r).is_dir() for r in runs):
        have = ", ".join(sorted(path.name for path in files.REFERENCE.glob("*"))) or "none"
        raise LLMDropError(f"There are no reference results of {run or 'any run'} in data/reference (there: {have}).")
    for name in runs:
        folders = files.committed(name)
        for figure, spec in FIGURES.items():
            if tables := read_tables(folders.tables / spec.notebook):
                draw(figure, tables, folders.figures)
        judge_run(name, folders, description_of(name))
        print(f"{name}: figures and scorecard redrawn from data/reference/{name} ({shown(folders.figures)})")
        if pages:
            _render_committed(name, folders)


def _render_committed(run: str, folders: RunFolders, notebooks: str | None = None) -> None:
    """Render the notebooks of a run from the tables in `folders`."""
    profile = max((name for name in profile_names() if f"{run}-".startswith(f"{name}-")), key=len)
    model = run.removeprefix(profile).removeprefix("-")  # of a committed run a name in data/sources.yaml
    os.environ[TABLES] = str(folders.tables)
    try:
        for source in choose_notebooks(notebooks):
            if (folders.tables / source.stem).is_dir():
                run_notebook(source, folders.pages / source.name, {"PROFILE": profile, "MODEL": model})
                print(f"{run}: {source.stem} rendered ({shown(folders.pages / source.name)})")
    finally:
        del os.environ[TABLES]


def keep_as_reference(run: str) -> RunFolders:
    """Copy tables, figures and pages of a run to where they are committed; returns these folders.

    Raises LLMDropError if there are none, or if they were not all measured by committed code.
    """
    files.need_checkout("Keeping a reference")
    source, target = files.local(run), files.committed(run)
    records = sorted(source.tables.glob("*/provenance.json"))
    if not records:
        raise LLMDropError(f"There are no results of the run {run!r} to keep: run `make reproduce` first.")
    for record in records:
        commits = {entry["git_commit"] for entry in json.loads(record.read_text(encoding="utf-8"))}
        if not all(commit and not commit.endswith("+changes") for commit in commits):
            raise LLMDropError(
                f"The results of the run {run!r} come from code that is not committed ({', '.join(map(str, commits))}). "
                "Commit first, then measure again: make reproduce FORCE=1 (and delete what was trained in data/cache/series)."
            )
    for made, kept in ((source.figures, target.figures), (source.pages, target.pages)):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(made, kept, ignore=shutil.ignore_patterns("*.failed.ipynb"))
    shutil.rmtree(target.tables, ignore_errors=True)
    for record in records:
        shutil.copytree(record.parent, target.tables / record.parent.name)
    return target


# ---- the end of a run -----------------------------------------------------------------------------------------------


def _report(profile: Profile, folders: RunFolders) -> None:
    """Scorecard and distance from the reference, at the end of a run."""
    verdicts = judge_run(profile.run, folders, profile.description)
    print(f"\nYour results, apart from what is committed: {shown(folders.tables)}")
    print("  figures/ and figures/scorecard.md, notebooks/ (rendered), and the tables of each notebook")
    print(profile.description)
    for verdict in verdicts:
        if verdict.verdict != NOT_RUN:
            print(f"  {verdict.verdict:10}  {verdict.claim}")
    others = [v for v in verdicts if v.verdict == NOT_RUN]
    print(f"  {len(others)} more claims were not run; scorecard.md says why.")
    print(describe_distance(profile.run, declared()))


# ---- what a rendered notebook depends on ----------------------------------------------------------------------------------


def _inputs(notebook: Path, parameters: dict, profile: Profile) -> str:
    """A hash of all that a rendered notebook depends on, and of nothing else.

    That is its source, the code of its own study and what that imports, the rules of its own claims, the tables that it reads
    and the rules of their claims, the catalogue of models and texts, parameters, models, libraries and dtype.
    """
    study = STUDIES.get(notebook.stem)
    located, not_run = study.models(profile) if study else ([], {})
    reads = study.reads if study else ()
    claims = [claim for claim in load_claims() if claim["notebook"] in (notebook.stem, *reads)]
    facts = [
        parameters,
        profile.to_json(),
        [model.identity for model in located],
        sorted(not_run),
        claims,
        state_of(profile, (*reads, notebook.stem) if profile.one_by_one else reads),
    ]
    facts += [version(package) for package in ("torch", "transformers", "tokenizers", "matplotlib", "seaborn", "lm_eval")]
    content = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    own = sorted((files.PACKAGE / "studies" / notebook.stem[3:]).glob("*.py"))
    rules = [files.PACKAGE / "studies" / name[3:] / "verdicts.py" for name in reads]
    code = made_of(*own, *rules, files.PACKAGE / "studies" / "page.py")
    data = [files.DATA / "sources.yaml", files.DATA / "tasks.yaml", files.DATA / "paper_claims.json"]
    tokenizers = [file for model in located for file in sorted(model.folder.glob("*token*"))]
    for path in [notebook, *code, *data, *tokenizers]:
        content.update(path.read_bytes())
    return content.hexdigest()


def _state(inputs: str, notebook: str, folders: RunFolders) -> str:
    """The inputs, and a hash of all that the notebook made: a product that is missing or changed is made again."""
    tables = sorted((folders.tables / notebook).glob("*"))
    content = hashlib.sha256()
    for path in [folders.pages / f"{notebook}.ipynb", *_figures_of(notebook, folders), *tables]:
        content.update(path.name.encode() + (path.read_bytes() if path.exists() else b""))
    return f"{inputs} {content.hexdigest()}\n"
