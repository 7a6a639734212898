"""Notebook 11: each number of its tables from values that are worked out by hand."""

import itertools
import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llmdrop_utils import load_profile
from llmdrop_utils.base import files, stats
from llmdrop_utils.base.errors import NotAvailable
from llmdrop_utils.measure.causes import DISTANCE, ENTROPY, OF_LAYER, OF_TEXT, OUTPUT, RANK, SINK, SLIDING, WEIGHTS, Causes
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.report.style import FIGURES, draw
from llmdrop_utils.report.tables import frame, read_tables, with_exact_names, write_tables
from llmdrop_utils.report.verdicts import ADVICE
from llmdrop_utils.studies.gather import gathered, of_model, runs_of, state_of
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.sizes_and_causes import compare
from llmdrop_utils.studies.sizes_and_causes.exceptions import exception_rows, fewest
from llmdrop_utils.studies.sizes_and_causes.rows import DAMAGE, IMPORTANCE, cause_rows, layer_rows, rank_rows
from llmdrop_utils.studies.sizes_and_causes.study import OWN, READ
from llmdrop_utils.studies.work import DENSE_CELL, Cell

NOTEBOOK = "11_sizes_and_causes"
TABLES = STUDIES[NOTEBOOK].tables
SMALL, LARGE = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"


def importance(attention):
    rows = np.atleast_2d(np.array(attention, dtype=float))
    return Importance({"attention": rows, "mlp": rows, "block": rows}, np.full(len(rows), 8), {})


def causes(n_samples, **given):
    """All causes of four layers: those given, the rest the same in all layers."""
    flat = {name: np.ones((n_samples, 4)) for name in OF_TEXT}
    of_layer = {DISTANCE: np.array([3.0, 2, 1, 0]), SLIDING: np.zeros(4), WEIGHTS: np.full(4, np.nan)}
    rows = {name: np.tile(np.array(values, dtype=float), (n_samples, 1)) for name, values in given.items()}
    return Causes(flat | {name: rows[name] for name in rows if name in OF_TEXT}, of_layer)


# ---- rows of one model -----------------------------------------------------------------------------------------------------


def test_layers():
    rows = layer_rows(importance([[0.1, 0.4], [0.3, 0.4]]), np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]]))
    assert [(row["layer"], row["importance"], row["kl"]) for row in rows] == [(0, pytest.approx(0.2), 3), (1, 0.4, 5)]
    assert rows[0]["low"] < 0.2 < rows[0]["high"]
    assert rows[0]["kl_low"] < 3 < rows[0]["kl_high"]
    assert rows[1]["kl_low"] == rows[1]["kl_high"] == 5


def test_predictors():
    """Importance 1, 2, 3, 4 and damage 4, 3, 2, 1 by layer."""
    scores, kl = importance([[0.1, 0.2, 0.3, 0.4]] * 4), np.tile([4.0, 3, 2, 1], (3, 1))
    found = cause_rows(causes(4, entropy=[1, 2, 3, 4], rank=[1, 3, 2, 4], output=[4, 3, 2, 1]), scores, kl)
    correlations = {(row["cause"], row["target"]): row["correlation"] for row in found["predictors"]}
    assert correlations == {
        (ENTROPY, IMPORTANCE): 1, (ENTROPY, DAMAGE): -1,
        (RANK, IMPORTANCE): pytest.approx(0.8), (RANK, DAMAGE): pytest.approx(-0.8),  # 1 - 6 x 2 / (4 x 15)
        (OUTPUT, IMPORTANCE): -1, (OUTPUT, DAMAGE): 1,
        (DISTANCE, IMPORTANCE): -1, (DISTANCE, DAMAGE): 1,
        (IMPORTANCE, DAMAGE): -1,
    }  # fmt: skip
    assert {row["n_layers"] for row in found["predictors"]} == {4}
    values = {(row["cause"], row["layer"]): (row["value"], row["low"], row["high"]) for row in found["causes"]}
    assert values[RANK, 1] == (3, 3, 3)
    assert values[DISTANCE, 0] == (3, 3, 3)
    assert np.isnan(values[WEIGHTS, 0]).all()
    assert {name for name, _ in values} == {*OF_TEXT, *OF_LAYER}


