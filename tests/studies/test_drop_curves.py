"""Notebook 02 and what it shares with 03: each number of a table, from values that are worked out by hand."""

import dataclasses
import types

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llmdrop_utils import DropPlan
from llmdrop_utils.base import files, stats
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.report.panels import curves, legend_above
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.tables import frame, read_tables
from llmdrop_utils.report.verdicts import ADVICE
from llmdrop_utils.studies.curve_rows import (
    TABLES,
    TaskValues,
    TextValues,
    average_rows,
    gap_rows,
    in_mean,
    mean_score,
    plan_rows,
    reach_rows,
    share_of_dense,
    task_reach_rows,
    task_rows,
    text_rows,
    without_rows,
)
from llmdrop_utils.studies.curves import Measured, Tasks, Text, cells_for_tasks, collect, plans_of
from llmdrop_utils.studies.drop_curves.across import across_rows
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.work import DENSE, DENSE_CELL, Cell

NOTEBOOK = "02_drop_curves"
A1, A2, M1, B1 = Cell("attention", 1), Cell("attention", 2), Cell("mlp", 1), Cell("block", 1)
OTHER_METHOD = Cell("attention", 1, "iterative")
PLANS = {
    DENSE_CELL: DENSE,
    A1: DropPlan(attention=(2,)),
    A2: DropPlan(attention=(2, 0)),
    M1: DropPlan(mlp=(1,)),
    B1: DropPlan(attention=(1,), mlp=(1,)),
    OTHER_METHOD: DropPlan(attention=(0,)),
}


def text_values(**hits):
    """Next-token accuracy by sample, of the dense model and of attention-1, attention-2, ..."""
    cells = [DENSE_CELL, *(Cell("attention", int(name.removeprefix("n"))) for name in hits if name != "dense")]
    array = np.array(list(hits.values()), dtype=float).T
    return TextValues(cells, np.zeros_like(array), array, np.zeros_like(array))


def task(scores, seed=0, chance=0.25):
    """Documents by cell."""
    return TaskValues("piqa", "acc", 0, np.array(scores, dtype=float).T, chance, seed)


# ---- text -------------------------------------------------------------------------------------------------------------


def test_perplexity_accuracy_and_divergence():
    nll = np.log([[2, 4], [8, 16]])  # dense: the mean of ln 2 and ln 8 is ln 4
    hits = np.array([[0.4, 0.4], [0.6, 0.5]])
    text = TextValues([DENSE_CELL, B1], nll, hits, np.array([[0.0, 0.1], [0.0, 0.3]]))
    dense, block = text_rows(text, "web", PLANS)
    assert (dense["corpus"], dense["kind"], dense["n"], dense["sub_layers"], dense["samples"]) == ("web", "dense", 0, 0, 2)
    assert dense["perplexity"] == pytest.approx(4)
    assert (dense["accuracy"], dense["kl"], dense["retained"]) == (0.5, 0, 1)
    assert (block["kind"], block["n"], block["sub_layers"]) == ("block", 1, 2)
    assert block["perplexity"] == pytest.approx(8)
    assert block["accuracy"] == pytest.approx(0.45)
    assert block["retained"] == pytest.approx(0.9)
    assert block["kl"] == pytest.approx(0.2)
    # Both samples drawn twice are the ends of the bootstrap.
    assert (block["perplexity_low"], block["perplexity_high"]) == pytest.approx((4, 16))
    assert (block["retained_low"], block["retained_high"]) == pytest.approx((0.5 / 0.6, 1))


def test_what_is_retained_is_paired():
    """Accuracy varies from sample to sample, the share of the dense model's does not."""
    dense = np.array([0.2, 0.9, 0.4, 0.7])
    _, row = text_rows(text_values(dense=dense, n1=0.8 * dense), "web", PLANS)
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert (row["retained_low"], row["retained"], row["retained_high"]) == pytest.approx((0.8, 0.8, 0.8))


def test_nothing_is_a_share_of_zero():
    assert np.isnan(share_of_dense(np.array([0.0, 0.5]))).all()
    np.testing.assert_allclose(share_of_dense(np.array([[2.0, 1.0], [4.0, 1.0]])), [[1, 0.5], [1, 0.25]])


