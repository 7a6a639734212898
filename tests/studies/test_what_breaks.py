"""Notebook 08 on small numbers worked out by hand, and on a tiny model from end to end."""

import dataclasses
import importlib.util

import families
import numpy as np
import pandas as pd
import pytest
import torch

from llmdrop_utils import DropPlan, LLMDropError, load_model, load_profile
from llmdrop_utils.base import files
from llmdrop_utils.derive.quantise import round_weights
from llmdrop_utils.derive.tuning import Tuning
from llmdrop_utils.derive.wanda import prune_by_wanda, sparsity_for
from llmdrop_utils.dropping.units import skipping
from llmdrop_utils.measure.decoding import greedy
from llmdrop_utils.measure.scoring import score
from llmdrop_utils.measure.text import score_text
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.load import model_of_shape
from llmdrop_utils.models.locate import locate_model
from llmdrop_utils.report.verdicts import ADVICE
from llmdrop_utils.studies.ablations.rows import Arm, of_text
from llmdrop_utils.studies.run import NOT_RUN, STUDIES
from llmdrop_utils.studies.what_breaks.abilities import Ability, Pooled, WhatBreaks
from llmdrop_utils.studies.what_breaks.change_rows import (
    change_rows,
    pruned_rows,
    ranking_rows,
    recovered_rows,
    speed_rows,
)
from llmdrop_utils.studies.what_breaks.changes import LORA, NONE, WANDA, ChangedSpeedWork, ChangedWork, Changes
from llmdrop_utils.studies.what_breaks.rows import (
    ability_rows,
    answer_rows,
    break_rows,
    confidence_rows,
    context_gap_rows,
    context_rows,
    generation_rows,
    repetition,
)
from llmdrop_utils.studies.what_breaks.shrinking import obstacles_to_changes
from llmdrop_utils.studies.what_breaks.study import TABLES, paper_rows
from llmdrop_utils.studies.what_breaks.work import GenerationWork, ProbeWork
from llmdrop_utils.studies.work import DENSE, DENSE_CELL, Cell, TextWork

MODEL = locate_model("tiny-llama")
SHARED = {"model": MODEL, "dtype": torch.float32, "attention": "sdpa"}
PLANS = (DENSE, DropPlan(attention=(1,)), DropPlan(mlp=(2,)))
TOKENS = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(1))
CELLS = [DENSE_CELL, Cell("attention", 1), Cell("attention", 2), Cell("mlp", 1), Cell("mlp", 2)]


def ability(name: str, *means: float, n: int = 40, chance: float = 0.0, **more) -> Ability:
    """Samples whose mean in each cell is as given, half of them a tenth above and half below it."""
    spread = np.where(np.arange(n) % 2, 0.1, -0.1)[:, None]
    return Ability(name, CELLS, np.array(means) + spread, chance, **more)


# ---- rows from numbers worked out by hand -----------------------------------------------------------------------------------


def test_what_is_retained_of_an_ability():
    """Of 0.6, where guessing gives 0.2: 0.5 is (0.5 - 0.2) / (0.6 - 0.2) = 0.75, and 0.2 nothing."""
    rows = ability_rows([ability("choices", 0.6, 0.5, 0.4, 0.2, 0.1, chance=0.2)])
    assert [row["retained"] for row in rows] == pytest.approx([1, 0.75, 0.5, 0, -0.25])
    assert [row["value"] for row in rows] == pytest.approx([0.6, 0.5, 0.4, 0.2, 0.1])
    assert [(row["kind"], row["n"]) for row in rows] == [tuple(cell)[:2] for cell in CELLS]
    assert all(row["low"] < row["value"] < row["high"] for row in rows)
    assert all(row["retained_low"] < row["retained"] < row["retained_high"] for row in rows[1:4:2])


def test_a_model_that_guesses_has_nothing_to_retain():
    (row, *_) = ability_rows([ability("choices", 0.26, 0.3, 0.3, 0.3, 0.3, chance=0.25, n=10)])
    assert np.isnan(row["retained"])
    assert row["low"] < 0.25 < row["high"]
    assert all(np.isnan(row["n"]) for row in break_rows([ability("choices", 0.26, *[0.3] * 4, chance=0.25, n=10)]))


