"""Notebook 10: how made models rank their layers, from values to rows by hand, on models, and what is said of it."""

import copy
import dataclasses
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch

from llmdrop_utils import DropPlan, dropped, measure_importance, score_text
from llmdrop_utils.base import files
from llmdrop_utils.base.store import Store
from llmdrop_utils.derive.healing import Healing
from llmdrop_utils.derive.repair import repair
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.models.locate import LocatedModel
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.tables import read_tables, write_tables
from llmdrop_utils.report.verdicts import ADVICE
from llmdrop_utils.studies import page as page_module
from llmdrop_utils.studies.keep_more import work as kept_module
from llmdrop_utils.studies.keep_more.ranking import RankingWork
from llmdrop_utils.studies.keep_more.ranking_rows import Ranked, further_rows, importance_rows, ranked, ranking_rows
from llmdrop_utils.studies.keep_more.rows import DENSE_VERSION, Version
from llmdrop_utils.studies.keep_more.study import _ranking
from llmdrop_utils.studies.keep_more.work import HEALING, MAPS, PLAIN, REPAIR, REPAIR_HEALING, WAYS, WINDOW, MadeWork
from llmdrop_utils.studies.profile import load_profile
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.work import ImportanceWork, TextWork

MODEL = LocatedModel("hand", Path("here"), "sha256:hand")
SHARED = {"model": MODEL, "dtype": torch.float64, "attention": "sdpa"}
TOKENS = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(0))
PLAN = DropPlan(attention=(1,))


def scores(attention, mlp=(0.1, 0.2, 0.3, 0.4), block=(0.4, 0.9, 0.6, 0.5)):
    """The same in each of three samples, so that every interval is the value itself."""
    rows = {"attention": attention, "mlp": mlp, "block": block}
    return Importance({kind: np.tile(values, (3, 1)) for kind, values in rows.items()}, np.full(3, 8), {})


DENSE = scores([0.1, 0.9, 0.2, 0.4])
REPAIRED = Version("cosine", REPAIR, 1)
FOUND = {
    REPAIRED: Ranked(
        PLAN, 1, scores([0.3, 0.0, 0.2, 0.8], mlp=(0.4, 0.3, 0.2, 0.1)), [[2.5, 2.7], [1.2, 1.4]], [[2.4, 2.4], [1.1, 1.1]]
    )
}


def of(rows, **keys):
    (row,) = [row for row in rows if all(row[name] == value for name, value in keys.items())]
    return row


# ---- rows ---------------------------------------------------------------------------------------------------------------


def test_layers_that_are_left_rank_beside_the_same_of_the_dense_model():
    """Ranks 1, 2, 3 in the dense model and 2, 1, 3 here: 1 - 6 x 2 / 24. The means are 0.7 / 3 and 1.3 / 3."""
    row = of(ranking_rows(DENSE, FOUND), kind="attention")
    assert row["correlation"] == row["low"] == row["high"] == pytest.approx(0.5)
    assert row["relative"] == row["relative_low"] == row["relative_high"] == pytest.approx(13 / 7)
    assert (row["n_left"], row["samples"], row["layers"], row["way"], row["n"]) == (3, 3, "cosine", REPAIR, 1)


def test_what_goes_next_in_each_order():
    (row,) = [row for row in ranking_rows(DENSE, FOUND) if row["kind"] == "attention"]
    assert (row["dense_next"], row["own_next"], row["shared"], row["by_chance"]) == ("0", "2", 0, pytest.approx(1 / 3))
    two = {REPAIRED: FOUND[REPAIRED]._replace(more=2)}
    row = of(ranking_rows(DENSE, two), kind="attention")
    assert (row["dense_next"], row["own_next"], row["shared"], row["by_chance"]) == ("0 2", "2 0", 2, pytest.approx(4 / 3))


def test_no_mlp_is_dropped_and_a_block_without_attention_is_none():
    rows = ranking_rows(DENSE, FOUND)
    assert of(rows, kind="mlp")["correlation"] == pytest.approx(-1)
    assert of(rows, kind="mlp")["n_left"] == 4
    assert of(rows, kind="mlp")["own_next"] == "3"
    assert of(rows, kind="block")["n_left"] == 3
    assert of(rows, kind="block")["correlation"] == pytest.approx(1)  # the second block would come last or, dropped, first


