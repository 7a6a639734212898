"""Train a small language model from scratch and keep checkpoints on the way: a series of stages where no hub has one.

    llmdrop train small-llama --seed 0

A recipe in data/sources.yaml (`series`, `trained`) says shape, text and length; tokenizer and model are its own. The loop is
transformers' Trainer. A killed run goes on from its last checkpoint with the losses that it would have had.
"""

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..base import files
from ..base.errors import DiskFull, LLMDropError
from ..base.files import building, disk_error, locked, write_text
from ..base.provenance import code_provenance
from ..base.settings import build
from ..sources.catalogue import catalogue
from ..sources.texts import load_documents, pack
from .load import default_dtype

VERSION = 1  # raise when a change alters what comes out of a recipe: older series are then not used

RESUME_POINTS = 20  # how often in a run the optimizer's state is kept, to go on from after a kill

END = "<|end|>"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a series is trained; a value of `series` in data/sources.yaml, under `trained`."""

    corpora: list[str]  # names in data/sources.yaml
    held_out: int  # the first documents of each corpus are kept for measuring
    vocab_size: int  # of a byte-level BPE tokenizer made from the training text
    config: dict  # of transformers: model_type and sizes
    seq_len: int
    batch_size: int  # sequences in a step
    tokens: int  # to train on, in whole steps; text that is too short is read several times
    learning_rate: float  # at its highest: linear warm-up over a twentieth of the steps, then a cosine down to a tenth
    stages: int  # checkpoints at most: before the first step, at the last, half of it, a quarter, ...

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size

    @property
    def n_steps(self) -> int:
        return self.tokens // self.tokens_per_step

    @property
    def steps(self) -> list[int]:
        """After which steps a stage is kept; not after the first, at which warm-up has just begun, with a rate of zero."""
        halves = {round(self.n_steps / 2**k) for k in range(self.stages - 1)}
        return sorted({0} | {step for step in halves if step > 1})


def load_recipe(name: str) -> Recipe:
    """The recipe of a trained series. Raises LLMDropError for one that does not exist or does not fit."""
    series = catalogue()["series"]
    trained = [n for n, source in series.items() if "trained" in source]
    if name not in trained:
        raise LLMDropError(f"No series {name!r} is trained here. data/sources.yaml has: {', '.join(trained)}.")
    recipe = build(Recipe, series[name]["trained"], f"data/sources.yaml, under series: {name}: trained")
    if recipe.stages < 2:
        raise LLMDropError(f"The series {name!r} needs two stages or more: before the first step, and after the last.")
    if recipe.n_steps < 2:
        needed = 2 * recipe.tokens_per_step
        raise LLMDropError(f"The series {name!r} trains on {recipe.tokens} tokens, but two steps take {needed}.")
    return recipe


def series_folder(name: str) -> Path:
    """Where a trained series lies: `seed-<n>/step-<n>/` are models, `seed-<n>/losses.csv` and `run.json` tell of the run."""
    recipe, corpora = load_recipe(name), catalogue()["corpora"]
    content = [VERSION, dataclasses.asdict(recipe), {corpus: corpora.get(corpus) for corpus in recipe.corpora}]
    return files.CACHE / "series" / f"{name}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}"


def untrained(name: str, seeds: list[int]) -> list[int]:
    """The seeds under which a series is not trained to its end yet."""
    return [seed for seed in seeds if not (series_folder(name) / f"seed-{seed}" / "run.json").exists()]


def train_seeds(name: str, seeds: list[int], on_tokens: Callable[[int], None] = lambda n: None) -> list[Path]:
    """Train a series for each seed, or find it trained; returns their folders.

    On a CPU, seeds are trained side by side, each on its share of the threads: small models gain little from more. The share
    does not depend on what is trained already, so that a run that was stopped goes on with the same sums.
    on_tokens: called with the number of tokens newly done. Raises LLMDropError with the reason if a training fails.
    """
    make_tokenizer(name)  # once, before several processes want it
    threads = torch.get_num_threads()
    side_by_side = 1 if torch.cuda.is_available() else min(len(seeds), threads)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads // side_by_side)}
    report = threading.Lock()

    def train(seed: int) -> None:
        command = [sys.executable, "-m", "llmdrop_utils.models.training", name, "--seed", str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
            errors: list[str] = []
            listener = threading.Thread(target=lambda: errors.extend(process.stderr))  # a full pipe would stop the process
            listener.start()
            done = 0
            for line in process.stdout:
                if found := re.search(r"([\d,]+) of [\d,]+ tokens", line):
                    now = int(found[1].replace(",", ""))
                    with report:
                        on_tokens(now - done)
                    done = now
            listener.join()
        if process.returncode:
            reason = next((line for line in reversed(errors) if line.strip()), "it said nothing").strip()
            if process.returncode < 0:
                reason = f"it was stopped by signal {-process.returncode} (9: perhaps for want of memory)"
            kind = DiskFull if "The disk is full" in reason else LLMDropError
            raise kind(f"Training {name} with seed {seed} failed: {reason.removeprefix('error: ')}")

    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(train, untrained(name, seeds)))
    return [series_folder(name) / f"seed-{seed}" for seed in seeds]


def train_series(name: str, seed: int) -> Path:
    """Train one series in this process, or go on with it; returns its folder. Prints a line for each hundredth of the way.

    Deterministic on a CPU with a given number of threads; products in bfloat16 where `default_dtype` is that, weights in
    float32. The last batch of each pass over the text may be short.
    """
    recipe, folder = load_recipe(name), series_folder(name) / f"seed-{seed}"
    tokenizer = make_tokenizer(name)
    with locked(folder):
        resume = folder / "resume"
        if (folder / "run.json").exists():
            shutil.rmtree(resume, ignore_errors=True)  # left by a process that was killed at the very end
            return folder
        started = time.monotonic()
        blocks = training_blocks(recipe, tokenizer)
        set_seed(seed)
        settings = {"vocab_size": recipe.vocab_size, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
                    "pad_token_id": None, "max_position_embeddings": recipe.seq_len} | recipe.config  # fmt: skip
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        trainer = Trainer(
            model,
            _arguments(recipe, resume, seed),
            data_collator=lambda rows: {"input_ids": torch.stack(rows), "labels": torch.stack(rows)},
            train_dataset=blocks,
            callbacks=[_Stages(recipe, folder, seed, tokenizer)],
        )
        trainer.remove_callback(PrinterCallback)
        with _full_disk_is_one_error(folder):
            trainer.train(resume_from_checkpoint=_last_checkpoint(resume))
        log = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
        losses = pd.DataFrame(log, columns=["step", "loss"])
        losses.insert(1, "tokens", losses["step"] * recipe.tokens_per_step)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "losses.csv", losses.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        about = {
            "recipe": dataclasses.asdict(recipe),
            "seed": seed,
            "bf16": trainer.args.bf16,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_per_step": recipe.tokens_per_step,
            "tokens": recipe.n_steps * recipe.tokens_per_step,
            "text_tokens": blocks.numel(),
            "unigram_entropy": unigram_entropy(blocks),
            "seconds_of_last_process": round(time.monotonic() - started, 1),
        } | code_provenance()
        write_text(folder / "run.json", json.dumps(about, indent=1, sort_keys=True) + "\n")  # now it is complete
        shutil.rmtree(resume)
    return folder


def training_documents(recipe: Recipe) -> list[str]:
    """The documents of all corpora but those held out, in a fixed pseudo-random order."""
    documents = [text for corpus in recipe.corpora for text in load_documents(corpus)[recipe.held_out :]]
    if not documents:
        raise LLMDropError(f"Nothing is left to train on once {recipe.held_out} documents of each corpus are held out.")
    random.Random(0).shuffle(documents)
    return documents


def training_blocks(recipe: Recipe, tokenizer) -> torch.LongTensor:
    """The training text as token ids (n_blocks, seq_len), packed as calibration text is."""
    return pack(training_documents(recipe), tokenizer, recipe.seq_len)


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Entropy of the token frequencies, in nats: the loss of a model that knows how often each token comes, and no more."""
    counts = torch.bincount(tokens.flatten()).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())