def test_comparisons_of_methods_are_not_on_the_curves():
    values = np.full((2, 3), 0.5)
    text = TextValues([DENSE_CELL, A1, OTHER_METHOD], values, values, values)
    assert [(row["kind"], row["n"]) for row in text_rows(text, "web", PLANS)] == [("dense", 0), ("attention", 1)]
    assert [row["kind"] for row in reach_rows(text)] == ["attention"]
    assert cells_for_tasks(PLANS, tasks_section(attention=[1, 2])) == [DENSE_CELL, A1, A2]
    labels = [row["kind"] for row in plan_rows(PLANS)]
    assert labels == ["dense", "attention", "attention", "mlp", "block", "iterative"]


@pytest.mark.parametrize(
    ("retained", "reach"),
    [
        ({"n1": 0.95, "n2": 0.85, "n4": 0.92}, 1),  # what comes after the first that fails does not count
        ({"n1": 0.95, "n2": 0.92, "n4": 0.91}, 4),  # all hold: the last that was tried
        ({"n1": 0.89, "n2": 0.95}, 0),
        ({"n1": 0.95, "n3": 0.9, "n8": 0.8}, 3),  # 90 % itself is enough, and n is told, not its place in the list
        ({"n8": 0.5, "n2": 0.95}, 2),  # in whatever order the cells are
    ],
)
def test_reach(retained, reach):
    hits = {name: [share, share] for name, share in retained.items()}
    (row,) = reach_rows(text_values(dense=[1, 1], **hits))
    tried = max(int(name.removeprefix("n")) for name in retained)
    assert row == {"kind": "attention", "n": reach, "low": reach, "high": reach, "tried_up_to": tried}


def test_the_interval_of_reach():
    """On average 0.91 is retained with two dropped, but by some draws of the samples less than 0.9."""
    (row,) = reach_rows(text_values(dense=[1] * 4, n1=[0.95] * 4, n2=[1, 1, 1, 0.64]))
    assert (row["n"], row["low"], row["high"]) == (2, 1, 2)


# ---- tasks ------------------------------------------------------------------------------------------------------------


def test_reach_in_the_tasks():
    """Of 100 documents the dense model solves 60, where guessing solves 20: 38 of 40 above guessing are 95 %, 37 are less.

    A task on which it is not above guessing does not count, whatever happens to it.
    """
    cells = [DENSE_CELL, *(Cell("attention", n) for n in (1, 2, 4)), Cell("mlp", 1)]
    right = [60, 59, 58, 57, 30]
    solved = task([[1] * n + [0] * (100 - n) for n in right], chance=0.2)
    guessed = dataclasses.replace(task([[1] * n + [0] * (100 - n) for n in (20, 0, 0, 0, 100)], chance=0.2), task="boolq")
    attention, mlp = task_reach_rows(cells, [solved, guessed])
    assert (attention["kind"], attention["n"], attention["tried_up_to"], attention["tasks"]) == ("attention", 2, 4, "piqa")
    assert (attention["low"], attention["high"]) == (0, 4), "by some draws of the documents none can go, by others all"
    assert (mlp["kind"], mlp["n"], mlp["low"], mlp["high"]) == ("mlp", 0, 0, 0)
    assert task_reach_rows(cells, [guessed]) == []


def test_score_and_standard_error():
    dense, dropped = task_rows([DENSE_CELL, A1], [task([[1, 1, 0, 0], [1, 0, 0, 0]])])
    assert (dense["task"], dense["metric"], dense["num_fewshot"], dense["documents"]) == ("piqa", "acc", 0, 4)
    assert (dense["value"], dropped["value"], dropped["chance"]) == (0.5, 0.25, 0.25)
    assert dense["stderr"] == pytest.approx(np.sqrt((4 * 0.25 / 3) / 4))  # the variance with n - 1, over n
    assert dropped["low"] == 0 < dropped["value"] < dropped["high"] <= 1


def test_a_single_document_has_no_standard_error():
    assert np.isnan(task_rows([DENSE_CELL], [task([[1]])])[0]["stderr"])