def test_importance_that_is_scaled_ranks_as_before():
    rng = np.random.default_rng(0)
    dense = Importance({kind: rng.uniform(size=(12, 6)) for kind in ("attention", "mlp", "block")}, np.full(12, 8), {})
    scaled = dataclasses.replace(dense, per_sample={kind: 3 * rows for kind, rows in dense.per_sample.items()})
    for row in ranking_rows(dense, {REPAIRED: Ranked(PLAN, 2, scaled, (), ())}):
        assert [row[name] for name in ("correlation", "low", "high")] == pytest.approx([1, 1, 1])
        assert [row[name] for name in ("relative", "relative_low", "relative_high")] == pytest.approx([3, 3, 3])
        assert row["dense_next"] == row["own_next"]


def test_noise_of_samples_is_in_the_interval():
    """Samples are shared, so what they have in common does not widen it."""
    rng = np.random.default_rng(1)
    level, noise = np.arange(1.0, 7), rng.normal(0, 1.5, (24, 6))
    rows = lambda values: Importance(dict.fromkeys(("attention", "mlp", "block"), values), np.full(24, 8), {})  # noqa: E731
    dense = rows(level + noise)
    same = of(ranking_rows(dense, {REPAIRED: Ranked(DropPlan(), 1, rows(level + noise), (), ())}), kind="mlp")
    other = rows(level + rng.normal(0, 1.5, (24, 6)))
    apart = of(ranking_rows(dense, {REPAIRED: Ranked(DropPlan(), 1, other, (), ())}), kind="mlp")
    assert same["low"] == same["high"] == 1
    assert apart["low"] < apart["correlation"] <= apart["high"] <= 1


def test_dropped_layers_are_gaps_in_the_table_of_importance():
    rows = [row for row in importance_rows(DENSE, FOUND) if row["kind"] == "attention"]
    assert [(row["way"], row["n"], row["layer"], round(row["importance"], 12)) for row in rows] == [
        (PLAIN, 0, 0, 0.1), (PLAIN, 0, 1, 0.9), (PLAIN, 0, 2, 0.2), (PLAIN, 0, 3, 0.4),
        (REPAIR, 1, 0, 0.3), (REPAIR, 1, 2, 0.2), (REPAIR, 1, 3, 0.8),
    ]  # fmt: skip
    assert all(row["low"] == pytest.approx(row["importance"]) == row["high"] for row in rows)
    assert importance_rows(DENSE, {}) == []


def text(corpus, tokens=TOKENS[16:]):
    return TextWork(**SHARED, corpus=corpus, tokens=tokens, plans=(PLAN,))


def ranking(order=(0, 2), more=1, plan=PLAN):
    texts = (TOKENS[16:20], TOKENS[20:])
    return RankingWork(**SHARED, tokens=TOKENS[:8], texts=texts, order=order, more=more, batch_size=4, plans=(plan,))


def made(way, *items, plan=PLAN):
    return MadeWork(**SHARED, way=way, plan=plan, tokens=TOKENS[:16], text=TOKENS, healing=Healing(tokens=64), items=items)


def test_what_further_layers_cost_by_each_order():
    """Of 2 and 1 nats the dense order loses 0.6 and 0.3 more, 0.45 as a mean, and the own order 0.4 and 0.1."""
    works = {DENSE_VERSION: made(PLAIN, text("web"), text("code")), REPAIRED: made(REPAIR, ranking())}
    values = {DENSE_VERSION: [{"nll": [2.0, 2.0]}, {"nll": [1.0, 1.0]}]}
    (row,) = further_rows(works, values, FOUND)
    assert [row[name] for name in ("by_dense_order", "by_own_order", "gained")] == pytest.approx([0.45, 0.25, 0.2])
    assert row["own_low"] == row["own_high"] == pytest.approx(0.25)
    assert row["dense_low"] < 0.45 < row["dense_high"]
    assert row["gained_low"] < 0.2 < row["gained_high"]
    assert row["more"] == 1
    assert further_rows(works, values, {}) == []


def test_versions_that_were_not_ranked_are_left_out():
    works = {DENSE_VERSION: made(PLAIN, text("web")), REPAIRED: made(REPAIR, text("web"), ranking())}
    value = {"importance": DENSE.to_json(), "by_dense_order": [[1.0]], "by_own_order": [[2.0]]}
    (found,) = ranked(works, {DENSE_VERSION: [{}], REPAIRED: [{}, value]}).items()
    assert found[0] == REPAIRED
    assert found[1][:2] == (PLAN, 1)
    assert found[1].scores.importance["attention"].tolist() == pytest.approx([0.1, 0.9, 0.2, 0.4])
    assert found[1][3:] == ([[1.0]], [[2.0]])


# ---- models -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_module.files, "CACHE", tmp_path)


@pytest.fixture
def model():
    return families.tiny("llama", num_hidden_layers=4).double()


