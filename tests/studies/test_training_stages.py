"""Notebook 07: its numbers from small hand-made input, and the study on tiny checkpoints."""

import ast
import dataclasses
import json
import math
import warnings

import families
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from llmdrop_utils import LLMDropError, NotAvailable, load_profile, locate_series, measure_importance, score_text
from llmdrop_utils.base import files
from llmdrop_utils.base.store import Store
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.load import load_located
from llmdrop_utils.models.locate import LocatedModel
from llmdrop_utils.models.recipe import load_recipe
from llmdrop_utils.models.series import Series, Stage
from llmdrop_utils.report.rules import INCONCLUSIVE, decide
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.tables import frame, read_tables, with_exact_names
from llmdrop_utils.report.verdicts import ADVICE, CHECKS
from llmdrop_utils.selection.ranking import select
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.studies.profile import profile_names
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.training_stages import study
from llmdrop_utils.studies.training_stages.figures import LABELS, name_stages
from llmdrop_utils.studies.training_stages.rows import LOSS_POINTS, Followed, StageValues, count, first_settled
from llmdrop_utils.studies.training_stages.study import TABLES, Stages
from llmdrop_utils.studies.work import DENSE

NOTEBOOK = "07_training_stages"
MINE = [name for name, spec in FIGURES.items() if spec.notebook == NOTEBOOK]

# ---- numbers from hand-made input ---------------------------------------------------------------------------------------

# Importance of four layers at three stages: untrained, after a quarter of the tokens, at the end.
ATTENTION = [[0.4, 0.1, 0.2, 0.3], [0.4, 0.3, 0.1, 0.2], [0.4, 0.2, 0.1, 0.3]]
MLP = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.9]]
BLOCK = [[0.8, 0.8, 0.8, 0.8], [0.8, 0.8, 0.8, 0.8], [0.9, 0.7, 0.8, 0.6]]
WEIGHTS = np.array([10, 30])  # tokens per sample: twice the value in the first, two thirds of it in the second


def importance(attention, mlp, block):
    """Scores of two unequal samples whose mean over tokens is what is given."""
    by_kind = {"attention": attention, "mlp": mlp, "block": block}
    return Importance({kind: np.outer([2, 2 / 3], values) for kind, values in by_kind.items()}, WEIGHTS, {})


def series(tokens=(0, 250, 1000), steps=(0, 5, 20), **more):
    stages = [
        Stage(f"step-{step}", step, seen, LocatedModel(f"hand, step-{step}", None, f"sha256:{step}"))
        for step, seen in zip(steps, tokens, strict=True)
    ]
    return Series("hand", 3, tuple(stages), **more)


def followed(measured=(0, 1, 2), **more):
    """The three stages above. Dropping adds 0.5 and 0.1 nats to the two samples, then takes 0.1 from both, then adds 1."""
    plans = study._plans(importance(ATTENTION[2], MLP[2], BLOCK[2]))
    added = [[0.5, 0.1], [-0.1, -0.1], [1.0, 1.0]]
    values = {}
    for i in measured:
        dense = {"nll": [2.0, 4.0], "kl": [0.0, 0.0]}
        without = {"nll": [2 + added[i][0], 4 + added[i][1]], "kl": [0.2, 0.4]}
        text = {DENSE.key: dense} | {plan.key: without for plan in plans.values()}
        values[i] = StageValues(importance(ATTENTION[i], MLP[i], BLOCK[i]), text)
    return Followed(series(**more), plans, values)


def table(name, **more):
    return pd.DataFrame(followed(**more).rows()[name])


def one(rows, **wanted):
    """The one row with these values."""
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, wanted
    return rows.iloc[0]


def test_rows_are_as_declared():
    for name, rows in followed(losses=pd.DataFrame({"step": [1], "tokens": [50], "loss": [7.0]})).rows().items():
        content = frame(name, rows, TABLES)
        assert len(content)
        assert set(content["model"]) == {"hand"}
        assert set(content["seed"]) == {3}


