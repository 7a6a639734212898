"""Notebook 03: each number that it adds to those of notebook 02, from values that are worked out by hand."""

import zlib

import matplotlib.pyplot as plt
import numpy as np
import pytest

from llmdrop_utils import DropPlan, load_profile
from llmdrop_utils.base import files, stats
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.tables import read_tables
from llmdrop_utils.report.verdicts import ADVICE
from llmdrop_utils.studies import run as run_module
from llmdrop_utils.studies.curve_rows import TaskValues, TextValues, plan_rows
from llmdrop_utils.studies.curves import cells_beside
from llmdrop_utils.studies.joint_drop.study import (
    ITERATIVE,
    SAME_SAMPLES,
    first_mlp_row,
    further_rows,
    iterative_average_rows,
    iterative_plans,
    iterative_rows,
    iterative_task_rows,
    iterative_work,
    order_rows,
)
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.work import DENSE, DENSE_CELL, Cell, ImportanceWork, IterativeWork, TextWork

NOTEBOOK = "03_joint_drop"


def importance(attention, mlp, weights=(8,)):
    """Rows are samples, columns layers."""
    attention, mlp = np.atleast_2d(attention), np.atleast_2d(mlp)
    return Importance({"attention": attention, "mlp": mlp, "block": attention + mlp}, np.array(weights), {})


# ---- the joint ranking ------------------------------------------------------------------------------------------------


def test_joint_order():
    """One list for both kinds; a tie goes to attention, and within a kind to the lower layer."""
    rows = order_rows(importance([0.3, 0.1, 0.9], [0.3, 0.5, 0.3]))
    assert [(row["position"], row["kind"], row["layer"], row["importance"]) for row in rows] == [
        (1, "attention", 1, 0.1), (2, "attention", 0, 0.3), (3, "mlp", 0, 0.3), (4, "mlp", 2, 0.3), (5, "mlp", 1, 0.5),
        (6, "attention", 2, 0.9),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("attention", "mlp", "ahead"),
    [
        ([0.3, 0.1, 0.9], [0.3, 0.5, 0.4], 2),
        ([0.3, 0.4, 0.9], [0.2, 0.5, 0.4], 0),
        ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 3),
    ],
)
def test_attention_layers_before_the_first_mlp(attention, mlp, ahead):
    one, two = (importance([attention] * n, [mlp] * n, weights=(8,) * n) for n in (1, 2))
    assert first_mlp_row(two) == {"attention_before": ahead, "low": ahead, "high": ahead, "n_layers": 3}
    assert np.isnan([first_mlp_row(one)["low"], first_mlp_row(one)["high"]]).all()


def test_the_interval_of_the_first_mlp():
    """In one of four equal samples, attention 1 is far above all MLPs: by its draws, it comes after the first."""
    scores = importance([[0.1, 0.2]] * 3 + [[0.1, 0.9]], [[0.4, 0.5]] * 4, weights=(8, 8, 8, 8))
    row = first_mlp_row(scores)
    assert row["attention_before"] == 2  # (3 x 0.2 + 0.9) / 4 = 0.375
    assert (row["low"], row["high"]) == (1, 2)


def reaching(**retained):
    """Text whose next-token accuracy is this share of the dense model's, by sub-layers dropped from one on, in each sample."""
    cells = [DENSE_CELL, *(Cell(kind, n + 1) for kind, shares in retained.items() for n in range(len(shares)))]
    hits = np.array([[dense, *(share * dense for shares in retained.values() for share in shares)] for dense in (0.5, 0.3)])
    return TextValues(cells, np.zeros_like(hits), hits, np.zeros_like(hits))


def test_how_much_further_joint_drop_reaches():
    """Joint reaches 4, attention 3, MLP 1; and of blocks 2, which are 4 sub-layers."""
    shares = {"attention": [0.99, 0.95, 0.92, 0.8], "mlp": [0.91, 0.5], "block": [0.95, 0.92, 0.7]}
    rows = further_rows(reaching(**shares, joint=[0.99, 0.98, 0.95, 0.91, 0.7]), {})
    assert rows == [
        {
            "other": other,
            "joint": 4,
            "compared": compared,
            "difference": more,
            "low": more,
            "high": more,
            "is_cut": False,
            "same_up_to": 0,
        }
        for other, compared, more in (("attention", 3, 1), ("mlp", 1, 3), ("block", 4, 0))
    ]
    rows = further_rows(reaching(**shares | {"mlp": [0.95, 0.91]}, joint=[0.99, 0.5]), {})
    assert [(row["compared"], row["difference"], row["is_cut"]) for row in rows] == [
        (3, -2, False),
        (2, -1, True),
        (4, -3, False),
    ]
    assert all(row["is_cut"] for row in further_rows(reaching(**shares, joint=[0.99, 0.95]), {}))


