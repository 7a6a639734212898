"""Notebook 08, abilities: what each is measured by, under which plans, and the scores that come out."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import numpy as np
import torch

from ...base import stats
from ...base.errors import LLMDropError, NotApplicable, NotAvailable
from ...base.settings import Counts, Names, Positive, Settings
from ...dropping.plan import DropPlan
from ...measure.importance import Importance
from ...models.families import position_limit
from ...models.load import load_config, load_tokenizer
from ...sources.probes import COPIED, Request, copy_probes, load_intents, many_shot_probes, retrieval_probes
from ...sources.task_data import first_prompt, load_task
from ...sources.texts import text_beginning
from ..ablations.work import ContinuationWork
from ..curves import Tasks, held_out, plans_for, sample_values, task_work, text_work, under_plans
from ..profile import known, section
from ..run import Run
from ..speedup.loads import n_layers_of
from ..work import DENSE_CELL, Cell, ImportanceWork, TaskWork, TextWork, Work
from .work import ConfidenceWork, GenerationWork, ProbeWork

MATHEMATICS = "gsm8k"
ROOM = 1024  # tokens of five examples, a question and its answer, nearly
BANKING = "banking77"
CONTEXTS = {1: "2k", 2: "4k", 3: "7k", 4: "9k", 5: "14k"}  # by examples of each label (Table 12)
CHOICES, CONTINUATION, ANSWERS = "choices", "dense continuation", "mathematics"  # names of abilities
RETRIEVAL = "retrieval"
QUESTIONS: dict[str, Callable[..., list[Request]]] = {  # about the context: (blocks, tokenizer, n_begin) -> requests
    "copy": lambda blocks, tokenizer, n_begin: copy_probes(blocks, n_begin),
    RETRIEVAL: retrieval_probes,
}


@section("what_breaks")
class WhatBreaks(Settings):
    """How many layers are dropped, and how much is asked of each ability."""

    n_drop: Counts  # attention layers, and MLPs
    text_samples: Positive  # of held-out text of each corpus
    task_limit: Positive | None  # documents of each task with choices; null: all
    answers_n: Counts | None  # attention layers dropped for the answers to GSM8K; null: it is not asked
    answers_limit: Positive | None  # documents of it; null: all
    answer_tokens: Positive  # of the answer to the first question that is shown
    prompts: Positive  # of held-out text, each continued
    prompt: Positive  # tokens
    new_tokens: Positive
    questions: Annotated[Names, known("question", QUESTIONS)]  # about the context
    contexts: Counts  # tokens that such a question reads
    probes: Positive  # questions of a kind at each context
    shots: Counts | None  # examples of each label before a query of BANKING77, from the hub; null: not asked
    shots_limit: Positive | None  # queries


@dataclasses.dataclass(frozen=True)
class Ability:
    """The scores of one ability in each cell."""

    what: str
    cells: Sequence[Cell]
    scores: np.ndarray  # float64 (n_samples, n_cells)
    chance: float = 0.0
    of_text: bool = False  # neighbouring samples are alike, and are drawn together
    corpus: str = ""  # of text
    context: str = ""  # how many tokens a question about the context reads
    seed: int = 0  # of the bootstrap: samples of another kind are others

    @property
    def name(self) -> str:
        """What tables call it: "text (web)", "copy (1,024)", "choices"."""
        return f"{self.what} ({more})" if (more := self.corpus or self.context) else self.what

    @property
    def n(self) -> float:
        """Independent samples."""
        return stats.independent(len(self.scores)) if self.of_text else len(self.scores)

    @functools.cached_property
    def draws(self) -> np.ndarray:
        """Bootstrap of the mean score: (REPEATS, n_cells)."""
        if self.of_text:
            return stats.text_means(self.scores, np.ones(len(self.scores)), self.seed)
        return stats.bootstrap_means(self.scores, np.ones(len(self.scores)), self.seed)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One model: its plans, and the items that tell what each ability is worth under them."""

    item: ImportanceWork
    plans: dict[Cell, DropPlan]
    answer_plans: dict[Cell, DropPlan]  # of the answers to GSM8K
    text: dict[str, TextWork]  # by corpus
    continuation: ContinuationWork
    generation: GenerationWork
    probes: dict[tuple[str, str], ProbeWork]  # by probe and context
    choices: list[TaskWork]  # each a `ConfidenceWork`
    answers: TaskWork | None
    first_answer: GenerationWork | None  # to the first question of the set (Table 10)

    @property
    def work(self) -> list[Work]:
        found: list[Work] = [*self.text.values(), self.continuation, self.generation, *self.probes.values(), *self.choices]
        return [*found, *(item for item in (self.answers, self.first_answer) if item)]