def test_interval_of_a_predictor_covers_the_draw_of_layers():
    """Twelve layers in perfect order but for two: the interval reaches one, and below the number."""
    values = np.arange(12.0)
    other = values.copy()
    other[[2, 9]] = other[[9, 2]]
    flat = {name: np.ones((3, 12)) for name in OF_TEXT}
    found = cause_rows(
        Causes(flat | {SINK: np.tile(other, (3, 1))}, {name: np.full(12, np.nan) for name in OF_LAYER}),
        importance([values] * 3),
        np.tile(values, (3, 1)),
    )
    row = next(row for row in found["predictors"] if (row["cause"], row["target"]) == (SINK, DAMAGE))
    assert row["correlation"] == pytest.approx(1 - 6 * 2 * 49 / (12 * 143))
    assert row["low"] < 0.4 < row["correlation"] < row["high"] == pytest.approx(1, abs=0.02)


def test_ranks():
    cells = [DENSE_CELL, Cell("attention", 2), Cell("mlp", 2)]
    found = rank_rows(cells, np.array([[50.0, 40, 20], [60, 44, 28]]))
    assert [(row["kind"], row["n"], row["rank"]) for row in found["ranks"]] == [
        ("dense", 0, 55),
        ("attention", 2, 42),
        ("mlp", 2, 24),
    ]
    (gap,) = found["rank_gaps"]
    assert (gap["n"], gap["difference"], gap["low"], gap["high"]) == (
        2,
        18,
        pytest.approx(16, abs=0.5),
        pytest.approx(20, abs=0.5),
    )


# ---- models beside each other ------------------------------------------------------------------------------------------------


def own(*models):
    """Tables of models: (name, parameters, layers, importance by layer, damage by layer, entropy by layer)."""
    rows = {name: [] for name in OWN}
    for name, parameters, layers, scores, damage, entropy in models:
        kl = np.tile(np.array(damage, dtype=float), (2, 1))
        part = {
            "models": [{"parameters": parameters, "n_layers": layers, "corpus": "web"}],
            "layers": layer_rows(importance([scores] * 2), kl),
            **cause_rows(causes(2, entropy=entropy), importance([scores] * 2), kl),
            **rank_rows([DENSE_CELL, Cell("attention", 1), Cell("mlp", 1)], np.array([[9.0, 8, 7], [9, 8, 6]])),
        }
        for table, several in part.items():
            rows[table] += [{"model": name} | row for row in several]
    return {name: frame(name, several, OWN) for name, several in rows.items()}


THREE = own(
    ("a", 1e8, 4, [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]),
    (SMALL, 1e9, 4, [4, 3, 2, 1], [1, 2, 3, 4], [4, 3, 2, 1]),
    (LARGE, 1e10, 4, [1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 2, 4]),
)


def curves(**retained):
    """Of each model: retained without two of four attention layers, of tasks (as given), and of text (0.9)."""
    values = np.array(list(retained.values()))
    numbers = {"retained": values, "retained_low": values - 0.03, "retained_high": values + 0.04}
    names = [{"a": "a", "small": SMALL, "large": LARGE}[name] for name in retained]
    tasks = pd.DataFrame({"model": names, "kind": "attention", "n": 2} | numbers)
    text = tasks.assign(retained=0.9, retained_low=0.9, retained_high=0.9)
    reach = pd.DataFrame({"model": names, "kind": "attention", "n": 2, "low": 1, "high": 4, "tried_up_to": 4})
    return {
        "average": pd.concat([tasks, tasks.assign(n=1, retained=1.0), tasks.assign(kind="mlp", retained=0.0)]),
        "text": text,
        "reach": reach,
        "task_reach": reach.assign(n=3, tried_up_to=3),
    }


