"""What the chosen notebooks need of a profile: models, series, texts and tasks; looked up, not fetched."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..base.errors import LLMDropError
from ..models.config import DECODERS, OTHERS
from ..models.kinds import kind_of_model
from ..models.names import folder_identity
from ..models.outlook import Outlook, Shape, outlook
from ..models.recipe import load_recipe, series_folder, untrained
from ..models.series import PICKLED_WEIGHTS, SMALL_FILES, WEIGHTS
from ..report.notebooks import choose_notebooks
from ..sources.catalogue import catalogue
from ..sources.sizes import Download, Hub, packaged, stored_commit, task_set
from ..sources.task_data import known_tasks
from .gather import runs_of
from .profile import SECTIONS, Profile
from .run import STUDIES

QUALITY = ("calibration", "text", "tasks")
OF_SHAPES = ("05", "06")  # those that random weights serve


def sections_of(number: str) -> list[str]:
    """The sections of a profile without which a notebook is not run."""
    keys = {cls: key for key, cls in SECTIONS.items()}
    return [keys[cls] for name, study in STUDIES.items() if name[:2] == number for cls in study.needs]


def is_of_models(number: str) -> bool:
    """Is a notebook about the profile's models? 07 is about series of checkpoints."""
    return "stages" not in sections_of(number)


def is_of_encoders(number: str) -> bool:
    """Is a notebook about encoders, and not about decoders?"""
    return "others" in sections_of(number)


@dataclasses.dataclass
class Item:
    """Something to download, and the notebooks that need it."""

    what: str  # "model", "text", "tasks" or "series"
    name: str
    download: Download  # of a series: of one checkpoint
    notebooks: set[str]


@dataclasses.dataclass
class Followed:
    """A series of checkpoints, or a model beside random weights of its shape."""

    name: str
    shape: Shape | None
    n_stages: int  # over all seeds
    checkpoint: int = 0  # bytes of one that is downloaded while it is measured
    to_train: int = 0  # seeds
    identities: Sequence[str] = ()


@dataclasses.dataclass
class Needed:
    """All that a run needs."""

    profile: Profile
    sources: dict[str, Path]  # notebook -> its file
    hub: Hub = dataclasses.field(default_factory=Hub)
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)  # notebook -> why
    models: dict[str, Outlook] = dataclasses.field(default_factory=dict)  # by their names in the profile
    series: list[Followed] = dataclasses.field(default_factory=list)
    items: list[Item] = dataclasses.field(default_factory=list)
    unusable: list[str] = dataclasses.field(default_factory=list)  # models and series, with the reason

    def __post_init__(self) -> None:
        self.settings = self.profile.to_json()
        self.of_models = {model: run.to_json() for model, run in runs_of(self.profile).items()}

    def settings_of(self, model: str) -> dict:
        """What the profile says, as it is for one of its models."""
        return self.of_models.get(model, self.settings)

    def is_run(self, number: str, model: str) -> bool:
        """Does the profile have what a notebook needs, as it is for one of its models, and is the model among those of it?"""
        return set(sections_of(number)) <= set(self.settings_of(model)) and model in self.models_of(number)

    def models_of(self, number: str) -> list[str]:
        """The models that a notebook is about, by their names in the profile."""
        return self.settings["others"]["models"] if is_of_encoders(number) else self.profile.models

    def reads(self, *kinds: str) -> bool:
        """Is there a model of one of these kinds among those of notebook 12? One of unknown kind may be of any."""
        return bool({*kinds, None} & {kind_of_model(name, self.hub) for name in self.settings["others"]["models"]})

    def runs(self, number: str) -> list[Profile]:
        """The runs that make a notebook: one, or one for each model, and the one that compares them."""
        if not self.profile.one_by_one:
            return [self.profile]
        of_models = [run for model, run in runs_of(self.profile).items() if self.is_run(number, model)]
        return of_models + [self.profile for study in STUDIES.values() if study.notebook[:2] == number and study.compares]

    @property
    def chosen(self) -> list[str]:
        return [number for number in self.sources if number not in self.not_run]

    def add(self, what: str, name: str, download: Download, notebooks: Iterable[str]) -> None:
        known = next((item for item in self.items if (item.what, item.name) == (what, name)), None)
        if known is None:
            self.items.append(Item(what, name, download, set(notebooks)))
        else:
            known.notebooks |= set(notebooks)

    def of_origin(self, origin: str) -> list[Download]:
        return [item.download for item in self.items if item.download.origin == origin and item.what != "series"]