def test_between_the_numbers_that_were_tried():
    """Joint reaches 2 or 3, for 4 fails; attention 4 to 7, for 8 fails; and block 2 to 3 of 4, which are 4 to 6 sub-layers."""
    cells = [DENSE_CELL, *(Cell(kind, n) for kind, n in (("joint", 2), ("joint", 4), ("attention", 4), ("attention", 8),
                                                         ("mlp", 1), ("block", 2), ("block", 4)))]  # fmt: skip
    hits = np.array([[1, 1, 0.5, 1, 0.5, 0.5, 1, 0.5]] * 2)
    attention, _, block = further_rows(TextValues(cells, hits, hits, hits), {})
    assert (attention["difference"], attention["low"], attention["high"]) == (-2, -5, -1)
    assert (block["difference"], block["low"], block["high"]) == (-2, -4, -1)


def test_how_long_joint_drop_is_attention_drop():
    cells = {Cell("joint", 1): DropPlan((1,)), Cell("joint", 2): DropPlan((1, 0)), Cell("joint", 3): DropPlan((1, 0), (0,))}
    cells |= {Cell("attention", n): DropPlan((1, 0, 2)[:n]) for n in (1, 2, 3)}
    text = reaching(attention=[0.99, 0.95, 0.5], mlp=[0.5], block=[0.5], joint=[0.99, 0.95, 0.5])
    assert [row["same_up_to"] for row in further_rows(text, cells)] == [2, 0, 0]


def test_reach_is_compared_draw_by_draw():
    """In the first sample both reach 1, in the second 2: the difference is zero in each, though either varies."""
    hits = np.array([[0.5, 0.5, 0.3, 0.5, 0.3], [0.5, 0.5, 0.5, 0.5, 0.5]])
    cells = [DENSE_CELL, Cell("attention", 1), Cell("attention", 2), Cell("joint", 1), Cell("joint", 2)]
    cells += [Cell("mlp", 1), Cell("block", 1)]
    hits = np.hstack([hits, np.zeros((2, 2))])
    attention, mlp, _ = further_rows(TextValues(cells, hits, hits, hits), {})
    assert (attention["difference"], attention["low"], attention["high"]) == (0, 0, 0)
    assert (mlp["difference"], mlp["low"], mlp["high"]) == (1, 1, 2), "0.8 is retained of the mean of both samples"


# ---- one by one, or all at once ---------------------------------------------------------------------------------------


def plans():
    """On few samples the order at once is 2, 0, 1; one by one it is 2, 1."""
    return {DENSE_CELL: DENSE} | iterative_plans(importance([0.2, 0.3, 0.1], [1, 1, 1]), [2, 1], [1, 2])


def test_both_ways_have_their_cells():
    cells = plans()
    assert [(cell.kind, cell.n, cell.method) for cell in cells][1:3] == [
        ("attention", 1, "one-shot on the same samples"), ("attention", 1, "iterative"),
    ]  # fmt: skip
    assert plan_rows(cells)[1:] == [
        {"kind": "one-shot", "n": 1, "attention": "2", "mlp": ""},
        {"kind": "iterative", "n": 1, "attention": "2", "mlp": ""},
        {"kind": "one-shot", "n": 2, "attention": "2 0", "mlp": ""},
        {"kind": "iterative", "n": 2, "attention": "2 1", "mlp": ""},
    ]


def test_iterative_minus_one_shot():
    """Attn-1 is the same layer either way; with two, iterative predicts 0.25 nats better in every sample: it is below zero."""
    by_sample = np.log([[2.0], [8.0]])
    nll = by_sample + np.array([0, 0.1, 0.1, 0.5, 0.25])
    text = TextValues(list(plans()), nll, nll, nll)
    one, two = iterative_rows(text, plans())
    assert (one["n"], one["shared"], one["difference"], one["low"], one["high"]) == (1, 1, 0, 0, 0)
    assert (two["n"], two["shared"], two["one_shot_layers"], two["layers"]) == (2, 1, "2 0", "2 1")
    assert (two["difference"], two["low"], two["high"]) == pytest.approx((-0.25,) * 3)
    assert two["one_shot"] == pytest.approx(4 * np.exp(0.5))
    assert two["iterative"] == pytest.approx(4 * np.exp(0.25))


