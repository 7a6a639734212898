"""Notebook 10: how many more layers can go if what is kept makes up for them: by a repair, by healing, by the choice."""

import dataclasses
from typing import Annotated, Any

import torch

from ...base.errors import NotApplicable, NotAvailable
from ...base.settings import Counts, Names, NamesByName, Positive, PositiveNumber, Settings
from ...derive.healing import Healing
from ...dropping.plan import DropPlan
from ...measure.importance import Importance
from ...models.load import load_config, load_tokenizer, model_of_shape
from ...report.tables import Column, Key, Tables, table
from ...selection.ranking import select
from ...sources.probes import copy_probes
from ...sources.texts import check_held_out, load_tokens, text_beginning
from ..curves import Tasks, Text, held_out, rank_layers, task_work, text_work
from ..profile import Calibration, known, section
from ..run import Run, fitting_length, importance_work, study
from ..speedup.loads import n_layers_of
from ..what_breaks.work import ConfidenceWork, GenerationWork, ProbeWork
from ..work import DENSE, ImportanceWork, TextWork, Work
from .ranking import MORE, RankingWork
from .ranking_rows import further_rows, importance_rows, ranked, ranking_rows
from .rows import DENSE_VERSION, Version, made_rows, order_rows, quality_rows, regained_rows
from .work import ORDERS, PLAIN, WAYS, ChoiceWork, MadeWork, obstacles

COSINE = "cosine"
DROPPED = Key("n", "Dropped", "d")
OF_VERSION = ("model", Key("layers", "Layers by"), Key("way", "Made up for by"), DROPPED)
TABLES = {
    "made": table(
        *OF_VERSION,
        Column("seconds", "Seconds", ".0f"), Column("parameters", "Parameters more", ",d"),
        Column("tokens", "Tokens read", ",d"), Column("cache", "Cache of 2,048 tokens, share of the dense", ".1%"),
    ),
    "quality": table(
        *OF_VERSION, "measure", Column("samples", "Samples", "d"), Column("value", "Value", ".3f", "low", "high"), "low high",
    ),
    "regained": table(
        *OF_VERSION, Key("against", "Beside"),
        Column("regained", "Share of the loss regained", ".0%", "low", "high"), "low high",
        Column("difference", "Nats per token less", "+.3f", "difference_low", "difference_high"),
        "difference_low difference_high",
    ),
    "orders": table("model", Key("layers", "Layers by"), Key("position", "Position", "d"), Column("layer", "Layer", "d"),
                    Column("divergence", "KL left, nats per token", ".3f")),
    "importance": table(*OF_VERSION, "kind layer", Column("importance", "Importance", ".4f", "low", "high"), "low high"),
    "rankings": table(
        *OF_VERSION, "kind", Column("samples", "Samples", "d"), Column("n_left", "Layers left", "d"),
        Column("correlation", "Rank correlation with the dense model", ".2f", "low", "high"), "low high",
        Column("relative", "Mean importance over dense", ".2f", "relative_low", "relative_high"), "relative_low relative_high",
        Column("more", "Further layers", "d"), Column("dense_next", "Next by the dense order"),
        Column("own_next", "Next by its own"), Column("shared", "Shared", "d"), Column("by_chance", "By chance", ".1f"),
    ),
    "further": table(
        *OF_VERSION, Column("more", "Further layers", "d"),
        Column("by_dense_order", "Nats per token lost, by the dense order", ".3f", "dense_low", "dense_high"),
        "dense_low dense_high",
        Column("by_own_order", "By its own order", ".3f", "own_low", "own_high"), "own_low own_high",
        Column("gained", "Less by its own", "+.3f", "gained_low", "gained_high"), "gained_low gained_high",
    ),
}  # fmt: skip


@section("keep_more")
class KeepMore(Settings):
    """How much is dropped, what makes up for it, and how much text each of these reads."""

    n_drop: Counts  # attention layers
    ways: Annotated[Names, known("way", WAYS)]  # beside dropping alone
    chosen: Annotated[NamesByName, known("order", ORDERS)] | None  # layers that something else than cosine chose: ways
    n_samples: Positive  # calibration samples of each corpus that fits read
    search_samples: Positive  # of each corpus, for these orders
    candidates: Positive  # layers that each step of the search with repair looks at
    healing_samples: Positive  # of each corpus, of the length of calibration samples
    healing_tokens: Positive
    healing_batch: Positive
    healing_rate: PositiveNumber  # the learning rate at its highest
    text_samples: Positive  # held-out samples of each corpus
    task_limit: Positive | None  # documents of each task
    context: Positive  # tokens that a question about the context reads
    probes: Positive
    prompts: Positive  # of held-out text, whose dense continuation is read
    prompt: Positive
    new_tokens: Positive

    @property
    def healing(self) -> Healing:
        """How the ways that heal do it."""
        return Healing(self.healing_rate, self.healing_batch, tokens=self.healing_tokens)


