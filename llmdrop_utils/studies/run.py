"""A run of one study: its profile, the store, what is not run and why; and the registry of studies."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import pandas as pd

from ..base import files
from ..base.errors import DiskFull, LLMDropError, NotApplicable, NotAvailable, each_available
from ..base.settings import Settings
from ..base.store import Store
from ..measure.importance import Importance
from ..models.config import DECODERS, ENCODER_DECODERS, ENCODERS
from ..models.families import family_of, position_limit
from ..models.kinds import kind_of_model, multimodal_kind
from ..models.load import attention_implementation, load_config, load_tokenizer
from ..models.locate import LocatedModel, locate_available
from ..models.names import label
from ..report.tables import Declaration, Tables, frame, table, write_tables
from ..sources.sizes import Hub
from ..sources.texts import load_documents, load_tokens
from .profile import Calibration, Profile
from .queue import measure_missing
from .work import ImportanceWork, Work

S = TypeVar("S", bound=Settings)
T = TypeVar("T")
R = TypeVar("R")
W = TypeVar("W", bound=Work)
NOT_RUN = {"not_run": table("what reason")}


@dataclasses.dataclass
class Run:
    """One study over one profile.

    `not_run` collects what is unavailable and why; the rest of the run goes on without it.
    """

    notebook: str
    profile: Profile
    tables: Declaration
    force: bool = False  # measure again what is stored
    store: Store = dataclasses.field(default_factory=Store)
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)

    def section(self, cls: type[S]) -> S:
        """The profile's settings for this study."""
        return self.profile.section(cls)

    def available(
        self,
        things: Iterable[T],
        get: Callable[[T], R],
        kind: str,
        reason: type[LLMDropError] = LLMDropError,
        several: bool | None = None,
        name: Callable[[T], str] = str,
    ) -> list[R]:
        """`get` of each thing that is available; the others go into `not_run` under `name` (see `each_available`)."""
        found, reasons = each_available(things, get, kind, reason, several)
        self.not_run |= {name(thing): why for thing, why in reasons.items()}
        return found

    @contextlib.contextmanager
    def one_of(self, model: LocatedModel, several: bool | None = None) -> Iterator[None]:
        """What keeps one of several models from being measured goes into `not_run`; the block is left, the others go on."""
        try:
            yield
        except LLMDropError as error:
            if isinstance(error, DiskFull) or not (self.profile.several if several is None else several):
                raise
            self.not_run[model.name] = str(error)

    def models(self) -> list[LocatedModel]:
        """The profile's models that are available."""
        located, reasons = locate_available(self.profile.models)
        self.not_run |= reasons
        return located

    def corpora(self) -> list[str]:
        """The corpora that are available. An unknown one is an error."""

        def get(corpus: str) -> str:
            load_documents(corpus)
            return corpus

        names = self.section(Calibration).corpora
        return self.available(names, get, "corpora", NotAvailable, name=lambda corpus: f"corpus {corpus}")

    def measure(self, work: Sequence[Work], force: bool | None = None, several: bool | None = None, what: str = "{}") -> None:
        """Measure what the store lacks (everything if `force`; None: if the run is forced).

        several: whether a model that fails leaves others to go on with; None: whether the profile has several. `what` names
        in `not_run` what is then missing of the model.
        """
        several = self.profile.several if several is None else several
        reasons = measure_missing(work, self.store, self.force if force is None else force, several)
        self.not_run |= {what.format(name): reason for name, reason in reasons.items()}

    def measured(self, work: Iterable[W]) -> list[W]:
        """The items whose model could be measured. Raises NotAvailable if none could."""
        done = [item for item in work if item.model.name not in self.not_run]
        if not done:
            raise NotAvailable("Nothing could be measured:\n" + "\n".join(self.not_run.values()))
        return done

    def values(self, item: Work) -> list[dict]:
        """The stored values of an item, in the order of its keys."""
        return [self.store.value(key) for key in item.keys]

    def importance(self, item: ImportanceWork) -> Importance:
        """What an item measured."""
        return Importance.from_json(self.values(item)[0], item.model.identity)

    def scores(self, model: LocatedModel, corpus: str) -> Importance | None:
        """Importance on the samples that the profile calibrates on, which notebook 01 measures; None if it could not be had."""
        (item,) = importance_work(model, [corpus], self.profile)
        self.measure([item], force=False)
        if model.name in self.not_run:
            return None
        return self.importance(item).first(self.section(Calibration).n_samples)

    def write(self, tables: dict[str, list[dict] | pd.DataFrame], work: Iterable[Work], more: Sequence[dict] = ()) -> Tables:
        """Write the tables, as declared, and the provenance of all items (and of what else there is) to the run's folder."""
        declared = {**self.tables, **NOT_RUN}
        not_run = self.not_run | self._shortened({item.model.name: item.model for item in work})
        reasons = [{"what": what, "reason": files.without_paths(reason)} for what, reason in not_run.items()]
        content = {name: frame(name, rows, declared) for name, rows in {**tables, "not_run": reasons}.items()}
        records = [self.store.get(key) for item in work for key in item.keys]
        entries = [record["provenance"] for record in records if record] + list(more)
        distinct = {json.dumps(entry, sort_keys=True): entry for entry in entries}  # values measured together share one
        return write_tables(content, files.local(self.profile.run).tables / self.notebook, list(distinct.values()))

    def _shortened(self, models: dict[str, LocatedModel]) -> dict[str, str]:
        """Which models know fewer positions than the samples have that the study asks for."""
        needs = STUDIES[self.notebook].needs if self.notebook in STUDIES else ()
        asked = max((getattr(self.profile.sections[cls], "seq_len", 0) for cls in needs), default=0)
        with_text = {name: model for name, model in models.items() if asked and not model.is_random}
        fitting = {name: fitting_length(model, asked) for name, model in with_text.items()}
        return {
            f"{name}, samples of {asked} tokens": f"The model knows {n} positions, so that its samples are no longer than that."
            for name, n in fitting.items()
            if n < asked
        }


