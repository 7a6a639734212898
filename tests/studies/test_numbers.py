"""The paper's numbers beside ours: each is read from the right cell of a run, or says what would run it."""

import dataclasses
import re

import families
import numpy as np
import pandas as pd
import pytest
from studies.paper_tables import GIB, MODELS, paper_tables

from llmdrop_utils import load_profile
from llmdrop_utils.base import files
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.report.tables import table, write_tables
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.sources.task_data import known_tasks, load_task
from llmdrop_utils.studies import curves, paper
from llmdrop_utils.studies.curve_rows import TABLES as CURVES
from llmdrop_utils.studies.number_rules import RULES
from llmdrop_utils.studies.numbers import WHY, compare, write_numbers
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.what_breaks.abilities import CONTEXTS

TASK_NAMES = ["boolq", "rte", "openbookqa", "piqa", "mmlu", "winogrande", "gsm8k", "hellaswag", "arc_challenge"]
KINDS = ["dense", "attention", "mlp", "block", "joint"]
FOUR = ["hellaswag", "mmlu", "openbookqa", "winogrande"]
NAMES = list(MODELS.values())  # mistral-7b-v0.1, llama-2-13b, llama-3-8b, llama-2-70b, llama-3-70b


def identity(name):
    return f"hub:{catalogue()['models'][name]['hub']}@abc"


def write_run(folder, tables, identities=None):
    """Write tables as a run of the paper's models does. identities: of the models, by their names in the tables."""
    entries = [{"model": name, "model_identity": hub} for name, hub in (identities or {n: identity(n) for n in NAMES}).items()]
    for notebook, content in tables.items():
        write_tables({name: pd.DataFrame(rows) for name, rows in content.items()}, folder / notebook, entries)
    return folder


def by_id(folder):
    return compare(folder).set_index("id")


# ---- tables in which no two cells are alike -----------------------------------------------------------------------------
# A score is 0.mtknn: model m, task t, kind k, nn dropped. Of Llama-2-13B (1) BoolQ (0), Attn-8 (kind 1) is 0.10108, 10.108 %.


def digits(m, t, k, n):
    return (10000 * m + 1000 * t + 100 * k + n) / 1e5


def score_rows(**more):
    known = known_tasks()
    return [
        {"model": model, "task": task, "kind": kind, "n": n, "metric": known[task]["metric"],
         "num_fewshot": known[task]["num_fewshot"], "value": digits(m, t, k, n), "stderr": 0.9,
         "low": digits(m, t, k, n) - 0.00003, "high": digits(m, t, k, n) + 0.00004, "chance": 0.7} | more
        for m, model in enumerate(NAMES) for t, task in enumerate(TASK_NAMES) for k, kind in enumerate(KINDS)
        for n in ([0] if kind == "dense" else [31, 4, 8, 12, 16, 20, 32, 40, 48])
    ]  # fmt: skip


def speed_rows(**more):
    """A speed-up is 1.0mknn, beside timings of other loads and back ends, which come first."""
    rows = []
    for m, model in enumerate(NAMES):
        for k, kind in enumerate(KINDS[:4]):
            for n in [0] if kind == "dense" else [4, 8, 12, 16, 20, 32, 40, 48]:
                right = {"what": "generation from samples", "backend": "eager", "context": 2048, "new_tokens": 2048}
                wrong = [
                    {"what": "decode"},
                    {"what": "generation"},
                    {"backend": "compiled"},
                    {"context": 512},
                    {"new_tokens": 512},
                ]
                value = 1 + digits(0, m, k, n) if kind != "dense" else 1
                ends = {"speedup_low": value - 0.0001, "speedup_high": value + 0.0002}
                row = {"model": model, "kind": kind, "n": n, "predicted": 7.7} | more
                rows += [row | right | other | {"speedup": 9.9, "speedup_low": 9.8, "speedup_high": 9.99} for other in wrong]
                rows.append(row | right | {"speedup": value} | ends)
    return rows