@dataclasses.dataclass(frozen=True)
class Kept:
    """One model: its versions, and the items that they are measured by."""

    item: ImportanceWork
    choices: dict[str, ChoiceWork]
    works: dict[Version, MadeWork]


@study("10_keep_more", needs=[Calibration, Text, Tasks, KeepMore], tables=TABLES)
def keep_more(run: Run) -> Tables:
    """Notebook 10: each way to make up for dropped attention, at equal numbers dropped."""
    settings, (scoring, tasks) = run.section(KeepMore), rank_layers(run)
    choices = {name: members for name, members in tasks.items() if members[0].OUTPUT_TYPE == "multiple_choice"}
    # 1. What is chosen otherwise, and what the dense model writes: both are read by what follows.
    choosing: dict[str, dict[str, ChoiceWork]] = {}
    reasons: dict[str, dict[str, str]] = {}
    written: dict[str, GenerationWork] = {}
    others: dict[str, list[ImportanceWork]] = {}
    for item in scoring:
        with run.one_of(item.model):
            others[item.model.name] = importance_work(item.model, run.corpora(), run.profile)
            prompts = text_work(run, item, [DENSE], settings.text_samples).tokens[: settings.prompts, : settings.prompt]
            written[item.model.name] = GenerationWork(
                **item.identity, corpus=item.corpus, plans=(DENSE,), tokens=prompts, new_tokens=settings.new_tokens
            )
            most = max((n for n in settings.n_drop if n < n_layers_of(item.model)), default=0)
            if not most:
                there, least = n_layers_of(item.model), min(settings.n_drop)
                raise NotApplicable(f"{item.model.name} has {there} layers, and the profile drops {least} or more.")
            reasons[item.model.name] = obstacles(model_of_shape(item.model, torch.bfloat16, "meta"))
            looked_at = {"tokens": _mixed(others[item.model.name], settings.search_samples), "candidates": settings.candidates}
            choosing[item.model.name] = {
                by: ChoiceWork(**item.identity, **looked_at, by=by, n_drop=most)
                for by in settings.chosen or {}
                if by not in reasons[item.model.name]
            }
    orders = [work for of_model in choosing.values() for work in of_model.values()]
    run.measure([*written.values(), *orders])
    # 2. Versions of each model.
    kept: list[Kept] = []
    for item in run.measured(scoring):
        with run.one_of(item.model):
            name = item.model.name
            kept.append(_versions(run, item, others[name], written, choosing[name], choices, reasons[name]))
    run.measure([work for each in kept for work in each.works.values()])
    kept = [each for each in kept if each.item.model.name not in run.not_run]
    if not kept:
        raise NotAvailable("Nothing could be measured:\n" + "\n".join(run.not_run.values()))
    # 3. Rows.
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
    for each in kept:
        for name, rows in _rows(run, each).items():
            tables[name] += [{"model": each.item.model.name} | row for row in rows]
    work: list[Work] = [*scoring, *written.values(), *orders, *(w for each in kept for w in each.works.values())]
    return run.write(tables, run.measured(work))


def _mixed(items: list[ImportanceWork], n_samples: int) -> torch.LongTensor:
    """The first calibration samples of each corpus, in turns."""
    return torch.stack([item.tokens[:n_samples] for item in items], 1).flatten(0, 1)


