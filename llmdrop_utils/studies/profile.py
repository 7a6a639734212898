"""What a run covers: models, corpora and sizes, read from data/profiles/<name>.yaml."""

import dataclasses

import yaml

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import short_name
from ..base.settings import build


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How importance is measured (paper, Appendix A: 256 samples of 2,048 tokens)."""

    corpora: list[str]  # names in data/sources.yaml; the first one also serves the sample-count study
    n_samples: int  # token blocks per corpus
    seq_len: int  # tokens per block
    sample_counts: list[int]  # Fig. 10: importance from the first n blocks of the first corpus, for each n
    batch_size: int  # blocks per forward pass; changes speed and memory, not results


@dataclasses.dataclass(frozen=True)
class Text:
    """Held-out text of the first calibration corpus: the blocks after those that importance is measured on."""

    n_samples: int
    seq_len: int
    n_drop: list[int]  # how many sub-layers of each kind (and jointly) are dropped, dense apart


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks of data/tasks.yaml, and how many sub-layers of which kind are dropped for them, dense apart."""

    names: list[str]
    data: str  # "package" or "hub"
    limit: int | None  # documents of each task (of each subject of a group), the first ones; null: all
    num_fewshot: int | None  # null: the paper's number for each task
    n_drop: dict[str, list[int]]  # "attention", "mlp", "block", "joint"


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Attention dropped one layer at a time, measuring again in between, against all at once (paper, Fig. 9)."""

    n_samples: int  # the first blocks of the first corpus, for both ways
    n_drop: list[int]


@dataclasses.dataclass(frozen=True)
class Speed:
    """What is timed: generation as in the paper (Sec. 5: 2,048 tokens in and out), and a sweep over batch and context."""

    repeats: int
    batch_size: int | None  # for the paper's protocol; null: as many as fit the GPU beside the dense model
    prompt: int
    new_tokens: int
    contexts: list[int]  # tokens in the cache at which decoding is timed; those of the protocol among them
    steps: int  # decode steps that are timed together
    n_drop: dict[str, list[int]]
    sweep_batches: list[int]  # decoding at each of these and of the contexts, with `sweep_n` attention or MLP layers gone
    sweep_n: int
    compiled: dict[str, list[int]] | None  # what is also timed on the compiled back end, as in the paper (compiling is slow)
    whole: list[int]  # prompt and new tokens of a generation that is timed whole, to check what is put together from samples


@dataclasses.dataclass(frozen=True)
class Stages:
    """Checkpoints of training runs, how important their sub-layers are, and what dropping costs them (paper, Sec. 6.2)."""

    series: list[str]  # whatever `locate_series` takes: names in data/sources.yaml, directories of checkpoints, models
    seeds: int  # how often a series is trained, where it is trained here
    corpus: str  # of which a series that is trained here has not seen the first documents
    n_samples: int  # blocks that importance is measured on
    text_samples: int  # further blocks, to see what dropping costs
    seq_len: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """One kind of run. `run` names its folder under figures/, notebooks/rendered/ and data/results/."""

    name: str
    description: str
    models: list[str]  # anything `load_model` takes
    calibration: Calibration
    n_drop: list[int]  # how many most droppable layers the overlap between rankings is counted for
    text: Text
    tasks: Tasks
    iterative: Iterative
    speed: Speed
    stages: Stages
    model: str | None = None  # set when the run is for one model of the user's choice

    @property
    def several(self) -> bool:
        """Are there several models? Then one that cannot be had is reported as not run; a single one is an error."""
        return len(self.models) > 1

    @property
    def run(self) -> str:
        return self.name if self.model is None else f"{self.name}-{short_name(self.model)}"


KINDS = ("attention", "mlp", "block", "joint")

# Keys of a profile that have keys of their own.
PARTS = {"calibration": Calibration, "text": Text, "tasks": Tasks, "iterative": Iterative, "speed": Speed, "stages": Stages}


def load_profile(name: str, model: str | None = None) -> Profile:
    """Read data/profiles/<name>.yaml; `model` replaces its models, and its series of checkpoints.

    Raises LLMDropError for an unknown profile, and for keys that are unknown, missing or of the wrong type.
    """
    path = files.PROFILE_DIR / f"{name}.yaml"
    known = sorted(p.stem for p in files.PROFILE_DIR.glob("*.yaml"))
    if name not in known:
        raise LLMDropError(f"Unknown profile {name!r}. The profiles in data/profiles are: {', '.join(known)}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise LLMDropError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise LLMDropError(f"{path.name} must hold the keys of a profile.")
    for key, part in PARTS.items():
        if not isinstance(content.get(key), dict):
            raise LLMDropError(f"{path.name} must hold the key {key!r} with keys of its own.")
        content[key] = build(part, content[key], f"{path.name}, under {key}")
    for part, kinds in (
        ("tasks", content["tasks"].n_drop),
        ("speed", content["speed"].n_drop | (content["speed"].compiled or {})),
    ):
        for kind in kinds:
            if kind not in KINDS:
                raise LLMDropError(f"Unknown kind {kind!r} in {path.name}, under {part}. Known kinds: {', '.join(KINDS)}.")
    if given := {"name", "model"} & set(content):
        raise LLMDropError(f"The key {given.pop()!r} does not belong in {path.name}: it is set by the command.")
    profile = build(Profile, {**content, "name": name, "model": model}, path.name)
    if model is None:
        return profile
    stages = dataclasses.replace(profile.stages, series=[model])
    return dataclasses.replace(profile, models=[model], stages=stages, description=description_of(profile.run))


def description_of(run: str) -> str:
    """What a run covers: its profile's description, or for a model ("<profile>-<model>") whose settings it is run with."""
    names = [path.stem for path in files.PROFILE_DIR.glob("*.yaml") if f"{run}-".startswith(f"{path.stem}-")]
    name = max(names, key=len)
    if run == name:
        return load_profile(name).description
    return f"{run.removeprefix(f'{name}-')} with the settings of the profile {name}."
