"""Stages of training: the checkpoints of one run, in order, and what is known of the run.

They come from a recipe that is trained on this machine (recipe.py), from the branches of a hub repository, from a directory of
checkpoints, or, for a model that is none of these, from itself and random weights of its shape.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from ..base import files
from ..base.errors import DiskFull, LLMDropError, NotAvailable, each_available
from ..base.files import write_text
from ..sources.catalogue import catalogue
from ..sources.fetch import fetch_hub, forget
from .convert import first_line
from .locate import LocatedModel, locate_folder, locate_model
from .names import checkpoints_in, local_label, local_path, plain_name, step_of
from .recipe import Recipe, load_recipe, untrained

SMALL_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]  # all of a model but its weights
WEIGHTS = ["*.safetensors"]
PICKLED_WEIGHTS = ["pytorch_model*.bin"]
UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One checkpoint."""

    name: str  # of the branch or folder
    step: int | None
    tokens: int | None  # seen so far; None where that is unknown
    model: LocatedModel


@dataclasses.dataclass(frozen=True)
class Series:
    """The checkpoints of one training run, from the first to the last."""

    name: str
    seed: int
    stages: tuple[Stage, ...]
    recipe: Recipe | None = None  # of a run that was trained on this machine
    run: dict = dataclasses.field(default_factory=dict)  # what was recorded of it
    losses: pd.DataFrame | None = None  # step, tokens, loss (of the batch, in nats per token)


def locate_series(
    name: str, n_seeds: int = 1, on_tokens: Callable[[int], None] = lambda n: None
) -> tuple[list[Series], dict[str, str]]:
    """A series under each seed, and what of it is unavailable (name of the stage -> reason).

    name: a series in data/sources.yaml, a directory of checkpoints, or whatever `locate_model` takes. A series with a recipe is
    trained first, which takes its time; `on_tokens` is called with the number of tokens newly done. Of a series on the hub only
    the small files are fetched (see `weights_at_hand`); it has one seed, its own, and if it lacks its untrained weights,
    others are drawn in their place (stage "random"). Raises LLMDropError for an unknown name, NotAvailable if no stage is
    available.
    """
    name = plain_name(name)
    source = catalogue()["series"].get(name)
    if source is None:
        return _local_series(name, n_seeds)
    if "trained" in source:
        from .training import train_seeds  # the Trainer takes seconds to import, and few runs train

        folders = train_seeds(name, list(range(n_seeds)), on_tokens)
        return [_trained_series(name, seed, folder) for seed, folder in enumerate(folders)], {}
    if "unavailable" in source:
        raise NotAvailable(f"The checkpoints of {name} ({source['hub']}) cannot be read: {source['unavailable']}")
    return _hub_series(name, source)


def is_at_hand(name: str) -> bool:
    """Can `locate_series` and its models be used at once, without training and without a download for each stage?"""
    source = catalogue()["series"].get(name)
    return source is None or ("trained" in source and not untrained(name, [0]))


def known_models(names: list[str]) -> tuple[list[LocatedModel], dict[str, str]]:
    """The models of some series as far as they exist without training, and what is unavailable (name -> reason).

    What a rendered notebook depends on. A series with a recipe adds none: the notebook depends on the recipe, in
    data/sources.yaml. Raises LLMDropError if the only series is unavailable, NotAvailable if none of several is available.
    """

    def stages_of(name: str) -> tuple[list[LocatedModel], dict[str, str]]:
        if "trained" in catalogue()["series"].get(name, {}):
            return [], {}
        series, without = locate_series(name)
        return [stage.model for one in series for stage in one.stages], without

    found, missing = each_available(names, stages_of, "series")
    for _, without in found:
        missing |= without
    return [model for models, _ in found for model in models], missing


def parse_stage(name: str, tokens_per_step: int | None = None) -> tuple[int | None, int | None]:
    """Step and tokens that a name states: "stage1-step1000-tokens5B", "step1000", "step-1000", "checkpoint-1000"."""
    step = step_of(name)
    if tokens := re.search(r"tokens[-_]?(\d+)([MBT])", name):
        return step, int(tokens[1]) * UNITS[tokens[2]]
    return step, step * tokens_per_step if step is not None and tokens_per_step else None


