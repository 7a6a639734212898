"""What a run covers: models, and a section for each study, read from data/profiles/<name>.yaml.

A study declares the section that it needs with `@section`; a profile without that section does not run the study.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml
from pydantic import AfterValidator, Field

from ..base import files
from ..base.errors import LLMDropError, NotAvailable
from ..base.settings import Counts, CountsByName, Names, Positive, Settings, build
from ..models.load import DTYPES, default_dtype
from ..models.names import label, local_path, plain_name
from ..selection.ranking import SELECTIONS

S = TypeVar("S", bound=Settings)
G = TypeVar("G", bound=Iterable[object])
SECTIONS: dict[str, type[Settings]] = {}  # key of a profile -> its settings


def section(key: str) -> Callable[[type[S]], type[S]]:
    """Register settings as the section `key` of profiles."""

    def register(cls: type[S]) -> type[S]:
        SECTIONS[key] = cls
        return cls

    return register


def known(what: str, names: Iterable[object]) -> AfterValidator:
    """That the members of a list, or the keys of a mapping, are among these: an unknown one is an error that lists them."""
    names = list(names)

    def check(given: G) -> G:
        for name in given:
            if name not in names:
                raise ValueError(f"Unknown {what} {name!r} in {{where}}. Known {what}s: {', '.join(map(str, names))}.")
        return given

    return AfterValidator(check)


CountsByKind = Annotated[CountsByName, known("kind", SELECTIONS)]  # "attention" -> how many are dropped


Own = Annotated[dict[str, dict[str, Any] | None], Field(min_length=1)]  # model -> section -> keys that are others for it


@section("calibration")
class Calibration(Settings):
    """How importance is measured (paper, Appendix A: 256 samples of 2,048 tokens)."""

    corpora: Names  # names in data/sources.yaml; the first one also serves the sample-count study
    n_samples: Positive  # token blocks per corpus
    seq_len: Positive  # tokens per block
    sample_counts: Counts  # Fig. 10: importance from the first n blocks of the first corpus, for each n
    batch_size: Positive  # blocks per forward pass; changes speed and memory, not results
    n_drop: Counts  # how many most droppable layers the overlap between rankings is counted for


class Head(Settings):
    """The keys of a profile that are no sections."""

    description: str
    models: Names | Own  # anything `load_model` takes; see `load_profile` for a mapping
    dtype: Literal["float32", "bfloat16"] | None = None  # that models are measured in; null: `default_dtype()`


@dataclasses.dataclass(frozen=True)
class Profile:
    """One kind of run. `run` names its folder under data/results/."""

    name: str
    description: str
    models: list[str]  # anything `load_model` takes
    sections: dict[type[Settings], Settings]
    chosen_dtype: str | None = None  # by the profile
    model: str | None = None  # set when the run is for one model of the user's choice
    one_by_one: bool = False  # each model is a run of its own, with sizes of its own; what compares them reads these runs

    def section(self, cls: type[S]) -> S:
        """The settings of one section. Raises NotAvailable if the profile has none: the study is not run."""
        if cls not in self.sections:
            key = next(key for key, known in SECTIONS.items() if known is cls)
            raise NotAvailable(f"The profile {self.name} has no section {key!r}, which this notebook needs.")
        return self.sections[cls]  # type: ignore[return-value]  # the key is the type

    def replacing(self, **changes: Any) -> "Profile":
        """The same with other models, or with other keys in a section: `replacing(models=[...], stages={"seeds": 1})`."""
        sections = dict(self.sections)
        for key in [key for key in changes if key in SECTIONS]:
            old = sections[SECTIONS[key]]
            sections[SECTIONS[key]] = old.model_copy(update=changes.pop(key))
        return dataclasses.replace(self, sections=sections, **changes)

    def of(self, model: str) -> "Profile":
        """The run of one of its models."""
        return load_profile(self.name, model)

    @property
    def dtype(self) -> torch.dtype:
        """What models are measured in: the profile's choice, or what is fast on this machine."""
        return DTYPES[self.chosen_dtype] if self.chosen_dtype else default_dtype()

    @property
    def several(self) -> bool:
        """Are there several models? Then one that is unavailable is reported as not run; a single one is an error."""
        return len(self.models) > 1

    @property
    def run(self) -> str:
        """Its name: of no two profiles, and of no two models, the same."""
        return self.name if self.model is None else f"{self.name}-{label(self.model)}"

    def to_json(self) -> dict[str, Any]:
        """All that the profile says, as plain values."""
        sections = {key: self.sections[cls].model_dump() for key, cls in SECTIONS.items() if cls in self.sections}
        return {"name": self.name, "models": self.models, "model": self.model, "dtype": str(self.dtype)} | sections


def profile_names() -> list[str]:
    """The profiles in data/profiles."""
    return sorted(path.stem for path in files.PROFILE_DIR.glob("*.yaml"))