@torch.no_grad()
def test_a_dropped_model_is_ranked_as_one_whose_attention_is_silent(model):
    """And the text is that without one layer more, the first by either order."""
    silent = copy.deepcopy(model)
    families.silence("llama", silent, [1], [])
    expected = measure_importance(silent, TOKENS[:8])
    own = min((0, 2, 3), key=expected.importance["attention"].__getitem__)
    other = max({0, 2, 3} - {own})
    (value,) = ranking(order=(other, *sorted({0, 2, 3} - {other}))).measure(model, None, lambda n: None)
    found = Importance.from_json(value["importance"])
    for kind in ("attention", "mlp", "block"):
        np.testing.assert_allclose(found.importance[kind], expected.importance[kind], rtol=1e-9)
    assert not found.histogram
    for name, layer in (("by_dense_order", other), ("by_own_order", own)):
        further = copy.deepcopy(silent)
        families.silence("llama", further, [layer], [])
        for nll, tokens in zip(value[name], (TOKENS[16:20], TOKENS[20:]), strict=True):
            np.testing.assert_allclose(nll, score_text(further, tokens).nll[0], rtol=1e-9)


@pytest.mark.parametrize("way", [PLAIN, REPAIR])
def test_a_made_model_is_ranked_as_it_was_made(model, way):
    by_hand, before = copy.deepcopy(model), copy.deepcopy(model)
    values = made(way, text("web"), ranking(order=(0, 2, 3))).measure(model, None, lambda n: None)
    if way == REPAIR:
        repair(by_hand, TOKENS[:16], PLAN)
    with dropped(by_hand, PLAN):
        expected = measure_importance(by_hand, TOKENS[:8]).importance
    found = Importance.from_json(values[1]["importance"]).importance
    np.testing.assert_allclose(found["attention"], expected["attention"], rtol=1e-6)
    assert values[1].keys() >= {"seconds", "parameters"}
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_ranked(model, way):
    """What has a window or a map in a dropped place is ranked over the layers that every other way has left, too."""
    done = []
    item = ranking(order=(0, 2, 3), more=2)
    (value,) = made(way, item).measure(model, None, done.append)
    attention = Importance.from_json(value["importance"]).importance["attention"]
    assert (attention[1] > 0) == (way == WINDOW or MAPS.removesuffix(" (NBL)") in way)
    own = sorted((0, 2, 3), key=attention.__getitem__)[:2]
    assert (value["by_dense_order"] == value["by_own_order"]) == ({*own} == {0, 2})
    assert np.isfinite([*value["by_dense_order"], *value["by_own_order"]]).all()
    assert sum(done) == pytest.approx(made(way, item).tokens_to_pass)


def test_nothing_is_ranked_if_one_layer_is_left():
    item = ImportanceWork(**SHARED, corpus="web", tokens=TOKENS, batch_size=4)
    assert _ranking(item, DENSE, [text("web")], DropPlan((0, 1, 2))) == []
    (two,) = _ranking(item, DENSE, [text("web")], DropPlan((0, 1)))
    assert (two.order, two.more) == ((2, 3), 1)
    (all_but_one,) = _ranking(item, DENSE, [text("web")], DropPlan((1,)))
    assert (all_but_one.order, all_but_one.more) == ((0, 2, 3), 2)
    assert torch.equal(all_but_one.tokens, TOKENS[:3]), "the samples that the dense model was ranked on"


# ---- keys ---------------------------------------------------------------------------------------------------------------


def test_the_address_of_what_is_stored(monkeypatch):
    """An address that stays; a ranking beside it is another value, and the only one to be measured."""
    code = {"processor": "P", "gpus": ["G"], "cpu_threads": 2}
    monkeypatch.setattr(kept_module, "code_provenance", lambda: code)
    before, after = made(REPAIR, text("web")), made(REPAIR, text("web"), ranking())
    assert Store(Path("records")).path(before.keys[0]).name == "6c51e3fbdc9519954acf2e297e05610f.json"
    assert after.keys[:1] == before.keys
    assert len({str(key) for key in after.keys}) == 2
    assert after.only([1]).items == after.items[1:]
    assert after.only([1]).keys == after.keys[1:]
    assert after.only([0, 1]) == after


# ---- the study ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Notebook 10 of the profile `smoke`, with fewer ways."""
    patch = pytest.MonkeyPatch()
    patch.setattr(files, "RESULTS", tmp_path_factory.mktemp("results"))
    few = {
        "ways": [WINDOW, MAPS, REPAIR, HEALING, REPAIR_HEALING],
        "chosen": {"random": [PLAIN, REPAIR]},
        "healing_tokens": 128,
    }
    try:
        yield STUDIES["10_keep_more"](load_profile("smoke").replacing(keep_more=few))
    finally:
        patch.undo()


