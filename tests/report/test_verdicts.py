"""Every claim has a home and a rule, and each rule can come out either way."""

import json
import re

import pandas as pd
import pytest
import yaml

from llmdrop_utils.base.files import ROOT
from llmdrop_utils.report import verdicts as claims

PAPER = json.loads((ROOT / "data" / "paper_claims.json").read_text())


def test_claims_file():
    listed = claims.load_claims()
    assert len({c["id"] for c in listed}) == len(listed)
    identifiers = [c["id"] for c in PAPER["claims"]]
    assert len(identifiers) == len(set(identifiers)) == 732
    for claim in listed:
        assert {"id", "claim", "where", "notebook", "rule", "paper"} <= set(claim)
        assert claim.get("check") in {None, *claims.CHECKS}
        for prefix in claim["paper"]:
            assert any(i.startswith(prefix) for i in identifiers), f"{claim['id']}: nothing in the paper begins with {prefix}"
    assert {c["check"] for c in listed if "check" in c} == set(claims.CHECKS), "a rule that no claim uses"


def test_every_number_of_the_paper_s_results_belongs_to_a_claim():
    """Except settings, which are no claims: Table 5, calibration length, deployment memory."""
    prefixes = tuple(p for c in claims.load_claims() for p in c["paper"])
    rest = {c["id"] for c in PAPER["claims"] if not c["id"].startswith(prefixes)}
    assert {i.split(".")[0] for i in rest} <= {"T5", "X"}, sorted(rest)
    assert {i for i in rest if i.startswith("X")} <= {"X.seq", "X.size"}, sorted(rest)


def notebooks_with_a_check():
    return {c["notebook"] for c in claims.load_claims() if "check" in c}


def test_checked_notebooks_exist():
    for name in notebooks_with_a_check():
        assert (ROOT / "notebooks" / f"{name}.ipynb").exists()


def frame(**columns):
    return pd.DataFrame({"model": "m"} | columns)


def contrast(high):
    means = {"attention": 0.1, "compared": 0.2, "attention_median": 0.1, "compared_median": 0.2, "difference": -0.1}
    layers = {"layers_lower": 3, "n_layers": 4}
    return {"contrast": frame(corpus=["a", "a"], other=["mlp", "block"], low=[-0.2] * 2, high=[-0.05, high], **means, **layers)}


def depth(mlp, high):
    kinds = ["attention", "mlp", "block"]
    return {"depth": frame(corpus=["a"] * 3, kind=kinds, correlation=[-0.9, mlp, -0.8], low=[-1.0] * 3, high=[high] * 3)}


def corpora(low):
    return {"corpora": frame(a=["x"] * 3, b=["y"] * 3, kind=["attention", "mlp", "block"], correlation=[0.9] * 3,
                             low=[low, 0.85, 0.85], high=[0.95] * 3)}  # fmt: skip


def samples(correlation):
    return {"sample_agreement": frame(corpus=["x"] * 2, kind=["mlp"] * 2, n_samples=[4, 64], groups=[16, 1],
                                      correlation=[correlation, 0.1], low=[0.8] * 2, high=[1.0] * 2)}  # fmt: skip


def distribution(q95):
    rows = {"corpus": ["x"] * 4, "kind": ["attention"] * 4}
    return {"distribution": frame(**rows, layer=range(4), q95=[0.9, q95, 0.9, 0.01]),
            "order": frame(**rows, position=range(4), layer=[1, 3, 2, 0])}  # fmt: skip


def published(shared):
    importance = frame(corpus=["x"], kind=["attention"])
    rows = frame(corpus=["x"], kind=["attention"], n_drop=[8], shared=[shared], by_chance=[2.0])
    return {"importance": importance, "published": rows if shared is not None else rows.iloc[:0]}


def average(retained, n=8, n_layers=32):
    rows = {"kind": ["dense", "attention"], "n": [0, n], "tasks": 2, "retained": [1.0, retained]}
    return {"models": frame(n_layers=[n_layers]), "average": frame(**rows, retained_low=0.9, retained_high=1.0)}


