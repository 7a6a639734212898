"""Notebook 12: is attention the redundant kind in text encoders, vision transformers and encoder-decoders, too, and what does
dropping it cost?

The decoder beside them is the run's own: its numbers are read from the tables of notebooks 01 and 02.
"""

import dataclasses

from ...base import stats
from ...base.errors import NotAvailable
from ...base.settings import Names, Positive, Settings
from ...measure.importance import Importance
from ...models.config import OTHERS, kind_of, read_config
from ...models.encoders import attention_of, longest_text, read_image_settings
from ...models.locate import LocatedModel, locate_available
from ...models.outlook import Shape
from ...report.tables import Column, Key, Tables, table
from ...selection.ranking import kinds_of, select
from ..gather import gathered
from ..profile import Profile, section
from ..run import Run, study
from ..similarity.study import TABLES as SIMILARITY
from ..similarity.study import contrast_rows, importance_rows
from ..work import DENSE, DENSE_CELL, Cell, Work
from .pair_rows import TABLES as PAIR_TABLES
from .pair_rows import pair_importance_rows, target_rows
from .rows import decoder_quality_rows, decoder_rows, gap_rows, half_rows, measures_of, quality_rows
from .work import DataSet, EmbeddingWork, EncoderImportanceWork, TargetWork

READ = ("01_similarity", "02_drop_curves")
KINDS = ("attention", "mlp", "block")
SHARE = Column("share", "Share of the layers", ".0%")
DROPPED = Key("n", "Dropped", "d")
TABLES = {
    "models": table(
        "model", Column("reads", "Reads"), Column("parameters", "Parameters", ",d"), Column("n_layers", "Layers", "d"),
        Column("input", "One sample"),
    ),
    "importance": SIMILARITY["importance"],
    "contrast": SIMILARITY["contrast"],
    "quality": table(
        "model data measure kind", DROPPED, SHARE, Column("samples", "Samples", "d"),
        Column("chance", "By guessing", ".3f"), Column("value", "Value", ".3f", "low", "high"), "low high",
        Column("retained", "Retained of what lies above guessing", ".1%", "retained_low", "retained_high"),
        "retained_low retained_high",
    ),
    "gaps": table(
        "model measure", Key("other", "Attention beside"), DROPPED, SHARE,
        Column("difference", "Without attention minus without the other", "+.3f", "low", "high"), "low high",
    ),
    "half": table(
        "model measure", Column("n", "Dropped", "d"), Column("chance", "By guessing", ".3f"), Column("dense", "Dense", ".3f"),
        Column("attention", "Without attention", ".3f", "attention_low", "attention_high"), "attention_low attention_high",
        Column("mlp", "Without MLPs", ".3f", "mlp_low", "mlp_high"), "mlp_low mlp_high",
        Column("difference", "Difference", "+.3f", "low", "high"), "low high",
    ),
    "decoder": table("model kind layer", Column("importance", "Importance", ".4f", "low", "high"), "low high"),
    "decoder_quality": table(
        "model kind", DROPPED, SHARE,
        Column("retained", "Next-token accuracy retained", ".1%", "retained_low", "retained_high"),
        "retained_low retained_high",
    ),
    **PAIR_TABLES,
}  # fmt: skip


@section("others")
class Others(Settings):
    """Encoders of text and of images and encoder-decoders, what they read, and how much of it."""

    models: Names  # anything `load_encoder` or `load_encoder_decoder` takes
    texts: Names  # corpora whose passages text encoders and encoder-decoders read; the first chooses the layers
    words: Positive  # of each half of a passage
    images: Names  # sets of images that vision models read; the first chooses the layers
    n_samples: Positive  # passages, or images, that importance is measured on
    n_tested: Positive  # later ones, whose embeddings are compared
    steps: Positive  # shares of the layers that are dropped: so many, evenly up to all
    batch_size: Positive  # texts, or images, of a forward pass; changes speed and memory, not results