@pytest.mark.slow
def test_the_study(study):
    ways = {PLAIN, WINDOW, MAPS, REPAIR, HEALING, REPAIR_HEALING}
    rankings, importance, further = study["rankings"], study["importance"], study["further"]
    versions = {("cosine", way, 2, kind) for way in ways for kind in ("attention", "mlp", "block")}
    assert {*rankings[["layers", "way", "n", "kind"]].itertuples(index=False, name=None)} == versions
    assert {*further["way"]} == ways
    dropped_layers = {*study["orders"].query("layers == 'cosine'")["layer"]}
    left = importance.query("kind == 'attention' and n == 2").groupby("way")["layer"].agg(set)
    assert all(layers == {*range(6)} - dropped_layers for layers in left)
    assert (rankings["more"] == 3).all(), "of six layers two are dropped, and one has to stay"
    assert rankings["dense_next"].map(lambda layers: len(layers.split())).eq(3).all()
    gained = further["by_dense_order"] - further["by_own_order"]
    assert further["gained"].tolist() == pytest.approx(gained.tolist(), abs=1e-5)


@pytest.mark.slow
def test_the_figure_and_the_advice(study):
    drawing = FIGURES["figS36_rankings"].draw(study)
    assert len(drawing.figure.axes) == 4
    assert "Rank correlation of the 4 attention layers that are left without 2" in drawing.takeaway
    advice = ADVICE["10_keep_more"](study)
    assert all(f"after {way} " in advice for way in (REPAIR, HEALING, REPAIR_HEALING))
    assert "To drop 3 more " in advice


def told(gained, low, high):
    """The advice of one model after a repair, on a table that says so much is gained."""
    key = {"model": "m", "layers": "cosine", "way": REPAIR, "n": 8}
    rankings = pd.DataFrame([key | {"kind": "attention", "correlation": 0.93, "low": 0.88, "high": 0.97}])
    further = pd.DataFrame([key | {"more": 4, "gained": gained, "gained_low": low, "gained_high": high}])
    quality = [("dense", PLAIN, 0, 1.0), ("cosine", PLAIN, 8, 2.0), ("cosine", REPAIR, 8, 1.5)]
    rows = [dict(zip(("layers", "way", "n", "value"), row, strict=True)) for row in quality]
    tables = {
        "quality": pd.DataFrame(rows).assign(model="m", measure="perplexity over dense (mean)"),
        "made": pd.DataFrame([key | {"parameters": 0, "seconds": 60}]),
    }
    return ADVICE["10_keep_more"](tables | {"rankings": rankings.assign(more=4), "further": further}), ADVICE["10_keep_more"](
        tables
    )


@pytest.mark.parametrize(
    ("gained", "what"),
    [
        ((0.02, 0.01, 0.03), "measure importance again"),
        ((-0.02, -0.03, -0.01), "keep the dense model's"),
        ((0.02, -0.01, 0.05), "either will do"),
    ],
)
def test_advice_follows_the_interval(gained, what):
    now, before = told(*gained)
    told_before = "To drop 4 more by the dense model's order or by the new model's own: after repair"
    numbers = f"{gained[0]:+.3f} nats per token less are lost, {gained[1]:+.3f} to {gained[2]:+.3f}"
    assert f"{told_before} {what} (rank correlation 0.93, 0.88 to 0.97; by its own {numbers})." in now
    assert "To drop" not in before, "tables of an older version"


def test_tables_of_an_older_version_have_no_figure():
    drawing = FIGURES["figS36_rankings"].draw({"quality": pd.DataFrame()})
    assert drawing.data.empty
    assert drawing.takeaway == ""


def test_a_page_of_older_tables_says_what_it_lacks(tmp_path, monkeypatch):
    write_tables({"not_run": pd.DataFrame(columns=["what", "reason"])}, tmp_path / "10_keep_more", [])
    said = []
    monkeypatch.setenv(page_module.TABLES, str(tmp_path))
    monkeypatch.setattr(page_module, "display", lambda what: said.append(what.data))
    page_module.Page("10_keep_more", "smoke").table("rankings", where="kind == 'attention'")
    assert said[-1] == "*Not run:* this run has no table `rankings` yet. `make reproduce NOTEBOOKS=10` makes it."


def test_a_list_of_one_layer_is_text(tmp_path):
    """As it is in memory, so that pages from files and from memory are the same."""
    rows = pd.DataFrame([{"model": "m"} | row for row in ranking_rows(DENSE, FOUND)])
    write_tables({"rankings": rows}, tmp_path, [])
    assert read_tables(tmp_path)["rankings"]["own_next"].tolist() == rows["own_next"].tolist()
