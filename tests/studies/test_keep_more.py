"""Notebook 10: from values to rows by hand, models that are made and unmade, and the rules."""

import contextlib
import copy
import dataclasses
import types
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch
from derive.changing import Stop

from llmdrop_utils import DropPlan, LLMDropError, dropped, load_profile, score_text
from llmdrop_utils.base import files
from llmdrop_utils.derive.healing import Healing
from llmdrop_utils.derive.nbl import canonical_correlation_bound
from llmdrop_utils.derive.repair import repair
from llmdrop_utils.derive.search import select_with_repair
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.locate import LocatedModel
from llmdrop_utils.report.rules import decide
from llmdrop_utils.report.verdicts import ADVICE, CHECKS
from llmdrop_utils.selection.methods import Context, select_at_random, select_by
from llmdrop_utils.sources.texts import _places, load_tokens
from llmdrop_utils.studies.curves import held_out
from llmdrop_utils.studies.keep_more import work as kept_module
from llmdrop_utils.studies.keep_more.rows import (
    DENSE_VERSION,
    Version,
    cached_share,
    made_rows,
    order_rows,
    quality_rows,
    regained_rows,
)
from llmdrop_utils.studies.keep_more.study import _fresh
from llmdrop_utils.studies.keep_more.work import (
    BOUND,
    FOLD,
    HEALING,
    MAPS,
    ORDERS,
    PLAIN,
    REPAIR,
    REPAIR_HEALING,
    RESCALED,
    SCALED,
    WAYS,
    WINDOW,
    ChoiceWork,
    MadeWork,
    obstacles,
)
from llmdrop_utils.studies.run import STUDIES, Run
from llmdrop_utils.studies.what_breaks.work import ConfidenceWork, ProbeWork
from llmdrop_utils.studies.work import ImportanceWork, TextWork

CONFIG = families.tiny("llama").config
TOKENS = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(0))
MODEL = LocatedModel("hand", Path("here"), "sha256:hand")
SHARED = {"model": MODEL, "dtype": torch.float32, "attention": "sdpa"}
PLAN = DropPlan(attention=(1,))


def made(way, plan, *items):
    return MadeWork(**SHARED, way=way, plan=plan, tokens=TOKENS[:16], text=TOKENS, healing=Healing(tokens=64), items=items)


def text(corpus, plan=PLAN):
    return TextWork(**SHARED, corpus=corpus, tokens=TOKENS[16:], plans=(plan,))


# ---- rows ---------------------------------------------------------------------------------------------------------------

ITEMS = (
    text("web"), text("code"),
    ConfidenceWork(**SHARED, task="some", members=(), fingerprint="f", tokenizer="t", num_fewshot=0, limit=None, plans=(PLAN,)),
    ProbeWork(**SHARED, probe="copy", requests=(), plans=(PLAN,)),
)  # fmt: skip
REPAIRED = Version("cosine", REPAIR, 2)
LOST = Version("cosine", PLAIN, 2)
MAPPED = Version("cosine", MAPS, 2)
WORKS = {version: made(version.way, PLAN, *ITEMS) for version in (DENSE_VERSION, LOST, REPAIRED, MAPPED)}


def value_of(web, code, sure, right, found):
    took = {"seconds": 9.0, "parameters": 5}
    return [{"nll": web} | took, {"nll": code} | took, {"confidence": sure, "right": right, "chance": 0.25} | took,
            {"found": found} | took]  # fmt: skip


VALUES = {
    DENSE_VERSION: value_of([2.0, 2.0], [1.0, 1.0], [0.8, 0.6], [1, 1], [1.0, 1.0]),
    LOST: value_of([2.4, 2.6], [1.4, 1.6], [0.95, 0.95], [1, 0], [0.5, 0.0]),  # 0.5 nats lost on both
    REPAIRED: value_of([2.1, 2.3], [1.2, 1.2], [0.7, 0.7], [1, 0], [0.5, 0.5]),  # 0.2
    MAPPED: value_of([2.2, 2.4], [1.3, 1.3], [0.7, 0.7], [1, 0], [0.5, 0.5]),  # 0.3
}


