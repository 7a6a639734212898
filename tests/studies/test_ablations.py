"""Notebook 04: arms, intervals over samples and seeds, and Holm's correction, from values worked out by hand."""

import numpy as np
import pytest
import torch

from llmdrop_utils import DropPlan, LLMDropError, load_model, load_profile, load_tokens, score_text, select_last
from llmdrop_utils.base import files
from llmdrop_utils.base.settings import build
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.models.load import model_of_shape
from llmdrop_utils.models.locate import locate_model
from llmdrop_utils.report.rules import DEVIATES, INCONCLUSIVE, REPRODUCED
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.tables import frame
from llmdrop_utils.report.verdicts import ADVICE, load_claims, verdict_of
from llmdrop_utils.selection.methods import as_plan
from llmdrop_utils.studies.ablations import rows
from llmdrop_utils.studies.ablations.rows import (
    SAME_SAMPLES,
    Arm,
    Estimate,
    Values,
    agreement_rows,
    block_rows,
    calibration_rows,
    method_rows,
    n_parameters,
)
from llmdrop_utils.studies.ablations.study import TABLES, at_least, paper_rows, parameters_of
from llmdrop_utils.studies.ablations.work import Ablations, ContinuationWork, OrderWork, counted_passes
from llmdrop_utils.studies.curves import Text
from llmdrop_utils.studies.profile import Calibration
from llmdrop_utils.studies.run import NOT_RUN, STUDIES
from llmdrop_utils.studies.take_away.work import TakeAway
from llmdrop_utils.studies.what_breaks.abilities import WhatBreaks
from llmdrop_utils.studies.what_breaks.changes import Changes

MODEL = locate_model("tiny-llama")
SHARED = {"model": MODEL, "dtype": torch.float32, "attention": "sdpa"}


def order(method="one-shot", kind="attention", n=6, seed=0, samples=2):
    tokens = torch.arange(3, 3 + 16 * samples).view(samples, 16) % 251  # no two samples begin alike
    return OrderWork(**SHARED, tokens=tokens, batch_size=2, kind=kind, method=method, n_drop=n, seed=seed)


# ---- what is measured -----------------------------------------------------------------------------------------------------


def test_an_order_and_what_it_took():
    """Cosine takes one pass; a layer less at a time about half of one for each of six layers, and one for the dense model."""
    model, _ = load_model("tiny-llama", torch.float32)
    (cosine,) = order().measure(model, None, lambda _: None)
    assert sorted(cosine["layers"]) == list(range(6))
    assert cosine["passes"] == pytest.approx(1.0)
    assert cosine["seconds"] > 0
    (change,) = order("output change", samples=64).measure(model, None, lambda _: None)
    # The dense model, and layers from the dropped one on, without its attention: 1 + (5.5 + 4.5 + 3.5 + 2.5 + 1.5 + 0.5) / 6
    # passes of the 15 tokens of each sample that predict one, and a few tokens to see what can be shared.
    assert 4 * 15 / 16 < change["passes"] < 4.3
    (nothing,) = order("reverse order", "mlp", 3).measure(model, None, lambda _: None)
    assert (nothing["layers"], nothing["passes"]) == ([5, 4, 3], 0.0)
    with counted_passes(model, 8) as passes, torch.no_grad():
        model(torch.ones(2, 8, dtype=torch.long))
    assert passes == [pytest.approx(2.0)]


def test_keys_of_orders():
    (key,) = order().keys
    for other in (order("Taylor"), order(kind="mlp"), order(n=3), order(seed=1), order(samples=1)):
        assert other.keys != [key]


def test_continuations_are_the_dense_model_s_own():
    """Under the dense plan every token stays; without layers some change, and their divergence is above zero."""
    model, _ = load_model("tiny-llama", torch.float32)
    plans = (DropPlan(), DropPlan((0, 1, 2, 3, 4), (0, 1, 2)))
    work = ContinuationWork(**SHARED, corpus="c", tokens=torch.arange(3, 19).view(2, 8), plans=plans, new_tokens=5)
    dense, dropped = work.measure(model, None, lambda _: None)
    assert dense["same"] == [1.0, 1.0]
    assert dense["kl"] == pytest.approx([0, 0], abs=1e-6)
    assert np.mean(dropped["same"]) < 1
    assert min(dropped["kl"]) > 0
    assert work.keys[0] != ContinuationWork(**SHARED, corpus="c", tokens=work.tokens, plans=plans, new_tokens=6).keys[0]


