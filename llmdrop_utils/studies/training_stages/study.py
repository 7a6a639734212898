"""Notebook 07: importance, and what dropping costs, at each stage of training."""

import dataclasses
import sys

import torch
from tqdm import tqdm

from ...base.errors import LLMDropError
from ...base.settings import Names, Positive, Settings
from ...measure.importance import Importance
from ...measure.metrics import KINDS
from ...models.load import load_tokenizer
from ...models.locate import shown_name
from ...models.recipe import load_recipe, untrained
from ...models.series import Series, known_models, locate_series
from ...report.tables import Column, Tables, table
from ...selection.ranking import select
from ...sources.catalogue import catalogue
from ...sources.texts import check_held_out, load_documents, load_tokens, pack, text_beginning
from ..profile import Profile, section
from ..run import Run, fitting_length, identity_of, study
from ..work import DENSE, ImportanceWork, TextWork, Work
from .rows import SHARES, Followed, Plans, StageValues, count


@section("stages")
class Stages(Settings):
    """Checkpoints of training runs, how important their sub-layers are, and what dropping costs them (paper, Sec. 6.2)."""

    series: Names  # whatever `locate_series` takes: names in data/sources.yaml, directories of checkpoints, models
    seeds: Positive  # how often a series is trained, if it has a recipe
    corpus: str  # of which a series with a recipe has not seen the first documents
    n_samples: Positive  # blocks that importance is measured on
    text_samples: Positive  # further blocks, to see what dropping costs
    seq_len: Positive  # tokens per block
    batch_size: Positive = 4  # blocks per forward pass; changes speed and memory, not results


TOKENS = Column("tokens", "Tokens seen", ",d")
PROGRESS = Column("progress", "Training seen", ".1%")
KIND_AND_STAGE = ("model seed position stage step", TOKENS, PROGRESS, "kind")
TABLES = {
    "runs": table(
        "model seed",
        Column("n_layers", "Layers", "d"),
        Column("parameters", "Parameters", ",d"),
        Column("tokens", "Tokens trained on", ",d"),
        Column("text_tokens", "Tokens of text", ",d"),
        Column("unigram_entropy", "Loss by token frequencies alone", ".3f"),
    ),
    "stages": table(
        "model seed position stage step", TOKENS, PROGRESS,
        Column("nll", "Loss on held-out text, nats per token", ".3f", "low", "high"), "low high",
        Column("same_as", "Same as"),
    ),
    "importance": table(*KIND_AND_STAGE, "layer", Column("importance", "Importance", ".4f", "low", "high"), "low high"),
    "means": table(
        *KIND_AND_STAGE, "layers", Column("importance", "Mean importance", ".4f", "low", "high"), "low high",
        Column("above_attention", "Above attention", "+.4f", "above_low", "above_high"), "above_low above_high",
    ),
    "change": table(
        *KIND_AND_STAGE, "layers", Column("change", "Last stage minus this one", "+.4f", "low", "high"), "low high"
    ),
    "agreement": table(
        *KIND_AND_STAGE, Column("correlation", "Rank correlation", ".2f", "low", "high"), "low high",
        Column("n", "Dropped", "d"), Column("shared", "Shared", "d"), Column("by_chance", "By chance", ".1f"),
    ),
    "settled": table(
        "model seed", Column("position", "Position", "d"), Column("stage", "Settled from"), Column("step", "Step", "d"), TOKENS,
        Column("progress", "Training seen", ".1%", "low", "high"), "kind share", Column("n", "Dropped", "d"),
        Column("layers", "Layers"), "low high", Column("low_stage", "Earliest"), Column("high_stage", "Latest"),
    ),
    "cost": table(
        *KIND_AND_STAGE, "share", Column("n", "Dropped", "d"),
        Column("cost", "Added loss, nats per token", "+.3f", "low", "high"), "low high",
        Column("kl", "KL from dense, nats per token", ".3f"),
    ),
    "losses": table("model seed step", TOKENS, Column("loss", "Training loss, nats per token", ".3f")),
}  # fmt: skip