def make_tokenizer(name: str):
    """The series' own tokenizer: byte-level BPE, trained on its training text (once)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def _arguments(recipe: Recipe, folder: Path, seed: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.n_steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, recipe.n_steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=default_dtype() == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        logging_steps=1,
        save_steps=max(1, recipe.n_steps // RESUME_POINTS),
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several GPUs one: each further one would make the batch larger
    return arguments


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (the Trainer writes its state last); half-written ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        shutil.rmtree(path)
    return None


@contextlib.contextmanager
def _full_disk_is_one_error(folder: Path):
    """The Trainer's writers raise errors of many kinds when the disk is full; the last whole checkpoint is kept."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free < 1 << 20:
            raise disk_error(OSError(errno.ENOSPC, str(error)), folder) from error
        raise


class _Stages(TrainerCallback):
    """Keeps the stages of a series, and says how far it is."""

    def __init__(self, recipe: Recipe, folder: Path, seed: int, tokenizer):
        self.recipe, self.folder, self.seed, self.tokenizer = recipe, folder, seed, tokenizer

    def on_train_begin(self, args, state, control, model=None, **_):
        self._keep(state.global_step, model)

    def on_step_end(self, args, state, control, model=None, **_):
        self._keep(state.global_step, model)

    def on_log(self, args, state, control, logs=None, **_):
        step, all_steps = state.global_step, self.recipe.n_steps
        if "loss" in (logs or {}) and (step % max(1, all_steps // 100) == 0 or step == all_steps):
            one = self.recipe.tokens_per_step
            print(f"seed {self.seed}: {step * one:,} of {all_steps * one:,} tokens, loss {logs['loss']:.3f}", flush=True)

    def _keep(self, step: int, model) -> None:
        folder = self.folder / f"step-{step}"
        if step in self.recipe.steps and not folder.exists():
            with building(folder) as temporary:
                model.save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)


def main(arguments: list[str] | None = None) -> int:
    """The command line; every LLMDropError is one message and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m llmdrop_utils.models.training", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", help="a trained series of data/sources.yaml")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of text (default 0)")
    options = parser.parse_args(arguments)
    try:
        print(f"kept in {train_series(options.name, options.seed)}")
    except LLMDropError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