@pytest.mark.parametrize(
    ("kind", "position", "layers", "mean", "above"),
    [
        ("attention", 0, "all layers", 0.25, 0.0),
        ("attention", 0, "all but the first", 0.2, 0.0),
        ("mlp", 0, "all layers", 0.25, 0.0),
        ("mlp", 0, "all but the first", 0.3, 0.1),
        ("mlp", 1, "all layers", 0.65, 0.4),
        ("mlp", 1, "all but the first", 0.7, 0.5),
        ("block", 2, "all but the first", 0.7, 0.5),
    ],
)
def test_means_with_and_without_the_first_layer(kind, position, layers, mean, above):
    row = one(table("means"), kind=kind, position=position, layers=layers)
    assert row["importance"] == pytest.approx(mean)
    assert row["above_attention"] == pytest.approx(above)
    assert row["low"] == pytest.approx(mean * 2 / 3), "at the low end both draws are the second sample"
    assert row["high"] == pytest.approx(mean * 2)


def test_kinds_are_compared_sample_by_sample():
    """MLP exceeds attention by 0.1 in every sample, and the samples differ by much more."""
    scores = importance([0.1, 0.2], [0.0, 0.0], [0.0, 0.0])
    scores = dataclasses.replace(scores, per_sample=scores.per_sample | {"mlp": scores.per_sample["attention"] + 0.1})
    values = StageValues(scores, {DENSE.key: {"nll": [1.0, 1.0], "kl": [0.0, 0.0]}})
    rows = pd.DataFrame(Followed(series(), {}, {2: values})._mean_rows())
    row = one(rows, kind="mlp", layers="all layers")
    assert [row["above_low"], row["above_attention"], row["above_high"]] == pytest.approx([0.1, 0.1, 0.1])
    assert row["high"] - row["low"] > 0.1


def test_change_is_the_last_stage_minus_this_one():
    rows = table("change")
    assert set(rows["position"]) == {0, 1}, "the last stage is compared with, and not with itself"
    change = lambda **wanted: one(rows, **wanted)["change"]  # noqa: E731
    assert change(kind="mlp", position=0, layers="all layers") == pytest.approx(0.675 - 0.25)
    assert change(kind="mlp", position=1, layers="all layers") == pytest.approx(0.675 - 0.65)
    assert change(kind="mlp", position=1, layers="all but the first") == pytest.approx((0.9 - 0.8) / 3)
    assert change(kind="block", position=1, layers="all layers") == pytest.approx(0.75 - 0.8)
    assert change(kind="attention", position=0, layers="all but the first") == pytest.approx(0)


def test_change_is_paired_by_sample():
    """Two samples that differ much, and in both importance grows by 0.1 from the first stage to the last."""
    first = importance([0.1, 0.2], [0.3, 0.6], [0.5, 0.5])
    last = dataclasses.replace(first, per_sample={kind: rows + 0.1 for kind, rows in first.per_sample.items()})
    text = {DENSE.key: {"nll": [1.0, 1.0], "kl": [0.0, 0.0]}}
    values = {0: StageValues(first, text), 2: StageValues(last, text)}
    for row in Followed(series(), {}, values)._change_rows():
        assert [row["low"], row["change"], row["high"]] == pytest.approx([0.1] * 3)


def test_change_has_an_interval_over_samples():
    """From 0.25 and 0.675, both times 2 in the first sample and times 2/3 in the second."""
    row = one(table("change"), kind="mlp", position=0, layers="all layers")
    assert [row["low"], row["high"]] == pytest.approx([0.425 * 2 / 3, 0.425 * 2])