def test_iterative_minus_one_shot_in_tasks():
    """Attn-1 is the same either way. With two, iterative has three of four documents right, one-shot one of these three."""
    cells = cells_beside(plans(), [1, 2])
    assert [(cell.n, cell.method) for cell in cells] == [
        (1, SAME_SAMPLES), (1, ITERATIVE), (2, SAME_SAMPLES), (2, ITERATIVE)
    ]  # fmt: skip
    assert cells_beside(plans(), [2]) == cells[2:], "without the dense model, and what is on a curve"
    assert cells_beside({Cell("mlp", 2): DENSE}, [2]) == []
    scores = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=float)
    one, two = iterative_task_rows(cells, [TaskValues("piqa", "acc", 5, scores, 0.5, 0)])
    assert (one["task"], one["metric"], one["num_fewshot"], one["documents"]) == ("piqa", "acc", 5, 4)
    assert (one["kind"], one["n"], one["value"], one["difference"]) == ("attention", 1, 0.5, 0)
    assert (one["difference_low"], one["difference_high"]) == (0, 0)
    assert (two["n"], two["value"], two["difference"], two["chance"]) == (2, 0.75, 0.5, 0.5)
    assert (two["difference_low"], two["difference_high"]) == (0, 1), "of four documents, of which two differ"
    assert iterative_task_rows(cells, []) == []


def test_iterative_minus_one_shot_in_the_mean():
    """Of the test above, a second task where one-shot is right once more: the mean over both is the same either way, Attn-2."""
    cells = cells_beside(plans(), [1, 2])
    first = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=float)
    second = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=float)
    generated = TaskValues("gsm8k", "exact_match", 5, np.zeros((4, 4)), 0, 2)
    tasks = [TaskValues("piqa", "acc", 5, first, 0.5, 0), TaskValues("boolq", "acc", 5, second, 0.5, 1), generated]
    one, two = iterative_average_rows(cells, tasks, plans())
    assert (one["n"], one["shared"], one["tasks"]) == (1, 1, 2), "without what is generated"
    assert (one["one_shot"], one["iterative"], one["difference"], one["low"], one["high"]) == (0.5, 0.5, 0, 0, 0)
    assert (two["n"], two["shared"], two["one_shot"], two["iterative"], two["difference"]) == (2, 1, 0.375, 0.375, 0)
    assert two["low"] < 0 < two["high"]
    many = np.random.default_rng(0).integers(0, 2, (400, 4)).astype(float)
    other = TaskValues("boolq", "acc", 5, many, 0.5, 1)
    mixed = iterative_average_rows(cells, [tasks[0], other], plans())[1]
    draws = (tasks[0].draws + other.draws) / 2
    ends = [stats.interval(draws[:, 3] - draws[:, 2], n) for n in (4, 400)]
    assert (mixed["low"], mixed["high"]) == ends[0] != ends[1], "as wide as that of the fewest documents"
    (only,) = iterative_average_rows(cells[2:], [TaskValues("piqa", "acc", 5, first[:, 2:], 0.5, 0)], plans())
    assert (only["one_shot"], only["iterative"], only["difference"]) == (0.25, 0.75, 0.5)
    assert iterative_average_rows(cells, [], plans()) == []


def test_both_ways_see_the_same_samples():
    item = ImportanceWork("hand", None, "eager", corpus="web", tokens=np.arange(12).reshape(4, 3), batch_size=2)
    work = iterative_work(item, n_samples=2, n_drop=5)
    assert (work.tokens.tolist(), work.batch_size, work.n_drop) == ([[0, 1, 2], [3, 4, 5]], 2, 5)
    assert work.identity == item.identity == {"model": "hand", "dtype": None, "attention": "eager"}


# ---- the study, on values that are made up -----------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Instead of measuring, values follow from what is dropped. Returns the profile."""

    def value(item, key):
        draws = np.random.default_rng(zlib.crc32(repr(key).encode()))
        if isinstance(item, ImportanceWork):
            n = len(item.tokens)
            rows = {"attention": [0.4, 0.1, 0.3, 0.2, 0.5, 0.6], "mlp": [0.35, 0.7, 0.7, 0.7, 0.7, 0.7], "block": [1.0] * 6}
            return {
                "per_sample": {k: [v] * n for k, v in rows.items()},
                "weights": [64] * n,
                "histogram": {k: [[0]] for k in rows},
            }
        if isinstance(item, IterativeWork):
            return {"attention": [1, 2]}
        plan = key["plan"]
        lost = len(plan["attention"]) + 3 * len(plan["mlp"])
        if isinstance(item, TextWork):
            base = draws.normal(0, 0.01, len(item.tokens))
            return {"nll": [*(3 + lost / 10 + base)], "hits": [*(0.5 - lost / 25 + base / 10)], "kl": [lost / 10 for _ in base]}
        correct = [float(i >= lost + (2 in plan["attention"])) for i in range(10)]
        return {"metrics": {"acc": correct, "acc_norm": correct}, "chance": 0.25}

    def measure_missing(work, store, force, several):
        for item in work:
            for key in item.keys:
                store.put(key, value(item, key), {"made": "up"})
        return {}

    monkeypatch.setattr(run_module, "measure_missing", measure_missing)
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    return load_profile("smoke")