def load_profile(name: str, model: str | None = None) -> Profile:
    """Read data/profiles/<name>.yaml; `model` replaces its models, its series of checkpoints and the models of sections.

    A relative path in `model` begins in the working directory, one in a profile in the checkout. A profile that `extends`
    another has its keys, but for those that it gives itself; a section that is null is left out. `models` may be a mapping
    from each model to what is other for it (keys of sections, or null): then each is a run of its own. Raises LLMDropError
    for an unknown profile, and for keys that are unknown, missing or of the wrong type.
    """
    content, where = _read(name, []), f"{name}.yaml"
    if given := {"name", "model"} & set(content):
        raise LLMDropError(f"The key {given.pop()!r} does not belong in {where}: it is set by the command.")
    sections = _sections(content, where)
    head = build(Head, {key: content[key] for key in content if key not in SECTIONS}, where, also=list(SECTIONS))
    models = [_from(files.ROOT, one) for one in head.models]
    own: dict[str, dict[type[Settings], Settings]] = {}
    if isinstance(head.models, dict):  # all are built, so that a mistake is found before the first model is measured
        pairs = zip(models, head.models.values(), strict=True)
        own = {one: _own_sections(content, changes or {}, where, one) for one, changes in pairs}
    if model is None:
        sections = {cls: _following(part, None) for cls, part in sections.items()}
        return Profile(name, head.description, models, sections, head.dtype, one_by_one=bool(own))
    model = _from(None, model)
    sections = {cls: _following(part, model) for cls, part in own.get(model, sections).items()}
    return Profile(name, f"{label(model)} with the settings of the profile {name}.", [model], sections, head.dtype, model)


def _sections(content: dict[str, Any], where: str) -> dict[type[Settings], Settings]:
    """The sections among the keys of a profile."""
    sections: dict[type[Settings], Settings] = {}
    for key in [key for key in SECTIONS if content.get(key) is not None]:
        if not isinstance(content[key], dict):
            raise LLMDropError(f"{where} must hold the key {key!r} with keys of its own.")
        sections[SECTIONS[key]] = build(SECTIONS[key], content[key], f"{where}, under {key}")
    return sections


def _own_sections(content: dict[str, Any], changes: dict[str, Any], where: str, model: str) -> dict[type[Settings], Settings]:
    """The sections as they are for one model."""
    if unknown := [key for key in changes if key not in SECTIONS]:
        raise LLMDropError(f"Unknown section {unknown[0]!r} in {where}, under {model}. Sections are: {', '.join(SECTIONS)}.")
    return _sections(_with(content, changes), f"{where}, under {model}")


def _from(base: Path | None, model: str) -> str:
    """A model as it is given; where it is a path an absolute one, since notebooks run in another folder."""
    model = plain_name(model)
    path = local_path(model, base)
    return model if path is None else str(path)


def _following(part: Settings, model: str | None) -> Settings:
    """The section, with its own series or models, if it names any; or with the model that the run is for in their place."""
    update = {}
    for key in {"series", "models"} & {*type(part).model_fields}:
        update[key] = [model] if model is not None else [_from(files.ROOT, one) for one in part.model_dump()[key]]
    return part.model_copy(update=update)


def _read(name: str, extended_by: list[str]) -> dict[str, Any]:
    """The keys of a profile, those of the profile that it extends among them."""
    path, known = files.PROFILE_DIR / f"{name}.yaml", profile_names()
    if name not in known:
        raise LLMDropError(f"Unknown profile {name!r}. The profiles in data/profiles are: {', '.join(known)}.")
    if name in extended_by:
        raise LLMDropError(f"The profiles extend each other in a circle: {' -> '.join([*extended_by, name])}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise LLMDropError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise LLMDropError(f"{path.name} must hold the keys of a profile.")
    if (base := content.pop("extends", None)) is None:
        return content
    extended, models = _read(str(base), [*extended_by, name]), content.get("models", {})
    if isinstance(extended.get("models"), dict) and isinstance(models, dict):  # each keeps its sizes, but of what is left out
        chosen: dict[str, Any] = models or {key: {} for key in extended["models"]}
        for one, changes in chosen.items():
            own = {key: part for key, part in (extended["models"].get(one) or {}).items() if content.get(key, part) is not None}
            if changes is None or isinstance(changes, dict):
                chosen[one] = _with(own, changes or {})
        content["models"] = chosen
    return _with(extended, content)


def _with(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The keys of a profile with others in their place; of a section that both give, key by key."""
    both = {key for key in changes if isinstance(changes[key], dict) and isinstance(content.get(key), dict)} & set(SECTIONS)
    return content | {key: content[key] | value if key in both else value for key, value in changes.items()}


def description_of(run: str) -> str:
    """What a run covers: its profile's description, or for a model ("<profile>-<model>") whose settings it is run with."""
    name = max((name for name in profile_names() if f"{run}-".startswith(f"{name}-")), key=len)
    if run == name:
        return load_profile(name).description
    return f"{run.removeprefix(f'{name}-')} with the settings of the profile {name}."