# ---- parameters -----------------------------------------------------------------------------------------------------------


def scores():
    """Attention from 0.1, MLP from 0.25, upwards in depth."""
    kinds = {"attention": 0.1, "mlp": 0.25, "block": 0.3}
    per_sample = {kind: np.array([[first + 0.1 * i for i in range(6)]]) for kind, first in kinds.items()}
    return Importance(per_sample, np.array([1]), {})


def test_equal_parameters():
    """Attention of tiny-llama has 3 x 1,024 weights and a norm of 32, its MLP 3 x 2,048 and a norm."""
    parameters = parameters_of(model_of_shape(MODEL, torch.float32, "meta"), 6)
    assert parameters == {"attention": 32 * 96 + 32, "mlp": 3 * 32 * 64 + 32}
    one = DropPlan((0,), (0,))
    assert n_parameters(one, parameters) == 3104 + 6176
    assert at_least(one, scores(), "attention", parameters).attention == (0, 1, 2)  # 3 x 3,104 are 9,312 of 9,280
    joint = at_least(one, scores(), "joint", parameters)
    assert (joint.attention, joint.mlp) == ((0, 1), (0,))  # 2 x 3,104 + 6,176 are 12,384; without the MLP too few
    four = at_least(DropPlan((0, 1, 2, 3)), scores(), "joint", parameters)  # 12,384 are too few for 4 x 3,104
    assert (four.attention, four.mlp) == ((0, 1, 2), (0,))
    assert at_least(DropPlan(tuple(range(3)), tuple(range(3))), scores(), "attention", parameters) is None


def test_plans_of_an_order():
    assert as_plan("attention", (4, 2)) == DropPlan((4, 2))
    assert as_plan("mlp", [4]) == DropPlan((), (4,))
    assert as_plan("block", [4]) == DropPlan((4,), (4,))


# ---- estimates ------------------------------------------------------------------------------------------------------------


def values(means, spread=0.01, n=1e9):
    """Arms with given means. Draws of the i-th lie evenly within i x `spread` on either side, 95 % within 0.95 of it."""
    arms, array = list(means), np.array(list(means.values()))
    shifts = np.linspace(-spread, spread, 2001)[:, None]
    return Values(arms, array, array + shifts * np.arange(1, len(arms) + 1), n)


COSINE_8, RANDOM = Arm("attention", "cosine", 8), [Arm("attention", "random", 8, seed) for seed in range(3)]


def ends(estimate):
    return estimate.value, estimate.low, estimate.high


def test_seeds_and_samples_both_widen_an_interval():
    """Seeds of -3, -4 and -5: mean -4, Student's t with two degrees of freedom reaches 4.303 x 1 / sqrt(3) = 2.484.

    Their draws move by 3 on average (2, 3 and 4 times the first's), so samples reach 0.95 x 3 = 2.85 there, and
    sqrt(2.484² + 2.85²) = 3.781 together.
    """
    found = values({COSINE_8: -2.0} | dict(zip(RANDOM, (-3.0, -4.0, -5.0), strict=True)), spread=1.0)
    random, cosine = ("attention", "random", 8), ("attention", "cosine", 8)
    assert ends(found.estimate(random)) == pytest.approx((-4.0, -7.781, -0.219), abs=2e-3)
    assert found.estimate(random).freedom == 2
    assert ends(found.estimate(cosine)) == pytest.approx((-2.0, -2.95, -1.05), abs=1e-3)
    assert found.estimate(cosine).freedom == 1e9 - 1
    difference = found.estimate(random, cosine)  # draws differ by 2: 1.9, and sqrt(2.484² + 1.9²) = 3.127
    assert ends(difference) == pytest.approx((-2.0, -5.127, 1.127), abs=2e-3)


def test_p_by_student():
    """With 4 degrees of freedom an interval reaches 2.776 standard errors: 4.604 of them from zero are p = 0.01."""
    assert Estimate(4.604, 4.604 - 2.776, 9, 4).p == pytest.approx(0.01, rel=1e-3)
    assert Estimate(-4.604, -9, -4.604 + 2.776, 4).p == pytest.approx(0.01, rel=1e-3)
    assert Estimate(1.96, 0.0, 3.92, 1e9).p == pytest.approx(0.05, rel=1e-3)
    assert np.isnan(Estimate(1.0, np.nan, np.nan, 0).p)
    assert (Estimate(0.0, 0.0, 0.0, 5).p, Estimate(1.0, 1.0, 1.0, 5).p) == (1.0, 0.0)


