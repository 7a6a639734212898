"""Claims, thresholds and history in data/claims.yaml; what a reader of the scorecard and of a notebook sees."""

import json
import re

import pandas as pd
import pytest
import yaml

from llmdrop_utils.base.files import REFERENCE, ROOT
from llmdrop_utils.report import verdicts
from llmdrop_utils.report.rules import DEVIATES, INCONCLUSIVE, NOT_RUN, OUTCOMES, REPRODUCED, Comparison, Finding
from llmdrop_utils.report.verdicts import Verdict
from llmdrop_utils.studies.curve_rows import KEEP

PAPER = json.loads((ROOT / "data" / "paper_claims.json").read_text(encoding="utf-8"))
PRINTED = {claim["id"]: claim["value"] for claim in PAPER["claims"]}
RAW = yaml.safe_load((ROOT / "data" / "claims.yaml").read_text(encoding="utf-8"))


# ---- data/claims.yaml -------------------------------------------------------------------------------------------------


def test_claims_file():
    listed = verdicts.load_claims()
    assert len({c["id"] for c in listed}) == len(listed)
    identifiers = [c["id"] for c in PAPER["claims"]]
    assert len(identifiers) == len(set(identifiers)) == 732
    keys = {"id", "claim", "where", "notebook", "rule", "paper"}
    for claim in listed:
        assert keys <= set(claim) <= keys | {"check", "thresholds", "history"}
        for prefix in claim["paper"]:
            assert any(i.startswith(prefix) for i in identifiers), f"{claim['id']}: nothing in the paper begins with {prefix}"
    checks = [c["check"] for c in listed if "check" in c]
    assert sorted(checks) == sorted(verdicts.CHECKS), "each rule has its claim"


def test_every_number_of_the_paper_s_results_belongs_to_a_claim():
    """Except settings, which are no claims: Table 5, calibration length, deployment memory."""
    prefixes = tuple(p for c in verdicts.load_claims() for p in c["paper"])
    rest = {c["id"] for c in PAPER["claims"] if not c["id"].startswith(prefixes)}
    assert {i.split(".")[0] for i in rest} <= {"T5", "X"}, sorted(rest)
    assert {i for i in rest if i.startswith("X")} <= {"X.seq", "X.size"}, sorted(rest)


def notebooks_with_a_check():
    return {c["notebook"] for c in verdicts.load_claims() if "check" in c}


def test_notebooks_exist_and_have_advice():
    for name in notebooks_with_a_check():
        assert (ROOT / "notebooks" / f"{name}.ipynb").exists()
    assert set(verdicts.ADVICE) == notebooks_with_a_check()


@pytest.mark.parametrize("claim", [claim for claim in RAW if "check" in claim], ids=lambda claim: claim["id"])
def test_a_rule_says_the_numbers_that_its_code_reads(claim):
    """Every threshold stands in the sentence; no other number but how far curves are followed, and what brackets explain."""
    for name in claim.get("thresholds", {}):
        assert f"{{{name}" in claim["rule"]
    own = re.sub(rf"\([^)]*\)|\{{[^}}]*\}}|95 % interval|{100 * KEEP:.0f} % of the dense", "", claim["rule"])
    assert not re.search(r"\d\.\d|\d %", own), own


def test_thresholds_stand_in_the_sentence():
    rules = {claim["id"]: claim["rule"] for claim in verdicts.load_claims()}
    assert "nearest to 25 %, at least 97.8 % of what lies above guessing" in rules["attention-drop-keeps-quality"]
    assert "At least 43.75 % of all attention layers" in rules["attention-goes-first"]
    assert "From 11.1 % of the training on" in rules["redundant-from-the-start"]
    assert not any("{" in rule for rule in rules.values())