@study(
    "07_training_stages",
    needs=[Stages],
    tables=TABLES,
    models=lambda profile: known_models(profile.section(Stages).series),
)
def training_stages(run: Run) -> Tables:
    """Notebook 07: importance at every stage of the profile's series, and what dropping the finally chosen layers costs there.

    A series with a recipe is trained first (once: a forced run measures anew, on the same checkpoints). Of several series or
    stages, one that is unavailable is listed in the table `not_run`.
    """
    stages = run.section(Stages)
    # 1. The series, and blocks of text that they were not trained on.
    found, jobs = _locate(run), []
    for series in found:
        with run.one_of(series.stages[-1].model, len(found) > 1):
            jobs.append(_Job(series, *_held_out_blocks(series, stages), run.profile))
    # 2. Importance at the last stage: it says which layers would be dropped.
    last = [job.importance_at(-1) for job in jobs]
    run.measure(last, several=True)
    # 3. Importance, and loss without those layers, at every stage.
    followed: list[tuple[Series, Plans, list[tuple[ImportanceWork, TextWork]]]] = []
    work: list[Work] = []
    for job, scores in zip(jobs, last, strict=True):
        if scores.model.name not in run.not_run:
            plans = _plans(run.importance(scores))
            pairs = [(job.importance_at(i), job.text_at(i, plans)) for i in range(len(job.series.stages) - 1)]
            pairs.append((scores, job.text_at(-1, plans)))
            followed.append((job.series, plans, pairs))
            work += [item for pair in pairs for item in pair if item is not scores]
    run.measure(work, several=True)
    # 4. Tables. A series whose last stage failed has nothing to be compared with.
    followed = [one for one in followed if one[0].stages[-1].model.name not in run.not_run]
    done: list[Work] = run.measured([item for *_, pairs in followed for pair in pairs for item in pair])
    rows: dict[str, list[dict]] = {name: [] for name in TABLES}
    for series, plans, pairs in followed:
        measured = {i: _values(run, *pair) for i, pair in enumerate(pairs) if pair[0].model.name not in run.not_run}
        for name, more in Followed(series, plans, measured).rows().items():
            rows[name] += more
    return run.write(rows, done, [_training_provenance(series) for series, *_ in followed if series.recipe is not None])


def _training_provenance(series: Series) -> dict:
    """What was recorded when a series was trained on this machine."""
    return series.run | {"model": series.name, "dtype": "bfloat16" if series.run["bf16"] else "float32"}


# ---- what to measure ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One series, and the blocks of text that it is measured on."""

    series: Series
    for_scores: torch.LongTensor  # (n_samples, seq_len)
    for_text: torch.LongTensor  # (text_samples, seq_len)
    profile: Profile

    def importance_at(self, stage: int) -> ImportanceWork:
        """Importance at a stage."""
        return ImportanceWork(**self._shared(stage), tokens=self.for_scores, batch_size=self.profile.section(Stages).batch_size)

    def text_at(self, stage: int, plans: Plans) -> TextWork:
        """Loss of the dense model and under each plan at a stage."""
        return TextWork(**self._shared(stage), tokens=self.for_text, plans=(DENSE, *plans.values()))

    def _shared(self, stage: int) -> dict:
        return identity_of(self.series.stages[stage].model, self.profile) | {"corpus": self.profile.section(Stages).corpus}


def _locate(run: Run) -> list[Series]:
    """The profile's series under each seed; training shows a bar with the time left."""
    stages = run.section(Stages)

    def locate(name: str) -> list[Series]:
        has_recipe = "trained" in catalogue()["series"].get(name, {})
        left = untrained(name, list(range(stages.seeds))) if has_recipe else []
        total = load_recipe(name).tokens * len(left) if left else 0
        with tqdm(total=total, unit=" tokens", unit_scale=True, mininterval=2, desc=f"training {name}", file=sys.stderr,
                  disable=not total, leave=False) as bar:  # fmt: skip
            series, missing = locate_series(name, stages.seeds, bar.update)
        run.not_run |= missing
        return series

    return [series for found in run.available(stages.series, locate, "series", name=shown_name) for series in found]


def _held_out_blocks(series: Series, stages: Stages) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Blocks to measure importance on, and further ones to see what dropping costs; a recipe kept them out of its training."""
    tokenizer = load_tokenizer(series.stages[-1].model)
    seq_len = fitting_length(series.stages[-1].model, stages.seq_len)
    n = stages.n_samples + stages.text_samples
    if series.recipe is not None and stages.corpus in series.recipe.corpora:
        held_out = load_documents(stages.corpus)[: series.recipe.held_out]
        blocks = len(pack(held_out, tokenizer, seq_len))
        if blocks < n:
            raise LLMDropError(
                f"The profile asks for {n} blocks of {seq_len} tokens of {stages.corpus!r}, but the {len(held_out)} "
                f"documents that {series.name} was not trained on hold {blocks}. Ask for fewer, or hold more out."
            )
    tokens = load_tokens(stages.corpus, tokenizer, n, seq_len)
    for_scores, for_text = tokens[: stages.n_samples], tokens[stages.n_samples :]
    check_held_out(for_text, for_scores, len(text_beginning(tokenizer)))
    return for_scores, for_text


def _plans(scores: Importance) -> Plans:
    """(kind, share) -> what is dropped by the scores of the last stage. The plans forget that model: they serve all stages."""
    n_layers = scores.importance["block"].size
    return {
        (kind, share): dataclasses.replace(select(scores, kind, count(n_layers, share)), model=None)
        for kind in KINDS
        for share in SHARES
    }


def _values(run: Run, scores: ImportanceWork, text: TextWork) -> StageValues:
    keys = (plan.key for plan in text.plans)
    return StageValues(run.importance(scores), dict(zip(keys, run.values(text), strict=True)))