def test_agreement_with_the_last_stage():
    """Ranks of attention: 4 1 2 3, then 4 3 1 2, and 4 2 1 3 at the end; rho = 1 - 6 sum d^2 / (n (n^2 - 1))."""
    rows = table("agreement")
    found = rows[rows["kind"] == "attention"]
    np.testing.assert_allclose(found["correlation"], [0.8, 0.8, 1.0])
    assert list(found["shared"]) == [0, 1, 1], "the least important layer is 1, then 2, and 2 at the end"
    assert set(found["n"]) == {1}
    assert set(found["by_chance"]) == {1 / 4}
    text = {DENSE.key: {"nll": [1.0, 1.0], "kl": [0.0, 0.0]}}
    eight = [0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    first, last = importance(eight, eight[::-1], eight), importance(eight, eight, [0.1, 0.8, *eight[2:]])
    rows = pd.DataFrame(Followed(series(), {}, {0: StageValues(first, text), 2: StageValues(last, text)})._agreement_rows())
    assert one(rows, kind="attention", position=0)["correlation"] == pytest.approx(1)
    assert one(rows, kind="mlp", position=0)["correlation"] == pytest.approx(1 - 6 * 72 / (8 * 63)), "d = 1 5 3 1 1 3 5 1"
    block = one(rows, kind="block", position=0)
    assert (block["shared"], block["n"], block["by_chance"]) == (1, 2, 0.5), "1 2 first, then 0 2"


def test_settled_row():
    """The least important attention layer is 1, 2, 2: settled at the second stage. The least two are 1 2, 2 3, 2 1."""
    rows = table("settled")
    quarter, half = (one(rows, kind="attention", share=share) for share in ("quarter", "half"))
    assert (quarter["stage"], quarter["position"], quarter["progress"], quarter["layers"]) == ("step-5", 1, 0.25, "2")
    assert (half["stage"], half["progress"], half["layers"]) == ("step-20", 1.0, "2 1")
    assert (half["low"], half["high"], half["low_stage"], half["high_stage"]) == (1.0, 1.0, "step-20", "step-20")
    mlp = one(rows, kind="mlp", share="half")
    assert (mlp["stage"], mlp["layers"]) == ("step-0", "0 1"), "it was the choice from the start"
    block = one(rows, kind="block", share="half")
    assert block["layers"] == "3 1"


def test_settled_has_an_interval_over_samples():
    """The second, larger sample ranks layer 2 lowest from the start, as the last stage does; the first sample does not."""
    scores = [importance(ATTENTION[2], MLP[2], BLOCK[2]) for _ in range(3)]
    scores[0].per_sample["attention"][:] = [[0.4, 0.0, 0.1, 0.3], [0.4, 0.2, 0.1, 0.3]]
    text = {DENSE.key: {"nll": [1.0, 1.0], "kl": [0.0, 0.0]}}
    values = {i: StageValues(at_stage, text) for i, at_stage in enumerate(scores)}
    row = Followed(series(), study._plans(scores[2]), values)._settled_row("attention", "quarter")
    assert (row["stage"], row["low_stage"], row["high_stage"]) == ("step-0", "step-0", "step-5")
    assert (row["progress"], row["low"], row["high"]) == (0, 0, 0.25)


def test_first_settled():
    """Two layers of three: the last set {0, 1} is there at the first stage, lost at the second, and stays from the third on."""
    values = np.array([[[1, 2, 3]], [[3, 2, 1]], [[2, 1, 3]], [[1, 2, 3]]], dtype=float)
    assert first_settled(values, 2) == [2]
    assert first_settled(values[2:], 2) == [0]
    assert first_settled(values[[1, 0]], 2) == [1]


def test_cost_is_what_dropping_adds_to_the_loss():
    rows = table("cost")
    found = rows[(rows["kind"] == "attention") & (rows["share"] == "quarter")]
    np.testing.assert_allclose(found["cost"], [0.3, -0.1, 1.0])
    np.testing.assert_allclose(found["low"], [0.1, -0.1, 1.0])
    np.testing.assert_allclose(found["high"], [0.5, -0.1, 1.0])
    np.testing.assert_allclose(found["kl"], [0.3, 0.3, 0.3])
    assert list(rows[rows["position"] == 0]["n"]) == [1, 2] * 3


def test_plans_are_those_of_the_last_stage_and_of_no_model():
    plans = study._plans(dataclasses.replace(importance(ATTENTION[2], MLP[2], BLOCK[2]), model="sha256:last"))
    assert plans["attention", "half"].attention == (2, 1)
    assert plans["mlp", "quarter"].mlp == (0,)
    assert (plans["block", "half"].attention, plans["block", "half"].mlp) == ((3, 1), (3, 1))
    assert {plan.model for plan in plans.values()} == {None}, "earlier stages are other models"


@pytest.mark.parametrize(("n_layers", "quarter", "half"), [(1, 1, 1), (2, 1, 1), (8, 2, 4), (30, 7, 15)])
def test_count(n_layers, quarter, half):
    assert (count(n_layers, "quarter"), count(n_layers, "half")) == (quarter, half)


@pytest.mark.parametrize(
    ("tokens", "steps", "progress"),
    [
        ((0, 250, 1000), (0, 5, 20), [0, 0.25, 1]),
        ((0, None, 1000), (0, 5, 20), [0, 0.25, 1]),  # by steps
        ((0, None, None), (0, None, None), [0, 0, 1]),  # a model beside random weights: its end
    ],
)
def test_progress(tokens, steps, progress):
    rows = followed(tokens=tokens, steps=steps).rows()["stages"]
    assert [row["progress"] for row in rows] == progress


def test_stages_and_twins():
    rows = followed().rows()["stages"]
    assert [(row["nll"], row["low"], row["high"]) for row in rows] == [(3.0, 2.0, 4.0)] * 3
    assert [row["same_as"] for row in rows] == [None, None, None]
    values = StageValues(importance(ATTENTION[0], MLP[0], BLOCK[0]), {DENSE.key: {"nll": [1.0], "kl": [0.0]}})
    twins = Followed(series(), {}, dict.fromkeys(range(3), values))
    assert [twins._stage_row(i)["same_as"] for i in range(3)] == [None, "step-0", "step-0"]


def test_a_stage_that_is_unavailable_is_left_out():
    rows = followed(measured=(0, 2)).rows()
    for name in ("stages", "means", "agreement", "cost"):
        assert sorted({row["position"] for row in rows[name]}) == [0, 2], name
    assert one(pd.DataFrame(rows["settled"]), kind="attention", share="quarter")["stage"] == "step-20"


def test_losses_between_points_are_averaged():
    """Loss equals step: a point stands for the steps since the one before."""
    n = 1000
    steps = np.arange(1, n + 1)
    rows = table("losses", losses=pd.DataFrame({"step": steps, "tokens": steps * 64, "loss": steps.astype(float)}))
    assert len(rows) <= LOSS_POINTS
    before = rows["step"].shift(fill_value=0)
    np.testing.assert_allclose(rows["loss"], (before + 1 + rows["step"]) / 2)
    assert rows["step"].iloc[-1] == n
    assert (rows["tokens"] == rows["step"] * 64).all()
    assert followed().rows()["losses"] == []


def test_a_single_layer_has_no_others():
    scores = importance([0.1], [0.2], [0.3])
    plans = study._plans(scores)
    text = {plan.key: {"nll": [1.0, 1.0], "kl": [0.0, 0.0]} for plan in (DENSE, *plans.values())}
    values = StageValues(scores, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = Followed(series(), plans, {0: values, 2: values}).rows()
    assert {row["layers"] for row in rows["means"] + rows["change"]} == {"all layers"}


# ---- advice, verdicts and figures -----------------------------------------------------------------------------------------


def content(**more):
    """All tables of the hand-made series."""
    return {name: frame(name, rows, TABLES) for name, rows in followed(**more).rows().items()}


def test_advice():
    assert ADVICE[NOTEBOOK](content()) == (
        "**hand**: choose layers on the final checkpoint. Its 1 least important attention layers stand out only once 25 % of "
        "the training is done. Dropping these 1 adds +1.000 nats per token at the end."
    )
    one_seed = content()
    later = one_seed["settled"].assign(seed=4, progress=1.0)
    text = ADVICE[NOTEBOOK](one_seed | {"settled": pd.concat([one_seed["settled"], later])})
    assert "once 25 to 100 % (range over seeds) of the training is done" in text
    assert "an early checkpoint will do" in ADVICE[NOTEBOOK](one_seed | {"settled": later.assign(progress=0.0)})
    text = ADVICE[NOTEBOOK](content(measured=(0, 2), tokens=(0, None, None), steps=(0, None, None)))
    assert "rank the attention layers with a correlation of 0.80 with the trained ones" in text


def test_a_seed_without_the_first_stage_leaves_the_claim_open():
    """Importance of MLP rises under the first seed; the second lacks the stage that the first one begins with."""
    rows = {"kind": ["attention", "mlp", "block"], "high": 0.4, "layers": "all layers", "model": "m"}
    early = pd.DataFrame(rows | {"change": [0.0, 0.2, 0.3], "low": 0.1}).assign(seed=0, position=1, stage="a", progress=0.2)
    late = early.assign(seed=1, position=2, stage="b", progress=0.5)
    means = pd.DataFrame({"model": "m", "seed": [0, 1]})
    (finding,) = CHECKS["others_rise"]({"means": means, "change": pd.concat([early, late])}, first=0.111)
    assert "seed 0, from a: attention +0.0000 (+0.1000 to +0.4000), mlp +0.2000 (+0.1000 to +0.4000)" in finding.text
    outcome, notes = decide([finding])
    assert outcome == INCONCLUSIVE
    assert "seed 1 lacks the stage a" in notes[0]


@pytest.mark.parametrize("run", ["cpu", "cpu-medium-llama"])
def test_figures_show_the_committed_data(run):
    tables = read_tables(files.REFERENCE / run / NOTEBOOK)
    assert set(tables) == {*TABLES, "not_run"}
    for name in MINE:
        drawing = FIGURES[name].draw({table: with_exact_names(rows) for table, rows in tables.items()})
        shown = drawing.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        assert shown == (files.committed(run).figures / f"{name}.csv").read_text(), name
        assert drawing.takeaway
        assert "\n" not in FIGURES[name].caption
    plt.close("all")


def test_takeaways_tell_the_numbers():
    tables = content()
    found = {name: FIGURES[name].draw(tables).takeaway for name in MINE}
    plt.close("all")
    assert "attention 1 to 2, MLP 0 to 0, blocks 0 to 3" in found["fig07_training_stages"]
    means = found["figS13_stage_means"]
    assert "at 2 of 3 stages (all layers) and 3 of 3 stages (all but the first)" in means, "attention equals MLP at first"
    assert "attention 0.250 to 0.250, MLP 0.250 to 0.675, blocks 0.800 to 0.750" in means
    assert "at step-0 0.80 for attention, 1.00 for MLP" in found["figS14_stage_agreement"]
    assert "+0.300 to +1.000 for attention" in found["figS15_stage_cost"]


@pytest.mark.parametrize(("n_stages", "n_panels"), [(2, 1), (10, 2), (18, 6)])
def test_labels_of_stages_fit_beside_each_other(n_stages, n_panels):
    stages = pd.DataFrame({"position": range(n_stages), "stage": "s", "tokens": [2.0**i for i in range(n_stages)]})
    _, ax = plt.subplots()
    name_stages(ax, stages, n_panels)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert len(labels) * n_panels <= LABELS + n_panels
    assert max(ax.get_xticks()) == n_stages - 1, "the last stage is named"
    plt.close("all")


# ---- the study on tiny checkpoints ----------------------------------------------------------------------------------------


def checkpoint(folder, seed):
    """A tiny model with weights of its own; returns its files."""
    torch.manual_seed(seed)
    families.tiny("llama", vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Records, tables and figures in a folder of their own."""
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.slow
def test_numbers_are_those_of_the_measuring_functions(cache, results, tmp_path):
    """Importance and cost of dropping at a stage, against the public functions on that stage's model."""
    for seed, step in enumerate((0, 5, 10)):
        checkpoint(tmp_path / "run" / f"checkpoint-{step}", seed)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"tokens_per_step": 100}))
    profile = load_profile("smoke", str(tmp_path / "run"))
    tables = STUDIES[NOTEBOOK](profile)
    assert list(tables["stages"]["tokens"]) == [0, 500, 1000]
    assert list(tables["stages"]["progress"]) == [0, 0.5, 1]
    found = locate_series(str(tmp_path / "run"))[0][0]
    for_scores, for_text = study._held_out_blocks(found, profile.section(Stages))
    assert (len(for_scores), len(for_text)) == (4, 2)
    assert not {tuple(row) for row in for_scores.tolist()} & {tuple(row) for row in for_text.tolist()}
    model, _ = load_located(found.stages[1].model)
    scores = measure_importance(model, for_scores)
    shown = tables["importance"].query("position == 1 and kind == 'mlp'")["importance"]
    np.testing.assert_allclose(shown, scores.importance["mlp"], rtol=1e-4)
    final, _ = load_located(found.stages[2].model)
    plan = dataclasses.replace(select(measure_importance(final, for_scores), "mlp", 1), model=None)
    dense, without = score_text(model, for_text, [DENSE, plan]).nll.mean(1)
    row = one(tables["cost"], position=1, kind="mlp", share="quarter")
    assert row["cost"] == pytest.approx(without - dense, abs=2e-4)
    assert (tables["agreement"].query("position == 2")["correlation"] == 1).all()