def test_what_breaks_first_comes_first():
    """90 % of 0.8 is 0.72."""
    rows = break_rows([
        ability("text", 0.8, 0.79, 0.73, 0.5, 0.75), ability("choices", 0.8, 0.75, 0.6, 0.74, 0.73),
        ability("guessed", 0.0, *[0.0] * 4),
    ])  # fmt: skip
    assert [(row["ability"], row["kind"], row["n"]) for row in rows[:2]] == [
        ("choices", "attention", 1),
        ("text", "attention", 2),
    ]
    assert [(row["ability"], row["kind"], row["n"]) for row in rows[3:5]] == [("text", "mlp", 0), ("choices", "mlp", 2)]
    assert [row["ability"] for row in rows if np.isnan(row["n"])] == ["guessed"] * 2
    assert [row["tried_up_to"] for row in rows] == [2] * 6


def test_what_a_reader_is_told():
    """Copying holds without four attention layers and text without eight, both without two MLPs; choices are guessed."""
    breaks = [
        ("copy", "attention", 4),
        ("text", "attention", 8),
        ("copy", "mlp", 2),
        ("text", "mlp", 2),
        ("choices", "mlp", None),
    ]
    sure = [("dense", 0, 0.1), ("attention", 4, 0.2), ("attention", 8, 0.25)]
    costs = pd.DataFrame([(0, -0.01), (8, -0.05)], columns=["n", "cost"])
    tables = {
        "breaks": pd.DataFrame(breaks, columns=["ability", "kind", "n"]).assign(model="m"),
        "confidence": pd.DataFrame(sure, columns=["kind", "n", "error"]).assign(model="m"),
        "changes": costs.assign(model="m", change="4 bits", measure="text"),
        "rankings": pd.DataFrame({"model": ["m"], "change": "4 bits", "n": 8, "shared": 7}),
    }
    assert ADVICE["08_what_breaks"](tables).split("\n\n")[0] == (
        "**m**: Of attention layers, 4 can go before less than 90 % is left of copy; 8 for text. Without up to 2 MLPs, 90 % of "
        "each ability is left. The dense model is at chance in choices, so nothing is said of these. The calibration error of "
        "choices goes from 10.0 % to 25.0 % without 8 attention layers. 4 bits cost, in nats per token, +0.010 of the dense "
        "model, +0.050 without 8 layers; they choose 7 of the 8 layers alike, so choose the layers before you quantise."
    )


def test_contexts_and_the_gap_between_kinds():
    """The mean over lengths: attention (0.7 + 0.5) / 2, MLPs (0.3 + 0.2) / 2, their difference 0.35."""
    asked = {"chance": 0.1, "context": "256"}
    of = [
        ability("copy", 0.9, 0.8, 0.7, 0.4, 0.3, **asked),
        ability("copy", 0.8, 0.6, 0.5, 0.3, 0.2, seed=1, chance=0.1, context="1,024"),
    ]
    rows = {
        (row["context"], row["kind"], row["n"]): row for row in context_rows([*of, ability("text", *[0.5] * 5, corpus="web")])
    }
    assert rows["256", "attention", 2]["accuracy"] == pytest.approx(0.7)
    assert rows["mean", "attention", 2]["accuracy"] == pytest.approx(0.6)
    assert rows["mean", "mlp", 2]["accuracy"] == pytest.approx(0.25)
    assert {key[0] for key in rows} == {"256", "1,024", "mean"}
    assert [each.name for each in of] == ["copy (256)", "copy (1,024)"]
    gaps = context_gap_rows(of)
    assert [row["difference"] for row in gaps] == pytest.approx([0.7 - 0.35, 0.6 - 0.25])
    assert all(row["told"] for row in gaps)
    at_chance = context_gap_rows([ability("copy", 0.1, *[0.1] * 4, **asked)])
    assert not any(row["told"] for row in at_chance)


def test_confidence_of_choices():
    """0.9 sure of two, one of them right: 40 points above accuracy, which is also the error of the only bin."""
    confidence = np.repeat([[0.9, 0.5]], 20, axis=0)
    right = np.column_stack([np.arange(20) % 2, np.arange(20) % 2])
    dense, dropped = confidence_rows(Pooled(confidence, right, 0.25), [DENSE_CELL, Cell("attention", 1)])
    assert (dense["accuracy"], dense["confidence"], dense["gap"], dense["error"]) == pytest.approx((0.5, 0.9, 0.4, 0.4))
    assert (dropped["gap"], dropped["error"]) == pytest.approx((0, 0))
    assert dense["accuracy_low"] < 0.5 < dense["accuracy_high"]
    assert dense["documents"] == 20


def test_repetition():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)
    assert repetition([7] * 8) == pytest.approx(0.8)
    assert repetition(range(8)) == 0
    assert repetition([1, 2]) == 0