def test_the_mean_over_tasks():
    """Tasks count alike, whatever their number of documents: (0.5 + 1) / 2 and (0.25 + 0.5) / 2."""
    tasks = [task([[1, 1, 0, 0], [1, 0, 0, 0]]), task([[1, 1], [1, 0]], seed=1, chance=0.5)]
    dense, dropped = average_rows([DENSE_CELL, A1], tasks)
    assert (dense["kind"], dense["n"], dense["tasks"], dense["value"]) == ("dense", 0, 2, 0.75)
    assert (dense["retained"], dense["points_lost"], dense["chance"]) == (1, 0, 0.375)
    assert (dropped["value"], dropped["points_lost"]) == (0.375, 37.5)
    assert dropped["retained"] == 0, "0.375 is what guessing gives"
    assert dropped["points_lost_low"] < 37.5 < dropped["points_lost_high"]


def test_what_is_retained_above_guessing():
    """Scores of 0.6, 0.5 and 0.35 where guessing gives 0.4. Documents differ much; what is above guessing, not in share."""
    above = np.array([0.05, 0.35, 0.1, 0.3])
    (one, half, less) = average_rows([DENSE_CELL, A1, A2], [task([0.4 + above, 0.4 + above / 2, 0.4 - above / 4], chance=0.4)])
    assert (one["value"], half["value"], less["value"]) == pytest.approx((0.6, 0.5, 0.35))
    for row, share in ((one, 1), (half, 0.5), (less, -0.25)):
        assert [row[f"retained{end}"] for end in ("", "_low", "_high")] == pytest.approx([share] * 3)
    assert np.isnan(average_rows([DENSE_CELL], [task([above], chance=0.4)])[0]["retained"]), "worse than guessing"


def test_points_lost_are_paired():
    dense = np.array([0.9, 0.1, 0.5, 0.3])
    _, dropped = average_rows([DENSE_CELL, A1], [task([dense, dense - 0.02])])
    assert dropped["low"] < dropped["value"] < dropped["high"]
    assert [dropped[f"points_lost{end}"] for end in ("", "_low", "_high")] == pytest.approx([2, 2, 2])


def test_tasks_are_drawn_independently():
    scores = [[1, 1, 1, 0, 0, 0]]
    same, other = mean_score([task(scores), task(scores)])[1], mean_score([task(scores), task(scores, seed=1)])[1]
    assert other.std() < 0.8 * same.std()


# ---- gaps -------------------------------------------------------------------------------------------------------------


NO_TEXT = TextValues([DENSE_CELL], np.zeros((2, 1)), np.zeros((2, 1)), np.zeros((2, 1)))


def of(rows, measure):
    return [row for row in rows if row["measure"] == measure]


def test_gaps_of_scores():
    """Attention minus the other kind at equal n, paired; only what was dropped in equal number is compared."""
    documents = np.array([0.9, 0.1, 0.5, 0.3])
    cells = [DENSE_CELL, A1, A2, M1, B1]
    tasks = [task([documents, documents - 0.01, documents - 0.02, documents - 0.04, documents - 0.03])]
    rows = gap_rows(NO_TEXT, cells, tasks, PLANS)
    assert [(row["n"], row["kind"], row["other"], row["measure"]) for row in rows] == [
        (1, "attention", "mlp", "tasks"), (1, "attention", "block", "tasks"),
    ]  # fmt: skip
    for row, difference in zip(rows, (0.03, 0.02), strict=True):
        assert (row["difference"], row["low"], row["high"]) == pytest.approx((difference,) * 3)
        assert row["detectable"] == pytest.approx(0, abs=1e-12), "it is found however small it is"
        assert row["same_plan"] is False


def test_gaps_of_text_and_the_same_plan():
    """More is better, so text enters as minus nats: joint predicts as attention does, and 0.5 nats better than MLP."""
    joint = Cell("joint", 1)
    plans = PLANS | {joint: DropPlan(attention=(2,))}
    nll = np.array([[3.0], [4.0], [2.0]]) + np.array([0, 0.1, 0.6, 0.1])
    text = TextValues([DENSE_CELL, A1, M1, joint], nll, nll, nll)
    rows = of(gap_rows(text, [DENSE_CELL], [task([[1, 0]])], plans), "text")
    found = {(row["kind"], row["other"]): row for row in rows}
    assert set(found) == {("attention", "mlp"), ("joint", "attention"), ("joint", "mlp")}
    same, better = found["joint", "attention"], found["joint", "mlp"]
    assert (same["difference"], same["low"], same["high"], same["same_plan"]) == (0, 0, 0, True)
    assert (better["difference"], better["low"], better["high"]) == pytest.approx((0.5,) * 3)
    assert better["same_plan"] is False


