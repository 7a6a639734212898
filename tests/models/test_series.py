"""Series of checkpoints: from a hub with several revisions, from a directory, from a single model."""

import shutil
from pathlib import Path

import families
import pytest
import torch
from huggingface_hub import constants

from llmdrop_utils import LLMDropError, NotAvailable, locate_series
from llmdrop_utils.base.errors import DiskFull
from llmdrop_utils.models import series as module
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.load import load_located
from llmdrop_utils.models.locate import locate_model
from llmdrop_utils.models.recipe import series_folder
from llmdrop_utils.models.series import SMALL_FILES, is_at_hand, known_models, parse_stage, weights_at_hand
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.sources.fetch import fetch_hub

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
    with pytest.raises(NotAvailable, match="No checkpoint of lost is available:\nThe hub has org/stages, but not"):
        locate_series("lost")


def test_a_full_disk_or_a_hub_that_is_down_stops_the_series(hub, monkeypatch):
    """Neither is a reason to go on with the other revisions."""
    for error in (DiskFull, NotAvailable):
        asked = []

        def fails(repository, revision, patterns, error=error, asked=asked):
            asked.append(revision)
            raise error("no")

        monkeypatch.setattr(module, "fetch_hub", fails)
        with pytest.raises(error, match="no"):
            locate_series("hub-series")
        assert asked == ["step1"]


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
    content = checkpoint(tmp_path / "pickled", 1, pickled=True)
    hub.repositories[REPOSITORY]["4" * 40] = content
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
    hub.repositories[REPOSITORY]["5" * 40] = content | {"pytorch_model.bin": (tmp_path / "evil.bin").read_bytes()}
    stage = locate_series("hub-series")[0][0].stages[2]
    with weights_at_hand(stage.model), pytest.raises(LLMDropError, match="could not be loaded"):
        load_located(stage.model)
    assert "executed!" not in capsys.readouterr().out


def test_a_single_model_has_two_stages(cache):
    series, missing = locate_series("tiny-llama", n_seeds=2)
    assert not missing
    assert [s.seed for s in series] == [0, 1]
    for one in series:
        assert [stage.name for stage in one.stages] == ["random", "as given"]
    first, second = (load_located(one.stages[0].model)[0].lm_head.weight for one in series)
    assert not torch.equal(first, second)
    assert series[0].stages[1].model == locate_model("tiny-llama")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("map-neo-7b-stages", "The checkpoints of map-neo-7b-stages .* cannot be read: .* shards of Megatron-LM"),
        ("small-lama", "Unknown model 'small-lama'.* Or did you mean the series 'small-llama'"),
    ],
)
def test_series_that_are_unavailable(name, message):
    with pytest.raises(LLMDropError, match=message):
        locate_series(name)


def test_a_directory_of_checkpoints(tmp_path, cache):
    """In the order of their steps; one that cannot be used is named."""
    for step in (100, 20, 3):
        checkpoint(tmp_path / "run" / f"step-{step}", step)
    (tmp_path / "run" / "step-20" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "run" / "step-3", tmp_path / "run" / ".step-4")
    (tmp_path / "run" / "step-5").mkdir()  # no model
    ((series,), missing) = locate_series(str(tmp_path / "run"))
    assert [(stage.name, stage.step, stage.tokens) for stage in series.stages] == [("step-3", 3, None), ("step-100", 100, None)]
    assert list(missing) == [f"{series.name}, step-20"]
    assert "has no *.safetensors" in missing[f"{series.name}, step-20"]


def test_known_models(hub, cache):
    """A series with a recipe is not trained for it; of several series one that is unavailable is named."""
    models, missing = known_models(["tiny-series", "hub-series", "lost", "tiny-llama"])
    assert [model.name for model in models] == [
        "hub-series, random weights 0", "hub-series, step1", "hub-series, step10", "hub-series, step100",
        "tiny-llama, random weights 0", "tiny-llama"]  # fmt: skip
    assert list(missing) == ["lost", "hub-series, step50"]
    assert not series_folder("tiny-series").exists()
    assert known_models(["tiny-series"]) == ([], {})
    with pytest.raises(NotAvailable, match="No checkpoint of lost"):
        known_models(["lost"])


def test_what_is_at_hand(hub, cache):
    assert is_at_hand("tiny-llama")
    assert not is_at_hand("hub-series")
    assert not is_at_hand("map-neo-7b-stages")
    assert not is_at_hand("tiny-series"), "it is not trained yet"
    (series_folder("tiny-series") / "seed-0").mkdir(parents=True)
    (series_folder("tiny-series") / "seed-0" / "run.json").write_text("{}")
    assert is_at_hand("tiny-series")


def test_small_files_hold_no_weights():
    assert not [pattern for pattern in SMALL_FILES if "safetensors" in pattern.replace(".json", "") or "bin" in pattern]