def test_quality_beside_cosine():
    """Draws of the second arm move by 0.01 more than the first's, which reaches 0.0095; stepwise methods have another base."""
    better, same, few, greedy = (
        Arm("attention", name, 8) for name in ("Taylor", "angular distance", SAME_SAMPLES, "greedy KL")
    )
    plans = {COSINE_8: DropPlan((1, 2)), better: DropPlan((2, 3)), same: DropPlan((2, 1)), few: DropPlan((4, 5)),
             greedy: DropPlan((5, 6))}  # fmt: skip
    found = values({COSINE_8: -2.0, better: -1.9, same: -2.0, few: -2.5, greedy: -2.4})
    table = {row["method"]: row for row in rows.quality_rows(plans, list(plans), {"text": found}, ["greedy KL"])}
    assert table["cosine"]["outcome"] == "itself"
    assert (table["angular distance"]["outcome"], table["angular distance"]["p"]) == ("the same layers", 1.0)
    taylor, step = table["Taylor"], table["greedy KL"]
    assert (taylor["against"], step["against"]) == ("cosine", SAME_SAMPLES)
    ends_of = lambda row: (row["difference"], row["difference_low"], row["difference_high"])  # noqa: E731
    assert ends_of(taylor) == pytest.approx((0.1, 0.0905, 0.1095), abs=1e-5)
    assert ends_of(step) == pytest.approx((0.1, 0.0905, 0.1095), abs=1e-5)
    assert (taylor["outcome"], step["outcome"]) == ("better", "better")
    assert table[SAME_SAMPLES]["outcome"] == "worse"
    single = values({COSINE_8: -2.0, better: -1.9}, n=1)
    (_, row) = rows.quality_rows(plans, [COSINE_8, better], {"text": single})
    assert row["outcome"] == "no interval"


def test_holm_takes_all_comparisons_together():
    """Of three, 0.01 is below 0.05 / 3; 0.03 is above 0.05 / 2, so 0.04 is not asked."""
    listed = [{"p": p, "outcome": "", "difference": d} for p, d in ((0.04, 1), (0.01, -1), (0.03, 1))]
    listed.append({"p": 0.0, "outcome": "itself", "difference": 0})
    rows._settle(listed)
    assert [row["outcome"] for row in listed] == ["no difference seen", "worse", "no difference seen", "itself"]
    two = [{"p": p, "outcome": "", "difference": 1} for p in (0.04, 0.02)]
    rows._settle(two)
    assert [row["outcome"] for row in two] == ["better", "better"]


def test_text_is_of_neighbouring_samples():
    """Of 32 samples five neighbours are drawn together, so they count as 6.4; means are those of the columns."""
    rows_of_text = np.column_stack([np.full(32, 3.0), np.arange(32)])
    found = rows.of_text([COSINE_8, RANDOM[0]], rows_of_text)
    assert found.means.tolist() == [3.0, 15.5]
    assert found.n == pytest.approx(6.4)
    assert np.ptp(found.draws[:, 0]) == pytest.approx(0)


# ---- rows -------------------------------------------------------------------------------------------------------------------


def orders():
    found = {"cosine": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), "Taylor": (9, 8, 7, 6, 5, 4, 3, 2, 1, 0), "greedy KL": (0, 1, 9)}
    found |= {"angles": (1, 2, 0, 3, 4, 5, 6, 7, 8, 9), "norms": (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)}
    return {
        ("attention", method, 0): (order(method), {"layers": list(layers), "passes": 1.5, "seconds": 2.0})
        for method, layers in found.items()
    }


def test_agreement_by_hand():
    found = {(row["method"], row["other"]): row for row in agreement_rows(orders())}
    assert (found["Taylor", "cosine"]["shared"], found["Taylor", "cosine"]["correlation"]) == (6, pytest.approx(-1.0))
    assert found["greedy KL", "cosine"]["shared"] == 2
    assert np.isnan(found["greedy KL", "cosine"]["correlation"])
    # Layers 0, 1, 2 stand at 2, 0, 1 and at 0, 2, 1: squares of the differences 4 + 4 + 0 = 8, 1 - 6 x 8 / (10 x 99).
    assert found["angles", "norms"]["correlation"] == pytest.approx(1 - 48 / 990)
    assert len(found) == 20