def test_a_gap_has_an_interval_over_samples_of_text():
    """Attention is 1 and 3 nats below MLP in the two samples. These are the ends, 2 x 1.96 standard errors apart."""
    nll = np.array([[2, 3, 4], [2, 3, 6.0]])
    (row,) = of(gap_rows(TextValues([DENSE_CELL, A1, M1], nll, nll, nll), [DENSE_CELL], [task([[1, 0]])], PLANS), "text")
    assert (row["difference"], row["low"], row["high"]) == (2, 1, 3)
    assert row["detectable"] == pytest.approx(2 / (2 * 1.959964) * (1.959964 + 0.841621))


COMPARED = [
    ("attention", "mlp", -1), ("attention", "block", -3),
    ("joint", "attention", 7), ("joint", "mlp", 6), ("joint", "block", 4),
]  # fmt: skip


def test_which_kinds_are_compared():
    """Attention with MLP and block, joint with all three; other methods with none, though they drop as many."""
    cells = [DENSE_CELL, A1, M1, B1, Cell("joint", 1), OTHER_METHOD]
    plans = PLANS | {Cell("joint", 1): PLANS[M1]}
    nll = np.tile([0.0, 1, 2, 4, 8, 16], (2, 1))
    rows = gap_rows(TextValues(cells, -nll, nll, nll), cells, [task(nll.T)], plans)
    for measure in ("tasks", "text"):
        found = of(rows, measure)
        assert [(row["kind"], row["other"], row["difference"]) for row in found] == COMPARED
        assert [row["same_plan"] for row in found] == [False, False, False, True, False]
    rows = without_rows(cells, [task(nll.T), task(nll.T, seed=1)])
    assert [(row["kind"], row["other"], row["difference"]) for row in rows] == 2 * COMPARED


def test_gaps_without_a_task():
    """Attention minus MLP is 0.3, 0.0 and -0.6 on three tasks, in each document."""
    documents = np.array([0.9, 0.1, 0.5])
    tasks = [
        dataclasses.replace(task([documents, documents - 0.1, documents - 0.1 - gap], seed), task=name)
        for seed, (name, gap) in enumerate({"a": 0.3, "b": 0.0, "c": -0.6}.items())
    ]
    rows = without_rows([DENSE_CELL, A1, M1], tasks)
    for row, (left_out, difference) in zip(rows, {"a": -0.3, "b": -0.15, "c": 0.15}.items(), strict=True):
        assert (row["left_out"], row["n"], row["kind"], row["other"]) == (left_out, 1, "attention", "mlp")
        assert (row["difference"], row["low"], row["high"]) == pytest.approx([difference] * 3)
    assert without_rows([DENSE_CELL, A1, M1], tasks[:1]) == [], "nothing is left"


def test_intervals_are_as_wide_as_the_smallest_task_makes_them():
    """Draws of all tasks together count as many as there are documents in the task that has fewest."""
    many, few = task([[0, 1] * 50, [0, 1] * 50]), task([[1, 0, 1], [0, 0, 1]], seed=1)
    (_, row) = average_rows([DENSE_CELL, A1], [many, few])
    drawn = mean_score([many, few])[1][:, 1]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(drawn, stats.percentiles(3))))


# ---- chosen on one corpus, tested on another ----------------------------------------------------------------------------


def test_across_corpora():
    """Web chooses 1 0, code 1 2. On web they cost 0.2 and 0.5 of every sample, on code 0.4 and 0.1; samples differ much."""
    plans = {("web", 2): DropPlan(attention=(1, 0)), ("code", 2): DropPlan(attention=(1, 2))}
    added = {"web": (0.2, 0.5), "code": (0.4, 0.1)}
    losses = {
        corpus: {DENSE.key: [2.0, 5, 3]} | {p.key: [x + 2, x + 5, x + 3] for p, x in zip(plans.values(), costs, strict=True)}
        for corpus, costs in added.items()
    }
    found = {(row["chosen_on"], row["tested_on"]): row for row in across_rows(losses, plans)}
    expected = {("web", "web"): (0.2, 0), ("code", "web"): (0.5, 0.3), ("web", "code"): (0.4, 0.3), ("code", "code"): (0.1, 0)}
    assert set(found) == set(expected)
    for pair, (cost, excess) in expected.items():
        row = found[pair]
        assert [row["cost"], row["low"], row["high"]] == pytest.approx([cost] * 3), pair
        assert [row["excess"], row["excess_low"], row["excess_high"]] == pytest.approx([excess] * 3), pair
        assert (row["n"], row["shared"]) == (2, 2 if pair[0] == pair[1] else 1)


