"""Short tuning of a dropped model: LoRA adapters are trained under the drop plan, then merged into the weights that it keeps.

A short training of what is left regains a part of what dropping lost. The figure post_train.pdf in the paper's repository has
means over tasks without and with it: 58.7 and 59.4 for the dense model, 52.8 and 57.0 after Attn Drop, 44.3 and 47.0 after MLP
Drop.

The loop is transformers' Trainer. A killed run resumes from its last checkpoint, with the same losses as one that was never
killed. adapters.py says what an adapter is, and which weights get one.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..base.files import locked, write_text
from ..dropping.plan import DropPlan, check_plan
from ..dropping.units import dropped
from ..measure.guard import frozen, tokens_for
from ..models.families import find_anatomy, input_device
from ..models.training import last_checkpoint
from ..sources.texts import fingerprint
from .adapters import adapted, library, merge

VERSION = 1  # raise when a change alters the weights that come out: it is a part of the recipe
RESUME_POINTS = 20  # how often in a run the adapters and the optimizer's state are stored, to resume from after a kill

# Checkpoints of small models follow each other within a second, which the Trainer takes for a clock that cannot be trusted.
logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)


def _positive(value: object, what: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # that is the question
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool | str) or not 0 < number < math.inf:
        raise LLMDropError(f"{what} must be a number above 0, but is {value!r}.")
    return number


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How adapters are trained. Raises LLMDropError for what is no such setting.

    rank: of the adapters (8 in Ma et al. 2023, LLM-Pruner, which tunes what was pruned).
    alpha: the adapters' product counts alpha / rank times.
    learning_rate: at its highest (2e-4 in Dettmers et al. 2023, QLoRA): it begins at zero, rises in a line for a twentieth of
        the steps, then falls to zero as a cosine. AdamW without weight decay, gradients clipped to a norm of 1, no dropout.
    epochs: how often the tokens are read.
    batch_size: samples in a step. The last batch of each epoch may be short.
    seed: of the adapters' first values and of the order of samples.
    """

    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 2e-4
    epochs: int = 1
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        for name, what in (("rank", "The rank"), ("epochs", "The number of epochs"), ("batch_size", "The batch size")):
            object.__setattr__(self, name, whole(getattr(self, name), what))
        object.__setattr__(self, "seed", whole(self.seed, "The seed", at_least=0))
        if self.seed >= 1 << 32:
            raise LLMDropError(f"The seed must be below 2**32, but is {self.seed}.")
        for name in ("alpha", "learning_rate"):
            object.__setattr__(self, name, _positive(getattr(self, name), f"The {name.replace('_', ' ')}"))


def describe_tuning(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, settings: Tuning) -> dict:
    """All that determines what `tune` makes of a base, as plain JSON: the recipe for `save_derived`.

    Arguments and errors as in `tune`.
    """
    check_plan(model, plan)
    return {
        "method": "LoRA",
        "version": VERSION,
        "plan": plan.key.to_json(),
        "tokens": fingerprint(_samples(model, tokens)),
        "dtype": str(model.dtype).removeprefix("torch."),
        **dataclasses.asdict(settings),
    }