def half(low, model="llama-2-70b"):
    rows = {"kind": ["attention"], "n": [40], "points_lost": [low + 1], "points_lost_low": [low], "points_lost_high": [low + 2]}
    tables = {"models": frame(n_layers=[80]), "average": frame(**rows)}
    return {name: table.assign(model=model) for name, table in tables.items()}


def series(large):
    rows = {"kind": "attention", "n": [4, 8] * 2, "retained": [0.99, 0.9, 0.99, large]}
    models = ["llama-2-13b", "llama-2-70b"]
    layers = pd.DataFrame({"model": models, "n_layers": [40, 40]})
    return {"models": layers, "average": pd.DataFrame(rows).assign(model=[m for m in models for _ in range(2)])}


def gaps(low, kind="attention", measure="tasks"):
    rows = {"n": [8, 8], "kind": kind, "other": ["attention" if kind == "joint" else "block", "mlp"], "measure": measure}
    table = frame(**rows, difference=0.1, low=[low, 0.05], high=0.2, same_plan=False)
    return {"gaps": table, "average": frame(kind=["dense"]), "text": frame(kind=["dense"])}


def first_mlp(low):
    return {"first_mlp": frame(attention_before=[12], low=[low], high=[14], n_layers=[32])}


def iterative(high):
    return {"iterative": frame(n=[4, 8], difference=-0.1, low=-0.2, high=[0.1, high], shared=3)}


def half_speed(high, model="random:llama-2-70b"):
    rows = {"what": "generation from samples", "backend": "eager", "kind": "attention", "n": [40], "context": 2048}
    speed = pd.DataFrame(rows | {"speedup": 1.4, "speedup_low": 1.3, "speedup_high": high, "noisy": False}).assign(model=model)
    return {"speed": speed, "models": pd.DataFrame({"model": [model], "n_layers": [80]})}


def trade(high):
    kinds = {"kind": ["attention", "mlp", "block"], "n": 8, "backend": "eager"}
    table = frame(**kinds, sdr=[0.1, 0.5, 0.5], sdr_low=[0.0, 0.3, 0.4], sdr_high=[high, 0.7, 0.6])
    return {"trade": table, "models": frame(n_layers=[30])}


def caches(counted, formula=500):
    sizes = {"formula_bytes": [formula], "counted_bytes": [counted], "dense_bytes": [1000], "n_layers": 40, "n": 20}
    own = frame(full_attention=False, length=[8], **sizes)
    return {"paper": frame(paper_gib=[26], **sizes), "caches": own.iloc[:0]}


STAGE = {"stage": ["step-0", "step-1", "step-9"], "step": [0, 1, 9], "position": [0, 1, 2], "progress": [0.0, 0.5, 1.0]}


def means(random, middle):
    """Lower ends by which MLP and block lie above attention, at random weights and half-way."""
    rows = {"importance": 0.1, "above_attention": 0.2, "above_high": 0.3, "layers": "all layers"}
    kinds = [frame(**STAGE, **rows, kind=kind, above_low=[random, middle, 0.1]) for kind in ("attention", "mlp", "block")]
    return {"means": pd.concat(kinds, ignore_index=True).assign(seed=0)}


def change(mlp, attention):
    rows = frame(kind=["attention", "mlp", "block"], change=[attention, 0.2, 0.3], low=[-0.1, mlp, 0.1], high=0.4)
    place = {"seed": 0, "position": 1, "stage": "step-1", "progress": 0.5, "layers": "all layers"}
    return means(0.1, 0.1) | {"change": rows.assign(**place)}


def same_layers(low):
    rows = frame(**STAGE, kind="attention", correlation=0.9, low=[-0.5, low, 1.0], high=1.0, n=2, shared=2)
    return {"agreement": rows.assign(seed=0)}