def quality(version, measure):
    rows = pd.DataFrame(quality_rows(WORKS, VALUES)).set_index(["layers", "way", "n", "measure"])
    return rows.loc[(*version, measure)]


def test_perplexity_is_over_that_of_the_dense_model():
    assert quality(LOST, "perplexity over dense (web)")["value"] == pytest.approx(np.exp(0.5))
    assert quality(REPAIRED, "perplexity over dense (code)")["value"] == pytest.approx(np.exp(0.2))
    assert quality(DENSE_VERSION, "perplexity over dense (mean)")["value"] == 1


def test_the_mean_over_corpora_is_geometric():
    values = VALUES | {LOST: value_of([2.0, 2.0], [2.0, 2.0], [0.5] * 2, [1, 0], [0.0, 0.0])}  # 1 and e
    rows = pd.DataFrame(quality_rows(WORKS, values)).set_index(["way", "measure"])
    assert rows.loc[(PLAIN, "perplexity over dense (mean)"), "value"].iloc[1] == pytest.approx(np.exp(0.5))


def test_choices_and_how_sure_the_model_is():
    assert quality(LOST, "choices")["value"] == 0.5
    assert quality(LOST, "calibration error")["value"] == pytest.approx(0.45)  # sure of 0.95 and right in half
    assert quality(DENSE_VERSION, "calibration error")["value"] == pytest.approx(0.5 * 0.2 + 0.5 * 0.4)
    assert quality(LOST, "copy")["value"] == 0.25
    assert quality(LOST, "choices")["samples"] == 2


def test_what_is_regained():
    rows = pd.DataFrame(regained_rows(WORKS, VALUES)).set_index(["way", "against"])
    plain, mapped = rows.loc[(REPAIR, PLAIN)], rows.loc[(REPAIR, MAPS)]
    assert plain["regained"] == mapped["regained"] == pytest.approx(0.6)  # 0.2 of 0.5 are left
    assert plain["difference"] == pytest.approx(0.3)
    assert mapped["difference"] == pytest.approx(0.1)
    assert rows.loc[(MAPS, REPAIR), "difference"] == pytest.approx(-0.1)
    assert (PLAIN, REPAIR) not in rows.index


def test_nothing_is_regained_where_nothing_is_lost():
    values = VALUES | {LOST: VALUES[DENSE_VERSION]}
    assert all(np.isnan(row["regained"]) for row in regained_rows(WORKS, values))


def test_what_each_version_took():
    (repaired, mapped) = [row for row in made_rows(WORKS, VALUES, CONFIG) if row["way"] in (REPAIR, MAPS)]
    took = {"seconds": 9.0, "parameters": 5, "tokens": 16 * 16, "cache": 2 / 3}
    assert repaired == {"layers": "cosine", "way": REPAIR, "n": 2} | took
    assert mapped["tokens"] == 16 * 16
    assert made("repair, healing", PLAN).tokens_read == 16 * 16 + 64


def test_a_cache_holds_what_is_kept_and_windows():
    """Of three layers with 32 numbers a token each, one is dropped, or keeps 128 of 2,048 tokens."""
    assert cached_share(CONFIG, made(REPAIR, DropPlan((1,)))) == pytest.approx(2 / 3)
    assert cached_share(CONFIG, made(WINDOW, DropPlan((1,)))) == pytest.approx((2 + 128 / 2048) / 3)
    sliding = families.tiny("gemma3").config  # two layers of three with a window of 4
    assert cached_share(sliding, made(WINDOW, DropPlan((0, 1)))) == pytest.approx((8 + 128) / (2048 + 8))