def test_tables_of_the_study(made_up):
    """tiny-llama has six layers: 9 of them cannot be dropped one by one, and only that is left out."""
    tables = STUDIES[NOTEBOOK](made_up.replacing(iterative={"n_drop": [2, 9]}))
    for name, content in read_tables(files.REFERENCE / "cpu" / NOTEBOOK).items():
        assert list(tables[name].columns) == list(content.columns), name
    plans = tables["plans"].set_index(["kind", "n"])["attention"]
    assert (plans["one-shot", 2], plans["iterative", 2]) == ("1 3", "1 2")
    assert set(tables["plans"]["kind"]) == {"dense", "attention", "mlp", "block", "joint", "one-shot", "iterative"}
    assert set(tables["text"]["kind"]) == {"dense", "attention", "mlp", "block", "joint"}
    assert set(tables["tasks"]["kind"]) == {"dense", "attention", "mlp", "block", "joint"}
    (row,) = tables["iterative"].to_dict("records")
    assert (row["n"], row["shared"]) == (2, 1)
    on_tasks = tables["iterative_tasks"]
    assert list(on_tasks["task"]) == ["openbookqa", "winogrande"]
    assert set(on_tasks["value"]) == {0.7}, "two of ten lost with two layers, and one more with layer 2"
    assert set(on_tasks["difference"].round(6)) == {-0.1}
    (mean,) = tables["iterative_average"].to_dict("records")
    assert (mean["n"], mean["tasks"], mean["one_shot"], mean["iterative"]) == (2, 2, 0.8, 0.7)
    assert tables["first_mlp"].iloc[0].to_dict() == {
        "model": "tiny-llama", "attention_before": 3, "low": 3, "high": 3, "n_layers": 6
    }  # fmt: skip
    same = tables["gaps"].query("kind == 'joint' and other == 'attention' and measure == 'text'").set_index("n")["same_plan"]
    assert same.astype(bool).to_dict() == {1: True, 2: True, 3: True, 4: False}
    assert tables["not_run"].empty


def test_no_number_to_compare_leaves_the_rest(made_up):
    tables = STUDIES[NOTEBOOK](made_up.replacing(iterative={"n_drop": [6]}))
    assert tables["iterative"].empty
    assert tables["iterative_tasks"].empty
    assert not tables["text"].empty
    drawing = FIGURES["fig09_iterative"].draw(tables)
    assert drawing.takeaway == ""
    plt.close(drawing.figure)
    assert "Measuring again" not in ADVICE[NOTEBOOK](tables)


def test_takeaways_and_advice(made_up):
    tables = STUDIES[NOTEBOOK](made_up)
    takeaways = {name: spec.draw(tables).takeaway for name, spec in FIGURES.items() if spec.notebook == NOTEBOOK}
    plt.close("all")
    assert (
        "3 of 6 attention layers (95 % interval 3 to 3) are dropped before the first MLP, that of layer 0."
        in takeaways["figS7_joint_order"]
    )
    # Attn-4 loses 0.4 nats, joint-4 (three attention, one MLP) 0.6.
    assert "Up to 3 dropped, joint drop is attention drop." in takeaways["fig08_joint_drop"]
    assert "With 4 dropped, joint minus attention is -0.2" in takeaways["fig08_joint_drop"]
    assert "the same plan as attention drop" in takeaways["figS6_joint_tasks"]
    assert takeaways["fig09_iterative"].startswith("Attn-2: ")
    advice = ADVICE[NOTEBOOK](tables)
    assert "begins with 3 attention layers" in advice
    assert "They differ first at 4: attention drop predicts text better there" in advice


def test_labels_of_methods():
    assert Cell("attention", 2).label == "attention"
    assert Cell("attention", 2, SAME_SAMPLES).label == "one-shot"
    assert Cell("attention", 2, ITERATIVE).label == "iterative"
    assert [Cell("joint", 2).on_curve, Cell("attention", 2, SAME_SAMPLES).on_curve] == [True, False]
    assert DropPlan(attention=(1, 0)).key == DropPlan(attention=(0, 1)).key


def test_a_model_of_one_layer_has_a_joint_curve_alone():
    """One of its two sub-layers can be dropped jointly, none of a single kind."""
    values = np.ones((2, 2))
    assert further_rows(TextValues([DENSE_CELL, Cell("joint", 1)], values, values, values), {}) == []
    assert further_rows(TextValues([DENSE_CELL], *[values[:, :1]] * 3), {}) == []