@pytest.mark.slow
def test_a_forced_run_measures_every_value_once(cache, results, tmp_path, monkeypatch):
    for seed, step in enumerate((0, 5)):
        checkpoint(tmp_path / "run" / f"checkpoint-{step}", seed)
    profile = load_profile("smoke", str(tmp_path / "run"))
    measured, put = [], Store.put
    monkeypatch.setattr(Store, "put", lambda self, key, *more: measured.append(key) or put(self, key, *more))
    STUDIES[NOTEBOOK](profile)
    first = len(measured)
    STUDIES[NOTEBOOK](profile)
    assert len(measured) == first, "all is stored"
    STUDIES[NOTEBOOK](profile, force=True)
    assert len(measured) == 2 * first


@pytest.mark.slow
def test_a_hub_series_with_gaps(network, cache, results, tmp_path, monkeypatch):
    """One stage without weights and one that does not exist are named; the others are measured; twins are seen."""
    repository = "org/followed"
    network.repositories[repository] = {f"{i}" * 40: checkpoint(tmp_path / f"source-{i}", min(i, 2)) for i in (1, 2, 3)}
    del network.repositories[repository]["1" * 40]["model.safetensors"]
    network.branches[repository] = {"step1": "1" * 40, "step10": "2" * 40, "step100": "3" * 40}
    source = {"hub": repository, "revisions": ["step1", "step10", "step50", "step100"], "tokens_per_step": 1000}
    monkeypatch.setitem(catalogue(), "series", catalogue()["series"] | {"followed": source})
    profile = load_profile("smoke", "followed")
    tables = STUDIES[NOTEBOOK](profile)
    assert list(tables["stages"]["stage"]) == ["random", "step10", "step100"]
    assert list(tables["stages"]["same_as"].fillna("")) == ["", "", "step10"]
    reasons = dict(zip(tables["not_run"]["what"], tables["not_run"]["reason"], strict=True))
    assert "The hub gave no *.safetensors for followed, step1" in reasons["followed, step1"]
    assert "but not the revision" in reasons["followed, step50"]
    network.requests.clear()
    again = STUDIES[NOTEBOOK](profile)
    fetched = [path for _, path, _ in network.requests if "2" * 40 in path and "safetensors" in path]
    assert not fetched, "nothing is fetched again"
    assert again["importance"].equals(tables["importance"])