# ---- work items that several studies share ----------------------------------------------------------------------------


def identity_of(model: LocatedModel, profile: Profile) -> dict:
    """What every item about a model begins with. A family that cannot be studied is refused before its weights are loaded."""
    if family_of(config := load_config(model)).mixer:
        raise LLMDropError(
            f"{model.name} is a hybrid ({config.model_type}): some layers have another mixer of tokens in place of attention, "
            "so notebooks cannot compare attention with MLP layer by layer. Measure and drop it in Python (docs/python.md)."
        )
    return {"model": model, "dtype": profile.dtype, "attention": attention_implementation(model)}


def fitting_length(model: LocatedModel, asked: int) -> int:
    """Tokens of a sample: as many as the profile asks for, or as the model knows positions, if those are fewer."""
    return min(asked, position_limit(load_config(model)) or asked)


def importance_work(model: LocatedModel, corpora: list[str], profile: Profile) -> list[ImportanceWork]:
    """Importance of a model on each corpus; the first one also serves the sample-count study."""
    shared, tokenizer, calibration = identity_of(model, profile), load_tokenizer(model), profile.section(Calibration)
    work = []
    for i, corpus in enumerate(corpora):
        n_samples = max([calibration.n_samples, *calibration.sample_counts]) if i == 0 else calibration.n_samples
        tokens = load_tokens(corpus, tokenizer, n_samples, fitting_length(model, calibration.seq_len))
        work.append(ImportanceWork(**shared, corpus=corpus, tokens=tokens, batch_size=calibration.batch_size))
    return work


# ---- the registry -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Study:
    """What a notebook needs measured, and the tables that come out."""

    notebook: str
    measure: Callable[[Run], Tables]
    needs: tuple[type[Settings], ...]  # sections of the profile; without one of them the study is not run
    tables: Declaration
    models: Callable[[Profile], tuple[list[LocatedModel], dict[str, str]]]  # that its results depend on; what is unavailable
    reads: tuple[str, ...] = ()  # notebooks whose tables it reads
    compares: bool = False  # of a profile that runs its models one by one, the run that compares them makes it too
    kinds: tuple[str, ...] = DECODERS  # of the models that it measures

    def __call__(self, profile: Profile, force: bool = False) -> Tables:
        """Measure what is missing (everything if `force`), write the tables to data/results/<run>/<notebook>, return them.

        Raises NotAvailable if the profile lacks a section that the study needs, NotApplicable if the user's model is of a kind
        that it does not measure, LLMDropError if its only model (corpus, task, series) cannot be used. Of several, one that
        cannot is listed in the table `not_run` with the reason.
        """
        if reason := self.passes_over(profile.model):
            raise NotApplicable(reason)
        for section in self.needs:
            profile.section(section)
        return self.measure(Run(self.notebook, profile, self.tables, force))

    def passes_over(self, model: str | None, hub: Hub | None = None) -> str | None:
        """Why a study has nothing to say of the model that a run is for, if it is of another kind than the study measures."""
        if model is None or (kind := kind_of_model(model, hub)) is None or kind in self.kinds:
            return None
        if kind in ENCODERS:
            return f"{label(model)} is a {kind}: it predicts no next token. Notebook 12 measures it."
        if kind in ENCODER_DECODERS:
            return f"{label(model)} is an {kind}: it predicts a target from a source. Notebook 12 measures it."
        whole = multimodal_kind(model, hub)
        what = f"The text part of {label(model)} ({whole})" if whole else label(model)
        return (
            f"{what} is a {kind}, and this notebook is about encoders of text and of images, and encoder-decoders. Give one as "
            "MODEL, or none to measure those of the profile."
        )


STUDIES: dict[str, Study] = {}  # by notebook


def study(
    notebook: str,
    needs: Sequence[type[Settings]],
    tables: Declaration,
    models: Callable[[Profile], tuple[list[LocatedModel], dict[str, str]]] = lambda profile: locate_available(profile.models),
    reads: Sequence[str] = (),
    compares: bool = False,
    kinds: tuple[str, ...] = DECODERS,
) -> Callable[[Callable[[Run], Tables]], Study]:
    """Register a function Run -> tables as the study of a notebook."""

    def register(function: Callable[[Run], Tables]) -> Study:
        STUDIES[notebook] = Study(notebook, function, tuple(needs), tables, models, tuple(reads), compares, kinds)
        return STUDIES[notebook]

    return register
