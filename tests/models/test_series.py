"""Series of checkpoints: from a hub with several revisions, from a directory, from a single model."""

import dataclasses
import json
import math
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import constants

from llmdrop_utils import (
    LLMDropError,
    NotAvailable,
    load_profile,
    locate_series,
    measure_importance,
    score_text,
    studies,
)
from llmdrop_utils.base import files
from llmdrop_utils.base.store import Store
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.load import load_located
from llmdrop_utils.models.locate import locate_model
from llmdrop_utils.models.series import SMALL_FILES, parse_stage, weights_at_hand
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.sources.fetch import fetch_hub
from llmdrop_utils.studies.training_stages import study

REPOSITORY = "org/stages"


@pytest.mark.parametrize(
    ("name", "per_step", "step", "tokens"),
    [
        ("step1000", 2097152, 1000, 2097152000),
        ("step-240000", None, 240000, None),
        ("checkpoint-500", 10, 500, 5000),
        ("stage1-step1000-tokens5B", None, 1000, 5_000_000_000),
        ("stage1-step0-tokens0B", None, 0, 0),
        ("iter_0002384", None, 2384, None),
        ("main", 10, None, None),
    ],
)
def test_names_tell_steps_and_tokens(name, per_step, step, tokens):
    assert parse_stage(name, per_step) == (step, tokens)


def test_committed_series_are_in_order():
    for name, source in catalogue()["series"].items():
        if "revisions" in source:
            steps, tokens = zip(*(parse_stage(r, source.get("tokens_per_step")) for r in source["revisions"]), strict=True)
            assert list(steps) == sorted(set(steps)), name
            assert None not in tokens, name
        assert {"trained", "revisions", "unavailable"} & set(source), name
    known = {*catalogue()["series"], *catalogue()["models"]}
    assert {series for name in ("gpu", "cpu", "smoke", "h200") for series in load_profile(name).stages.series} <= known


def checkpoint(folder, seed, pickled=False):
    """Files of a tiny model with weights of its own."""
    torch.manual_seed(seed)
    model = families.tiny("llama", vocab_size=257)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(network, cache, tmp_path, monkeypatch):
    """Three branches with checkpoints, of which the last two are the same; and a name that no branch has."""
    network.repositories[REPOSITORY] = {
        f"{i}" * 40: checkpoint(tmp_path / f"source-{i}", min(i, 2), pickled=i == 1) for i in (1, 2, 3)
    }
    del network.repositories[REPOSITORY]["1" * 40]["pytorch_model.bin"]
    network.branches[REPOSITORY] = {"step1": "1" * 40, "step10": "2" * 40, "step100": "3" * 40}
    source = {"hub": REPOSITORY, "revisions": ["step1", "step10", "step50", "step100"], "tokens_per_step": 1000}
    series = {"hub-series": source, "lost": source | {"revisions": ["step7"]}}
    monkeypatch.setitem(catalogue(), "series", catalogue()["series"] | series)
    yield network
    for folder in hub_cache().glob("snapshots/*"):
        for file in folder.iterdir():
            file.unlink()


def hub_cache():
    return Path(constants.HF_HUB_CACHE) / "models--org--stages"


def weights_on_disk():
    return [file for file in hub_cache().glob("*/*/*") if file.suffix in (".safetensors", ".bin")] + [
        blob for blob in hub_cache().glob("blobs/*") if blob.stat().st_size > 100_000
    ]


def test_a_missing_revision_is_named_and_the_others_are_found(hub):
    (series,), missing = locate_series("hub-series")
    assert [(s.name, s.step, s.tokens) for s in series.stages] == [
        ("random", 0, 0), ("step1", 1, 1000), ("step10", 10, 10000), ("step100", 100, 100000)]  # fmt: skip
    assert series.stages[1].model.identity == f"hub:{REPOSITORY}@{'1' * 40}", "stored under the commit, not the branch"
    assert list(missing) == ["hub-series, step50"]
    assert "but not the revision 'step50'" in missing["hub-series, step50"]
    assert not weights_on_disk(), "only small files so far"
    with pytest.raises(NotAvailable, match="No checkpoint of lost can be had:\nThe hub has org/stages, but not"):
        locate_series("lost")