def test_costs_by_hand():
    weights = order("Gate-Norm"), {"layers": [1], "passes": 0.0, "seconds": 0.1}
    found = {row["method"]: row for row in method_rows(orders() | {("attention", "Gate-Norm", 0): weights})}
    assert (found["cosine"]["tokens"], found["cosine"]["passes"], found["cosine"]["seconds"]) == (32, 1.5, 2.0)
    assert (found["Gate-Norm"]["tokens"], found["Gate-Norm"]["reads"]) == (0, "weights")


def test_calibrations_and_blocks_by_hand():
    """Text under another calibration costs 0.2 nats more; perplexity is exp of minus the value."""
    few = Arm("attention", "samples 1", 8)
    blocks, row = Arm("block", "blocks", 1), Arm("block", "blocks in a row", 1)
    plans = {COSINE_8: DropPlan((1, 2, 3)), few: DropPlan((1, 2, 4)), blocks: DropPlan((1,), (1,)), row: DropPlan((2,), (2,))}
    found = values({COSINE_8: -2.0, few: -2.2, blocks: -3.0, row: -2.5})
    (calibration,) = calibration_rows(plans, found, {("samples", "1"): order()})
    assert (calibration["varied"], calibration["setting"], calibration["n"], calibration["shared"]) == ("samples", "1", 8, 2)
    assert calibration["difference"] == pytest.approx(0.2)
    first, second = block_rows(plans, found, {"attention": 10, "mlp": 20})
    assert (first["sub_layers"], first["parameters"], first["difference"]) == (2, 30, 0.0)
    assert (second["arm"], second["perplexity"]) == ("blocks in a row", pytest.approx(np.exp(2.5)))
    assert second["low"] < second["perplexity"] < second["high"]
    assert second["difference"] == pytest.approx(-0.5)


def test_the_paper_s_rows():
    """Table 6 is about Llama-2-13B, whatever its caption says."""
    found = {(row["model"], row["kind"], row["method"], row["n"]): row["paper"] for row in paper_rows()}
    assert found["Llama-2-13B", "attention", "without residual", 4] == 39.4
    assert found["Llama-2-13B", "mlp", "cosine", 20] == 42.1
    assert found["Mistral-7B", "attention", "random", 12] == 39.4
    assert found["Mistral-7B", "attention", "reverse order", 12] == 61.5
    assert len(found) == 20 + 12


