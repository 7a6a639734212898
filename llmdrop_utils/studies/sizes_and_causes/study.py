"""Notebook 11: does the finding hold at every size, and what makes an attention layer redundant?

Causes, and what dropping each attention layer alone costs, are measured here; all else is read from the tables of notebooks 01
to 04, 08 and 10. In a profile that runs its models one by one, each run measures its own model, and the profile's run compares
them all.
"""

import contextlib
from typing import NamedTuple

import numpy as np

from ...base.errors import LLMDropError, NotAvailable
from ...base.settings import Counts, Positive, Settings
from ...dropping.plan import DropPlan
from ...measure.causes import Causes
from ...models.load import load_config
from ...models.locate import LocatedModel, locate_available, locate_model
from ...models.outlook import Shape
from ...report.tables import Column, Key, Tables, frame, table
from ...selection.ranking import select
from ..curves import Text, rank_layers, text_work
from ..gather import gathered, provenance
from ..profile import Calibration, Profile, section
from ..run import Run, study
from ..work import DENSE, DENSE_CELL, Cell, ImportanceWork, TextWork, Work
from . import compare, rows
from .work import CausesWork, RankWork

READ = ("01_similarity", "02_drop_curves", "03_joint_drop", "04_ablations", "08_what_breaks", "10_keep_more")
OWN = {  # what is measured here
    "models": table(
        "model", Column("parameters", "Parameters", ",d"), Column("n_layers", "Layers", "d"), Column("corpus", "Read")
    ),
    "causes": table("model cause layer", Column("value", "Value", ".4g", "low", "high"), "low high"),
    "layers": table(
        "model layer", Column("importance", "Importance of attention", ".4f", "low", "high"), "low high",
        Column("kl", "KL when it is dropped alone, nats per token", ".4f", "kl_low", "kl_high"), "kl_low kl_high",
    ),
    "predictors": table(
        "model cause target", Column("correlation", "Rank correlation over layers", "+.2f", "low", "high"), "low high",
        Column("n_layers", "Layers", "d"),
    ),
    "ranks": table(
        "model kind", Key("n", "Dropped", "d"), Column("rank", "Effective rank of the last states", ".1f", "low", "high"),
        "low high",
    ),
    "rank_gaps": table(
        "model", Key("n", "Dropped", "d"),
        Column("difference", "Rank without attention minus rank without MLPs", "+.1f", "low", "high"), "low high",
    ),
}  # fmt: skip


@section("causes")
class CausesOf(Settings):
    """What may make attention layers redundant, measured on the first samples of the first calibration corpus."""

    n_samples: Positive
    n_drop: Counts  # how many attention layers, or MLPs, are dropped to see whether tokens can still be told apart


def _models(profile: Profile) -> tuple[list[LocatedModel], dict[str, str]]:
    """What compares finished runs needs no model but for its example: the first that is available."""
    if not profile.one_by_one:
        return locate_available(profile.models)
    for name in profile.models:
        with contextlib.suppress(LLMDropError):
            return [locate_model(name)], {}
    return [], {}


@study(
    "11_sizes_and_causes",
    needs=[Calibration, Text, CausesOf],
    tables=OWN | compare.TABLES,
    models=_models,
    reads=READ,
    compares=True,
)
def sizes_and_causes(run: Run) -> Tables:
    """Notebook 11: the profile's models beside each other, and what goes with redundancy and with damage."""
    if run.profile.one_by_one:
        own, lacking = gathered(run.profile, run.notebook)
        run.not_run |= lacking
        if not own:
            raise NotAvailable(f"No model has been measured yet: there is no {', '.join(lacking)}.")
        own, work, records = {name: own[name] for name in OWN}, list[Work](), provenance(run.profile, run.notebook)
    else:
        own, work = _measured(run)
        records = []
    others: dict[str, Tables] = {}
    for notebook in READ:
        others[notebook], lacking = gathered(run.profile, notebook)
        run.not_run |= lacking
    return run.write(own | compare.compared(own, others), work, records)


class Planned(NamedTuple):
    """What is measured of one model."""

    importance: ImportanceWork
    causes: CausesWork
    alone: TextWork  # each attention layer dropped alone, in order
    ranks: RankWork
    cells: list[Cell]  # that ranks are measured in

    @property
    def work(self) -> list[Work]:
        return [self.causes, self.alone, self.ranks]


def _measured(run: Run) -> tuple[Tables, list[Work]]:
    """The tables of `OWN`, and the items that they come from."""
    planned: list[Planned] = []
    scoring, _ = rank_layers(run, with_tasks=False)
    for item in scoring:
        with run.one_of(item.model):
            planned.append(_planned(run, item))
    run.measure([work for one in planned for work in one.work])
    found: dict[str, list[dict]] = {name: [] for name in OWN}
    done = {item.model.name for item in run.measured(scoring)}
    planned = [one for one in planned if one.importance.model.name in done]
    for one in planned:
        for name, several in _rows(run, one).items():
            found[name] += [{"model": one.importance.model.name} | row for row in several]
    return (
        {name: frame(name, several, OWN) for name, several in found.items()},
        [work for one in planned for work in (one.importance, *one.work)],
    )


def _planned(run: Run, item: ImportanceWork) -> Planned:
    settings, scores = run.section(CausesOf), run.importance(item)
    n_layers = len(scores.importance["attention"])
    ranked = scores.first(run.section(Calibration).n_samples)
    plans = {DENSE_CELL: DENSE}
    for kind in ("attention", "mlp"):
        plans |= {Cell(kind, n): select(ranked, kind, n) for n in settings.n_drop if n < n_layers}
    on = {**item.identity, "corpus": item.corpus, "tokens": item.tokens[: settings.n_samples]}
    alone = text_work(run, item, [DropPlan(attention=(layer,)) for layer in range(n_layers)])
    return Planned(item, CausesWork(**on), alone, RankWork(**on, plans=tuple(plans.values())), list(plans))


def _rows(run: Run, one: Planned) -> dict[str, list[dict]]:
    """Rows of one model, without the column `model`."""
    item = one.importance
    kl = np.array([value["kl"] for value in run.values(one.alone)]).T
    scores = run.importance(item).first(run.section(CausesOf).n_samples)
    ranks = np.array([value["rank"] for value in run.values(one.ranks)]).T
    shape = Shape.of_config(load_config(item.model), name=item.model.name)
    return {
        "models": [{"parameters": shape.parameters, "n_layers": shape.layers, "corpus": item.corpus}],
        "layers": rows.layer_rows(scores, kl),
        **rows.cause_rows(Causes.from_json(run.values(one.causes)[0]), scores, kl),
        **rows.rank_rows(one.cells, ranks),
    }