def test_weights_pass_through(hub):
    stage = locate_series("hub-series")[0][0].stages[2]
    with weights_at_hand(stage.model):
        model, tokenizer = load_located(stage.model)
        assert weights_on_disk()
        assert tokenizer is not None
    assert not weights_on_disk()
    assert (stage.model.folder / "config.json").exists(), "small files stay: they say which results are stored already"
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()
    with pytest.raises(ZeroDivisionError), weights_at_hand(stage.model):
        1 / 0  # noqa: B018
    assert not weights_on_disk()


def test_what_was_there_before_stays(hub):
    """A user's own copy of a revision is not deleted, also where another revision shares its content."""
    fetch_hub(REPOSITORY, "step10")
    mine = weights_on_disk()
    stages = locate_series("hub-series")[0][0].stages
    for stage in stages[2:]:  # the same weights under two commits
        with weights_at_hand(stage.model):
            pass
        assert weights_on_disk() == mine
    model, _ = load_located(stages[2].model)
    assert model is not None


def test_what_a_killed_run_left_goes(hub, cache):
    stage = locate_series("hub-series")[0][0].stages[2]
    passing = cache / "passing" / ("2" * 40)
    passing.parent.mkdir(parents=True)
    passing.write_text(REPOSITORY)  # as if killed inside weights_at_hand
    fetch_hub(REPOSITORY, "step10")
    with weights_at_hand(stage.model):
        assert weights_on_disk()
    assert not weights_on_disk()
    assert not passing.exists()


def test_pickled_weights_run_no_code(hub, tmp_path, monkeypatch, capsys):
    """They are read where a source says so, by the unpickler that knows tensors alone."""
    files = checkpoint(tmp_path / "pickled", 1, pickled=True)
    hub.repositories[REPOSITORY]["4" * 40] = files
    hub.branches[REPOSITORY] |= {"step1": "4" * 40, "step10": "5" * 40}
    source = catalogue()["series"]["hub-series"]
    monkeypatch.setitem(catalogue()["series"], "hub-series", source | {"pickled": True})
    stage = locate_series("hub-series")[0][0].stages[1]
    with weights_at_hand(stage.model):
        model, _ = load_located(stage.model, torch.float32)
    torch.manual_seed(1)
    reference = families.tiny("llama", vocab_size=257)
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)

    class Evil:
        def __reduce__(self):
            return (print, ("executed!",))

    torch.save({"model.norm.weight": Evil()}, tmp_path / "evil.bin")
    hub.repositories[REPOSITORY]["5" * 40] = files | {"pytorch_model.bin": (tmp_path / "evil.bin").read_bytes()}
    stage = locate_series("hub-series")[0][0].stages[2]
    with weights_at_hand(stage.model), pytest.raises(LLMDropError, match="could not be loaded"):
        load_located(stage.model)
    assert "executed!" not in capsys.readouterr().out


def test_study_of_a_hub_series(hub, tmp_path, monkeypatch):
    """One stage without weights and one that does not exist are named; the others are measured; twins are seen."""
    profile = dataclasses.replace(load_profile("smoke", "hub-series"))
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "Store", lambda: Store(tmp_path / "records"))
    tables = studies.training_stages(profile)
    assert list(tables["stages"]["stage"]) == ["random", "step10", "step100"]
    assert list(tables["stages"]["same_as"].fillna("")) == ["", "", "step10"]
    reasons = dict(zip(tables["not_run"]["what"], tables["not_run"]["reason"], strict=True))
    assert "The hub gave no *.safetensors for hub-series, step1" in reasons["hub-series, step1"]
    assert "but not the revision" in reasons["hub-series, step50"]
    assert not weights_on_disk()
    hub.requests.clear()
    again = studies.training_stages(profile)
    assert not [path for _, path, _ in hub.requests if "2" * 40 in path and "safetensors" in path], "nothing is fetched again"
    assert again["importance"].equals(tables["importance"])