def look_up(profile: Profile, notebooks: str | None = None) -> Needed:
    """Everything that the notebooks (all, or those whose numbers are listed) need of a profile."""
    needed = Needed(profile, {path.stem[:2]: path for path in choose_notebooks(notebooks)})
    settings = needed.settings
    needed.not_run = {number: reason for number in needed.sources if (reason := _lacking(needed, number))}
    for number in needed.chosen:
        names = needed.models_of(number)
        for name in names if is_of_models(number) else []:
            if needed.is_run(number, name):
                _add_model(needed, name, number, len(names) > 1)
    for name in settings["stages"]["series"] if "07" in needed.chosen else []:
        _add_series(needed, name)
    with_scores = any(not model.is_random for model in needed.models.values())
    for number in needed.chosen:
        sections = set(sections_of(number)) | (set(QUALITY) & set(settings) if number == "05" and with_scores else set())
        corpora = settings["calibration"]["corpora"] if "calibration" in sections else []
        if is_of_encoders(number):
            corpora = settings["others"]["texts"] if needed.reads("text encoder", "encoder-decoder") else []
        for corpus in corpora:
            needed.add("text", corpus, _text(corpus, needed.hub), [number])
        for name in settings["tasks"]["names"] if set(QUALITY) <= sections else []:
            needed.add("tasks", *_task_data(name, settings["tasks"]["data"], needed.hub), [number])
        for name in settings["others"]["images"] if is_of_encoders(number) and needed.reads("vision encoder") else []:
            if packages := catalogue()["images"].get(name, {}).get("packages"):
                needed.add("images", name, packaged(packages), [number])
        if number == "07":
            trained = [corpus for s in needed.series if s.to_train for corpus in load_recipe(s.name).corpora]
            for corpus in [*trained, settings["stages"]["corpus"]]:
                needed.add("text", corpus, _text(corpus, needed.hub), [number])
    return needed


def _lacking(needed: Needed, number: str) -> str | None:
    """Why a notebook is not run at all."""
    profile = needed.profile
    study = STUDIES.get(needed.sources[number].stem)
    if study and (reason := study.passes_over(profile.model, needed.hub)):
        return reason
    lacking = [key for key in sections_of(number) if key not in needed.settings]
    if is_of_encoders(number) and not lacking:
        return None
    if lacking and not (is_of_models(number) and any(needed.is_run(number, model) for model in profile.models)):
        return f"the profile {profile.name} has no section {lacking[0]!r}"
    if is_of_models(number) and all(name in catalogue()["series"] for name in profile.models):
        return f"{profile.models[0]} is a series of checkpoints: notebook 07 follows it"
    if number not in OF_SHAPES and is_of_models(number) and all(name.startswith("random:") for name in profile.models):
        return "random weights have no tokenizer: they serve notebooks 05 and 06 alone"
    return None


def _add_model(needed: Needed, name: str, number: str, several: bool) -> Outlook | None:
    if name not in needed.models:
        try:
            kinds = OTHERS if is_of_encoders(number) else DECODERS
            needed.models[name] = outlook(name, needed.hub, kinds)
        except LLMDropError as reason:
            if not several:
                raise
            if f"{name}: {reason}" not in needed.unusable:
                needed.unusable.append(f"{name}: {reason}")
            return None
    found = needed.models[name]
    needed.add("model", found.name, found.download, [number])
    return found


def _add_series(needed: Needed, name: str) -> None:
    part, source = needed.settings["stages"], catalogue()["series"].get(name)
    seeds: int = part["seeds"]
    if source is None:
        found = _add_model(needed, name, "07", len(part["series"]) > 1)
        if found is not None:
            identities = [found.identity] if found.identity else []
            needed.series.append(Followed(found.name, found.shape, seeds + 1, identities=identities))
    elif "unavailable" in source:
        needed.unusable.append(f"{name}: its checkpoints cannot be read: {source['unavailable']}")
    elif "trained" in source:
        recipe, left = load_recipe(name), len(untrained(name, list(range(seeds))))
        shape = Shape.of_settings({"vocab_size": recipe.vocab_size} | recipe.config)
        stages = [] if left else sorted(series_folder(name).glob("seed-*/step-*"))
        identities = [folder_identity(stage) for stage in stages]
        needed.series.append(Followed(name, shape, len(recipe.steps) * seeds, to_train=left, identities=identities))
    else:
        revisions, weights = source["revisions"], PICKLED_WEIGHTS if source.get("pickled") else WEIGHTS
        try:
            one = needed.hub.download(source["hub"], revisions[-1], patterns=[*SMALL_FILES, *weights], passing=True)
        except LLMDropError as reason:
            needed.unusable.append(f"{name}: {reason}")
            return
        commits = [commit for revision in revisions if (commit := stored_commit(source["hub"], revision))]
        shape = Shape.guess(one.total // 2) if one.total else None
        identities = [f"hub:{source['hub']}@{commit}" for commit in commits]
        needed.series.append(Followed(name, shape, len(revisions) + 1, one.total or 0, identities=identities))
        needed.add("series", name, one.times(len(revisions)), ["07"])


def _text(corpus: str, hub: Hub) -> Download:
    source = catalogue()["corpora"].get(corpus)
    if source is None:
        raise LLMDropError(f"Unknown corpus {corpus!r}. data/sources.yaml has: {', '.join(catalogue()['corpora'])}.")
    if "packages" in source:
        return packaged(source["packages"])
    if "generated" in source:
        return Download("generated")
    try:
        return hub.download(source["hub"], source["revision"], "dataset", source["files"])
    except LLMDropError as reason:
        return Download("hub", None, None, problem=str(reason))


def _task_data(name: str, where: str, hub: Hub) -> tuple[str, Download]:
    """What holds the data of a task: a package, which serves several, or a data set of the hub."""
    if where == "package" and name in known_tasks():
        package = known_tasks()[name]["package"]
        return package, packaged(catalogue()["task_packages"][package]["packages"])
    if where == "hub" and name in catalogue()["task_sets"]:
        try:
            return name, task_set(catalogue()["task_sets"][name], hub)
        except LLMDropError as reason:
            return name, Download("hub", None, None, problem=str(reason))
    return name, Download(where, None, None, problem=f"Nothing is known of the data of the task {name!r}.")