def test_what_is_written():
    """The second text of the dropped model differs from the dense one at its third of four tokens, and comes back to it."""
    written = np.array([[[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 6, 0, 8]]])
    dense, dropped = generation_rows(written, [DENSE_CELL, Cell("attention", 1)])
    assert (dense["same"], dropped["same"]) == (1, 0.75)
    assert dense["repeated"] == dropped["repeated"] == dropped["more"] == 0


def test_answers():
    """The marked number, or else the last one; another question that the model goes on to ask is not its answer."""
    texts = [
        "16 - 3 - 4 = 9. 9 * 2 = $18.\n#### 18\n\nQuestion: What is 5?", "So she makes 1,018.50 dollars\nQuestion: 7",
        "I do not know.", "",
    ]  # fmt: skip
    rows = answer_rows(texts, CELLS[:4])
    assert [row["answer"] for row in rows[:2]] == [18, 1018.5]
    assert [row["marked"] for row in rows] == [True, False, False, False]
    assert np.isnan([row["answer"] for row in rows[2:]]).all()
    assert rows[0]["text"].endswith("#### 18")


ARMS = [Arm("dense", NONE, 0), Arm("attention", NONE, 2), Arm("dense", "4 bits", 0), Arm("attention", "4 bits", 2),
        Arm("attention", WANDA, 2), Arm("attention", LORA, 2), Arm("dense", LORA, 0)]  # fmt: skip
NATS = [-3.0, -3.4, -3.1, -3.6, -3.2, -3.1, -2.9]


def values(nats=NATS):
    """Samples around these means; the same ones up and down in all versions."""
    return of_text(ARMS, np.array(nats) + np.where(np.arange(16) % 2, 0.05, -0.05)[:, None])


def test_what_a_change_costs():
    """4 bits cost 0.1 nats of the dense model, and 0.2 without two layers; Wanda is beside the dense model."""
    rows = {(row["change"], row["n"]): row for row in change_rows({"text": values()}, dict.fromkeys(ARMS, 7))}
    costs = {key: row["cost"] for key, row in rows.items()}
    assert costs == pytest.approx({("none", 0): 0, ("none", 2): 0, ("4 bits", 0): -0.1, ("4 bits", 2): -0.2, ("Wanda", 2): -0.2,
                                   ("LoRA", 2): 0.3, ("LoRA", 0): 0.1})  # fmt: skip
    assert rows["4 bits", 2]["from_dense"] == pytest.approx(-0.6)
    assert rows["4 bits", 2]["bytes"] == 7


def test_dropping_beside_pruning():
    (row,) = pruned_rows({"text": values()}, {2: 0.11})
    assert row["difference"] == pytest.approx(-3.4 + 3.2)
    assert (row["n"], row["sparsity"]) == (2, 0.11)


def test_what_tuning_regains():
    """0.4 nats lost; 0.3 gained, of which the dense model gains 0.1: half. Where dropping lost nothing there is no share."""
    (row,) = recovered_rows({"text": values()})
    assert (row["lost"], row["gained"], row["dense_gained"], row["recovered"]) == pytest.approx((0.4, 0.3, 0.1, 0.5))
    assert row["low"] == pytest.approx(0.5)
    (nothing,) = recovered_rows({"text": values([-3.0, -2.9, *NATS[2:]])})
    assert np.isnan([nothing["recovered"], nothing["low"], nothing["high"]]).all()


def test_speed_beside_the_dense_model():
    """Ratios of each round: 2, 2 and 4, with 2 in the middle."""
    taken = {"dense": [[0.2, 0.4, 0.4]] * 2, "seconds": [[0.2, 0.4, 0.4], [0.1, 0.2, 0.1]]}
    dense, other = speed_rows(ARMS[:2], taken)
    assert (dense["speedup"], other["speedup"], other["milliseconds"]) == pytest.approx((1, 2, 100))
    assert (other["low"], other["high"], other["repeats"]) == pytest.approx((2, 4, 3))


def test_layers_chosen_once_weights_are_rounded():
    (row,) = ranking_rows([3, 2, 1, 0], {"4 bits": [2, 3, 0, 1]}, [1])
    assert (row["shared"], row["correlation"]) == (0, pytest.approx(0.6))