def cache_rows():
    """GiB of 101 (dense) and 51, 102 and 52, ... in the order of Table 4; the formula and what is printed are others."""
    claims = [c for c in paper.numbers() if c["id"].startswith("T4.")]
    return [
        {"model": c["model"], "n": c["n_drop"], "paper_gib": 5, "formula_bytes": 7 * GIB,
         "counted_bytes": (51 + i // 2 if c["n_drop"] else 101 + i // 2) * GIB, "dense_bytes": (101 + i // 2) * GIB}
        for i, c in enumerate(claims)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def distinct(tmp_path_factory):
    """What `compare` finds in such tables, by identifier."""
    first = [{"model": name, "attention_before": 21 + m, "low": 11 + m, "high": 31 + m, "n_layers": 77}
             for m, name in enumerate(NAMES)]  # fmt: skip
    fits = [{"model": name, "n": n, "weights_bytes": (200 + 10 * m + n) * GIB} for m, name in enumerate(NAMES) for n in (8, 0)]
    average = [{"model": name, "kind": "attention", "n": 8, "value": 0.99, "points_lost": 55} for name in NAMES]
    tables = {
        "02_drop_curves": {"tasks": score_rows(), "average": average},
        "03_joint_drop": {"tasks": score_rows(), "first_mlp": first},
        "05_speedup": {"speed": speed_rows()},
        "06_kv_cache": {"paper": cache_rows(), "fits": fits},
    }
    return by_id(write_run(tmp_path_factory.mktemp("distinct"), tables))


# Tasks: boolq 0, rte 1, openbookqa 2, piqa 3, mmlu 4, winogrande 5, gsm8k 6, hellaswag 7, arc_challenge 8. Kinds: dense 0,
# attention 1, mlp 2, block 3, joint 4. Models: mistral-7b 0, llama-2-13b 1, llama-3-8b 2, llama-2-70b 3, llama-3-70b 4.
# Mean of the eight tasks: t = 30 / 8 = 3.75. Of the four of Llama-3 (7, 4, 2, 5): 4.5.
HAND = {
    "T1.Llama-2-13B.Baseline.BoolQ": (10.0, 80.7),
    "T1.Llama-2-13B.Attn-8.BoolQ": (10.108, 80.5),
    "T1.Llama-2-13B.MLP-4.ARC-C": (18.204, 54.9),
    "T1.Llama-2-13B.Block-8.HellaSwag": (17.308, 75.3),
    "T1.Mistral-7B.Attn-12.RTE": (1.112, None),
    "T2.Llama-3-8B.Attn-20.WinoGrande": (25.120, None),
    "T3.Llama-2-70B.Attn-40.MMLU": (34.140, None),
    "T2.Llama-3-70B.Attn-48.OBQA": (42.148, None),
    "T3.Llama-2-70B.Block-32.PIQA": (33.332, None),
    "T1.Llama-2-13B.Attn-8.Avg": (13.858, 68.1),
    "T1.Llama-2-13B.Baseline.Avg": (13.75, 68.2),
    "T2.Llama-3-70B.Attn-40.Avg": (44.640, 73.3),
    "T1.Llama-2-13B.Baseline.SpeedUp": (1, 1.0),
    "T1.Llama-2-13B.Attn-8.SpeedUp": (1.01108, 1.13),
    "T3.Llama-2-70B.MLP-32.SpeedUp": (1.03232, 1.17),
    "T1.Mistral-7B.Block-4.SpeedUp": (1.00304, 1.14),
    "T1.Llama-2-13B.Attn-8.SDR": ((13.75 - 13.858) / 1.108, 0.01),
    "T4.Llama-2-13B.dense": (102, 52),
    "T4.Llama-2-13B.dropped": (52, 26),
    "T4.Llama-3-70B.dropped": (55, 10),
    "T5.MMLU": (5, 5),
    "T5.ARC-C": (25, 25),
    "T6.Attn.16.wres": (14.616, 63.4),  # of Llama-2-13B, whatever the caption says
    "T6.MLP.4.wres": (14.704, 64.5),
    "T7.Cosine.12": (4.612, 64.8),
    "T9.Attn-12.HellaSwag": (17.112, 82.7),
    "T9.Attn-12.mean_of_4_tasks": (14.612, 65.4),
    "T9.Attn-12.speedup": (1.01112, 1.2),
    "T11.Mistral-7B.8.fp.ARC-C": (8.108, 60.2),
    "T11.Llama-2-13B.0.fp.mean_of_4_tasks": (15.5, 66.2),  # ARC-C, not MMLU: (7 + 8 + 2 + 5) / 4
    "F9.One-shot.8.MMLU": (4.108, 62.2),
    "F9.One-shot.4.mean_of_4_tasks": (4.604, 67.0),
    "X.abs.70b.speedup": (3.14, 48.4),
    "X.abs.70b.drop": (-0.14, 2.4),
    "TMLR.speedup": (4.14, 43.4),
    "TMLR.drop": (-0.14, 1.8),
    "X.block4.13b": (-0.304, 2.4),
    "X.block8.13b": (-0.308, 7.5),
    "X.mlp4.13b": (-0.204, 1.3),
    "X.mlp8.13b": (-0.208, 6.3),
    "X.99at8": (100 * 13.858 / 13.75, 99),  # Mistral: 3.858 / 3.75, which is more
    "X.40at95": (1.12, 40),  # Attn-20 of Llama-2-13B; nothing loses 5 % here
    "X.joint31": (100 * 14.431 / 14.0, 90),
    "X.joint.first.mistral": (21, 14),
    "X.joint.first.13b": (22, 18),
    "X.kv50": (100 * (1 - 52 / 102), 50),
    "X.size": (230, 128),
}


@pytest.mark.parametrize("identifier", HAND)
def test_each_rule_reads_its_cell(distinct, identifier):
    """Model, task, kind, n, load and unit: any other cell is another number."""
    ours, printed = HAND[identifier]
    row = distinct.loc[identifier]
    assert row["status"] == "compared", row["reason"]
    assert row["ours"] == pytest.approx(ours, abs=2e-4)
    printed = float(row["paper"]) if printed is None else printed
    assert row["difference"] == pytest.approx(ours - printed, abs=2e-4)


def test_every_rule_is_tested_by_hand():
    """Here, or with the tables of other notebooks below."""
    of = lambda identifier: next(pattern for pattern, _ in RULES if re.fullmatch(pattern, identifier))  # noqa: E731
    assert {of(c["id"]) for c in paper.numbers()} == {pattern for pattern, _ in RULES}, "a rule that no number uses"
    reached = {of(identifier) for identifier in [*HAND, *OTHERS]}
    rest = {pattern for pattern, rule in RULES if callable(rule)} - reached
    assert rest == {r"(X|TMLR)\..*"}, rest


def test_intervals(distinct):
    """Of a score 0.003 below and 0.004 above, in percent; of a mean of 8 these over the root of 8; of a speed-up its own."""
    for identifier, below, above in (
        ("T1.Llama-2-13B.Attn-8.BoolQ", 0.003, 0.004),
        ("T1.Llama-2-13B.Attn-8.Avg", 0.003 / 8**0.5, 0.004 / 8**0.5),
        ("T1.Llama-2-13B.Attn-8.SpeedUp", 0.0001, 0.0002),
        ("X.abs.70b.speedup", 0.01, 0.02),
        ("X.joint.first.mistral", 10, 10),
    ):
        row = distinct.loc[identifier]
        assert (row["ours"] - row["low"], row["high"] - row["ours"]) == pytest.approx((below, above), rel=0.01), identifier
    assert np.isnan(distinct.loc["T4.Mistral-7B.dense", "low"])


def test_all_of_tables_1_to_5_are_compared(distinct):
    tables = distinct[distinct.index.str.match(r"T[1-5]\.")]
    assert len(tables) == 457
    assert tables[tables["status"] != "compared"]["reason"].to_dict() == {}


# ---- one row each --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_cpu():
    return compare(files.REFERENCE / "cpu")


def test_every_number_has_one_row(of_cpu, distinct):
    printed = paper.numbers()
    for rows in (of_cpu, distinct.reset_index()):
        assert list(rows["id"]) == [c["id"] for c in printed]
        assert rows["id"].is_unique
        assert len(rows) == 732
        assert list(rows["paper"]) == [str(c["value"]) for c in printed]
        compared = rows["status"] == "compared"
        assert set(rows["status"]) == {"compared", "not run"}
        assert rows.loc[compared, ["ours", "difference", "source"]].notna().all(axis=None)
        assert rows.loc[compared, ["reason", "why"]].isna().all(axis=None)
        assert rows.loc[~compared, ["reason", "why"]].notna().all(axis=None)
        assert rows.loc[~compared, ["ours", "low", "high", "difference", "source"]].isna().all(axis=None)
        assert set(rows["why"].dropna()) <= set(WHY)


def test_a_run_of_another_model(of_cpu):
    """It counts the paper's caches, and says how it asks its tasks; nothing else is about the paper's models."""
    rows = of_cpu.set_index("id")
    compared = rows[rows["status"] == "compared"]
    assert {identifier.split(".")[0] for identifier in compared.index} == {"T4", "T5", "X"}
    slips = compared[compared.index.str.startswith("T4") & (compared["difference"] != 0)]
    assert slips["difference"].to_dict() == {"T4.Llama-2-13B.dense": -2, "T4.Llama-2-13B.dropped": -1}
    assert slips["note"].str.contains("gives 50 GiB / 25 GiB, not 52/26").all()
    assert rows.loc["T5.HellaSwag", "difference"] == -10
    assert rows.loc["T5.HellaSwag", "source"] == "02_drop_curves/tasks, acc_norm: the paper's metric"
    assert rows.loc["T1.Mistral-7B.Attn-8.MMLU", "reason"] == "needs mistral-7b-v0.1: make reproduce PROFILE=gpu"
    assert rows.loc["T5.MMLU", "reason"] == "02_drop_curves/tasks has no row for task mmlu: add it to the profile"
    assert rows.loc["T7.Random.8", "reason"] == "needs mistral-7b-v0.1: make reproduce PROFILE=gpu"
    assert rows.loc["F9.Iterative.4.MMLU", "reason"] == "needs mistral-7b-v0.1: make reproduce PROFILE=gpu"
    assert rows.loc["X.deep", "reason"] == "a statement, judged by the rule deeper-more-redundant"
    assert rows.loc["PT.no_finetune.Baseline", "reason"] == "a figure file whose model or task is not labelled"


def test_a_wrong_cache_shows(tmp_path):
    rows = cache_rows()
    rows[0]["counted_bytes"] = 999 * GIB
    row = by_id(write_run(tmp_path, {"06_kv_cache": {"paper": rows}})).loc["T4.Mistral-7B.dense"]
    assert (row["ours"], row["difference"]) == (999, 983)


def test_the_line_counts_every_number(tmp_path):
    line = write_numbers(files.REFERENCE / "cpu", tmp_path)
    rows = pd.read_csv(tmp_path / "numbers.csv")
    compared, others = (int((rows["status"] == status).sum()) for status in ("compared", "not run"))
    assert (compared, others) == (17, 715)
    assert line.startswith(
        "Of the paper's 732 numbers 17 were compared with ours, 5 of them settings ([numbers.csv](numbers.csv)), 715 not run: 6"
    )
    counts = [int(count) for count in re.findall(r"(?:: |, )(\d+) (?:are|need|belong|were measured)", line)]
    assert sum(counts) == 715
    assert list(rows.columns) == ["id", "where", "model", "method", "n_drop", "what", "unit", "paper", "status", "ours", "low",
                                  "high", "difference", "source", "reason", "note"]  # fmt: skip


# ---- what is not comparable ----------------------------------------------------------------------------------------------


def test_other_numbers_of_examples_are_not_compared(tmp_path):
    """0-shot BoolQ is the paper's, 0-shot HellaSwag is not; so there is no mean, and the count of examples differs."""
    rows = by_id(write_run(tmp_path, {"02_drop_curves": {"tasks": score_rows(num_fewshot=0)}}))
    row = "T1.Llama-2-13B.Attn-8"
    assert rows.loc[f"{row}.BoolQ", "status"] == "compared"
    for column in ("HellaSwag", "Avg"):
        assert "was measured 0-shot; num_fewshot: null" in rows.loc[f"{row}.{column}", "reason"]
    assert rows.loc["T5.HellaSwag", "difference"] == -10


def test_another_metric_is_not_compared(tmp_path):
    rows = by_id(write_run(tmp_path, {"02_drop_curves": {"tasks": score_rows(metric="acc")}}))
    row = "T1.Llama-2-13B.Attn-8"
    assert rows.loc[f"{row}.BoolQ", "status"] == "compared"
    assert "no row for" in rows.loc[f"{row}.PIQA", "reason"]
    assert rows.loc["T5.PIQA", "source"].endswith("acc: not the paper's metric acc_norm")


def test_a_mean_needs_all_of_its_tasks(tmp_path):
    """Without RTE there is no mean of eight, but the means of four remain."""
    tasks = [row for row in score_rows() if row["task"] != "rte"]
    rows = by_id(write_run(tmp_path, {"02_drop_curves": {"tasks": tasks}, "05_speedup": {"speed": speed_rows()}}))
    for column in ("Avg", "SDR", "RTE"):
        reason = rows.loc[f"T1.Llama-2-13B.Attn-8.{column}", "reason"]
        assert "no row for kind" in reason
        assert "task rte: add it to the profile" in reason
    assert rows.loc["T2.Llama-3-8B.Attn-8.Avg", "status"] == "compared"
    assert rows.loc["T9.Attn-8.mean_of_4_tasks", "status"] == "compared"


@pytest.mark.parametrize(
    ("name", "hub", "scores", "speed"),
    [
        ("meta-llama/Llama-2-13b-hf", "hub:meta-llama/Llama-2-13b-hf@def", True, True),  # by its hub id
        ("llama-2-13b", "sha256:0", False, False),  # a folder of that name may hold anything
        ("llama-2-13b", "hub:me/Llama-2-13b-hf@def", False, False),
        ("random:llama-2-13b", "random:0", False, True),  # speed does not depend on weights, and it has no scores
    ],
)
def test_which_model_it_is(tmp_path, name, hub, scores, speed):
    def renamed(rows):
        return [row | {"model": name} for row in rows if row["model"] == "llama-2-13b"]

    tasks = [] if name.startswith("random:") else renamed(score_rows())
    other = [row for row in score_rows() if row["model"] == "mistral-7b-v0.1"]
    tables = {"02_drop_curves": {"tasks": tasks + other}, "05_speedup": {"speed": renamed(speed_rows())}}
    rows = by_id(write_run(tmp_path, tables, {name: hub, "mistral-7b-v0.1": identity("mistral-7b-v0.1")}))
    for column, expected in (("BoolQ", scores), ("SpeedUp", speed)):
        row = rows.loc[f"T1.Llama-2-13B.Attn-8.{column}"]
        assert (row["status"] == "compared") == expected
        if not expected:
            assert row["reason"] == "needs llama-2-13b: make reproduce PROFILE=gpu"


def test_a_notebook_that_was_left_out(tmp_path):
    rows = by_id(write_run(tmp_path, {"05_speedup": {"speed": speed_rows()}}))
    assert rows.loc["T1.Llama-2-13B.Attn-8.BoolQ", "reason"].endswith("was not run: make reproduce NOTEBOOKS=02")
    assert rows.loc["T4.Llama-2-13B.dense", "reason"].endswith("was not run: make reproduce NOTEBOOKS=06")
    empty = by_id(write_run(tmp_path / "empty", {}))
    assert (empty["status"] == "not run").all()
    assert empty.loc["T1.Llama-2-13B.Attn-8.BoolQ", "why"] == "model"


def test_statements_about_what_still_holds(tmp_path):
    """With more than 95 % kept: Attn-20 of Llama-2-13B is the fastest, but loses too much, so it is Attn-16."""
    tasks = score_rows()
    for row in tasks:
        if (row["model"], row["kind"], row["n"]) == ("llama-2-13b", "attention", 20):
            row["value"] *= 0.94
        if (row["model"], row["kind"], row["n"]) == ("mistral-7b-v0.1", "attention", 8):
            row["value"] *= 0.9
    tables = {"02_drop_curves": {"tasks": tasks}, "05_speedup": {"speed": speed_rows()}}
    rows = by_id(write_run(tmp_path, tables))
    assert rows.loc["X.40at95", "ours"] == pytest.approx(1.116, abs=1e-3)
    assert rows.loc["X.99at8", "ours"] == pytest.approx(90 * 3.858 / 3.75, abs=1e-2), "the least of both models"


# ---- tables of the other notebooks ------------------------------------------------------------------------------------------

NO_DIFFERENCE = dict.fromkeys(("difference", "difference_low", "difference_high"), 0)
OTHERS = {
    "T6.Attn.8.wores": 14.608 + 1,
    "T6.MLP.8.wores": 14.708 + 1,
    "T7.Random.8": 4.608 + 2,
    "T7.Reverse.8": 4.608 + 3,
    "T7.Relative.8": 4.608 + 4,
    "F9.Iterative.8.MMLU": 4.108 + 5,
    "F9.Iterative.8.mean_of_4_tasks": 4.608 + 5,
    "T9.Wanda-8.HellaSwag": 17.108 + 6,
    "T9.Wanda-8.mean_of_4_tasks": 14.608 + 6,
    "T9.Wanda-8.speedup": 1.01108,
    "T10.12": 44,
    "T11.Mistral-7B.0.q.ARC-C": 8.0 + 7,
    "T11.Mistral-7B.8.q.mean_of_4_tasks": 5.608 + 7,
    "T12.MLP-8.7k": 28.07,
    "T12.Attn-4.mean": 14.99,
    "X.quant": -7,
}


def test_tables_of_other_notebooks(tmp_path, monkeypatch):
    """A study with a table of the declared name and columns is all that it takes."""

    def by_method(offsets):
        """Scores that are higher by so many points for each method."""
        shifted = lambda row, method, points: row | {"method": method, "value": row["value"] + points / 100}  # noqa: E731
        return [shifted(row, method, points) for row in score_rows() for method, points in offsets.items()]

    scores = {"tasks": (*CURVES["tasks"], *table("method"))}
    joint = STUDIES["03_joint_drop"]
    beyond = {"speed": table("model method kind n speedup low high"), "answers": table("model kind n answer"),
              "long_context": table("model probe kind n context accuracy")}  # fmt: skip
    for name, declared in (
        ("04_ablations", scores),
        ("08_what_breaks", scores | beyond),
    ):
        monkeypatch.setitem(STUDIES, name, dataclasses.replace(joint, notebook=name, tables=declared))
    kinds = [("attention", 4), ("attention", 8), ("mlp", 8)]
    asked = {"model": "llama-2-7b-32k", "probe": "banking77"}
    contexts = [asked | {"kind": kind, "n": n, "context": context, "accuracy": (100 * k + 10 * n + c) / 1e3}
                for k, (kind, n) in enumerate(kinds) for c, context in enumerate(["2k", "7k"])]  # fmt: skip
    contexts[3]["accuracy"], contexts[5]["accuracy"] = 0.9, 0.2807
    contexts.append(asked | {"kind": "attention", "n": 4, "context": "mean", "accuracy": 0.1499})
    speed = {"model": "llama-2-13b", "method": "Wanda", "kind": "attention", "n": 8, "speedup": 1.01108, "low": 1, "high": 1.1}
    answers = [{"model": "metamath-mistral-7b", "kind": "attention", "n": n, "answer": 32 + n} for n in (2, 12)]
    ablations = {"without residual": 1, "random": 2, "reverse order": 3, "relative magnitude": 4}
    tables = {
        "02_drop_curves": {"tasks": score_rows()},
        "03_joint_drop": {"iterative_tasks": [row | {"value": row["value"] + 0.05} | NO_DIFFERENCE for row in score_rows()]},
        "04_ablations": {"tasks": by_method(ablations)},
        "08_what_breaks": {"tasks": by_method({"Wanda": 6, "4 bits": 7}), "answers": answers, "long_context": contexts,
                      "speed": [speed]},
    }  # fmt: skip
    models = {name: identity(name) for name in NAMES} | {n: f"hub:{hub}@{1:040d}" for n, hub in paper.OF_ONE_TABLE.items()}
    rows = by_id(write_run(tmp_path, tables, models))
    for identifier, expected in OTHERS.items():
        assert rows.loc[identifier, "status"] == "compared", rows.loc[identifier, "reason"]
        assert rows.loc[identifier, "ours"] == pytest.approx(expected, abs=1e-3), identifier


# ---- the paper's own numbers, and the profile of the paper's models ---------------------------------------------------------


def test_the_paper_against_itself(tmp_path):
    """What the paper prints twice agrees within rounding, but for what is known; Tables 1 to 4 agree exactly."""
    rows = by_id(write_run(tmp_path, paper_tables()))
    compared = rows[rows["status"] == "compared"]
    assert len(compared) == 542
    means = compared.index.str.contains(r"\.Avg|mean_of|^X|^TMLR|^T[67]|SDR")
    assert compared[~means & ~compared.index.str.contains("Attn-40.SpeedUp")]["difference"].abs().max() < 1e-3
    assert compared["difference"].abs()[lambda d: d > 0.06].round(3).to_dict() == {
        "X.99at8": 0.377,  # "> 99"
        "X.block4.13b": 0.075,  # differences of means that were rounded first
        "X.mlp4.13b": 0.1,
    }


def test_the_profile_gpu_measures_what_reasons_promise(tmp_path):
    """`make reproduce PROFILE=gpu` has every model, task and count of the numbers that are said to need it."""
    profile = load_profile("gpu").to_json()
    assert set(NAMES) <= set(profile["models"])
    cells = {(kind, n) for kind, several in profile["tasks"]["n_drop"].items() for n in several} | {("dense", 0)}
    timed = {(kind, n) for kind, several in profile["speed"]["n_drop"].items() for n in several} | {("dense", 0)}
    tasks = [row for row in score_rows() if (row["kind"], row["n"]) in cells]
    tasks = [row for row in tasks if row["task"] in profile["tasks"]["names"]]
    first = [{"model": name, "attention_before": 20, "low": 19, "high": 21, "n_layers": 40} for name in NAMES]
    part = profile["iterative"]
    one_by_one = [row | NO_DIFFERENCE for row in tasks
                  if row["kind"] == "attention" and row["n"] in {*part["n_drop"]} & {*part["task_n"]}]  # fmt: skip
    part = profile["ablations"]
    asked = [row for row in score_rows() if row["kind"] in ("attention", "mlp") and row["n"] in part["task_n"]]
    asked = [row for row in asked if row["n"] in part["n_drop"] and part["task_limit"] is None]
    tables = {
        "02_drop_curves": {"tasks": tasks},
        "03_joint_drop": {"tasks": tasks, "first_mlp": first, "iterative_tasks": one_by_one},
        "04_ablations": {"tasks": [row | {"method": method} for row in asked for method in part["methods"]]},
        "05_speedup": {"speed": [row for row in speed_rows() if (row["kind"], row["n"]) in timed]},
        "06_kv_cache": paper_tables()["06_kv_cache"],
        "08_what_breaks": _what_breaks(profile),
    }
    promised = by_id(write_run(tmp_path / "nothing", {})).query("why in ('model', 'notebook')")
    models = {name: identity(name) for name in NAMES} | {n: f"hub:{hub}@{1:040d}" for n, hub in paper.OF_ONE_TABLE.items()}
    rows = by_id(write_run(tmp_path / "gpu", tables, models)).loc[promised.index]
    assert rows[rows["status"] != "compared"]["reason"].to_dict() == {}
    assert profile["tasks"]["num_fewshot"] is None
    assert (profile["speed"]["prompt"], profile["speed"]["new_tokens"]) == (2048, 2048)


def _what_breaks(profile):
    """What notebook 08 has under the profile: changed weights of all models, and two models of a single table each."""
    asked, part = profile["what_breaks"], profile["changes"]
    assert part["task_limit"] is asked["answers_limit"] is None
    methods = {"4 bits": (0, *part["n_drop"]), "Wanda": part["n_drop"]} if 4 in part["bits"] else {}
    kinds = {n: "attention" if n else "dense" for n in (0, *part["n_drop"])}
    tasks = [row | {"method": method} for row in score_rows() for method, counts in methods.items()
             if row["n"] in counts and row["kind"] == kinds[row["n"]] and row["task"] in profile["tasks"]["names"]]  # fmt: skip
    speed = [{"model": name, "method": "Wanda", "kind": "attention", "n": n, "speedup": 1, "low": 1, "high": 1}
             for name in NAMES for n in part["n_drop"]]  # fmt: skip
    answers = [{"model": "metamath-mistral-7b", "kind": "attention" if n else "dense", "n": n, "answer": 18}
               for n in (0, *asked["answers_n"])]  # fmt: skip
    of_context = {"model": "llama-2-7b-32k", "probe": "banking77", "accuracy": 0.5, "low": 0.4, "high": 0.6}
    cells = [("dense", 0), *((kind, n) for kind in ("attention", "mlp") for n in asked["n_drop"])]
    contexts = [of_context | {"kind": kind, "n": n, "context": context} for kind, n in cells
                for context in (*(CONTEXTS[shots] for shots in asked["shots"]), "mean")]  # fmt: skip
    return {"tasks": tasks, "speed": speed, "answers": answers, "long_context": contexts}


@pytest.mark.slow
def test_a_run_of_the_profile_gpu(network, tmp_path, monkeypatch):
    """A tiny model under a name of the paper on a hub, a document of each task: measured, and compared with no further code."""
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(curves, "load_task", lambda *task: load_task(*task)[:2])  # of the 57 subjects of MMLU
    folder, drops = tmp_path / "llama-2-13b", {"attention": [4], "mlp": [4], "block": [4]}
    shape = {"num_hidden_layers": 5, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 16384}
    families.tiny("llama", vocab_size=257, **shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    source = catalogue()["models"]["llama-2-13b"]
    network.repositories[source["hub"]] = {source["revision"]: {p.name: p.read_bytes() for p in folder.iterdir()}}
    few = {"corpora": ["random-words"], "n_samples": 2, "seq_len": 32, "sample_counts": [2], "batch_size": 2, "n_drop": [4]}
    profile = load_profile("gpu").replacing(
        models=["llama-2-13b"],
        calibration=few,
        text={"n_samples": 2, "seq_len": 32, "n_drop": [4]},
        tasks={"names": [task for task in TASK_NAMES if task != "gsm8k"], "data": "package", "limit": 1, "n_drop": drops},
        speed={"repeats": 1, "batch_size": 1, "contexts": [2048, 4096], "steps": 1, "n_drop": drops, "sweep_batches": [1],
               "sweep_n": 4, "compiled": None, "whole": None},
    )  # fmt: skip
    quality, speed = (STUDIES[name](profile) for name in ("02_drop_curves", "05_speedup"))
    rows = by_id(files.local("gpu").tables)

    def score(kind, task):
        return 100 * quality["tasks"].query(f"kind == '{kind}' and n in (0, 4) and task == '{task}'")["value"].item()

    eight = [task for task in TASK_NAMES if task != "gsm8k"]
    (timed,) = speed["speed"].query("what == 'generation from samples' and context == 2048 and n == 4 and kind == 'mlp'")[
        "speedup"
    ]
    expected = {
        "T1.Llama-2-13B.Baseline.MMLU": score("dense", "mmlu"),
        "T1.Llama-2-13B.Attn-4.ARC-C": score("attention", "arc_challenge"),
        "T1.Llama-2-13B.MLP-4.MMLU": score("mlp", "mmlu"),
        "T1.Llama-2-13B.Block-4.Avg": np.mean([score("block", task) for task in eight]),
        "T9.Attn-4.mean_of_4_tasks": np.mean([score("attention", task) for task in FOUR]),
        "T1.Llama-2-13B.MLP-4.SpeedUp": timed,
        "T5.ARC-C": 25,
    }
    for identifier, value in expected.items():
        assert rows.loc[identifier, "status"] == "compared", rows.loc[identifier, "reason"]
        assert rows.loc[identifier, "ours"] == pytest.approx(value), identifier
        assert rows.loc[identifier, "difference"] == pytest.approx(value - float(rows.loc[identifier, "paper"])), identifier
    cells = rows[rows.index.str.match(r"T1.Llama-2-13B\.(Baseline|(Attn|MLP|Block)-4)\.")]
    assert len(cells) == 4 * 10 + 3  # eight tasks, mean and speed-up; SDR, but of the dense model
    arms = [f"T1.Llama-2-13B.{kind}-4" for kind in ("Attn", "MLP", "Block")]  # which so small a model may not make faster
    slower = {f"{arm}.SDR": "there is no speed-up to divide by" for arm in arms if rows.loc[f"{arm}.SpeedUp", "ours"] <= 1}
    assert cells[cells["status"] != "compared"]["reason"].to_dict() == slower
    assert rows.loc["T1.Llama-2-13B.Attn-8.MMLU", "reason"].endswith("n 8, task mmlu: add it to the profile")
    assert rows.loc["T4.Llama-2-13B.dense", "reason"].endswith("was not run: make reproduce NOTEBOOKS=06")
    assert rows.loc["T1.Mistral-7B.Attn-4.MMLU", "reason"] == "needs mistral-7b-v0.1: make reproduce PROFILE=gpu"