def test_thresholds_are_the_paper_s():
    """Those that the paper gives a number for. The others (correlations, importance, nats) are ours."""
    of = {claim["id"]: claim.get("thresholds", {}) for claim in RAW}
    dense, guessing = PRINTED["T1.Llama-2-13B.Baseline.Avg"], 37.5
    above = (0.99 * dense - guessing) / (dense - guessing)
    assert of["attention-drop-keeps-quality"]["retained"] == pytest.approx(above, abs=5e-4)
    lost = PRINTED["T3.Llama-2-70B.Baseline.Avg"] - PRINTED["T3.Llama-2-70B.Attn-40.Avg"]
    assert lost <= of["half-the-attention"]["points"] < round(lost, 1) + 0.0501, "what rounds to the printed number"
    assert of["attention-drop-is-fast"]["speedup"] == PRINTED["T3.Llama-2-70B.Attn-40.SpeedUp"]
    ahead = {32: PRINTED["X.joint.first.mistral"], 40: PRINTED["X.joint.first.13b"]}
    assert of["attention-goes-first"]["layers"] == min(n / n_layers for n_layers, n in ahead.items())
    for claim in ("redundant-from-the-start", "others-rise", "same-layers-at-every-stage"):
        assert 500 / 4500 - 0.001 < of[claim]["first"] <= 500 / 4500, "the first checkpoint counts"


@pytest.mark.parametrize("entry", [(c["id"], entry) for c in RAW for entry in c.get("history", ())], ids=lambda e: e[0])
def test_history_of_a_rule(entry):
    _, old = entry
    assert set(old) == {"date", "rule", "verdicts", "why"}
    assert re.fullmatch(r"2026-\d\d-\d\d", str(old["date"]))
    for run, verdict in old["verdicts"].items():
        assert (REFERENCE / run).is_dir(), f"no committed run {run}"
        assert verdict in OUTCOMES


def test_history_is_in_order_of_time():
    for claim in RAW:
        dates = [str(entry["date"]) for entry in claim.get("history", ())]
        assert dates == sorted(dates)


# ---- from tables to a verdict ---------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch):
    """The verdict of a rule with these findings, on tables with these models that are not run."""

    def judge(*findings, not_run=()):
        monkeypatch.setitem(verdicts.CHECKS, "made_up", lambda tables, size: iter(findings) if size == 3 else None)
        claim = {"check": "made_up", "thresholds": {"size": 3}, "notebook": "09_x"}
        return verdicts.verdict_of(claim, {"not_run": pd.DataFrame(list(not_run), columns=["what", "reason"])})

    return judge


HOLDS, FAILS = Comparison("a", 2, 1.5, 2.5, at_least=1), Comparison("b", 0, -0.5, 0.5, at_least=1)
OPEN = Comparison("c", 2, 0, 4, at_least=1, size=10, unit="samples")


def test_evidence_of_one_model_and_of_several(judged):
    assert judged(Finding("m", "two", [HOLDS])) == (REPRODUCED, "two")
    assert judged(Finding("m", "none", [FAILS])) == (DEVIATES, "none")
    assert judged(Finding("m", "two", [HOLDS]), Finding("n", "none", [FAILS])) == (DEVIATES, "m: two; n: none")
    assert judged(Finding("m", "two", [HOLDS]), Finding("n", "it has no layers")) == (
        REPRODUCED, "m: two; n: not run: it has no layers",
    )  # fmt: skip
    assert judged(Finding("m", "it has no layers")) == (NOT_RUN, "it has no layers")
    assert judged(Finding("m", "it is small"), Finding("n", "so is it")) == (
        NOT_RUN, "m: not run: it is small; n: not run: so is it",
    )  # fmt: skip
    assert judged() == (
        NOT_RUN,
        "this run has nothing to compare: see the corpora and sample counts of its profile",
    )


def test_what_is_unavailable_is_named(judged):
    assert judged(Finding("m", "two", [HOLDS]), not_run=[("big", "it is gated")]) == (
        REPRODUCED, "m: two; big: not run: it is gated",
    )  # fmt: skip
    assert judged(not_run=[("big", "it is gated")]) == (NOT_RUN, "it is gated")


