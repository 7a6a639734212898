"""Training from a recipe: the same every time, also after a kill, and never on what is measured later."""

import json
import os
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

from llmdrop_utils import LLMDropError, load_documents
from llmdrop_utils.base.files import REFERENCE
from llmdrop_utils.models import training
from llmdrop_utils.models.training import Recipe, load_recipe, series_folder, train_seeds, train_series
from llmdrop_utils.report.tables import read_tables
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.studies.training_stages import study

NAME = "tiny-series"
COMMAND = [sys.executable, "-m", "llmdrop_utils.training", NAME, "--seed"]


def content(folder):
    """Weights of every stage, and the losses."""
    files = [*folder.glob("step-*/model.safetensors"), folder / "losses.csv"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def environment(cache):
    return os.environ | {"LLMDROP_CACHE": str(cache)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption, in a process of its own."""
    cache = tmp_path_factory.mktemp("whole")
    subprocess.run([*COMMAND, "0"], env=environment(cache), check=True, capture_output=True)
    (folder,) = cache.glob(f"series/{NAME}-*/seed-0")
    return content(folder)


def test_killed_and_restarted(tmp_path, whole):
    """Killed in mid-training, and in the middle of writing a checkpoint: the same losses from there on, the same weights."""
    with subprocess.Popen([*COMMAND, "0"], env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "1,792 of 4,096 tokens" in line:
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -9
    (folder,) = tmp_path.glob(f"series/{NAME}-*/seed-0")
    assert not (folder / "run.json").exists()
    checkpoints = list((folder / "resume").glob("checkpoint-*"))
    assert checkpoints
    half = folder / "resume" / "checkpoint-99"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 1.')
    again = subprocess.run([*COMMAND, "0"], env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert " 128 of 4,096 tokens" not in again.stdout, "it goes on, and does not start again"
    assert content(folder) == whole
    assert not (folder / "resume").exists(), "the optimizer's state goes once it is of no use"


def test_same_seed_same_weights(cache, whole):
    folder = train_series(NAME, 0)
    assert content(folder) == whole
    stamp = (folder / "run.json").stat().st_mtime_ns
    assert (train_series(NAME, 0) / "run.json").stat().st_mtime_ns == stamp, "trained once"
    run, recipe = json.loads((folder / "run.json").read_text()), load_recipe(NAME)
    assert (run["tokens"], run["tokens_per_step"], run["seed"]) == (4096, 128, 0)
    assert sorted(int(p.name.split("-")[1]) for p in folder.glob("step-*")) == recipe.steps == [0, 4, 8, 16, 32]
    losses = pd.read_csv(folder / "losses.csv")
    assert list(losses["step"]) == list(range(1, 33))
    assert abs(losses["loss"][0] - np.log(recipe.vocab_size)) < 0.1, "it starts at guessing"


def test_seeds_side_by_side(cache, whole, monkeypatch):
    monkeypatch.setenv("LLMDROP_CACHE", str(cache))
    done = []
    folders = train_seeds(NAME, [0, 1], done.append)
    assert content(folders[0]) == whole
    assert content(folders[1]) != whole
    assert sum(done) == 2 * 4096
    assert train_seeds(NAME, [0, 1], done.append) == folders
    assert sum(done) == 2 * 4096, "nothing is trained twice"


def test_killed_parent(cache, whole, monkeypatch):
    """Kill what started the training, not the training itself: that ends too, and the next run goes on from there."""
    monkeypatch.setenv("LLMDROP_CACHE", str(cache))
    die = "import os; from llmdrop_utils.models.training import *; train_seeds({!r}, [0], lambda _: os.kill(os.getpid(), 9))"
    assert subprocess.run([sys.executable, "-c", die.format(NAME)], check=False).returncode == -9
    assert content(train_seeds(NAME, [0])[0]) == whole


def test_a_training_that_fails_says_why(cache, monkeypatch):
    monkeypatch.setenv("LLMDROP_CACHE", str(cache))
    monkeypatch.setenv("LLMDROP_OUTPUT", str(cache))
    series_folder(NAME).mkdir(parents=True)
    (series_folder(NAME) / "seed-0").write_text("in the way")
    with pytest.raises(LLMDropError, match=f"Training {NAME} with seed 0 failed: NotADirectoryError"):
        train_seeds(NAME, [0])


def test_full_disk(cache, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(training.Trainer, "train", full)
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        train_series(NAME, 0)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda _: mock.Mock(free=1000))
    with pytest.raises(LLMDropError, match="The disk is full: could not write"):
        train_series(NAME, 0)


def test_held_out_text_is_not_trained_on():
    recipe = load_recipe(NAME)
    trained = training.training_documents(recipe)
    documents = load_documents("random-words")
    assert set(trained).isdisjoint(documents[: recipe.held_out])
    assert sorted(trained) == sorted(documents[recipe.held_out :])


def test_what_is_measured_was_held_out(cache):
    """As many blocks as the profile asks for fit into the documents that were held out; otherwise it says so."""
    import dataclasses

    from llmdrop_utils import load_profile

    profile = load_profile("smoke")
    profile = dataclasses.replace(profile, stages=dataclasses.replace(profile.stages, n_samples=100))
    (series,) = training_stub(cache)
    with pytest.raises(LLMDropError, match="asks for 102 blocks .* that tiny-series was not trained on hold"):
        study._tokens(series, profile)


def training_stub(cache):
    from llmdrop_utils.models.series import locate_series

    train_series(NAME, 0)
    return locate_series(NAME)[0]


def test_unigram_entropy():
    assert training.unigram_entropy(torch.arange(8).repeat(3)) == pytest.approx(np.log(8))
    assert training.unigram_entropy(torch.zeros(5, dtype=torch.long)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3}, "Unknown key 'layers' in data/sources.yaml, under series: tiny-series: trained"),
        ({"learning_rate": "fast"}, "'learning_rate' .* must be a positive number, but is 'fast'"),
        ({"config": 3}, "'config' .* must be a mapping, but is 3"),
        ({"tokens": 200}, "trains on 200 tokens, but two steps take 256"),
    ],
)
def test_wrong_recipes(change, message, monkeypatch):
    series = catalogue()["series"]
    trained = {"trained": series[NAME]["trained"] | change}
    monkeypatch.setitem(catalogue(), "series", series | {NAME: trained})
    with pytest.raises(LLMDropError, match=message):
        load_recipe(NAME)


def test_unknown_recipe(capsys):
    assert training.main(["huge-llama"]) == 1
    assert "error: No series 'huge-llama' is trained here. data/sources.yaml has: small-llama" in capsys.readouterr().err


def test_nothing_left_to_train_on():
    recipe = Recipe(**catalogue()["series"][NAME]["trained"] | {"held_out": 1000})
    with pytest.raises(LLMDropError, match="Nothing is left to train on once 1000 documents"):
        training.training_documents(recipe)


def test_committed_series_learned_something():
    """The reference runs end below what token frequencies alone would give."""
    found = list(REFERENCE.glob("*/07_training_stages"))
    assert {folder.parent.name for folder in found} >= {"cpu", "cpu-medium-llama"}
    for folder in found:
        content = read_tables(folder)
        trained = content["runs"].dropna(subset=["unigram_entropy"])  # the others were not trained here
        assert len(trained) >= 2
        for run in trained.itertuples():
            stages = content["stages"].query("model == @run.model and seed == @run.seed")
            assert len(stages) >= 8
            assert stages["nll"].iloc[-1] < run.unigram_entropy < stages["nll"].iloc[0]