def test_sizes():
    half = pd.DataFrame(compare._half_rows(THREE, curves(a=0.5, small=0.6, large=0.9)))
    assert list(half[half["measure"] == "tasks"]["retained"]) == [0.5, 0.6, 0.9]
    reach = pd.DataFrame(compare._reach_rows(THREE, curves(a=0.5, small=0.6, large=0.9)))
    assert set(zip(reach["measure"], reach["share"], reach["share_low"], reach["share_high"], strict=True)) == {
        ("text", 0.5, 0.25, 1.0), ("tasks", 0.75, 0.25, 1.0),
    }  # fmt: skip
    rows = {(row["what"], row["measure"], row["models"]): row for row in compare._size_rows(THREE, reach, half)}
    pair = rows["retained without half", "tasks", f"{LARGE} minus {SMALL}"]
    assert pair["change"] == pytest.approx(0.3)
    assert pair["low"] == pytest.approx(0.3 - np.hypot(0.03, 0.04))
    assert pair["high"] == pytest.approx(0.3 + np.hypot(0.04, 0.03))
    slope = rows["retained without half", "tasks", compare.ALL]  # 0.5, 0.6 and 0.9 at 8, 9 and 10
    assert (slope["change"], slope["n_models"]) == (pytest.approx(0.2), 3)
    spread = 12.7062 * np.sqrt((1 + 4 + 1) / 900 / 2)  # residuals of 1/30, -2/30 and 1/30
    assert slope["low"] == pytest.approx(0.2 - spread, abs=1e-4)  # wider than from the models: half of 0.04 and of 0.03
    assert slope["high"] == pytest.approx(0.2 + spread, abs=1e-4)
    text = rows["retained without half", "text", compare.ALL]
    assert (text["change"], text["low"], text["high"]) == pytest.approx((0, 0, 0), abs=1e-12)
    assert rows["share of the layers that can go", "text", f"{LARGE} minus {SMALL}"]["change"] == 0
    assert ("share of the layers that can go", "tasks", compare.ALL) not in rows, "all that were tried can go"


def test_intervals_of_a_slope_from_the_models():
    """On a line there is no spread: half of 0.04 above the first, of 0.03 below the last."""
    half = pd.DataFrame(compare._half_rows(THREE, curves(a=0.5, small=0.7, large=0.9)))
    rows = {(row["measure"], row["models"]): row for row in compare._size_rows(THREE, pd.DataFrame(), half)}
    assert rows["tasks", compare.ALL]["low"] == pytest.approx(0.2 - np.hypot(0.02, 0.015))


def test_sizes_of_two_models_have_no_slope():
    two = {name: rows[rows["model"] != "a"] for name, rows in THREE.items()}
    half = pd.DataFrame(compare._half_rows(two, curves(small=0.6, large=0.9)))
    assert {row["models"] for row in compare._size_rows(two, pd.DataFrame(), half)} == {f"{LARGE} minus {SMALL}"}
    assert compare._size_rows(two, pd.DataFrame(), pd.DataFrame()) == []


def test_a_model_with_nothing_to_retain_is_left_out_of_the_sizes():
    half = pd.DataFrame(compare._half_rows(THREE, curves(a=float("nan"), small=0.6, large=0.9)))
    rows = compare._size_rows(THREE, pd.DataFrame(), half)
    assert [row["models"] for row in rows if row["measure"] == "tasks"] == [f"{LARGE} minus {SMALL}"]


def test_causes_over_all_models():
    rows = {(row["cause"], row["target"]): row for row in compare._overall_rows(THREE)}
    entropy = rows[ENTROPY, IMPORTANCE]  # 1, 1 and 0.8, of which Fisher's z is 3.800 (of 0.999) twice, and 1.099
    assert entropy["correlation"] == pytest.approx(np.tanh((2 * np.arctanh(0.999) + np.arctanh(0.8)) / 3))
    assert entropy["low"] < 0 < entropy["correlation"] < entropy["high"] < 1, "three models say little"
    assert (entropy["models"], entropy["same_sign"]) == (3, 3)
    x, y = [1, 2, 3, 4, 4, 3, 2, 1, 1, 3, 2, 4], [1, 2, 3, 4, 4, 3, 2, 1, 1, 2, 3, 4]
    assert entropy["pooled"] == pytest.approx(stats.rank_correlation(x, y))
    damage = rows[IMPORTANCE, DAMAGE]  # 1, -1 and -1
    assert damage["correlation"] == pytest.approx(-np.tanh(np.arctanh(0.999) / 3))
    assert damage["same_sign"] == 2
    assert (WEIGHTS, DAMAGE) not in rows, "nothing is known of it"