def test_orders():
    rows = order_rows({"cosine": ([3, 1], None), "search": ([1], [0.5])})
    assert [(row["layers"], row["position"], row["layer"]) for row in rows] == [
        ("cosine", 1, 3),
        ("cosine", 2, 1),
        ("search", 1, 1),
    ]
    assert np.isnan(rows[0]["divergence"])
    assert rows[2]["divergence"] == 0.5


# ---- models -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_module.files, "CACHE", tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_made_measured_and_unmade(way, tmp_path):
    model = families.tiny("llama")
    before = copy.deepcopy(model)
    (value,) = made(way, PLAN, text("web")).measure(model, None, lambda n: None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name
    with dropped(model, PLAN):
        plain = score_text(model, TOKENS[16:]).nll[0]
    assert (value["nll"] == plain.tolist()) == (way == PLAIN)
    assert value["parameters"] == (32 * 33 if "maps" in way else 0)
    assert not list(tmp_path.glob("healing/[!.]*"))


def test_a_repaired_version_is_what_repair_makes():
    model = families.tiny("llama")
    by_hand = copy.deepcopy(model)
    (value,) = made(REPAIR, PLAN, text("web")).measure(model, None, lambda n: None)
    repair(by_hand, TOKENS[:16], PLAN)
    with dropped(by_hand, PLAN):
        np.testing.assert_allclose(value["nll"], score_text(by_hand, TOKENS[16:]).nll[0], rtol=1e-6)


def test_an_error_leaves_the_dense_model():
    model = families.tiny("llama")
    before = copy.deepcopy(model)
    item = dataclasses.replace(text("web"), tokens=TOKENS[:, :1])  # too short to predict anything
    with pytest.raises(Exception, match="seq_len >= 2"):
        made(REPAIR, PLAN, item).measure(model, None, lambda n: None)
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", [*families.CASES, "bloom", "mpt", "ctrl"])
def test_ways_that_a_structure_does_not_allow_are_known_before(name):
    """What is said of the structure is what the way itself says of the model."""
    model, known = families.tiny(name), obstacles(families.tiny(name))
    items = {way: made(way, DropPlan((1, 2)), text("web")) for way in (WINDOW, MAPS, FOLD, SCALED, RESCALED)}
    items[BOUND] = ChoiceWork(**SHARED, by=BOUND, tokens=TOKENS, n_drop=2, candidates=2)
    for what, item in items.items():
        with pytest.raises(LLMDropError) if what in known else contextlib.nullcontext():
            item.measure(model, None, lambda n: None)


def test_orders_are_those_of_their_functions():
    model = families.tiny("llama")
    orders = {}
    for by in ORDERS:
        item = ChoiceWork(**SHARED, by=by, tokens=TOKENS, n_drop=2, candidates=2)
        (value,) = item.measure(model, None, lambda n: None)
        orders[by] = value["layers"]
        assert len(value["divergence"]) == (2 if by == "search with repair" else 0)
    bounds = canonical_correlation_bound(model, TOKENS)
    assert orders["NBL's bound"] == sorted(range(3), key=bounds.__getitem__)[:2]
    for by, chosen in (("greedy KL", select_by("greedy KL", Context(model, TOKENS), "attention", 2)),
                       ("random", select_at_random(3, "attention", 2, 0)),
                       ("search with repair", select_with_repair(model, TOKENS, "attention", 2, 2))):  # fmt: skip
        assert tuple(orders[by]) == chosen.attention


def test_healing_is_that_of_the_profile(tmp_path, monkeypatch):
    """In what notebook 10 is about to make."""
    asked, measure = [], Run.measure

    def watch(self, work, *others, **more):
        asked.extend(each for each in work if isinstance(each, MadeWork))
        if asked:
            raise Stop
        measure(self, work, *others, **more)

    monkeypatch.setattr(files, "RESULTS", tmp_path)
    monkeypatch.setattr(Run, "measure", watch)
    changes = {"healing_rate": 0.5, "healing_batch": 3, "healing_tokens": 99}
    changes |= {"ways": [HEALING, REPAIR_HEALING], "chosen": {"random": [REPAIR_HEALING]}}
    with pytest.raises(Stop):
        STUDIES["10_keep_more"](load_profile("smoke").replacing(keep_more=changes))
    healed = {(work.way, work.healing) for work in asked if "healing" in work.way}
    assert healed == {(HEALING, Healing(0.5, 3, tokens=99)), (REPAIR_HEALING, Healing(0.5, 3, tokens=99))}


def test_healing_reads_none_of_the_text_that_is_measured_on():
    tokenizer = byte_tokenizer()
    read = load_tokens("random-words", tokenizer, 4, 32)
    item = ImportanceWork(**SHARED, corpus="random-words", tokens=read, batch_size=4)
    tested, asked = held_out(item, tokenizer, 6, 16), held_out(item, tokenizer, 3, 48)
    settings = types.SimpleNamespace(probes=3, context=48, healing_samples=5)
    fresh = _fresh(item, tested, tokenizer, settings)
    assert fresh.shape == (5, 32)
    whole = load_tokens("random-words", tokenizer, 64, 32).flatten()
    (start,) = _places(fresh.flatten(), whole).tolist()
    for used in (read, tested, asked):
        (place,) = _places(used.flatten(), whole).tolist()
        assert place + used.numel() <= start


# ---- rules --------------------------------------------------------------------------------------------------------------


def verdict(check, regained, **thresholds):
    tables = {"regained": pd.DataFrame(regained)}
    return decide(list(CHECKS[check](tables, **thresholds)))[0]


def row(way, against, share=(0.6, 0.55, 0.65), less=(0.1, 0.05, 0.15), layers="cosine"):
    names = ("regained", "low", "high", "difference", "difference_low", "difference_high")
    return {"model": "m", "layers": layers, "way": way, "n": 8, "against": against} | dict(
        zip(names, (*share, *less), strict=True)
    )


@pytest.mark.parametrize(
    ("share", "expected"),
    [((0.6, 0.55, 0.65), "reproduced"), ((0.3, 0.2, 0.4), "deviates"), ((0.5, 0.4, 0.6), "inconclusive")],
)
def test_a_repair_regains_half(share, expected):
    rows = [row(REPAIR, PLAIN, share=share), row(REPAIR, PLAIN, share=(0.0, 0.0, 0.0), layers="search with repair")]
    assert verdict("repair_regains", rows, share=0.5) == expected


@pytest.mark.parametrize(("low", "expected"), [(0.05, "reproduced"), (-0.2, "inconclusive")])
def test_a_repair_beats_each_published_one(low, expected):
    rows = [row(REPAIR, way) for way in (MAPS, "ReplaceMe", "LinearPatch")]
    rows.append(row(REPAIR, "Prune&Comp", less=(0.1, low, 0.25)))
    rows.append(row(REPAIR, "repair, linear maps", less=(-1, -1, -1)))  # not published
    assert verdict("repair_beats_published", rows) == expected


def test_repair_and_healing():
    assert verdict("repair_helps_healing", [row("repair, healing", "healing")]) == "reproduced"
    assert verdict("repair_helps_healing", [row("repair, healing", "healing", less=(-0.1, -0.2, -0.05))]) == "deviates"


def test_advice_names_the_best_that_costs_nothing():
    tables = {"quality": pd.DataFrame([{"model": "m"} | each for each in quality_rows(WORKS, VALUES)])}
    values = VALUES | {REPAIRED: [value | {"parameters": 0} for value in VALUES[REPAIRED]]}
    tables["made"] = pd.DataFrame([{"model": "m"} | each for each in made_rows(WORKS, values, CONFIG)])
    text = ADVICE["10_keep_more"](tables)
    assert (
        "the least is lost by repair on layers chosen by cosine: perplexity 1.22 times the dense model's, instead of 1.65"
        in text
    )
    assert "Right choices go from 50.0 % to 50.0 % with that (dense 100.0 %)" in text