# ---- what is asked ------------------------------------------------------------------------------------------------------


def ask(run: Run, item: ImportanceWork, others: Sequence[ImportanceWork], scores: Importance, tasks: dict[str, list]) -> Asked:
    """The items of one model. item: importance on the first corpus; others: on the others. tasks: those with choices."""
    settings, tokenizer = run.section(WhatBreaks), load_tokenizer(item.model)
    plans = plans_for(scores, dict.fromkeys(("attention", "mlp"), settings.n_drop))
    if len(plans) == 1:
        few = f"{item.model.name} has {n_layers_of(item.model)} layers, and the profile drops {min(settings.n_drop)} or more."
        raise NotApplicable(few)
    held_out_text = lambda each: text_work(run, each, plans.values(), settings.text_samples)  # noqa: E731
    name = lambda each: f"held-out text of {each.corpus}"  # noqa: E731
    text = [held_out_text(item), *run.available(others, held_out_text, "corpora", several=True, name=name)]
    tokens = text[0].tokens
    if settings.prompt > tokens.shape[1]:
        raise LLMDropError(
            f"The profile's prompts of {settings.prompt} tokens are longer than its samples, {tokens.shape[1]} tokens."
        )
    prompts = tokens[: settings.prompts, : settings.prompt]
    read = {**item.identity, "corpus": item.corpus, "plans": tuple(plans.values())}
    dropped = tuple(plan for cell, plan in plans.items() if cell != DENSE_CELL)
    mathematics = _mathematics(run, item) if settings.answers_n else {}
    answer_plans = plans_for(scores, {"attention": settings.answers_n or ()})
    first = _first_prompt(run, item, mathematics[MATHEMATICS], tokenizer) if mathematics else None
    say = read | {"plans": tuple(answer_plans.values()), "new_tokens": settings.answer_tokens}
    answers = task_work(run, item.model, mathematics, answer_plans.values(), settings.answers_limit)
    return Asked(
        item, plans, answer_plans, {work.corpus: work for work in text},
        ContinuationWork(**read | {"plans": dropped}, tokens=prompts, new_tokens=settings.new_tokens),
        GenerationWork(**read, tokens=prompts, new_tokens=settings.new_tokens),
        _probes(run, item, plans.values(), tokenizer),
        task_work(run, item.model, tasks, plans.values(), settings.task_limit, ConfidenceWork),
        answers[0] if answers else None,
        GenerationWork(**say, tokens=first) if first is not None else None,
    )  # fmt: skip


def _mathematics(run: Run, item: ImportanceWork) -> dict[str, list]:
    """GSM8K with the paper's number of examples, as `load_task` gives it, by its name; empty if it cannot be asked."""
    if not _has_room(run, item, MATHEMATICS, ROOM):
        return {}
    load = lambda name: (name, load_task(name, None, run.section(Tasks).data))  # noqa: E731
    return dict(run.available([MATHEMATICS], load, "tasks", NotAvailable, several=True, name=lambda name: f"task {name}"))


def _first_prompt(run: Run, item: ImportanceWork, mathematics: list, tokenizer) -> torch.LongTensor | None:
    """The first question with its examples, (1, n) token ids; None if the model has no room for it and for an answer."""
    prompt = torch.tensor([tokenizer(first_prompt(mathematics))["input_ids"]])
    longest, what = prompt.shape[1] + run.section(WhatBreaks).answer_tokens, f"the first question of {MATHEMATICS}"
    return prompt if _has_room(run, item, what, longest) else None