def test_a_model_that_is_left_out():
    rows = {(row["model"], row["predictor"], row["target"]): row for row in compare._left_out_rows(THREE)}
    # Entropy and damage: 1, -1 and -0.8. The others say "negative" of the first, and "positive" of the last.
    assert rows["a", ENTROPY, DAMAGE]["correlation"] == -1
    assert rows[LARGE, ENTROPY, DAMAGE]["correlation"] == pytest.approx(-0.8)
    assert rows["a", ENTROPY, DAMAGE]["low"] <= -1 <= rows["a", ENTROPY, DAMAGE]["high"]
    # By the distance to the last layer, damage falls in two models and rises in the third.
    assert rows[LARGE, "without a forward pass", DAMAGE]["correlation"] == pytest.approx(-1)
    # Importance follows entropy in every model.
    assert rows["a", "all causes", IMPORTANCE]["correlation"] == pytest.approx(1)
    assert {name for name, _, _ in rows} == {"a", SMALL, LARGE}
    alone = {name: table[table["model"] == "a"] for name, table in THREE.items()}
    assert list(compare._left_out_rows(alone)) == []


def test_fewest_layers():
    """Without the layer of importance 1 the order is perfect."""
    values = np.array([9.0, 1, 8, 7, 6, 5, 4])
    depth = np.arange(7)
    number = lambda layers: float(stats.rank_correlation(depth[layers], values[layers]))  # noqa: E731
    assert number(depth) == pytest.approx(1 - 6 * 82 / 336)
    left_out, without = fewest(number, depth, -0.95, 1)
    assert (left_out, without) == ([1], -1)
    left_out, without = fewest(lambda layers: 1.0, np.arange(12), 0.0, 1)
    assert (len(left_out), without) == (6, 1.0), "six at most"
    assert fewest(number, depth, 0.0, 1)[0] == [], "it is not beyond the limit"