def apply(check, tables):
    """The findings of a rule with the thresholds of data/claims.yaml."""
    (claim,) = [claim for claim in claims.load_claims() if claim.get("check") == check]
    return list(claims.CHECKS[check](tables, **claim.get("thresholds", {})))


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ("redundant_from_the_start", means(-0.1, 0.1), means(-0.1, -0.01)),
        ("redundant_at_random", means(0.01, 0.1), means(-0.01, 0.1)),
        ("others_rise", change(0.1, -0.1), change(-0.01, -0.1)),
        ("others_rise", change(0.1, -0.1), change(0.1, -0.25)),
        ("same_layers_at_every_stage", same_layers(0.85), same_layers(0.75)),
        ("attention_most_redundant", contrast(-0.01), contrast(0.01)),
        ("near_zero_attention", distribution(0.05), distribution(0.2)),
        ("deeper_more_redundant", depth(-0.6, -0.1), depth(-0.2, -0.1)),
        ("deeper_more_redundant", depth(-0.6, -0.1), depth(-0.6, 0.1)),
        ("corpus_does_not_matter", corpora(0.82), corpora(0.78)),
        ("sample_count_does_not_matter", samples(0.95), samples(0.85)),
        ("published_lists", published(6), published(5)),
        ("quarter_of_attention_keeps_quality", average(0.995), average(0.985)),
        ("attention_beats_mlp_and_block", gaps(0.01), gaps(-0.01)),
        ("half_of_attention", half(2.0), half(3.0)),
        ("joint_goes_furthest", gaps(0.01, "joint", "text"), gaps(-0.01, "joint", "text")),
        ("attention_goes_first", first_mlp(8), first_mlp(7)),
        ("iterative_no_better", iterative(0.1), iterative(-0.01)),
        ("half_of_attention_is_faster", half_speed(1.5), half_speed(1.45)),
        ("attention_is_best_trade", trade(0.2), trade(0.35)),
        ("cache_shrinks_in_proportion", caches(500), caches(501)),
        ("cache_shrinks_in_proportion", caches(500), caches(520, formula=520)),
    ],
)
def test_rules_come_out_both_ways(check, good, bad):
    assert [holds for _, holds, _ in apply(check, good)] == [True]
    assert [holds for _, holds, _ in apply(check, bad)] == [False]


def test_larger_models_lose_less():
    """The pair that both models of are there is judged; the other is not run."""
    for retained, verdict in ((0.96, True), (0.9, False)):
        found = apply("larger_models_lose_less", series(retained))
        assert [holds for _, holds, _ in found] == [verdict, None]


def test_claims_about_other_models_are_not_run():
    ((_, holds, reason),) = apply("half_of_attention", half(2.0, model="smollm2-135m"))
    assert holds is None
    assert "the claim is about a 70B model" in reason


def test_speed_of_other_models_is_told_but_not_judged():
    tables = half_speed(1.5)
    ((_, holds, reason),) = apply("half_of_attention_is_faster", tables | {"models": frame(n_layers=[80])})
    assert holds is None
    assert "the claim is about Llama-2-70B on a GPU" in reason
    ((_, holds, reason),) = apply("attention_is_best_trade", trade(0.2) | {"trade": pd.DataFrame()})
    assert holds is None
    assert "no quality and speed of two kinds" in reason


def test_a_speed_up_within_noise_is_no_evidence():
    tables = trade(0.2)
    tables["trade"].loc[0, ["sdr_low", "sdr_high"]] = float("nan")
    ((_, holds, reason),) = apply("attention_is_best_trade", tables)
    assert holds is None
    assert "within noise" in reason


def test_windows_are_not_judged_by_share():
    own = frame(full_attention=[False], formula_bytes=1, counted_bytes=1, dense_bytes=1, n_layers=2, n=1)
    (_, (_, holds, reason)) = apply("cache_shrinks_in_proportion", caches(500) | {"caches": own})
    assert holds is None
    assert "sliding windows" in reason


def test_joint_that_never_differs_from_attention_is_not_run():
    tables = gaps(0.01, "joint", "text")
    tables["gaps"]["same_plan"] = True
    ((_, holds, _),) = apply("joint_goes_furthest", tables)
    assert holds is None