def test_numbers_are_those_of_the_measuring_functions(cache, tmp_path, monkeypatch):
    """Importance and cost of dropping at a stage, against the public functions on that stage's model."""
    for seed, step in enumerate((0, 5, 10)):
        checkpoint(tmp_path / "run" / f"checkpoint-{step}", seed)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"tokens_per_step": 100}))
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "Store", lambda: Store(tmp_path / "records"))
    profile = load_profile("smoke", str(tmp_path / "run"))
    tables = studies.training_stages(profile)
    assert list(tables["stages"]["tokens"]) == [0, 500, 1000]
    assert list(tables["stages"]["progress"]) == [0, 0.5, 1]
    series = locate_series(str(tmp_path / "run"))[0][0]
    for_scores, for_text = study._tokens(series, profile)
    model, _ = load_located(series.stages[1].model)
    scores = measure_importance(model, for_scores)
    shown = tables["importance"].query("position == 1 and kind == 'mlp'")["importance"]
    np.testing.assert_allclose(shown, scores.importance["mlp"], rtol=1e-4)
    final, _ = load_located(series.stages[2].model)
    plan = dataclasses.replace(study.select(measure_importance(final, for_scores), "mlp", 1), model=None)
    dense, without = score_text(model, for_text, [study.DENSE, plan]).nll.mean(1)
    row = tables["cost"].query("position == 1 and kind == 'mlp' and share == 'quarter'").iloc[0]
    assert row["cost"] == pytest.approx(without - dense, abs=2e-4)
    assert (tables["agreement"].query("position == 2")["correlation"] == 1).all()


def test_a_single_model_has_two_stages(cache):
    series, missing = locate_series("tiny-llama", n_seeds=2)
    assert not missing
    assert [s.seed for s in series] == [0, 1]
    for one in series:
        assert [stage.name for stage in one.stages] == ["random", "as given"]
    first, second = (load_located(one.stages[0].model)[0].lm_head.weight for one in series)
    assert not torch.equal(first, second)
    assert series[0].stages[1].model == locate_model("tiny-llama")


def test_settled():
    """Two layers of three: the last set {0, 1} is there at the first stage, lost at the second, and stays from the third on."""
    importance = np.array([[[1, 2, 3]], [[3, 2, 1]], [[2, 1, 3]], [[1, 2, 3]]], dtype=float)
    assert study._settled(importance, 2) == [2]
    assert study._settled(importance[2:], 2) == [0]
    assert study._settled(importance[[1, 0]], 2) == [1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("map-neo-7b-stages", "The checkpoints of map-neo-7b-stages .* cannot be read: .* shards of Megatron-LM"),
        ("small-lama", "Unknown model 'small-lama'.* Or did you mean the series 'small-llama'"),
    ],
)
def test_series_that_cannot_be_had(name, message):
    with pytest.raises(LLMDropError, match=message):
        locate_series(name)


def test_of_several_series_the_others_are_followed(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "Store", lambda: Store(tmp_path / "records"))
    profile = load_profile("smoke")
    both = dataclasses.replace(profile.stages, series=["map-neo-7b-stages", "tiny-llama"])
    profile = dataclasses.replace(profile, stages=both)
    tables = studies.training_stages(profile)
    assert list(tables["not_run"]["what"]) == ["map-neo-7b-stages"]
    assert set(tables["runs"]["model"]) == {"tiny-llama"}
    assert isinstance(tables["losses"], pd.DataFrame)
    assert tables["losses"].empty
    assert math.isnan(tables["runs"]["unigram_entropy"][0])


def test_small_files_hold_no_weights():
    assert not [pattern for pattern in SMALL_FILES if "safetensors" in pattern.replace(".json", "") or "bin" in pattern]