def test_the_papers_numbers():
    rows = {(row["where"], row["model"], row["method"], row["n"], row["what"]): row["paper"] for row in paper_rows()}
    assert len(rows) == len(paper_rows())
    assert rows["Table 9", "Llama-2-13B", "Attn Drop", 8, "speedup"] == 1.13
    assert rows["Table 12", "togethercomputer/LLaMA-2-7B-32K", "MLP Drop", 8, "context mean"] == 39.0
    assert rows["Table 11", "Mistral-7B", "Attn Drop, AWQ 4-bit", 8, "mean of 4 tasks"] == 65.9


# ---- what is measured -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return load_model("tiny-llama", torch.float32, "cpu")


def test_probes_are_scored_by_the_share_that_is_found(model):
    requests = (([1, 2, 3], [4, 5]), ([6, 7], [8, 9, 10]))
    work = ProbeWork(**SHARED, plans=PLANS, probe="copy", requests=requests)
    found = work.measure(*model, lambda _: None)
    hits = score(model[0], list(requests), PLANS).hits
    assert [value["found"] for value in found] == (hits / [2, 3]).tolist()
    other = ProbeWork(**SHARED, plans=PLANS, probe="copy", requests=requests[::-1])
    assert len({str(key) for key in work.keys + other.keys}) == 2 * len(PLANS)


def test_a_model_writes_under_each_plan(model):
    work = GenerationWork(**SHARED, corpus="web", tokens=TOKENS, plans=PLANS, new_tokens=5)
    found = work.measure(*model, lambda _: None)
    for plan, value in zip(PLANS, found, strict=True):
        with skipping(model[0], plan):
            alone = [greedy(model[0], prompt[None], 5)[0].tolist() for prompt in TOKENS]
        assert value["tokens"] == alone


def changed(change: str, plan: DropPlan, **more) -> ChangedWork:
    text = TextWork(**SHARED, corpus="web", tokens=TOKENS, plans=PLANS[:2])
    return ChangedWork(**SHARED, change=change, plan=plan, tokens=TOKENS, settings=Tuning(batch_size=2), items=(text,), **more)


def test_a_change_is_measured_and_taken_back(model, cache):
    before = {name: weight.clone() for name, weight in model[0].state_dict().items()}
    plain = score_text(model[0], TOKENS, PLANS[:2]).nll
    for change, plan in (("8 bits", DENSE), ("4 bits", DENSE), (WANDA, PLANS[1]), (LORA, PLANS[1])):
        found = changed(change, plan).measure(*model, lambda _: None)
        assert not np.allclose([value["nll"] for value in found], plain, atol=1e-7), change
        assert all(torch.equal(weight, before[name]) for name, weight in model[0].state_dict().items()), change
    assert not list(cache.rglob("tuning/*/*")), "checkpoints are deleted"


def test_changed_weights_are_those_of_the_change(model):
    found = changed("4 bits", DENSE).measure(*model, lambda _: None)
    other, _ = load_model("tiny-llama", torch.float32, "cpu")
    round_weights(other, 4)
    assert np.allclose([value["nll"] for value in found], score_text(other, TOKENS, PLANS[:2]).nll)
    found = changed(WANDA, PLANS[1]).measure(*model, lambda _: None)
    other, _ = load_model("tiny-llama", torch.float32, "cpu")
    prune_by_wanda(other, TOKENS, sparsity_for(other, PLANS[1]))
    assert np.allclose([value["nll"] for value in found], score_text(other, TOKENS, PLANS[:2]).nll)