def _versions(
    run: Run,
    item: ImportanceWork,
    corpora: list[ImportanceWork],
    written: dict[str, GenerationWork],
    choosing: dict[str, ChoiceWork],
    tasks: dict[str, list],
    reasons: dict[str, str],
) -> Kept:
    settings, tokenizer = run.section(KeepMore), load_tokenizer(item.model)
    begin = len(text_beginning(tokenizer))
    texts = [text_work(run, each, [DENSE], settings.text_samples) for each in corpora]
    for_healing = torch.stack(
        [_fresh(each, text.tokens, tokenizer, settings) for each, text in zip(corpora, texts, strict=True)], 1
    )
    generation = written[item.model.name]
    (value,) = run.values(generation)
    continued = tuple(zip(generation.tokens.tolist(), value["tokens"], strict=True))
    context = fitting_length(item.model, settings.context)
    copied = copy_probes(held_out(item, tokenizer, settings.probes, context), begin)
    asked: list[Any] = [  # each has plans
        *texts,
        *task_work(run, item.model, tasks, [DENSE], settings.task_limit, ConfidenceWork),
        ProbeWork(**item.identity, probe="copy", requests=tuple(copied), plans=(DENSE,)),
        ProbeWork(**item.identity, probe="continuation", requests=continued, plans=(DENSE,)),
    ]
    shared = item.identity | {
        "tokens": _mixed(corpora, settings.n_samples),
        "text": for_healing.flatten(0, 1),
    }

    def made(way: str, plan: DropPlan, *more: RankingWork) -> MadeWork:
        items = tuple(dataclasses.replace(each, plans=(plan,)) for each in (*asked, *more))
        return MadeWork(**shared, way=way, plan=plan, healing=settings.healing, items=items)

    chosen = settings.chosen or {}
    asked_for = {*settings.ways, *chosen, *(way for ways in chosen.values() for way in ways)}
    run.not_run |= {f"{item.model.name}, {way}": reason for way, reason in reasons.items() if way in asked_for}
    scores = run.importance(item).first(run.section(Calibration).n_samples)
    works = {DENSE_VERSION: made(PLAIN, DENSE)}
    for n in (n for n in settings.n_drop if n < n_layers_of(item.model)):
        plan = select(scores, "attention", n)
        ranking = _ranking(item, scores, texts, plan)
        works |= {Version(COSINE, way, n): made(way, plan, *ranking) for way in (PLAIN, *settings.ways) if way not in reasons}
        for by, work in choosing.items():
            plan = DropPlan(attention=tuple(run.values(work)[0]["layers"][:n]))
            works |= {Version(by, way, n): made(way, plan) for way in chosen[by] if way not in reasons}
    return Kept(item, choosing, works)


def _ranking(item: ImportanceWork, scores: Importance, texts: list[TextWork], plan: DropPlan) -> list[RankingWork]:
    """What tells how the layers are ranked that a plan leaves; nothing if it leaves a single attention layer."""
    order = tuple(layer for layer in scores.order("attention") if layer not in plan.attention)
    if len(order) < 2:
        return []
    tokens, read = item.tokens[: len(scores.weights)], tuple(text.tokens for text in texts)
    more, batch_size = min(MORE, len(order) - 1), item.batch_size
    return [
        RankingWork(**item.identity, tokens=tokens, texts=read, order=order, more=more, batch_size=batch_size, plans=(plan,))
    ]


def _fresh(item: ImportanceWork, tested: torch.LongTensor, tokenizer, settings: KeepMore) -> torch.LongTensor:
    """Blocks of the item's corpus after all that is measured on."""
    seq_len, begin = item.tokens.shape[1], len(text_beginning(tokenizer))
    used = item.tokens.numel() + max(tested.numel(), settings.probes * settings.context)
    skip = -(-used // (seq_len - begin)) + 1
    tokens = load_tokens(item.corpus, tokenizer, skip + settings.healing_samples, seq_len)[skip:]
    for each in (item.tokens, tested):
        if each.shape[1] <= seq_len:
            check_held_out(each, tokens, begin)
    return tokens


def _rows(run: Run, kept: Kept) -> dict[str, list[dict]]:
    values = {version: run.values(work) for version, work in kept.works.items()}
    scores: Importance = run.importance(kept.item).first(run.section(Calibration).n_samples)
    rankings = ranked(kept.works, values)
    most = max(version.n for version in kept.works)
    orders = {COSINE: (select(scores, "attention", most).attention, None)}
    for by, work in kept.choices.items():
        (found,) = run.values(work)
        orders[by] = (found["layers"][:most], found["divergence"] or None)
    return {
        "made": made_rows(kept.works, values, load_config(kept.item.model)),
        "quality": quality_rows(kept.works, values),
        "regained": regained_rows(kept.works, values),
        "orders": order_rows(orders),
        "importance": importance_rows(scores, rankings),
        "rankings": ranking_rows(scores, rankings),
        "further": further_rows(kept.works, values, rankings),
    }