def test_cost_across_corpora_has_an_interval_over_samples():
    plans = {("web", 1): DropPlan(attention=(1,)), ("code", 1): DropPlan(attention=(2,))}
    on_web = {DENSE.key: [2.0, 5], plans["web", 1].key: [2.1, 5.1], plans["code", 1].key: [2.3, 5.9]}
    row = across_rows({"web": on_web}, plans)[1]
    assert [row["cost"], row["low"], row["high"]] == pytest.approx([0.6, 0.3, 0.9])
    assert [row["excess"], row["excess_low"], row["excess_high"]] == pytest.approx([0.5, 0.2, 0.8])


# ---- plans, and which value belongs to which cell ------------------------------------------------------------------------


def tasks_section(**n_drop):
    return Tasks(names=["piqa"], data="package", limit=4, num_fewshot=0, n_drop=n_drop)


def scores_of_three_layers():
    """Attention 2 < 0 < MLP 1 < attention 1 < the other MLPs."""
    importance = {"attention": [0.2, 0.4, 0.1], "mlp": [0.6, 0.3, 0.7], "block": [0.8, 0.6, 0.7]}
    return Importance({kind: np.array([values]) for kind, values in importance.items()}, np.array([8]), {})


def test_plans_of_the_curves():
    """Counts of text and of tasks together, in order; with all three layers of a kind nothing is left to compare."""
    text = Text(n_samples=1, seq_len=8, n_drop=[2, 3, 5], across=[1])
    plans = plans_of(scores_of_three_layers(), ("attention", "joint"), text, tasks_section(attention=[1]))
    assert [(cell.kind, cell.n) for cell in plans] == [
        ("dense", 0), ("attention", 1), ("attention", 2), ("joint", 2), ("joint", 3), ("joint", 5),
    ]  # fmt: skip
    assert (plans[A1].attention, plans[A2].attention) == ((2,), (2, 0))
    assert plans[Cell("joint", 2)].key == plans[A2].key
    assert (plans[Cell("joint", 3)].attention, plans[Cell("joint", 3)].mlp) == ((2, 0), (1,))
    assert plan_rows(plans)[2] == {"kind": "attention", "n": 2, "attention": "2 0", "mlp": ""}


@pytest.fixture
def measured():
    """One model, of which 0.1 is lost with each sub-layer on text, and 0.02 on two tasks."""

    def values(item):
        lost = [plan.n_drop for plan in item.plans]
        if item.task is None:
            return [{"nll": [3 + n / 10] * 2, "hits": [0.5 - n / 10] * 2, "kl": [n / 10] * 2} for n in lost]
        return [{"metrics": {"acc": [0.5] * 3, "acc_norm": [0.8 - n / 50] * 3}, "chance": 0.25} for n in lost]

    work = {name: types.SimpleNamespace(task=name, num_fewshot=0, corpus="web") for name in (None, "piqa", "elsewhere")}
    work[None].plans = (DENSE, PLANS[B1], PLANS[A2], PLANS[A1], PLANS[M1])
    for name in ("piqa", "elsewhere"):
        work[name].plans = (DENSE, PLANS[M1], PLANS[A1])
    run = types.SimpleNamespace(values=values, section=lambda cls: tasks_section(attention=[1], mlp=[1]))
    plans = {cell: plan for cell, plan in PLANS.items() if cell != OTHER_METHOD}
    plans[Cell("joint", 1)] = PLANS[A1]  # a joint plan that is an attention plan is measured once, for both
    model = types.SimpleNamespace(name="hand")
    return Measured(run, model, scores_of_three_layers(), plans, work[None], [work["piqa"], work["elsewhere"]])