# ---- the whole study ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The profile smoke on its model of six layers, with a number for tasks that the model does not have."""
    profile = load_profile("smoke").replacing(ablations={"task_n": [8], "methods": ["reverse order", "random"], "stepwise": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "RESULTS", tmp_path_factory.mktemp("results"))
        return STUDIES["04_ablations"](profile)


def test_what_the_study_writes_is_what_was_measured(measured):
    """The value of text is minus the loss on the first samples after those of the calibration."""
    model, tokenizer = load_model("tiny-llama", torch.float32)
    smoke = load_profile("smoke")
    calibration, text = smoke.section(Calibration), smoke.section(Text)
    read = max(calibration.n_samples, *calibration.sample_counts) * calibration.seq_len
    held_out = load_tokens("random-words", tokenizer, -(-read // text.seq_len) + 4, text.seq_len)[-4:]
    found = measured["quality"].set_index(["kind", "method", "n", "measure"])["value"]
    for n in (2, 3):
        plan = select_last(6, "attention", n)
        loss = score_text(model, held_out, [plan]).nll.mean()
        assert found["attention", "reverse order", n, "text"] == pytest.approx(-loss, rel=1e-4)
        assert 0 <= found["attention", "reverse order", n, "continuation"] <= 1


def test_numbers_that_the_model_does_not_have_are_left_out(measured):
    assert set(measured["quality"]["measure"]) == {"text", "continuation"}
    assert measured["tasks"].empty
    assert len(measured["not_run"]) == 0
    assert "at once: " in ADVICE["04_ablations"](measured)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (Ablations, {"methods": ["best"]}, "Unknown method 'best' in here. Known methods: one-shot, "),
        (Ablations, {"stepwise": ["slow"]}, "Unknown method 'slow' in here"),
        (WhatBreaks, {"questions": ["rhyme"]}, "Unknown question 'rhyme' in here. Known questions: copy, retrieval"),
        (Changes, {"bits": [8, 3]}, "Unknown bit width 3 in here. Known bit widths: 8, 4"),
        (TakeAway, {"kinds": ["F16", "Q3"]}, "Unknown GGUF kind 'Q3' in here. Known GGUF kinds: F32, F16, "),
    ],
)
def test_a_mistake_in_a_profile_is_seen_when_it_is_read(section, changes, message):
    content = load_profile("smoke").section(section).model_dump() | changes
    with pytest.raises(LLMDropError, match=message):
        build(section, content, "here")


def test_a_prompt_is_no_longer_than_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    with pytest.raises(LLMDropError, match="prompts of 900 tokens are longer than its samples of text, 64 tokens"):
        STUDIES["04_ablations"](load_profile("smoke").replacing(ablations={"prompt": 900}))
    assert not list(tmp_path.rglob("*.json")), "nothing was measured"


# ---- rules, figures, advice -------------------------------------------------------------------------------------------------


def tables(difference=-0.2, mlp=-0.3, reach=0.05, outcome="worse"):
    def row(kind, method, n, measure, d, outcome, reach):
        value = {"value": -2.0 + d, "low": -2.1 + d, "high": -1.9 + d}
        ends = {"difference": d, "difference_low": d - reach, "difference_high": d + reach, "p": 0.01, "outcome": outcome,
                "against": "cosine"}  # fmt: skip
        return {"model": "m", "kind": kind, "method": method, "n": n, "measure": measure} | value | ends

    quality = [
        row(kind, method, n, measure, d, outcome, reach)
        for kind, method, d in (
            ("attention", "random", difference),
            ("attention", "relative magnitude", difference),
            ("attention", "without residual", difference),
            ("mlp", "without residual", mlp),
        )
        for n in (4, 8)
        for measure in ("text", "tasks", "continuation")
    ]
    quality += [row(kind, "cosine", n, "text", 0.0, "itself", 0.0) for kind in ("attention", "mlp") for n in (4, 8)]
    calibration = [
        {"model": "m", "varied": what, "setting": setting, "n": 8, "shared": 7, "difference": d, "difference_low": d - 0.01,
         "difference_high": d + 0.01}
        for what, setting, d in (("samples", "1", 0.1), ("samples", "4", 0.0), ("corpus", "code", 0.2))
    ]  # fmt: skip
    content = dict.fromkeys(TABLES, ()) | {
        "models": [{"model": "m", "n_layers": 30}],
        "quality": quality,
        "calibration": calibration,
    }
    return {name: frame(name, list(content.get(name, ())), TABLES | NOT_RUN) for name in (*TABLES, "not_run")}


CLAIMS = {claim["id"]: claim for claim in load_claims() if claim["notebook"] == "04_ablations"}


@pytest.mark.parametrize(
    ("claim", "changes", "outcome"),
    [
        ("cosine-is-the-better-metric", {}, REPRODUCED),
        ("cosine-is-the-better-metric", {"reach": 0.3}, INCONCLUSIVE),
        ("cosine-is-the-better-metric", {"difference": 0.2}, DEVIATES),
        ("residual-matters", {}, REPRODUCED),
        ("residual-matters", {"mlp": 0.3}, DEVIATES),
        ("residual-matters", {"reach": 0.25}, INCONCLUSIVE),
    ],
)
def test_rules(claim, changes, outcome):
    assert verdict_of(CLAIMS[claim], tables(**changes))[0] == outcome


def test_what_a_reader_sees():
    drawn = {
        name: FIGURES[name].draw(tables()).takeaway for name in ("figS24_methods", "figS25_calibration", "figS26_residual")
    }
    assert drawn["figS24_methods"] == (
        "Of 3 methods these are better than cosine, all comparisons taken together: "
        "on text none; on tasks none; on continuation none."
    )
    assert (
        drawn["figS25_calibration"]
        == "The most that another calibration costs is 0.200 nats per token (corpus code, 8 dropped)."
    )
    assert drawn["figS26_residual"] == (
        "Perplexity with 8 layers dropped: Attention 7 with residual, 9 without; MLP 7 with residual, 10 without."
    )
    first, _ = ADVICE["04_ablations"](tables()).split("\n\n")
    assert "better than cosine in text and tasks and continuation at once: no method" in first
    assert "Layers chosen on 4 samples are not seen to be worse than on all." in first
    assert "Corpora whose choice costs more on text of the first: code." in first
    better, _ = ADVICE["04_ablations"](tables(outcome="better")).split("\n\n")
    several = [f"{method} ({n} dropped)" for method in ("random", "relative magnitude", "without residual") for n in (4, 8)]
    assert f"at once: {', '.join(several)}." in better