def _models(profile: Profile) -> tuple[list[LocatedModel], dict[str, str]]:
    return locate_available(profile.section(Others).models, OTHERS)


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is measured of one model."""

    scoring: list[EncoderImportanceWork]  # on each data set
    cells: list[Cell]
    testing: list[EmbeddingWork | TargetWork]  # under the plans of all cells, on each data set

    @property
    def work(self) -> list[Work]:
        return [*self.scoring, *self.testing]


@study("12_other_transformers", needs=[Others], tables=TABLES, models=_models, reads=READ, kinds=OTHERS)
def other_transformers(run: Run) -> Tables:
    """Notebook 12: importance of every sub-layer; and without some of them what is found by the embeddings of an encoder, and
    what a target costs an encoder-decoder."""
    settings = run.section(Others)
    several = len(settings.models) > 1
    located, reasons = _models(run.profile)
    run.not_run |= reasons
    # 1. Importance, which chooses the layers.
    scoring: dict[str, list[EncoderImportanceWork]] = {}
    for model in located:
        with run.one_of(model, several):
            data = _data_sets(run, model, settings.n_samples, 0)
            scoring[model.name] = [EncoderImportanceWork(**_identity(run, model), data=each) for each in data]
    run.measure([item for items in scoring.values() for item in items], several=several)
    # 2. Embeddings, or targets, without what was chosen.
    planned: list[Planned] = []
    for items in scoring.values():
        if items[0].model.name not in run.not_run:
            with run.one_of(items[0].model, several):
                planned.append(_planned(run, items))
    run.measure([item for each in planned for item in each.testing], several=several)
    # 3. Rows.
    done = run.measured([item for each in planned for item in each.work])
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
    for each in planned:
        if (model := each.scoring[0].model).name not in run.not_run:
            for name, rows in _rows(run, each).items():
                tables[name] += [{"model": model.name} | row for row in rows]
    return run.write(tables | _decoder_rows(run), done)


def reads(model: LocatedModel) -> str:
    """What a model reads: "text", "images", or "pairs" of a source and a target."""
    return {"text encoder": "text", "encoder-decoder": "pairs"}.get(kind_of(_config(model)) or "", "images")


def _config(model: LocatedModel):
    return read_config(model.name, model.folder, OTHERS)


def _identity(run: Run, model: LocatedModel) -> dict:
    """What every item about a model begins with."""
    shared = {"model": model, "dtype": run.profile.dtype, "attention": attention_of(_config(model))}
    return shared | {"batch_size": run.section(Others).batch_size}


def _about(run: Run, model: LocatedModel, n_layers: int) -> dict:
    """A row of the table `models`."""
    if reads(model) == "text":
        cut = longest_text(model)
        sample = f"{run.section(Others).words} words" + (f", cut at {cut} tokens" if cut else "")
    else:
        images = read_image_settings(model)
        numbers = ["/".join(f"{x:g}" for x in each) for each in (images.mean, images.std)]
        sample = f"{images.height} x {images.width} pixels, mean {numbers[0]}, standard deviation {numbers[1]}"
    return {
        "reads": reads(model),
        "parameters": Shape.of_encoder(_config(model)).parameters,
        "n_layers": n_layers,
        "input": sample,
    }


def data_set(settings: Others, model: LocatedModel, n: int, skip: int = 0, name: str | None = None) -> DataSet:
    """What a model reads, n samples after the first `skip`: passages of a corpus or images of a set, by default the first."""
    if reads(model) == "images":
        return DataSet.of_images(name or settings.images[0], n, skip)
    return DataSet.of_passages(name or settings.texts[0], n, settings.words, skip)


def _data_sets(run: Run, model: LocatedModel, n: int, skip: int) -> list[DataSet]:
    """The same of each corpus, or set of images, that is available."""
    settings = run.section(Others)
    names = settings.images if reads(model) == "images" else settings.texts
    return run.available(names, lambda name: data_set(settings, model, n, skip, name), "data sets", NotAvailable)


def _planned(run: Run, scoring: list[EncoderImportanceWork]) -> Planned:
    settings, scores = run.section(Others), _scores(run, scoring[0])
    plans = {DENSE_CELL: DENSE}
    for kind in (kind for kind in kinds_of(scores) if kind != "joint"):
        plans |= {Cell(kind, n): select(scores, kind, n) for n in dropped_counts(len(scores.order(kind)), settings.steps)}
    model = scoring[0].model
    work = TargetWork if reads(model) == "pairs" else EmbeddingWork
    testing = [
        work(**_identity(run, model), data=data, plans=tuple(plans.values()))
        for data in _data_sets(run, model, settings.n_tested, settings.n_samples)
    ]
    return Planned(scoring, list(plans), testing)


def dropped_counts(n_layers: int, steps: int) -> list[int]:
    """How many layers are dropped: so many shares, evenly up to all: 12 layers in 6 steps are 2, 4, 6, 8, 10, 12."""
    return sorted({round(n_layers * step / steps) for step in range(1, steps + 1)} - {0})


def _scores(run: Run, item: EncoderImportanceWork) -> Importance:
    return Importance.from_json(run.values(item)[0], item.model.identity)


def _rows(run: Run, each: Planned) -> dict[str, list[dict]]:
    """Rows of one model, without the column `model`."""
    model = each.scoring[0].model
    scores = {item.data.name: _scores(run, item) for item in each.scoring}
    if reads(model) == "pairs":
        return _pair_rows(run, each, scores)
    draws = {
        name: {kind: stats.text_means(s.per_sample[kind], s.weights, seed) for kind in KINDS}
        for seed, (name, s) in enumerate(scores.items())
    }
    n_layers = len(next(iter(scores.values())).importance["attention"])
    measures = measures_of({item.data.name: (run.values(item), item.data.groups, item.data.chances) for item in each.testing})
    return {
        "models": [_about(run, model, n_layers)],
        "importance": importance_rows(scores, draws),
        "contrast": contrast_rows(scores, draws),
        "quality": quality_rows(each.cells, measures, n_layers),
        "gaps": gap_rows(each.cells, measures, n_layers),
        "half": half_rows(each.cells, measures, n_layers),
    }


def _pair_rows(run: Run, each: Planned, scores: dict[str, Importance]) -> dict[str, list[dict]]:
    """The same of an encoder-decoder."""
    model, first = each.scoring[0].model, next(iter(scores.values()))
    n_layers = {kind: len(first.order(kind)) for kind in first.per_sample}
    about = {
        "parameters": Shape.of_encoder(_config(model)).parameters,
        "encoder_layers": n_layers["block"] - n_layers["cross_attention"],
        "decoder_layers": n_layers["cross_attention"],
        "input": f"{run.section(Others).words} words, then as many to predict",
    }
    targets = [
        {"corpus": item.data.name} | row for item in each.testing for row in target_rows(each.cells, run.values(item), n_layers)
    ]
    return {"pairs": [about], "pair_importance": pair_importance_rows(scores), "targets": targets}


def _decoder_rows(run: Run) -> dict[str, list[dict]]:
    """The run's first decoder, as far as notebooks 01 and 02 have measured it."""
    importance, lacking = gathered(run.profile, READ[0])
    quality, more = gathered(run.profile, READ[1])
    run.not_run |= lacking | more
    return {"decoder": decoder_rows(importance), "decoder_quality": decoder_quality_rows(quality)}