@contextlib.contextmanager
def weights_at_hand(model: LocatedModel) -> Iterator[None]:
    """Inside, the weights of a stage on the hub are on disk; afterwards they are deleted, unless they were there before.

    A series takes the disk space of one checkpoint in this way. A note in the cache (`passing`) says which weights were fetched
    for a moment only, so that those of a killed run are deleted too.
    """
    if model.on_hub is None:
        yield
        return
    repository, commit = model.on_hub
    wanted = PICKLED_WEIGHTS if model.pickled else WEIGHTS
    on_disk = lambda: {file for pattern in wanted for file in model.folder.glob(pattern)}  # noqa: E731
    passing = files.CACHE / "passing" / commit
    before = set() if passing.exists() else on_disk()
    if not before:
        write_text(passing, repository)
    try:
        fetch_hub(repository, commit, patterns=[*SMALL_FILES, *wanted])
        if not on_disk():
            kinds = " or ".join(wanted)
            raise NotAvailable(f"The hub gave no {kinds} for {model.name}: it has none, or could not be reached just now.")
        yield
    finally:
        forget(on_disk() - before)
        passing.unlink(missing_ok=True)


# ---- where stages come from --------------------------------------------------------------------------------------------


def _trained_series(name: str, seed: int, folder: Path) -> Series:
    recipe = load_recipe(name)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    stages, _ = _stages_in(folder, f"{name}, seed {seed}", recipe.tokens_per_step)
    return Series(name, seed, stages, recipe, run, pd.read_csv(folder / "losses.csv"))


def _hub_series(name: str, source: dict) -> tuple[list[Series], dict[str, str]]:
    stages, missing, pickled = [], {}, source.get("pickled", False)
    for revision in source["revisions"]:
        try:
            folder = fetch_hub(source["hub"], revision, patterns=SMALL_FILES)
        except (NotAvailable, DiskFull):  # the same would happen to the others
            raise
        except LLMDropError as reason:
            missing[f"{name}, {revision}"] = str(reason)
            continue
        commit = folder.name  # .../snapshots/<commit>: a branch can move, so this is what results are stored under
        model = LocatedModel(f"{name}, {revision}", folder, f"hub:{source['hub']}@{commit}", on_hub=(source["hub"], commit),
                             pickled=pickled)  # fmt: skip
        stages.append(Stage(revision, *parse_stage(revision, source.get("tokens_per_step")), model))
    if not stages:
        raise NotAvailable(f"No checkpoint of {name} is available:\n" + "\n".join(missing.values()))
    if all(stage.step for stage in stages):
        stages.insert(0, _random_stage(stages[0].model, name, 0))
    return [Series(name, 0, tuple(stages))], missing


def _local_series(name: str, n_seeds: int) -> tuple[list[Series], dict[str, str]]:
    path = local_path(name)
    if path is not None and path.is_dir():
        run, title = _run_of(path), local_label(path)
        stages, missing = _stages_in(path, title, run.get("tokens_per_step"))
        if len(stages) > 1:
            return [Series(title, run.get("seed", 0), stages, run=run)], missing
    try:
        model = locate_model(name)
    except LLMDropError as error:
        if close := difflib.get_close_matches(name, catalogue()["series"], n=1):
            raise LLMDropError(f"{error} Or did you mean the series {close[0]!r}?") from error
        raise
    final = Stage("as given", None, None, model)
    return [Series(model.name, seed, (_random_stage(model, model.name, seed), final)) for seed in range(n_seeds)], {}


def _run_of(folder: Path) -> dict:
    """What a run.json beside checkpoints says. Raises LLMDropError if it cannot be used."""
    about = folder / "run.json"
    try:
        run = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
        if not isinstance(run, dict) or not all(isinstance(run.get(key, 1), int) for key in ("tokens_per_step", "seed")):
            raise ValueError('expected is a mapping such as {"tokens_per_step": 8192}')
    except (OSError, ValueError, RecursionError) as error:
        raise LLMDropError(f"The run.json in {folder} cannot be used: {first_line(error)}. Correct or delete it.") from error
    return run


def _stages_in(folder: Path, name: str, tokens_per_step: int | None) -> tuple[tuple[Stage, ...], dict[str, str]]:
    """The models in a folder whose names state a step, in that order; and those that cannot be used (name -> reason)."""
    paths = checkpoints_in(folder)
    stage_at = lambda path: Stage(  # noqa: E731
        path.name, *parse_stage(path.name, tokens_per_step), locate_folder(f"{name}, {path.name}", path)
    )
    found, reasons = each_available(paths, stage_at, "stages", several=True)
    missing = {f"{name}, {path.name}": reason for path, reason in reasons.items()}
    return tuple(sorted(found, key=lambda stage: stage.step or 0)), missing


def _random_stage(model: LocatedModel, name: str, seed: int) -> Stage:
    """Weights as transformers draws them for the model's configuration, before any training."""
    digest = hashlib.sha256((model.folder / "config.json").read_bytes() + str(seed).encode()).hexdigest()
    title = f"{name}, random weights {seed}"
    return Stage("random", 0, 0, LocatedModel(title, model.folder, f"random:{digest}", seed=seed))