def test_what_would_settle_it_is_told_behind_the_evidence(judged):
    told = "c 2.00 (0.00 to 4.00), where the threshold is 1.00: about 40 samples instead of 10 would settle it"
    assert judged(Finding("m", "two", [OPEN])) == (INCONCLUSIVE, f"two. To settle it: {told}")
    verdict, evidence = judged(Finding("m", "two", [OPEN]), Finding("n", "more", [OPEN, HOLDS]))
    assert evidence == f"m: two; n: more. To settle it: {told}. To settle it: {told}"
    assert verdict == INCONCLUSIVE
    assert "settle" not in judged(Finding("m", "two", [OPEN]), Finding("n", "none", [FAILS]))[1]


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (lambda rows: rows["retained"], "retained"),
        (lambda rows: rows[["model", "retained"]], "retained"),
        (lambda rows: [row.retained for row in rows.itertuples()], "retained"),
        (lambda rows: rows.query("retained > 1"), "retained"),
        (lambda rows: rows.set_index("retained"), "retained"),
        (lambda rows: rows.groupby("model")["retained"], "retained"),
        (lambda rows: {"average": rows}["trade_pairs"], "trade_pairs"),
    ],
)
def test_tables_of_an_older_version(monkeypatch, read, named):
    """However a rule reads them, it names what they lack, and says how to make them anew."""
    monkeypatch.setitem(verdicts.CHECKS, "made_up", lambda tables: iter([read(tables["average"])]))
    claim = {"check": "made_up", "notebook": "02_drop_curves"}
    assert verdicts.verdict_of(claim, {"average": pd.DataFrame({"model": ["m"]})}) == (
        NOT_RUN,
        f"the tables of notebook 02_drop_curves are of an older version, without '{named}': "
        "`make reproduce NOTEBOOKS=02` makes them anew",
    )


def test_a_fault_of_a_rule_is_not_taken_for_an_old_table(monkeypatch):
    monkeypatch.setitem(verdicts.CHECKS, "made_up", lambda tables: iter([1 / 0]))
    with pytest.raises(ZeroDivisionError):
        verdicts.verdict_of({"check": "made_up", "notebook": "02_drop_curves"}, {"average": pd.DataFrame()})


# ---- the scorecard ----------------------------------------------------------------------------------------------------

HISTORY = (
    {"date": "2026-01-02", "rule": "The first rule.", "verdicts": {"demo": DEVIATES}, "why": "It was too strict.\n"},
    {"date": "2026-03-04", "rule": "The second rule.", "verdicts": {"other": REPRODUCED}, "why": "It read one number."},
)


def verdict(i, outcome, **more):
    return Verdict(f"id-{i}", f"Claim {i}.", f"Sec. {i}", "01_x", outcome, f"Evidence {i}.", f"Rule {i}.", **more)


def test_the_scorecard(tmp_path):
    several = [verdict(0, REPRODUCED), verdict(1, INCONCLUSIVE), verdict(2, REPRODUCED, history=HISTORY), verdict(3, NOT_RUN)]
    page = verdicts.write_scorecard(several, tmp_path, "demo", "About it.").read_text(encoding="utf-8")
    assert page.startswith(
        "# Scorecard: demo\n\nAbout it.\n\n2 reproduced, 0 deviates, 1 inconclusive, 1 not run, of 4 claims.\n"
    )
    assert re.search(r"\| Claim 1\. +\| Sec\. 1 +\| 01_x +\| \*\*inconclusive\*\* +\| Evidence 1\. +\|", page)
    reached, changed = page.split("## How each verdict is reached")[1].split("## Rules that changed after numbers were seen")
    assert "- *Claim 0.* Rule 0.\n- *Claim 1.* Rule 1.\n- *Claim 2.* Rule 2.\n- *Claim 3.* Rule 3." in reached
    for told in ("95 % intervals", "Holm's correction", "*Reproduced*", "*Deviates*", "*Inconclusive*", "how large a run"):
        assert told in reached
    assert changed == (
        "\n\n1 of 4 rules were changed after numbers of some run had been seen.\n\n- *Claim 2.* Now reproduced.\n"
        "  - until 2026-01-02 (deviates): The first rule. Why it was changed: It was too strict.\n"
        "  - until 2026-03-04 (not run): The second rule. Why it was changed: It read one number.\n"
    )
    table = pd.read_csv(tmp_path / "scorecard.csv")
    assert list(table.columns) == ["id", "claim", "where", "notebook", "verdict", "evidence", "rule"]
    assert list(table["verdict"]) == [REPRODUCED, INCONCLUSIVE, REPRODUCED, NOT_RUN]