def similarity(model, attention, mlp, corpus="web"):
    block = [a + b for a, b in zip(attention, mlp, strict=True)]
    rows = [
        {"model": model, "corpus": corpus, "kind": kind, "layer": layer, "importance": value, "low": value, "high": value}
        for kind, values in (("attention", attention), ("mlp", mlp), ("block", block))
        for layer, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_layers_that_make_a_claim_fail():
    """Attention of layer 0 alone makes attention more important than MLP, and the order of depth fail."""
    tables = {"importance": similarity("a", [0.9, 0.3, 0.2, 0.1, 0.2], [0.4, 0.35, 0.3, 0.2, 0.25])}
    model = {name: rows[rows["model"] == "a"] for name, rows in THREE.items()}
    rows = {(row["claim"], row["kind"]): row for row in exception_rows(model, {"01_similarity": tables, "02_drop_curves": {}})}
    row = rows["attention-most-redundant", "mlp"]
    assert (row["layers"], row["corpus"]) == ("0", "web")
    assert row["value"] == pytest.approx((1.7 - 1.5) / 5)
    assert row["without"] == pytest.approx((0.8 - 1.1) / 4)
    assert ("attention-most-redundant", "block") not in rows
    assert ("deeper-more-redundant", "attention") not in rows


def test_the_worst_pair_of_corpora():
    tables = pd.concat([
        similarity("a", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        similarity("a", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "code"),
        similarity("a", [5, 2, 3, 4, 1], [1, 2, 3, 4, 5], "mathematics"),
    ])  # fmt: skip
    model = {name: rows[rows["model"] == "a"] for name, rows in THREE.items()}
    given = {"01_similarity": {"importance": tables}, "02_drop_curves": {}}
    (row,) = [
        row for row in exception_rows(model, given) if (row["claim"], row["kind"]) == ("corpus-does-not-matter", "attention")
    ]
    assert "mathematics" in row["corpus"]
    assert row["value"] == pytest.approx(1 - 6 * 32 / 120)
    assert set(row["layers"].split()) <= {"0", "4"}


def test_the_costliest_of_the_dropped():
    """Attn-2 drops layers 3 and 1, worse than MLP-2 in the tasks: of these layer 3 costs most alone."""
    gaps = pd.DataFrame({"other": ["mlp", "block"], "difference": [-0.1, 0.1]})
    gaps = gaps.assign(model="a", kind="attention", n=2, measure="tasks")
    plans = pd.DataFrame({"model": "a", "kind": ["attention", "mlp"], "n": 2, "attention": ["3 1", ""]})
    given = {"01_similarity": {}, "02_drop_curves": {"gaps": gaps, "plans": plans}}
    model = {name: rows[rows["model"] == "a"] for name, rows in THREE.items()}
    (row,) = exception_rows(model, given)
    assert (row["kind"], row["layers"], row["value"]) == ("mlp-2", "3", -0.1)


def test_methods_beside_cosine():
    """At the largest number for which there are tasks; what is compared with itself is left out."""
    row = {"model": "a", "kind": "attention", "n": 4, "against": "cosine", "outcome": "no difference seen"}
    measures = {"text": (0.3, 0.1, 0.5), "tasks": (-0.02, -0.03, -0.01), "continuation": (0.1, 0.0, 0.2)}
    numbers = {m: dict(zip(("difference", "difference_low", "difference_high"), v, strict=True)) for m, v in measures.items()}
    quality = pd.DataFrame([
        *(row | {"model": "b", "method": "random", "measure": m} | numbers[m] for m in measures),
        *(row | {"method": "greedy KL", "measure": m, "n": 2} | numbers[m] for m in measures),
        *(row | {"method": "greedy KL", "measure": m} | numbers[m] | {"outcome": told}
          for m, told in (("text", "better"), ("tasks", "worse"), ("continuation", "better"))),
        *(row | {"method": "cosine", "measure": m, "outcome": "itself"} | numbers[m] for m in measures),
        *(row | {"method": "greedy KL", "measure": m, "kind": "mlp", "n": 6} | numbers[m] for m in measures),
        *(row | {"method": "greedy KL", "measure": m, "n": 8} | numbers[m] for m in ("text", "continuation")),
        row | {"model": "c", "method": "random", "measure": "text"} | numbers["text"],
    ])  # fmt: skip
    first, found = compare._method_rows({"quality": quality})
    assert [first[key] for key in ("model", "method", "n", "better", "worse")] == ["b", "random", 4, "", ""]
    assert found == {
        "model": "a", "method": "greedy KL", "n": 4, "against": "cosine", "text": 0.3, "text_low": 0.1, "text_high": 0.5,
        "tasks": -0.02, "tasks_low": -0.03, "tasks_high": -0.01, "continuation": 0.1, "continuation_low": 0.0,
        "continuation_high": 0.2, "better": "text, continuation", "worse": "tasks",
    }  # fmt: skip
    assert list(compare._method_rows({})) == []


def test_claims_of_each_model():
    """Two models whose contrast lies on different sides of zero."""
    contrast = pd.DataFrame({
        "model": ["a", SMALL], "corpus": "web", "other": "mlp", "attention": 0.1, "compared": 0.2, "attention_median": 0.1,
        "compared_median": 0.2, "difference": [-0.1, 0.1], "low": [-0.2, 0.05], "high": [-0.05, 0.2], "layers_lower": 1,
        "n_layers": 4,
    })  # fmt: skip
    imp = pd.concat([similarity(name, [1.0] * 4, [1.0] * 4).assign(n_samples=8) for name in ("a", SMALL)])
    not_run = pd.DataFrame(columns=["what", "reason"])
    tables = {"contrast": contrast, "importance": imp, "not_run": not_run}
    others = {"01_similarity": tables}
    found = {(row["model"], row["claim"]): row["verdict"] for row in compare._claim_rows(THREE, others)}
    assert found["a", "attention-most-redundant"] == "reproduced"
    assert found[SMALL, "attention-most-redundant"] == "deviates"
    assert not [claim for model, claim in found if model == LARGE]


# ---- runs -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    """A profile of two models, of which the first has been measured."""
    monkeypatch.setattr(files, "PROFILE_DIR", tmp_path / "profiles")
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/steps.yaml").write_text(
        "description: d\nmodels: {smollm2-135m: , qwen2.5-coder-0.5b: {causes: {n_samples: 3}}}\n"
        "calibration: {corpora: [web], n_samples: 8, seq_len: 8, sample_counts: [2], batch_size: 1, n_drop: [1]}\n"
        "text: {n_samples: 2, seq_len: 8, n_drop: [1], across: [1]}\ncauses: {n_samples: 2, n_drop: [1]}\n"
    )
    folder = files.local("steps-smollm2-135m").tables / NOTEBOOK
    tables = {name: rows[rows["model"] == "a"] for name, rows in THREE.items()}
    rest = {name: frame(name, [], TABLES) for name in compare.TABLES}
    none = {"not_run": pd.DataFrame(columns=["what", "reason"])}
    write_tables(tables | rest | none, folder, [{"model": "a", "dtype": "float32", "git_commit": "c"}])
    return load_profile("steps")


def test_runs_are_gathered(ladder):
    assert [run.run for run in runs_of(ladder).values()] == ["steps-smollm2-135m", "steps-qwen2.5-coder-0.5b"]
    tables, lacking = gathered(ladder, NOTEBOOK)
    assert list(tables["models"]["model"]) == ["a"]
    assert lacking == {"notebook 11 of steps-qwen2.5-coder-0.5b": "There are no results of it."}
    assert gathered(ladder, "01_similarity")[0] == {}
    before = state_of(ladder, (NOTEBOOK,))
    path = files.local("steps-smollm2-135m").tables / NOTEBOOK / "models.csv"
    path.write_text(path.read_text().replace("100000000", "100000001") + "\n")
    assert state_of(ladder, (NOTEBOOK,)) != before


def test_what_compares_runs_measures_nothing(ladder):
    tables = STUDIES[NOTEBOOK](ladder)
    assert list(tables["models"]["model"]) == ["a"]
    assert list(tables["not_run"]["what"]) == [
        "notebook 11 of steps-qwen2.5-coder-0.5b",
        "notebook 01 of steps-smollm2-135m, steps-qwen2.5-coder-0.5b",
    ], "the profile has no sections for 02 to 04, 08 and 10"
    record = json.loads((files.local("steps").tables / NOTEBOOK / "provenance.json").read_text())
    assert record == [{"model": "a", "dtype": "float32", "git_commit": "c"}]


def test_nothing_to_compare(ladder):
    shutil.rmtree(files.local("steps-smollm2-135m").tables)
    with pytest.raises(NotAvailable, match="No model has been measured yet"):
        STUDIES[NOTEBOOK](ladder)


def test_rows_of_one_model():
    tables = {"text": pd.DataFrame({"model": ["a", "b"], "x": [1, 2]}), "plain": pd.DataFrame({"x": [3]})}
    found = of_model(tables, "b")
    assert list(found["text"]["x"]) == [2]
    assert list(found["plain"]["x"]) == [3]


def test_what_makes_up_for_dropped_attention():
    """Each version of each model once, the dense one too, with its own numbers: what was not measured stays empty."""
    mean, versions = "perplexity over dense (mean)", list[tuple]()
    quality, made, regained = [], [], []
    for i, model in enumerate(("a", "b")):
        dense = dict(zip(compare.VERSION, (model, "dense", "plain", 0), strict=True))
        quality.append(dense | {"measure": mean, "value": 1, "low": 1, "high": 1})
        for j, (layers, way, n) in enumerate(itertools.product(("cosine", "random"), ("plain", "repair"), (4, 8))):
            version = dict(zip(compare.VERSION, (model, layers, way, n), strict=True))
            versions.append(tuple(version.values()))
            for k, measure in enumerate((mean, "perplexity over dense (web)", "calibration error", "copy")):
                value = 100 * i + 10 * j + k
                quality.append(version | {"measure": measure, "value": value, "low": value - 0.5, "high": value + 0.25})
            made.append(version | {"seconds": 1000 * i + j, "parameters": 0, "tokens": 100 + j, "cache": 0.5})
            for against in ("ReplaceMe", "plain") if way == "repair" else ():
                ends = {"low": 0.5, "high": 0.75} if against == "plain" else {"low": 0, "high": 0}
                regained.append(version | {"against": against, "regained": 0.625 if against == "plain" else 0} | ends)
    tables = {"quality": pd.DataFrame(quality), "made": pd.DataFrame(made), "regained": pd.DataFrame(regained)}
    found = frame("kept", compare._kept_rows(tables), TABLES).set_index(compare.VERSION)
    assert list(found.index) == [("a", "dense", "plain", 0), *versions[:8], ("b", "dense", "plain", 0), *versions[8:]]
    row = found.loc["b", "random", "repair", 4]  # the seventh version of the second model
    assert row[["perplexity", "perplexity_low", "perplexity_high"]].tolist() == [160, 159.5, 160.25]
    assert row[["error", "error_low", "copied", "copied_high"]].tolist() == [162, 161.5, 163, 163.25]
    assert row[["seconds", "tokens", "parameters", "cache"]].tolist() == [1006, 106, 0, 0.5]
    assert row[["regained", "regained_low", "regained_high"]].tolist() == [0.625, 0.5, 0.75]
    assert found.loc["b", "random", "plain", 4][["regained", "choices", "continued"]].isna().all()
    dense = found.loc["a", "dense", "plain", 0]
    assert dense[["copied", "copied_low"]].isna().all()
    assert dense[["seconds", "tokens", "parameters", "cache"]].tolist() == [0, 0, 0, 1]
    assert found["parameters"].dtype.kind == found["tokens"].dtype.kind == "i"
    assert list(compare._kept_rows({})) == []


# ---- figures and advice -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """Tables of three models, as if 01 and 02 had been run on all."""
    scores = [similarity(name, [0.1, 0.2, 0.3, 0.2], [0.3, 0.4, 0.5, 0.4]) for name in ("a", SMALL, LARGE)]
    others = {"01_similarity": {"importance": pd.concat(scores)}}
    verdict = {"claim": "deeper-more-redundant", "verdict": "deviates", "evidence": "e"}
    numbers = curves(a=0.5, small=0.6, large=0.9)
    numbers |= {name: pd.concat([numbers[name], numbers[name].assign(kind="mlp", n=1)]) for name in ("reach", "task_reach")}
    half = list(compare._half_rows(THREE, numbers))
    reach = list(compare._reach_rows(THREE, numbers))
    rows = {
        "depth": compare._depth_rows(others["01_similarity"]), "reach": reach, "half": half,
        "sizes": compare._size_rows(THREE, pd.DataFrame(reach), pd.DataFrame(half)),
        "overall": list(compare._overall_rows(THREE)), "left_out": list(compare._left_out_rows(THREE)),
        "claims": [{"model": name} | verdict for name in ("a", SMALL)],
        "exceptions": [], "methods": [], "kept": [],
    }  # fmt: skip
    return THREE | {name: frame(name, rows[name], TABLES) for name in compare.TABLES}


@pytest.mark.parametrize("name", [name for name, spec in FIGURES.items() if spec.notebook == NOTEBOOK])
def test_figures(drawn, name, tmp_path):
    drawing = draw(name, drawn, tmp_path)
    assert drawing.takeaway.endswith(".")
    empty = drawn | {table: frame(table, [], TABLES) for table in compare.TABLES}
    one = {table: rows[rows["model"] == "a"] if "model" in rows else rows for table, rows in empty.items()}
    one["overall"] = frame("overall", compare._overall_rows(one), TABLES)
    draw(name, one, tmp_path)  # a single model, of which nothing else was run


def test_lines_join_models_of_one_series(drawn):
    """Of three models two were trained alike: for each kind a line joins these two, and none all three."""
    drawing = FIGURES["figS17_sizes"].draw({name: with_exact_names(rows) for name, rows in drawn.items()})
    lines = [line for ax in drawing.figure.axes for line in ax.get_lines() if line.get_linestyle() not in ("None", "none")]
    ends = [np.round(np.log10(line.get_xdata())).tolist() for line in lines if len(line.get_xdata())]
    assert ends == [[9, 10]] * 4, "attention and MLP, in both panels"
    plt.close(drawing.figure)


def test_takeaways(drawn, tmp_path):
    sizes = draw("figS17_sizes", drawn, tmp_path).takeaway
    assert "from 100 M to 10.0 B parameters, 50 to 50 % of the attention layers but 25 to 25 % of the MLPs" in sizes
    assert "Reproduced: a 0 of 1" in draw("figS19_claims", drawn, tmp_path).takeaway
    assert "importance goes best with attention entropy, nats (+0.99" in draw("figS20_predictors", drawn, tmp_path).takeaway


def test_advice(drawn):
    text = ADVICE[NOTEBOOK](drawn)
    assert "**a**: 2 attention layers and 1 MLPs keep 90 % of next-token accuracy; 3 or more and 1 keep 95 % of the" in text
    assert "importance, measured on it" in text


def test_reads_what_it_says():
    assert STUDIES[NOTEBOOK].reads == READ
    assert STUDIES[NOTEBOOK].compares
    assert not any(study.compares for name, study in STUDIES.items() if name != NOTEBOOK)
    assert read_tables(files.REFERENCE / "nowhere") == {}