def test_a_single_trained_checkpoint_has_no_course():
    """Two stages, random and trained: nothing can be said of the way between them."""
    tables = change(0.1, -0.1) | same_layers(0.9)
    for check, table in (
        ("others_rise", "change"),
        ("same_layers_at_every_stage", "agreement"),
        ("redundant_from_the_start", "means"),
    ):
        ((_, holds, reason),) = apply(check, tables | {table: tables[table][tables[table]["position"] != 1]})
        assert holds is None
        assert "it has no" in reason


def test_every_seed_must_hold():
    good, bad = means(-0.1, 0.1)["means"], means(-0.1, -0.01)["means"].assign(seed=1)
    ((_, holds, text),) = apply("redundant_from_the_start", {"means": pd.concat([good, bad])})
    assert holds is False
    assert "all layers: least at step-1 of seed 1, where" in text
    assert "so from step-9 on" in text
    never = means(-0.1, -0.1)["means"].assign(above_low=-0.1)
    ((_, holds, text),) = apply("redundant_from_the_start", {"means": never})
    assert holds is False
    assert "not so at the last stage" in text


def test_without_the_first_layer_too():
    """What holds for all layers only because of the first does not hold."""
    both = pd.concat([means(0.1, 0.1)["means"], means(0.1, -0.01)["means"].assign(layers="all but the first")])
    ((_, holds, _),) = apply("redundant_from_the_start", {"means": both})
    assert holds is False


def test_no_list_is_not_run():
    ((_, holds, reason),) = apply("published_lists", published(None))
    assert holds is None
    assert "no published drop list is known for m" in reason


def test_thresholds_are_what_rule_and_code_share(monkeypatch):
    """Every threshold stands in its rule's sentence, and another number there is another verdict."""
    for claim in yaml.safe_load((ROOT / "data" / "claims.yaml").read_text()):
        for name in claim.get("thresholds", {}):
            assert f"{{{name}" in claim["rule"], f"{claim['id']}: {name}"
        own = re.sub(r"95 %|\{[^}]*\}", "", claim["rule"])  # of the numbers in the sentence, all but the thresholds
        assert not re.search(r"\d\.\d", own), f"{claim['id']}: a number that the code does not read"
    rule = next(c["rule"] for c in claims.load_claims() if c["id"] == "attention-drop-keeps-quality")
    assert "nearest to 25 %, the mean task score is at least 99 % of" in rule
    for retained, holds in ((0.99, False), (0.98, True)):
        check = claims.CHECKS["quarter_of_attention_keeps_quality"]
        assert [found for _, found, _ in check(average(0.985), layers=0.25, retained=retained)] == [holds]


def test_every_notebook_has_advice():
    assert set(claims.ADVICE) == {c["notebook"] for c in claims.load_claims() if "check" in c}


def test_verdicts_in_a_notebook_fold_their_evidence():
    verdict = claims.Verdict("a", "A claim.", "Sec. 1", "01_x", claims.REPRODUCED, "The evidence.", "The rule.")
    page = claims.as_html([verdict])
    assert "The evidence" not in page.split("<details>")[0]
    assert "<summary>A claim.</summary>\n\nThe evidence.\n\n*Rule: The rule.*" in page


def test_scorecard_lists_every_claim(tmp_path):
    """Without results everything is not run, and says what would run it."""
    verdicts = claims.judge(tmp_path)
    claims.write_scorecard(verdicts, tmp_path, "demo", "About it.")
    assert {v.verdict for v in verdicts} == {claims.NOT_RUN}
    assert len(pd.read_csv(tmp_path / "scorecard.csv")) == len(claims.load_claims())
    page = (tmp_path / "scorecard.md").read_text()
    assert page.startswith("# Scorecard: demo\n\nAbout it.\n")
    assert "make reproduce NOTEBOOKS=01" in page
    assert "is not written yet" in page


def test_models_that_could_not_be_had_are_named():
    claim = {"check": "attention_most_redundant", "notebook": "01_similarity"}
    missing = pd.DataFrame({"what": ["big"], "reason": ["it is gated"]})
    verdict, evidence = claims._judge(claim, contrast(-0.01) | {"not_run": missing})
    assert verdict == claims.REPRODUCED
    assert "m: attention 0.100" in evidence
    assert "big: not run: it is gated" in evidence
