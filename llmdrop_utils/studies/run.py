"""From a profile to work items."""

from ..base.errors import NotAvailable
from ..base.store import Store
from ..drop.plan import DropPlan
from ..measure.importance import Importance
from ..models.families import family_of
from ..models.load import attention_implementation, default_dtype, load_config, load_tokenizer
from ..models.locate import LocatedModel
from ..sources.task_data import fingerprint_task
from ..sources.texts import load_documents, load_tokens
from .profile import Profile
from .work import ImportanceWork, TaskWork

# ---- from a profile to items ----------------------------------------------------------------------------------------


def available_corpora(profile: Profile, not_run: dict[str, str]) -> list[str]:
    """The corpora that can be had here; of several, those that cannot go into `not_run`. Unknown ones are an error."""
    available = []
    for corpus in profile.calibration.corpora:
        try:
            load_documents(corpus)
            available.append(corpus)
        except NotAvailable as reason:
            if len(profile.calibration.corpora) == 1:
                raise
            not_run[f"corpus {corpus}"] = str(reason)
    if not available:
        raise NotAvailable("None of the corpora can be had here:\n" + "\n".join(not_run.values()))
    return available


def identity_of(model: LocatedModel) -> dict:
    """What every item about a model begins with. An unknown family is refused before its weights are loaded."""
    family_of(load_config(model))
    return {"model": model, "dtype": default_dtype(), "attention": attention_implementation(model)}


def importance_work(model: LocatedModel, corpora: list[str], profile: Profile) -> list[ImportanceWork]:
    """Importance of a model on each corpus; the first one also serves the sample-count study."""
    shared, calibration, tokenizer = identity_of(model), profile.calibration, load_tokenizer(model)
    work = []
    for i, corpus in enumerate(corpora):
        n_samples = max([calibration.n_samples, *calibration.sample_counts]) if i == 0 else calibration.n_samples
        tokens = load_tokens(corpus, tokenizer, n_samples, calibration.seq_len)
        work.append(ImportanceWork(**shared, corpus=corpus, tokens=tokens, batch_size=calibration.batch_size))
    return work


def importance_of(item: ImportanceWork, store: Store) -> Importance:
    """What an item measured."""
    return Importance.from_json(store.get(item.keys[0])["value"], item.model.identity)


def task_work(model: LocatedModel, members: dict[str, list], plans: tuple[DropPlan, ...], profile: Profile) -> list[TaskWork]:
    """The profile's tasks under each plan. `members`: task -> what `load_task` gave."""
    shared, work = identity_of(model), []
    for task, tasks in members.items():
        fingerprint = fingerprint_task(tasks, profile.tasks.limit)
        shots = tasks[0].config.num_fewshot
        work.append(TaskWork(**shared, task=task, members=tuple(tasks), fingerprint=fingerprint, num_fewshot=shots,
                             limit=profile.tasks.limit, plans=plans))  # fmt: skip
    return work
