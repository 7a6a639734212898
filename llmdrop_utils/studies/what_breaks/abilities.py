"""Notebook 08, abilities: what each is measured by, under which plans, and the scores that come out."""

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from ...base import stats
from ...base.errors import LLMDropError, NotApplicable, NotAvailable
from ...base.settings import Counts, Positive, Settings
from ...dropping.plan import DropPlan
from ...measure.importance import Importance
from ...models.families import position_limit
from ...models.load import load_config, load_tokenizer
from ...selection.ranking import drop_sequence, select
from ...sources.probes import COPIED, copy_probes, load_intents, many_shot_probes, retrieval_probes
from ...sources.task_data import first_prompt, load_task
from ...sources.texts import text_beginning
from ..ablations.work import ContinuationWork
from ..curves import Tasks, held_out, task_work, text_work, under_plans
from ..profile import section
from ..run import Run
from ..speedup.loads import n_layers_of
from ..work import DENSE, DENSE_CELL, Cell, ImportanceWork, PlansWork, TaskWork, TextWork, Work
from .work import ConfidenceWork, GenerationWork, ProbeWork, as_prompt

MATHEMATICS = "gsm8k"
ROOM = 1024  # tokens of five examples, a question and its answer
BANKING = "banking77"
CONTEXTS = {1: "2k", 2: "4k", 3: "7k", 4: "9k", 5: "14k"}  # by examples of each label (Table 12)
CHOICES, CONTINUATION, ANSWERS = "choices", "dense continuation", "mathematics"  # names of abilities
COPY, RETRIEVAL = "copy", "retrieval"


@section("what_breaks")
class WhatBreaks(Settings):
    """How many layers are dropped, and how much is asked of each ability."""

    n_drop: Counts  # attention layers, and MLPs
    text_samples: Positive  # of held-out text of each corpus
    task_limit: Positive | None  # documents of each task with choices; null: all
    answers_limit: Positive | None  # documents of GSM8K
    answers_n: Counts  # attention layers dropped for them
    answer_tokens: Positive  # of the answer to the first question that is shown
    prompts: Positive  # of held-out text, each continued
    prompt: Positive  # tokens
    new_tokens: Positive
    contexts: Counts  # tokens that a question about the context reads
    probes: Positive  # questions of a kind at each context
    shots: Counts | None  # examples of each label before a query of BANKING77, from the hub; null: not asked
    shots_limit: Positive | None  # queries


@dataclasses.dataclass(frozen=True)
class Ability:
    """The scores of one ability in each cell."""

    name: str
    cells: Sequence[Cell]
    scores: np.ndarray  # float64 (n_samples, n_cells)
    chance: float = 0.0
    of_text: bool = False  # neighbouring samples are alike, and are drawn together
    asks_context: bool = False  # its name says which probe, and how long the context is
    seed: int = 0  # of the bootstrap: samples of another kind are others

    @property
    def n(self) -> float:
        """Independent samples."""
        return stats.independent(len(self.scores)) if self.of_text else len(self.scores)

    @property
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
    answer_cells: list[Cell]
    text: dict[str, TextWork]  # by corpus
    continuation: ContinuationWork
    generation: GenerationWork
    probes: dict[tuple[str, str], ProbeWork]  # by probe and context
    choices: list[ConfidenceWork]
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
    plans = plans_of(scores, settings.n_drop)
    if len(plans) == 1:
        few = f"{item.model.name} has {n_layers_of(item.model)} layers, and the profile drops {min(settings.n_drop)} or more."
        raise NotApplicable(few)
    text = {}
    for each in (item, *others):
        work = text_work(run, each, plans.values())
        text[each.corpus] = dataclasses.replace(work, tokens=work.tokens[: settings.text_samples])
    tokens = text[item.corpus].tokens
    if settings.prompt > tokens.shape[1]:
        raise LLMDropError(
            f"The profile's prompts of {settings.prompt} tokens are longer than its samples, {tokens.shape[1]} tokens."
        )
    prompts = tokens[: settings.prompts, : settings.prompt]
    read = {**item.identity, "corpus": item.corpus, "plans": tuple(plans.values())}
    dropped = tuple(plan for cell, plan in plans.items() if cell != DENSE_CELL)
    choices = task_work(run, item.model, tasks, plans.values(), settings.task_limit)
    mathematics = _mathematics(run, item)
    first = _first_prompt(run, item, mathematics, tokenizer) if mathematics else None
    answer_cells = [DENSE_CELL, *(cell for n in settings.answers_n if (cell := Cell("attention", n)) in plans)]
    asked = {MATHEMATICS: mathematics} if mathematics else {}
    of_answers = [plans[cell] for cell in answer_cells]
    say = read | {"plans": tuple(of_answers), "new_tokens": settings.answer_tokens}
    answers = task_work(run, item.model, asked, of_answers, settings.answers_limit)
    return Asked(
        item, plans, answer_cells, text,
        ContinuationWork(**read | {"plans": dropped}, tokens=prompts, new_tokens=settings.new_tokens),
        GenerationWork(**read, tokens=prompts, new_tokens=settings.new_tokens),
        _probes(run, item, read, tokenizer),
        [ConfidenceWork(**{field.name: getattr(work, field.name) for field in dataclasses.fields(work)}) for work in choices],
        answers[0] if answers else None,
        GenerationWork(**say, tokens=first) if first is not None else None,
    )  # fmt: skip


def plans_of(scores: Importance, counts: Sequence[int]) -> dict[Cell, DropPlan]:
    """Nothing dropped, and n attention layers or MLPs, for each n that the model has."""
    plans = {DENSE_CELL: DENSE}
    for kind in ("attention", "mlp"):
        for n in (n for n in counts if n < len(drop_sequence(scores, kind))):
            plans[Cell(kind, n)] = select(scores, kind, n)
    return plans


