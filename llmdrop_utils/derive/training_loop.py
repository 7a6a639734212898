"""The loop that tuning and healing share: transformers' Trainer, checkpoints to resume from, and all else left as it was.

A killed run resumes from its last checkpoint, with the same losses as one that was never killed.
"""

import contextlib
import hashlib
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..base.checks import as_number
from ..base.errors import LLMDropError
from ..base.files import disk_error, write_text
from ..measure.guard import tokens_for
from ..models.training import checkpoints_in, full_disk_is_one_error, last_checkpoint
from .processes import own_device, share_of

# Checkpoints of small models follow each other within a second, which the Trainer takes for a clock that cannot be trusted.
logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)


# ---- what comes in ------------------------------------------------------------------------------------------------------


class Settings(Protocol):
    """What the loop takes from the settings of a training."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


def positive(value: object, what: str) -> float:
    """A finite float above 0, or LLMDropError: "The alpha must be a number above 0, but is 0."."""
    number = as_number(value)
    if not 0 < number < math.inf:
        raise LLMDropError(f"{what} must be a number above 0, but is {value!r}.")
    return number


def samples_for(model: nn.Module, tokens: object) -> torch.LongTensor:
    """Token ids int64 (n_samples, seq_len), seq_len >= 2, that the model can read; LLMDropError for anything else."""
    samples = tokens_for(model, tokens)
    if samples.shape[1] < 2:
        raise LLMDropError("A loss takes samples of at least 2 tokens: one to read, and one to predict.")
    return samples


def check_place(model: nn.Module, done: str) -> None:
    """Raise LLMDropError unless all weights are on one device, the CPU or the first GPU, or that of this process if
    `accelerate launch` started several, and can have gradients beside them. done: "tuned", for the message."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise LLMDropError(f"Weights that were made in torch.inference_mode() cannot be {done}. Load the model outside of it.")
    devices = {parameter.device for parameter in model.parameters()}
    names = ", ".join(sorted(map(str, devices)))
    if own := own_device():
        if any(device.type != own.type or (device.index or 0) != (own.index or 0) for device in devices):
            raise LLMDropError(f"This process computes on {own}, but its model is on {names}. Load it with device='{own}'.")
    elif len(devices) > 1 or any(device.type == "meta" or device.index for device in devices):  # "meta": offloaded
        raise LLMDropError(
            f"A model is {done} on one device, the CPU or the first GPU, but the weights of this one are on {names}. Load it "
            "on one: load_model(..., device='cuda') or device='cpu'."
        )


# ---- checkpoints --------------------------------------------------------------------------------------------------------


def hash_of_weights(model: nn.Module) -> str:
    """sha256 of all weights as they are now, in hex. An identity would not do: a model may have been changed since."""
    content = hashlib.sha256()
    for name, parameter in model.named_parameters():
        content.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        content.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


def prepare(folder: Path, kind: str, about: dict) -> tuple[str | None, dict]:
    """Make the folder that of the training which `about` tells of: plain JSON, kept in its note, <kind>.json.

    Returns its newest whole checkpoint, or None, and what its note says, which may be more than `about` (see `write_note`).
    Checkpoints of another training of this kind are deleted. Raises LLMDropError for a folder of other files, and for one
    that cannot be read or written.
    """
    note = folder / f"{kind}.json"
    if folder.exists() and not folder.is_dir():
        raise LLMDropError(f"{folder} is a file. Give the checkpoints a folder of their own.")
    if folder.is_dir() and not note.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise LLMDropError(f"{folder} holds files that are not of a {kind}. Give the checkpoints a folder of their own.")
    known: object = None
    try:
        with contextlib.suppress(FileNotFoundError, ValueError):
            known = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known | about == known:
            return last_checkpoint(folder), known
        for path in checkpoints_in(folder):
            shutil.rmtree(path)
    except OSError as error:
        raise disk_error(error, folder) from error
    write_note(folder, kind, about)
    return None, about


def write_note(folder: Path, kind: str, about: dict) -> None:
    """Write the folder's note anew, in one step."""
    write_text(folder / f"{kind}.json", json.dumps(about, indent=1, sort_keys=True) + "\n")


# ---- the loop -----------------------------------------------------------------------------------------------------------


def train(
    loss: nn.Module,
    rows: Dataset,
    collate: Callable[[list], dict[str, torch.Tensor]],
    epochs: int,
    settings: Settings,
    folder: Path,
    checkpoint: str | None,
    resume_points: int,
    on_step: Callable[[int, float], None],
    in_order: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> list[float]:
    """Train the loss module's parameters in place; returns the loss of each step, those before the checkpoint included.

    Gradients are clipped to a norm of 1. The rate rises in a line for a twentieth of the steps, then falls to zero as a cosine.

    loss: called with what `collate` makes of some rows, it returns {"loss": scalar}. rows: read `epochs` times, each time in
    another order drawn from the seed, or in their own if `in_order`. resume_points: how many checkpoints are written.
    on_step: called after each step with the number of steps done and the step's loss. optimizer: a class, made with the
    parameters, the rate `lr` and these options. Raises LLMDropError for a loss that is not finite.
    """
    # Imported only when something is trained: the Trainer takes seconds.
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:  # at the end comes a summary
                if not math.isfinite(logs["loss"]):
                    raise LLMDropError(
                        f"The loss of step {state.global_step} is not finite. Load the model in bfloat16 or float32, or use a "
                        "lower learning rate."
                    )
                on_step(state.global_step, logs["loss"])

    device = next(loss.parameters()).device
    n_steps = math.ceil(len(rows) / settings.batch_size) * epochs
    with full_disk_is_one_error(folder), _accelerate_as_it_was():
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=n_steps,
            per_device_train_batch_size=share_of(settings.batch_size),
            train_sampling_strategy="sequential" if in_order else "random",
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=n_steps // 20,
            weight_decay=0.0,
            max_grad_norm=1.0,
            use_cpu=device.type == "cpu",
            seed=settings.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would show such a loss as the mean of those before
            save_steps=max(1, n_steps // resume_points),
            save_total_limit=1,
            dataloader_pin_memory=device.type == "cuda",
            report_to=[],
            disable_tqdm=True,
        )
        arguments.mixed_precision = "no"  # that of `accelerate launch` would train what is not measured later
        arguments._n_gpu = min(1, arguments.n_gpu)  # of several GPUs one: each further one would make the batch larger
        made = optimizer, {"lr": settings.learning_rate} | options
        trainer = Trainer(
            loss, arguments, data_collator=collate, train_dataset=rows, callbacks=[Steps()], optimizer_cls_and_kwargs=made
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@contextlib.contextmanager
def memory_error(batch_size: int, seq_len: int, advice: str = "Use a smaller batch or shorter samples.") -> Iterator[None]:
    """Inside, running out of GPU memory is one clear LLMDropError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"{batch_size} samples of {seq_len} tokens"
        raise LLMDropError(f"Out of GPU memory with a batch of {what}. {advice}") from error


# ---- all else is left as it was -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def random_numbers_of_its_own(seed: int) -> Iterator[None]:
    """Inside, torch's random numbers begin with the seed. Those of the caller go on afterwards; the Trainer seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what the Trainer sets)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def _accelerate_as_it_was() -> Iterator[None]:
    """Inside, the Trainer may begin anew with accelerate's state, which all of a program shares."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)