@pytest.mark.slow
def test_of_several_series_the_others_are_followed(cache, results):
    profile = load_profile("smoke").replacing(stages={"series": ["map-neo-7b-stages", "tiny-llama"]})
    tables = STUDIES[NOTEBOOK](profile)
    assert list(tables["not_run"]["what"]) == ["map-neo-7b-stages"]
    assert set(tables["runs"]["model"]) == {"tiny-llama"}
    assert tables["losses"].empty
    assert list(tables["losses"].columns) == [column.name for column in TABLES["losses"]]
    assert math.isnan(tables["runs"]["unigram_entropy"][0])
    none = profile.replacing(stages={"series": ["map-neo-7b-stages", "small-lama"]})
    with pytest.raises(NotAvailable, match=r"None of these series is available:\nThe checkpoints of map-neo(.|\n)*small-llama"):
        STUDIES[NOTEBOOK](none)


def test_scores_and_text_have_tokens_of_their_own(monkeypatch):
    """Of the stage that is asked for; the text under the dense model first, then under every plan."""
    identity = {"dtype": torch.float32, "attention": "sdpa"}
    monkeypatch.setattr(study, "identity_of", lambda model, profile: {"model": model} | identity)
    for_scores, for_text = torch.zeros(4, 8).long(), torch.ones(2, 8).long()
    job = study._Job(series(), for_scores, for_text, load_profile("smoke"))
    plans = study._plans(importance(ATTENTION[2], MLP[2], BLOCK[2]))
    scores, text = job.importance_at(1), job.text_at(1, plans)
    assert scores.tokens is for_scores
    assert text.tokens is for_text
    assert scores.model.name == text.model.name == "hand, step-5"
    assert scores.corpus == text.corpus == "random-words"
    assert text.plans == (DENSE, *plans.values())


