"""Notebook 02: attention layers chosen on one corpus, and what dropping them costs on the others."""

from collections.abc import Mapping

import numpy as np

from ...base import stats
from ...dropping.plan import DropPlan, PlanKey
from ...models.locate import LocatedModel
from ...report.tables import Column, Key, table
from ...selection.ranking import drop_sequence, select
from ..curves import Text, text_work
from ..profile import Calibration
from ..run import Run, importance_work
from ..work import DENSE, TextWork

COST = Column("cost", "Added loss, nats per token", "+.3f", "low", "high")
ACROSS = table(
    "model", Key("chosen_on", "Chosen on"), Key("tested_on", "Tested on"), Key("n", "Attention dropped", "d"),
    Column("shared", "Shared with the layers chosen there", "d"), COST, "low high",
    Column("excess", "More than the layers chosen there", "+.3f", "excess_low", "excess_high"), "excess_low excess_high",
)  # fmt: skip

Plans = Mapping[tuple[str, int], DropPlan]  # corpus, number of attention layers dropped -> the plan chosen on it
Losses = Mapping[str, Mapping[PlanKey, list[float]]]  # corpus -> plan -> nats per token of each held-out sample of it


def across_corpora(run: Run, models: list[LocatedModel]) -> tuple[list[dict], list[TextWork]]:
    """Rows of the table "across" of all models, and the items that their values are read from.

    Nothing where the profile has a single corpus. What a corpus lacks of held-out text is listed as not run.
    """
    corpora = run.corpora()
    rows: list[dict] = []
    done: list[TextWork] = []
    for model in models if len(corpora) > 1 else []:
        # 1. Layers, chosen on each corpus.
        scoring = importance_work(model, corpora, run.profile)
        run.measure(scoring, force=False)  # notebook 01 measures it
        plans: dict[tuple[str, int], DropPlan] = {}
        for item in run.measured(scoring):
            scores = run.importance(item).first(run.section(Calibration).n_samples)
            counts = [n for n in run.section(Text).across if n < len(drop_sequence(scores, "attention"))]
            plans |= {(item.corpus, n): select(scores, "attention", n) for n in counts}
        # 2. Loss without them, on held-out text of each.
        work = run.available(
            scoring,
            lambda item: text_work(run, item, [DENSE, *plans.values()]),  # noqa: B023 (called at once)
            "corpora",
            several=True,
            name=lambda item: f"held-out text of {item.corpus}",
        )
        run.measure(work)
        work = [item for item in work if item.model.name not in run.not_run]
        losses = {
            item.corpus: {plan.key: value["nll"] for plan, value in zip(item.plans, run.values(item), strict=True)}
            for item in work
        }
        rows += [{"model": model.name} | row for row in across_rows(losses, plans)]
        done += work
    return rows, done


def across_rows(losses: Losses, plans: Plans) -> list[dict]:
    """What the layers chosen on one corpus cost on another, and how much more than those that this other one chooses.

    Both are paired over its samples.
    """
    rows = []
    for tested_on, of_plan in losses.items():
        nll = {key: np.array(values) for key, values in of_plan.items()}
        ones = np.ones(len(nll[DENSE.key]))
        for (chosen_on, n), plan in plans.items():
            own = plans[tested_on, n]
            cost, excess = nll[plan.key] - nll[DENSE.key], nll[plan.key] - nll[own.key]
            (low, high), (excess_low, excess_high) = (
                stats.text_interval(stats.text_means(values, ones), len(ones)) for values in (cost, excess)
            )
            rows.append({"chosen_on": chosen_on, "tested_on": tested_on, "n": n,
                         "shared": len({*plan.attention} & {*own.attention}), "cost": cost.mean(), "low": low, "high": high,
                         "excess": excess.mean(), "excess_low": excess_low, "excess_high": excess_high})  # fmt: skip
    return rows
