"""Train a small language model from scratch and keep checkpoints on the way: a series of stages that needs no hub.

    llmdrop train small-llama --seed 0

The recipe (recipe.py) says shape, text and length. The loop is transformers' Trainer. A killed run resumes from its last
checkpoint, with the same losses as a run that was never killed.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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
from .load import default_dtype
from .recipe import Recipe, load_recipe, make_tokenizer, series_folder, training_blocks, unigram_entropy, untrained

RESUME_POINTS = 20  # how often in a run the optimizer's state is kept, to resume from after a kill

# ---- several seeds, each in a process of its own ------------------------------------------------------------------------


def train_seeds(name: str, seeds: list[int], on_tokens: Callable[[int], None] = lambda n: None) -> list[Path]:
    """Train a series for each seed that is not trained yet; returns the folders of all.

    On a CPU, seeds are trained side by side, each on its share of the threads: small models gain little from more. The share
    does not depend on what is trained already, so that a run that was stopped goes on with the same sums.
    on_tokens: called with the number of tokens newly done. Raises LLMDropError with the reason if a training fails.
    """
    make_tokenizer(name)  # once, before several processes want it
    threads = torch.get_num_threads()
    side_by_side = 1 if torch.cuda.is_available() else min(len(seeds), threads)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads // side_by_side), "LLMDROP_CACHE": str(files.CACHE)}
    report = threading.Lock()

    def one_at_a_time(n_tokens: int) -> None:
        with report:
            on_tokens(n_tokens)

    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(lambda seed: _train_in_a_process(name, seed, environment, one_at_a_time), untrained(name, seeds)))
    return [series_folder(name) / f"seed-{seed}" for seed in seeds]


def _train_in_a_process(name: str, seed: int, environment: dict[str, str], on_tokens: Callable[[int], None]) -> None:
    """`train_series` in a process of its own, which reports how far it is by the lines that it prints."""
    command = [sys.executable, "-m", "llmdrop_utils", "train", name, "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        errors: list[str] = []
        listener = threading.Thread(target=errors.extend, args=[process.stderr])  # a full pipe would stop the process
        listener.start()
        done = 0
        for line in process.stdout:
            if found := re.search(r"([\d,]+) of [\d,]+ tokens", line):
                now = int(found[1].replace(",", ""))
                on_tokens(now - done)
                done = now
        listener.join()
    if process.returncode:
        reason = _why_it_ended(process.returncode, errors)
        kind = DiskFull if "The disk is full" in reason else LLMDropError
        raise kind(f"Training {name} with seed {seed} failed: {reason}")


def _why_it_ended(returncode: int, errors: list[str]) -> str:
    """The reason in a process's last line of errors; or the signal that stopped it, which POSIX gives as a negative code."""
    if returncode < 0:
        return f"it was stopped by signal {-returncode}; memory may have run out"
    said = next((line for line in reversed(errors) if line.strip()), "it gave no reason")
    return said.strip().removeprefix("error: ")


# ---- one seed, in this process ------------------------------------------------------------------------------------------


def train_series(name: str, seed: int) -> Path:
    """Train one series in this process, or resume it; returns its folder. Prints a line for each hundredth of the way.

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
        # 1. Text, and weights drawn with the seed.
        blocks = training_blocks(recipe, tokenizer)
        set_seed(seed)
        model = _untrained_model(recipe, tokenizer)
        # 2. The loop, from the last checkpoint if there is one.
        trainer = Trainer(
            model,
            _arguments(recipe, resume, seed),
            data_collator=lambda rows: {"input_ids": torch.stack(rows), "labels": torch.stack(rows)},
            train_dataset=blocks,
            callbacks=[_Stages(recipe, folder, seed, tokenizer)],
        )
        trainer.remove_callback(PrinterCallback)
        with full_disk_is_one_error(folder):
            trainer.train(resume_from_checkpoint=last_checkpoint(resume))
        # 3. What is known of the run. run.json comes last: with it the series is complete.
        log = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
        losses = pd.DataFrame(log, columns=["step", "loss"])
        losses.insert(1, "tokens", losses["step"] * recipe.tokens_per_step)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "losses.csv", losses.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        about = {
            "recipe": recipe.model_dump(),
            "seed": seed,
            "bf16": trainer.args.bf16,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_per_step": recipe.tokens_per_step,
            "tokens": recipe.n_steps * recipe.tokens_per_step,
            "text_tokens": blocks.numel(),
            "unigram_entropy": unigram_entropy(blocks),
            "seconds_of_last_process": round(time.monotonic() - started, 1),
        } | code_provenance()
        write_text(folder / "run.json", json.dumps(about, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(resume)
    return folder


def _untrained_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    settings = {"vocab_size": recipe.vocab_size, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": None, "max_position_embeddings": recipe.seq_len} | recipe.config  # fmt: skip
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


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


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders that the Trainer made, the newest first: checkpoint-<steps>."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (the Trainer writes its state last); half-written ones are removed."""
    for path in checkpoints_in(folder):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        shutil.rmtree(path)
    return None


@contextlib.contextmanager
def full_disk_is_one_error(folder: Path) -> Iterator[None]:
    """The Trainer's writers raise errors of many kinds when the disk is full; the last whole checkpoint is kept. A folder that
    may not be written is one error, too."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free < 1 << 20:
            raise disk_error(OSError(errno.ENOSPC, str(error)), folder) from error
        if isinstance(error, OSError) and not os.access(folder, os.W_OK):  # else it may be the caller's own
            raise disk_error(error, folder) from error
        raise


class _Stages(TrainerCallback):
    """Keeps the stages of a series, and says how far it is."""

    def __init__(self, recipe: Recipe, folder: Path, seed: int, tokenizer: PreTrainedTokenizerFast):
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

    def _keep(self, step: int, model: nn.Module) -> None:
        folder = self.folder / f"step-{step}"
        if step in self.recipe.steps and not folder.exists():
            with building(folder) as temporary:
                model.save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
