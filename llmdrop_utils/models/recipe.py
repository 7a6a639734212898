"""Recipes of series that are trained on this machine: shape, length, text and tokenizer.

A recipe is a value of `series` in data/sources.yaml, under `trained`. Its tokenizer and its training text follow from it alone,
so that every seed of a series sees the same tokens; training.py does the training.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import building
from ..base.settings import Names, Positive, PositiveNumber, Settings, build
from ..sources.catalogue import catalogue
from ..sources.texts import load_documents, pack

VERSION = 1  # raise when a change alters what comes out of a recipe: older series are then not used
END = "<|end|>"


class Recipe(Settings):
    """How a series is trained."""

    corpora: Names  # names in data/sources.yaml
    held_out: Positive  # the first documents of each corpus are kept for measuring
    vocab_size: Positive  # of a byte-level BPE tokenizer made from the training text
    config: dict[str, Any]  # of transformers: model_type and sizes
    seq_len: Positive
    batch_size: Positive  # sequences in a step
    tokens: Positive  # to train on, in whole steps; text that is too short is read several times
    learning_rate: PositiveNumber  # at its highest: linear warm-up over a twentieth of the steps, then a cosine down to a tenth
    stages: Positive  # checkpoints at most: before the first step, at the last, half of it, a quarter, ...

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size

    @property
    def n_steps(self) -> int:
        return self.tokens // self.tokens_per_step

    @property
    def steps(self) -> list[int]:
        """After which steps a stage is kept; not after the first, at which warm-up has just begun, with a rate of zero.

        32 steps and 5 stages: [0, 4, 8, 16, 32].
        """
        halves = {round(self.n_steps / 2**k) for k in range(self.stages - 1)}
        return sorted({0} | {step for step in halves if step > 1})


def load_recipe(name: str) -> Recipe:
    """The recipe of a trained series. Raises LLMDropError for one that does not exist or does not fit."""
    series = catalogue()["series"]
    trained = [n for n, source in series.items() if "trained" in source]
    if name not in trained:
        raise LLMDropError(f"There is no recipe for a series {name!r}. data/sources.yaml has: {', '.join(trained)}.")
    recipe = build(Recipe, series[name]["trained"], f"data/sources.yaml, under series: {name}: trained")
    if recipe.stages < 2:
        raise LLMDropError(f"The series {name!r} needs two stages or more: before the first step, and after the last.")
    if recipe.n_steps < 2:
        needed = 2 * recipe.tokens_per_step
        raise LLMDropError(f"The series {name!r} trains on {recipe.tokens} tokens, but two steps take {needed}.")
    return recipe


def series_folder(name: str) -> Path:
    """Where a trained series is kept: `seed-<n>/step-<n>/` are models, `seed-<n>/losses.csv` and `run.json` tell of the run."""
    recipe, corpora = load_recipe(name), catalogue()["corpora"]
    content = [VERSION, recipe.model_dump(), {corpus: corpora.get(corpus) for corpus in recipe.corpora}]
    return files.CACHE / "series" / f"{name}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}"


def untrained(name: str, seeds: list[int]) -> list[int]:
    """The seeds under which a series is not trained to its end yet."""
    return [seed for seed in seeds if not (series_folder(name) / f"seed-{seed}" / "run.json").exists()]


# ---- text and tokenizer -----------------------------------------------------------------------------------------------


def training_documents(recipe: Recipe) -> list[str]:
    """The documents of all corpora but those held out, in a fixed pseudo-random order."""
    documents = [text for corpus in recipe.corpora for text in load_documents(corpus)[recipe.held_out :]]
    if not documents:
        raise LLMDropError(f"Nothing is left to train on once {recipe.held_out} documents of each corpus are held out.")
    random.Random(0).shuffle(documents)
    return documents


def training_blocks(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> torch.LongTensor:
    """The training text as token ids (n_blocks, seq_len), packed as calibration text is."""
    return pack(training_documents(recipe), tokenizer, recipe.seq_len)


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Entropy of the token frequencies, in nats: the loss of a model that knows how frequent each token is, and no more."""
    counts = torch.bincount(tokens.flatten()).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The series' own tokenizer: byte-level BPE, trained on its training text (once)."""
    recipe, folder = load_recipe(name), series_folder(name) / "tokenizer"
    if not folder.exists():
        with building(folder) as temporary:
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            trainer = trainers.BpeTrainer(
                vocab_size=recipe.vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
            )
            tokenizer.train_from_iterator(training_documents(recipe), trainer)
            fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
            fast.save_pretrained(temporary)
    return AutoTokenizer.from_pretrained(folder)