def _has_room(run: Run, item: ImportanceWork, what: str, n_tokens: int) -> bool:
    """Does the model know so many positions? If not, `not_run` says so."""
    known_positions = position_limit(load_config(item.model))
    if known_positions is None or n_tokens <= known_positions:
        return True
    reason = f"It takes {n_tokens} tokens, and the model knows {known_positions} positions."
    run.not_run[f"{item.model.name}, {what}"] = reason
    return False


def _probes(run: Run, item: ImportanceWork, plans: Iterable[DropPlan], tokenizer) -> dict[tuple[str, str], ProbeWork]:
    """Questions about the context, at each of the profile's lengths that the model has positions for."""
    settings, begin = run.section(WhatBreaks), text_beginning(tokenizer)
    asked: dict[tuple[str, str], Sequence[Request]] = {}
    for context in settings.contexts:
        if not _has_room(run, item, f"contexts of {context} tokens", context + COPIED):
            continue
        tokens = held_out(item, tokenizer, settings.probes, context)
        for question in settings.questions:
            try:
                asked[question, f"{context:,}"] = QUESTIONS[question](tokens, tokenizer, len(begin))
            except LLMDropError as error:
                run.not_run[f"{item.model.name}, {question} in {context} tokens"] = str(error)
    for shots in settings.shots or ():
        try:
            requests = many_shot_probes(*load_intents(BANKING), tokenizer, shots, settings.shots_limit, begin)
        except NotAvailable as error:
            run.not_run[BANKING] = str(error)
            break
        longest = max(len(context) + len(answer) for context, answer in requests)
        if _has_room(run, item, f"{BANKING} with {shots} examples of each label", longest):
            asked[BANKING, CONTEXTS.get(shots, f"{shots} of each")] = requests
    shared = item.identity | {"plans": tuple(plans)}
    return {which: ProbeWork(**shared, probe=which[0], requests=tuple(requests)) for which, requests in asked.items()}


# ---- scores -------------------------------------------------------------------------------------------------------------


def abilities_of(run: Run, asked: Asked, choices: "Pooled | None") -> list[Ability]:
    """The scores of all abilities, in the order in which they are shown."""
    cells, plans = list(asked.plans), list(asked.plans.values())
    found = [
        Ability("text", cells, sample_values(run, work, plans, "hits"), of_text=True, corpus=corpus, seed=seed)
        for seed, (corpus, work) in enumerate(asked.text.items())
    ]
    if choices:
        found.append(Ability(CHOICES, cells, choices.right, choices.chance, seed=50))
    same = sample_values(run, asked.continuation, plans[1:], "same")
    found.append(Ability(CONTINUATION, cells, np.hstack([np.ones((len(same), 1)), same]), of_text=True))
    for seed, ((probe, context), item) in enumerate(asked.probes.items(), 10):
        chance = 0.1 if probe == RETRIEVAL else 0.0  # a digit is guessed in one of ten
        found.append(Ability(probe, cells, sample_values(run, item, plans, "found"), chance, context=context, seed=seed))
    if asked.answers:
        values = under_plans(run, asked.answers, asked.answer_plans.values())
        scores = np.array([value["metrics"]["exact_match"] for value in values]).T
        found.append(Ability(ANSWERS, list(asked.answer_plans), scores, seed=100))
    return found


@dataclasses.dataclass(frozen=True)
class Pooled:
    """The choices made in the documents of all tasks, in each cell; each document counts as one."""

    confidence: np.ndarray  # float64 (n_documents, n_cells)
    right: np.ndarray
    chance: float


def pooled(run: Run, asked: Asked) -> Pooled | None:
    """None without tasks that have choices."""
    if not asked.choices:
        return None
    plans = list(asked.plans.values())
    sure, right = (
        np.vstack([sample_values(run, work, plans, name) for work in asked.choices]) for name in ("confidence", "right")
    )
    chances = np.concatenate([np.full(len(first["right"]), first["chance"]) for work in asked.choices
                              for first in under_plans(run, work, plans[:1])])  # fmt: skip
    return Pooled(sure, right, float(chances.mean()))