def test_an_error_takes_the_change_back(model, monkeypatch):
    before = {name: weight.clone() for name, weight in model[0].state_dict().items()}
    monkeypatch.setattr(TextWork, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        changed("4 bits", DENSE).measure(*model, lambda _: None)
    assert all(torch.equal(weight, before[name]) for name, weight in model[0].state_dict().items())


def test_versions_are_timed_in_turns(model):
    versions = ((NONE, DENSE), (NONE, PLANS[1]), (WANDA, PLANS[1]), ("8 bits", PLANS[1]))
    work = ChangedSpeedWork(**SHARED, versions=versions, context=8, steps=2, repeats=3, tokens=TOKENS)
    done = []
    (value,) = work.measure(*model, done.append)
    for name in ("seconds", "dense"):
        assert [len(seconds) for seconds in value[name]] == [3] * 4
        assert all(second > 0 for seconds in value[name] for second in seconds)
    assert value["dense"][0] == value["dense"][1] != value["dense"][2], "weights that are the same are timed together"
    assert sum(done) == work.tokens_to_pass


# ---- the study --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("results")
    patch.setattr(files, "RESULTS", folder)
    try:
        yield STUDIES["08_what_breaks"](load_profile("smoke"))
    finally:
        patch.undo()


def test_the_study(measured):
    assert set(measured) == {*TABLES, *NOT_RUN}
    empty = {name for name, rows in measured.items() if rows.empty}
    assert empty == {"answers", "not_run"}, "the profile does not ask for answers, and all else is run"
    settings = load_profile("smoke").section(WhatBreaks)
    cells = {("dense", 0), *((kind, n) for kind in ("attention", "mlp") for n in settings.n_drop)}
    rows = measured["abilities"]
    assert set(rows[rows["ability"] == "choices"][["kind", "n"]].itertuples(index=False, name=None)) == cells
    versions = set(measured["changes"][["change", "kind", "n"]].itertuples(index=False, name=None))
    dense, attention, mlp = ("dense", 0), ("attention", 2), ("mlp", 2)
    of = {"none": [dense, attention, mlp], "8 bits": [dense, attention], "4 bits": [dense, attention], "Wanda": [attention],
          "LoRA": [dense, attention, mlp]}  # fmt: skip
    assert versions == {(change, *cell) for change, several in of.items() for cell in several}


def test_bytes_fall_with_bits_and_with_layers(measured):
    rows = measured["changes"].query("measure == 'text'").set_index(["change", "kind", "n"])["bytes"]
    assert rows["4 bits", "dense", 0] < rows["8 bits", "dense", 0] < rows["none", "dense", 0]
    assert rows["4 bits", "attention", 2] < rows["4 bits", "dense", 0]
    assert rows["Wanda", "attention", 2] == rows["none", "dense", 0], "zeros are stored like other numbers"
    parameters = sum(p.numel() for p in load_model("tiny-llama", torch.float32, "cpu")[0].parameters())
    assert rows["none", "dense", 0] == 2 * parameters


def test_a_profile_without_changes_measures_abilities(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    profile = load_profile("smoke")
    sections = {cls: part for cls, part in profile.sections.items() if cls is not Changes}
    profile = dataclasses.replace(profile, sections=sections)
    tables = STUDIES["08_what_breaks"](profile)
    assert tables["changes"].empty
    assert len(tables["abilities"])


@pytest.mark.slow
def test_a_model_whose_experts_are_one_tensor(tmp_path, monkeypatch):
    """Neither rounded nor pruned, with the reason; tuned all the same."""
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")
    families.tiny("mixtral", vocab_size=257, num_hidden_layers=3).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    tables = STUDIES["08_what_breaks"](load_profile("smoke", str(tmp_path / "model")))
    told = {what.split(", ", 1)[1]: reason for what, reason in tables["not_run"].itertuples(index=False) if ", " in what}
    assert "cannot be quantised as a whole" in told["4 bits"]
    assert "experts" in told["Wanda"]
    assert set(tables["changes"]["change"]) == {"none", "LoRA"}
    assert tables["pruned"].empty
    assert set(tables["speed"]["method"]) == {"none"}


def test_libraries_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = obstacles_to_changes(load_profile("smoke").section(Changes), model_of_shape(MODEL, torch.bfloat16, "meta"))
    assert reasons == {"8 bits": (torchao := "It takes the library torchao: pip install torchao."), "4 bits": torchao,
                       "LoRA": "It takes the library peft: pip install peft."}  # fmt: skip


def test_what_a_model_has_no_room_for_is_not_run(tmp_path, monkeypatch):
    """It knows 256 positions: what the profile asks for beyond them is in the table, with the reason."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    asked = {"answers_n": [1], "questions": ["copy", "retrieval"], "contexts": [64, 400]}
    profile = load_profile("smoke").replacing(what_breaks=asked)
    sections = {cls: part for cls, part in profile.sections.items() if cls is not Changes}
    tables = STUDIES["08_what_breaks"](dataclasses.replace(profile, sections=sections))
    assert dict(tables["not_run"].itertuples(index=False)) == {
        "tiny-llama, gsm8k": "It takes 1024 tokens, and the model knows 256 positions.",
        "tiny-llama, contexts of 400 tokens": "It takes 416 tokens, and the model knows 256 positions.",
        "tiny-llama, retrieval in 64 tokens":
            "Contexts of 64 tokens are too short for retrieval: its sentences alone take 257.",
    }  # fmt: skip
    assert set(tables["long_context"]["probe"]) == {"copy"}


def test_too_long_a_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    with pytest.raises(LLMDropError, match="prompts of 900 tokens are longer than its samples, 64 tokens"):
        STUDIES["08_what_breaks"](load_profile("smoke").replacing(what_breaks={"prompt": 900}))