def _mathematics(run: Run, item: ImportanceWork) -> list | None:
    """GSM8K with the paper's number of examples; None if it is unavailable, or if the model has no room for it."""
    tasks = run.section(Tasks)
    if (position_limit(load_config(item.model)) or np.inf) < ROOM:
        return None
    load = lambda name: load_task(name, None, tasks.data)  # noqa: E731
    found = run.available([MATHEMATICS], load, "tasks", NotAvailable, several=True, name=lambda name: f"task {name}")
    return found[0] if found else None


def _first_prompt(run: Run, item: ImportanceWork, mathematics: list, tokenizer) -> torch.LongTensor | None:
    """The first question with its examples, (1, n) token ids; None if the model has no room for it and for an answer."""
    prompt, known = as_prompt(first_prompt(mathematics), tokenizer), position_limit(load_config(item.model))
    longest = prompt.shape[1] + run.section(WhatBreaks).answer_tokens
    if known is not None and longest > known:
        reason = f"It takes {longest} tokens with its answer, and the model knows {known} positions."
        run.not_run[f"{item.model.name}, the first question of {MATHEMATICS}"] = reason
        return None
    return prompt


def _probes(run: Run, item: ImportanceWork, read: dict, tokenizer) -> dict[tuple[str, str], ProbeWork]:
    """Questions about the context, at each of the profile's lengths that the model has positions for."""
    settings, begin = run.section(WhatBreaks), text_beginning(tokenizer)
    known = position_limit(load_config(item.model)) or np.inf
    found = {}
    for context in settings.contexts:
        what = f"{item.model.name}, contexts of {context} tokens"
        if context + 2 * COPIED > known:
            run.not_run[what] = f"The model knows {known} positions."
            continue
        tokens = held_out(item, tokenizer, settings.probes, context)
        asked = {COPY: copy_probes(tokens, len(begin))}
        with contextlib.suppress(LLMDropError):  # where its sentences do not fit, which the length tells
            asked[RETRIEVAL] = retrieval_probes(tokens, tokenizer, len(begin))
        for probe, requests in asked.items():
            found[probe, f"{context:,}"] = ProbeWork(**read, tokens=tokens, probe=probe, requests=tuple(requests))
    for shots in settings.shots or []:
        what = f"{item.model.name}, {BANKING} with {shots} examples of each label"
        try:
            requests = many_shot_probes(*load_intents(BANKING), tokenizer, shots, settings.shots_limit, begin)
        except NotAvailable as error:
            run.not_run[BANKING] = str(error)
            break
        if (longest := max(len(context) + len(answer) for context, answer in requests)) > known:
            run.not_run[what] = f"It takes {longest} tokens, and the model knows {known} positions."
            continue
        label = CONTEXTS.get(shots, f"{shots} of each")
        found[BANKING, label] = ProbeWork(
            **read, tokens=torch.empty(0, dtype=torch.long), probe=BANKING, requests=tuple(requests)
        )
    return found


# ---- scores -------------------------------------------------------------------------------------------------------------


def abilities_of(run: Run, asked: Asked) -> list[Ability]:
    """The scores of all abilities, in the order in which they are shown."""
    cells, plans = list(asked.plans), list(asked.plans.values())
    found = []
    for seed, (corpus, work) in enumerate(asked.text.items()):
        scores = column(run, work, plans, "hits")
        found.append(Ability(f"text, {corpus}", cells, scores, of_text=True, seed=seed))
    if asked.choices:
        found.append(pooled(run, asked).ability(cells))
    same = column(run, asked.continuation, plans[1:], "same")
    found.append(Ability(CONTINUATION, cells, np.hstack([np.ones((len(same), 1)), same]), of_text=True))
    for seed, ((probe, context), item) in enumerate(asked.probes.items(), 10):
        chance = 0.1 if probe == RETRIEVAL else 0.0  # a digit is guessed in one of ten
        found.append(
            Ability(f"{probe}, {context}", cells, column(run, item, plans, "found"), chance, asks_context=True, seed=seed)
        )
    if asked.answers:
        scores = np.array([row["metrics"]["exact_match"] for row in under_plans(run, asked.answers, _plans(asked))]).T
        found.append(Ability(ANSWERS, asked.answer_cells, scores, seed=100))
    return found


def _plans(asked: Asked) -> list[DropPlan]:
    return [asked.plans[cell] for cell in asked.answer_cells]


def column(run: Run, item: PlansWork, plans: Sequence[DropPlan], name: str) -> np.ndarray:
    """One of the values of an item, of each sample under each plan: float64 (n_samples, n_plans)."""
    return np.array([value[name] for value in under_plans(run, item, plans)]).T


@dataclasses.dataclass(frozen=True)
class Pooled:
    """The choices made in the documents of all tasks, in each cell."""

    confidence: np.ndarray  # float64 (n_documents, n_cells)
    right: np.ndarray
    chance: float

    def ability(self, cells: Sequence[Cell]) -> Ability:
        return Ability(CHOICES, cells, self.right, self.chance, seed=50)


def pooled(run: Run, asked: Asked) -> Pooled:
    """Each document counts as one."""
    plans, values = list(asked.plans.values()), []
    for work in asked.choices:
        values.append(under_plans(run, work, plans))
    stack = lambda name: np.vstack([np.array([row[name] for row in rows]).T for rows in values])  # noqa: E731
    counts = [len(rows[0]["right"]) for rows in values]
    return Pooled(
        stack("confidence"), stack("right"), float(np.average([rows[0]["chance"] for rows in values], weights=counts))
    )
