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
from llmdrop_utils.base.errors import DiskFull
from llmdrop_utils.cli import main
from llmdrop_utils.models import training
from llmdrop_utils.models.recipe import Recipe, load_recipe, series_folder, training_documents, unigram_entropy
from llmdrop_utils.models.training import train_seeds, train_series
from llmdrop_utils.sources.catalogue import catalogue

NAME = "tiny-series"
COMMAND = [sys.executable, "-m", "llmdrop_utils", "train", NAME, "--seed"]


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


def test_seeds_side_by_side(cache, whole):
    done = []
    folders = train_seeds(NAME, [0, 1], done.append)
    assert content(folders[0]) == whole
    assert content(folders[1]) != whole
    assert sum(done) == 2 * 4096
    assert train_seeds(NAME, [0, 1], done.append) == folders
    assert sum(done) == 2 * 4096, "nothing is trained twice"


def test_killed_parent(cache, whole):
    """Kill what started the training, not the training itself: that ends too, and the next run goes on from there."""
    die = "import os; from llmdrop_utils.models.training import *; train_seeds({!r}, [0], lambda _: os.kill(os.getpid(), 9))"
    dead = subprocess.run([sys.executable, "-c", die.format(NAME)], env=environment(cache), check=False)
    assert dead.returncode == -9
    assert content(train_seeds(NAME, [0])[0]) == whole


def test_a_training_that_fails_says_why(cache):
    series_folder(NAME).mkdir(parents=True)
    (series_folder(NAME) / "seed-0").write_text("in the way")
    with pytest.raises(LLMDropError, match=f"Training {NAME} with seed 0 failed: NotADirectoryError"):
        train_seeds(NAME, [0])


@pytest.mark.parametrize(
    ("ends", "kind", "reason"),
    [
        ("echo 'error: The disk is full: no room' >&2; exit 1", DiskFull, "The disk is full: no room"),
        ("echo 'ValueError: first' >&2; echo >&2; exit 3", LLMDropError, "ValueError: first"),
        ("exit 1", LLMDropError, "it gave no reason"),
        ("kill -9 $$", LLMDropError, "it was stopped by signal 9; memory may have run out"),
    ],
)
def test_why_a_training_ended(cache, tmp_path, monkeypatch, ends, kind, reason):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{ends}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(LLMDropError) as error:
        train_seeds(NAME, [7])
    assert type(error.value) is kind
    assert str(error.value) == f"Training {NAME} with seed 7 failed: {reason}"


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
    trained = training_documents(recipe)
    documents = load_documents("random-words")
    assert set(trained).isdisjoint(documents[: recipe.held_out])
    assert sorted(trained) == sorted(documents[recipe.held_out :])


def test_unigram_entropy():
    assert unigram_entropy(torch.arange(8).repeat(3)) == pytest.approx(np.log(8))
    assert unigram_entropy(torch.zeros(5, dtype=torch.long)) == 0
    by_hand = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert unigram_entropy(torch.tensor([[3, 3], [3, 5]])) == pytest.approx(by_hand)


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
    assert main(["train", "huge-llama"]) == 1
    assert "error: There is no recipe for a series 'huge-llama'. data/sources.yaml has: small-llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("small-llama", "small-llama-be58a553d725"),
        ("medium-llama", "medium-llama-f0aadbf240d9"),
        ("tiny-series", "tiny-series-2045762d16ea"),
    ],
)
def test_series_that_are_trained_already_are_found(name, folder):
    """A change of recipe, corpus or VERSION is another series; a change of the code that reads them is not."""
    assert series_folder(name).name == folder


def test_nothing_left_to_train_on():
    recipe = Recipe(**catalogue()["series"][NAME]["trained"] | {"held_out": 1000})
    with pytest.raises(LLMDropError, match="Nothing is left to train on once 1000 documents"):
        training_documents(recipe)