@pytest.mark.parametrize(("run", "then"), [("demo", ["deviates", "not run"]), ("other", ["not run", "reproduced"])])
def test_history_tells_the_verdicts_of_the_same_run(tmp_path, run, then):
    page = verdicts.write_scorecard([verdict(0, REPRODUCED, history=HISTORY)], tmp_path, run, "").read_text(encoding="utf-8")
    assert re.findall(r"until 2026-\d\d-\d\d \(([a-z ]+)\)", page) == then


def test_a_scorecard_without_history(tmp_path):
    page = verdicts.write_scorecard([verdict(0, DEVIATES)], tmp_path, "demo", "About it.").read_text(encoding="utf-8")
    assert "Rules that changed" not in page
    assert "0 reproduced, 1 deviates, 0 inconclusive, 0 not run, of 1 claims." in page


def test_scorecard_lists_every_claim(tmp_path):
    """Without results everything is not run, and says what would run it. The history of each rule is told all the same."""
    several = verdicts.judge(tmp_path)
    page = verdicts.write_scorecard(several, tmp_path, "demo", "About it.").read_text(encoding="utf-8")
    assert {v.verdict for v in several} == {NOT_RUN}
    assert [v.id for v in several] == [claim["id"] for claim in RAW]
    for claim in RAW:
        assert page.count(f"- *{claim['claim']}* Now not run.") == ("history" in claim)
    assert page.count("  - until ") == sum(len(claim.get("history", ())) for claim in RAW)
    assert "make reproduce NOTEBOOKS=01" in page


def test_claims_of_one_notebook(tmp_path):
    several = verdicts.judge(tmp_path, "05_speedup")
    assert [v.id for v in several] == ["attention-drop-is-fast", "best-trade-off"]


def test_verdicts_in_a_notebook_fold_their_evidence():
    page = verdicts.as_html([verdict(0, REPRODUCED)])
    assert "Evidence 0" not in page.split("<details>")[0]
    assert "**reproduced**" in page.split("<details>")[0]
    assert "<summary>Claim 0.</summary>\n\nEvidence 0.\n\n*Rule: Rule 0.*" in page


# ---- what rules are made of -----------------------------------------------------------------------------------------------


def test_a_number_and_its_ends():
    row = {"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.7, "low": 8, "high": 9}
    assert verdicts.triple(row, "speedup", "speedup_") == (1.5, 1.4, 1.7)
    assert verdicts.triple(row, "speedup") == (1.5, 8, 9)


@pytest.mark.parametrize(
    ("n_layers", "share", "last"), [(8, 0.25, 1), (8, 0.5, 3), (30, 0.25, 6), (3, 0.25, 0), (1, 0.25, 0), (4, 1, 3)]
)
def test_the_last_of_the_least_important(n_layers, share, last):
    """Of eight layers a quarter are two: the second least. Seven of 30; one at least."""
    values = pd.Series(range(n_layers)).sample(frac=1, random_state=0)
    rows = pd.DataFrame({"importance": values, "layer": values + 100})
    assert verdicts.kth_least(rows, share)["layer"] == 100 + last


def test_lowest_of_each_kind():
    rows = pd.DataFrame({"kind": ["mlp", "attention", "mlp"], "correlation": [0.9, 0.5, 0.8]})
    assert [(row["kind"], row["correlation"]) for row in verdicts.lowest_of(rows)] == [("mlp", 0.8), ("attention", 0.5)]


def test_how_ends_are_told():
    assert verdicts.span(pd.Series({"low": 0.8123, "high": 0.9})) == "0.81 to 0.90"
    assert verdicts.span(pd.Series({"low": -0.0123, "high": 0.9})) == "-0.012 to 0.900"
    assert verdicts.span(pd.Series({"low": 0.5, "high": 0.9}), 4) == "0.5000 to 0.9000"
    assert verdicts.percent(pd.Series({"x_low": 0.9512, "x_high": 1.008}), "x") == "95.1 to 100.8 %"