def test_values_find_their_cells(measured):
    """Whatever the order in which plans were measured, and where two cells have one plan."""
    np.testing.assert_allclose(measured.text.kl[0], [0, 0.1, 0.2, 0.1, 0.2, 0.1])
    assert measured.task_cells == [DENSE_CELL, A1, M1]
    piqa, elsewhere = measured.tasks
    assert (piqa.metric, elsewhere.metric) == ("acc_norm", "acc"), "the paper's; of other tasks lm-eval's first"
    assert piqa.seed != elsewhere.seed
    np.testing.assert_allclose(piqa.scores, [[0.8, 0.78, 0.78]] * 3)


def test_a_generated_task_stands_apart(measured):
    """GSM8K is no part of the paper's mean. With nothing else, it is its own."""
    chosen, generated = task([1.0, 0.5]), task([0.9, 0.1], chance=0)
    assert in_mean([generated, chosen]) == [chosen]
    assert in_mean([generated]) == [generated]
    before = measured.rows()
    measured.tasks.append(dataclasses.replace(measured.tasks[0], task="gsm8k", scores=measured.tasks[0].scores / 2, chance=0.0))
    after = measured.rows()
    for name in ("average", "gaps", "without"):
        assert after[name] == before[name]
    assert len(after["tasks"]) == 1.5 * len(before["tasks"])


def test_tables_figures_and_advice(measured):
    """From the rows of a model to what a reader sees: every table is as declared, and numbers reach the takeaways."""
    del measured.plans[Cell("joint", 1)]  # which notebook 02 does not have
    rows = collect([measured], lambda m: {"paper": []}, STUDIES[NOTEBOOK].tables)
    tables = {name: frame(name, content, STUDIES[NOTEBOOK].tables) for name, content in rows.items()}
    assert tables["models"].to_dict("records") == [{"model": "hand", "n_layers": 3}]
    assert len(tables["gaps"].query("measure == 'tasks'")) == 1
    takeaways = {name: spec.draw(tables).takeaway for name, spec in FIGURES.items() if spec.notebook == NOTEBOOK}
    plt.close("all")
    assert "up to this many dropped layers: 0 for Attention, 0 for MLP, 0 for Block" in takeaways["figS4_text_curves"]
    assert (
        "With 1 dropped, perplexity is 22 (Attention), 22 (MLP), 25 (Block); the dense model's is 20"
        in takeaways["figS4_text_curves"]
    )
    assert "Attention on piqa (2.0 points), MLP on piqa (2.0 points)" in takeaways["fig05_drop_curves"]
    assert "Points lost at n = 1: Attention 1.0 (1.0 to 1.0)" in takeaways["figS5_average"]
    assert "The dense model is 40.0 points above guessing." in takeaways["figS5_average"]  # (0.5 + 0.8) / 2 - 0.25
    assert "keep all attention layers" in ADVICE[NOTEBOOK](tables)


def test_advice_takes_the_lower_end():
    tables = read_tables(files.REFERENCE / "cpu" / NOTEBOOK)
    tables["reach"] = tables["reach"].assign(low=5.5)  # between two counts that were tried
    text = ADVICE[NOTEBOOK](tables)
    assert "5 attention layers can be dropped" in text
    assert "`DropPlan(attention=[25, 26, 7, 6, 28])`" in text


# ---- what is written and drawn -------------------------------------------------------------------------------------------


def test_tables_are_declared_as_they_are_committed():
    for name, content in read_tables(files.REFERENCE / "cpu" / NOTEBOOK).items():
        if name != "not_run":
            assert list(content.columns) == [column.name for column in STUDIES[NOTEBOOK].tables[name]], name
    assert set(TABLES) | {"paper", "across"} == set(STUDIES[NOTEBOOK].tables)


def test_kinds_at_equal_n_stand_apart():
    """Dodged by 0.2 layers around n, from a dense model whose interval is drawn once."""
    rows = [("dense", 0, 0.8), ("attention", 4, 0.7), ("mlp", 4, 0.5)]
    data = pd.DataFrame(rows, columns=["kind", "n", "value"]).assign(low=0.4, high=0.9)
    fig, ax = plt.subplots()
    curves(ax, data, "value", "low", "high", "a title", dodge=0.2)
    legend_above(fig, ax)
    lines = {container.get_label(): container.lines[0].get_xdata(orig=False) for container in ax.containers}
    np.testing.assert_allclose(lines["Attention"], [0, 3.9])
    np.testing.assert_allclose(lines["MLP"], [0, 4.1])
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["Attention", "MLP"]
    plt.close(fig)