def tune(
    model: nn.Module,
    tokens: torch.LongTensor,
    plan: DropPlan,
    folder: Path | str,
    settings: Tuning = Tuning(),
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train adapters with the plan's sub-layers dropped, and merge them into the model in place.

    Afterwards the model has the base's shape, and what is dropped has the base's weights. Store it with `save_derived`, and
    measure it under the same plan. Deterministic on a CPU with a given number of threads.

    Parameters
    ----------
    model: the whole model, on one device, not quantised. Adapters are trained in float32 whatever its dtype, or in float64 if
        that is its dtype. Merged weights are rounded to its dtype once: in bfloat16, changes below 1/512 of a weight are lost.
    tokens: LongTensor (n_samples, seq_len), seq_len >= 2. The loss is the mean over all tokens but the first of each sample, in
        nats.
    plan: what is dropped; `DropPlan()` tunes the dense model.
    folder: for checkpoints, of its own. If it holds a checkpoint of the same tuning of the same weights, that is resumed, to
        the same result as without an interruption; otherwise checkpoints in it are deleted. Delete it once the model is stored.
    on_step: called after each step with the number of steps done and the step's loss.

    Returns the losses of all steps, those before a resumption included; the first is that of the base. Raises LLMDropError for
    wrong input and for a loss that is not finite, NotAvailable without peft. After any error or interruption the model is bit
    for bit as it was.
    """
    if not isinstance(settings, Tuning):
        raise LLMDropError(f"Expected settings, found {settings!r}. Make them: Tuning(rank=8, learning_rate=2e-4).")
    peft, folder = library(), Path(folder)
    recipe, tokens = describe_tuning(model, tokens, plan, settings), _samples(model, tokens)
    with locked(folder), dropped(model, plan), frozen(model), _random_numbers_of_its_own(settings.seed):
        _check_place(model)
        # 1. Whatever else determines the result decides whether a checkpoint may be resumed.
        checkpoint = _prepare(folder, {"recipe": recipe, "base": _hash_of_weights(model)})
        with adapted(peft, find_anatomy(model), settings.rank, settings.alpha) as layers:
            # 2. The loop.
            losses = _train(model, layers, tokens, settings, folder, checkpoint, on_step)
            # 3. All merged weights are made before the first takes its place: an error changes none.
            for weight, merged in merge(layers):
                weight.data = merged
    return losses


# ---- what comes in ------------------------------------------------------------------------------------------------------


def _samples(model: nn.Module, tokens: object) -> torch.LongTensor:
    samples = tokens_for(model, tokens)
    if samples.shape[1] < 2:
        raise LLMDropError("A loss takes samples of at least 2 tokens: one to read, and one to predict.")
    return samples


def _check_place(model: nn.Module) -> None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" or device.index for device in devices):  # "meta": offloaded by accelerate
        names = ", ".join(sorted(map(str, devices)))
        raise LLMDropError(
            f"A model is tuned on one device, the CPU or the first GPU, but the weights of this one are on {names}. Load it on "
            "one: load_model(..., device='cuda') or device='cpu'."
        )


# ---- checkpoints --------------------------------------------------------------------------------------------------------


def _hash_of_weights(model: nn.Module) -> str:
    """sha256 of all weights as they are now, in hex. An identity would not do: a model may have been changed since."""
    content = hashlib.sha256()
    for name, parameter in model.named_parameters():
        content.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        content.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


def _prepare(folder: Path, about: dict) -> str | None:
    """The newest whole checkpoint in the folder if it is of this tuning; otherwise None, and the folder is ready for it."""
    note, text = folder / "tuning.json", json.dumps(about, indent=1, sort_keys=True) + "\n"
    if folder.is_dir() and not note.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise LLMDropError(f"{folder} holds files that are not of a tuning. Give the checkpoints a folder of their own.")
    if note.exists() and note.read_bytes() == text.encode():
        return last_checkpoint(folder)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    write_text(note, text)
    return None


# ---- the loop -----------------------------------------------------------------------------------------------------------


class _NextTokenLoss(nn.Module):
    """The loss, as a module whose only parameters are the adapters: these the Trainer optimizes, clips and stores."""

    def __init__(self, model: nn.Module, layers: dict[str, Any]):
        super().__init__()
        self.adapters = nn.ModuleList(part for layer in layers.values() for part in (layer.lora_A, layer.lora_B))
        self.unregistered = (model,)  # in a tuple, where torch does not look for parameters

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        (model,) = self.unregistered
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())}


def _train(
    model: nn.Module,
    layers: dict[str, Any],
    tokens: torch.LongTensor,
    settings: Tuning,
    folder: Path,
    checkpoint: str | None,
    on_step: Callable[[int, float], None],
) -> list[float]:
    """Train the adapters in place; returns the loss of each step."""
    # Imported only when something is tuned: the Trainer takes seconds.
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

    device = input_device(model)
    n_steps = math.ceil(len(tokens) / settings.batch_size) * settings.epochs
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=n_steps // 20,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show such a loss as the mean of those before
        save_steps=max(1, n_steps // RESUME_POINTS),
        save_total_limit=1,
        dataloader_pin_memory=device.type == "cuda",
        report_to=[],
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several GPUs one: each further one would make the batch larger
    trainer = Trainer(
        _NextTokenLoss(model, layers),
        arguments,
        data_collator=lambda rows: {"input_ids": torch.stack(rows)},
        train_dataset=tokens.cpu(),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        what = f"{settings.batch_size} samples of {tokens.shape[1]} tokens"
        raise LLMDropError(f"Out of GPU memory with a batch of {what}. Use a smaller batch or shorter samples.") from error
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# ---- all else is left as it was -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _random_numbers_of_its_own(seed: int) -> Iterator[None]:
    """Inside, torch's random numbers begin with the seed. Those of the caller go on afterwards; the Trainer seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (what the Trainer sets)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