def test_what_is_measured_was_held_out(monkeypatch):
    """As many blocks as the profile asks for fit into the documents that were held out; otherwise it says so."""
    monkeypatch.setattr(study, "load_tokenizer", lambda model: byte_tokenizer())
    monkeypatch.setattr(study, "fitting_length", lambda model, asked: asked)
    recipe = load_recipe("tiny-series")
    stages = load_profile("smoke").section(Stages)
    scores, text = study._held_out_blocks(series(recipe=recipe), stages)
    assert (tuple(scores.shape), tuple(text.shape)) == ((4, 32), (2, 32))
    assert not {tuple(row) for row in scores.tolist()} & {tuple(row) for row in text.tolist()}
    with pytest.raises(LLMDropError, match="asks for 1002 blocks .* that hand was not trained on hold"):
        study._held_out_blocks(series(recipe=recipe), stages.model_copy(update={"n_samples": 1000}))


def test_the_profile_section():
    known = {*catalogue()["series"], *catalogue()["models"]}
    with_stages = [profile for profile in map(load_profile, profile_names()) if Stages in profile.sections]
    assert {profile.name for profile in with_stages} >= {"smoke", "cpu", "gpu"}
    for profile in with_stages:
        assert set(profile.section(Stages).series) <= known, profile.name
        assert profile.section(Stages).batch_size == 4
    assert load_profile("smoke", "some/run").section(Stages).series == ["some/run"]


def test_committed_series_learned_something():
    """The reference runs end below what token frequencies alone would give."""
    found = list(files.REFERENCE.glob(f"*/{NOTEBOOK}"))
    assert {folder.parent.name for folder in found} >= {"cpu", "cpu-medium-llama"}
    for folder in found:
        tables = read_tables(folder)
        trained = tables["runs"].dropna(subset=["unigram_entropy"])  # the others have no recipe
        assert len(trained) >= 2
        for run in trained.itertuples():
            stages = tables["stages"].query("model == @run.model and seed == @run.seed")
            assert len(stages) >= 8
            assert stages["nll"].iloc[-1] < run.unigram_entropy < stages["nll"].iloc[0]


def test_what_the_notebook_names_is_declared():
    notebook = nbformat.read(files.NOTEBOOKS / f"{NOTEBOOK}.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    named = {"table": [], "figure": []}
    for call in calls:
        if call.func.attr in named:
            named[call.func.attr].append([ast.literal_eval(argument) for argument in call.args])
    assert [name for (name,) in named["figure"]] == MINE
    for name, *columns in named["table"]:
        assert set(columns) <= {column.name for column in TABLES[name]}, name
