"""Short tuning of a dropped model: LoRA adapters are trained under the drop plan, then merged into the weights that it keeps.

A short training of what is left regains a part of what dropping lost. The figure post_train.pdf in the paper's repository has
means over tasks without and with it: 58.7 and 59.4 for the dense model, 52.8 and 57.0 after Attn Drop, 44.3 and 47.0 after MLP
Drop.

What they learn is text; or, with a teacher, what that predicts: healing (healing.py) with less memory and less to gain.

The loop is transformers' Trainer. A killed run resumes from its last checkpoint, with the same losses as one that was never
killed. adapters.py says what an adapter is, and which weights get one.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.checks import seed_of, whole
from ..base.errors import LLMDropError
from ..base.files import locked
from ..dropping.plan import DropPlan
from ..dropping.units import dropped
from ..measure.guard import frozen
from ..models.families import find_anatomy
from .adapters import adapted, library, merge
from .distillation import Applied, Divergence, predicted, teacher_of
from .model import recipe_of
from .processes import n_processes
from .training_loop import (
    check_place,
    hash_of_weights,
    memory_error,
    positive,
    prepare,
    random_numbers_of_its_own,
    samples_for,
    train,
)

VERSION = 1  # raise when a change alters the weights that come out: it is a part of the recipe
RESUME_POINTS = 20  # how often in a run the adapters and the optimizer's state are stored, to resume from after a kill


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
        object.__setattr__(self, "seed", seed_of(self.seed))
        for name in ("alpha", "learning_rate"):
            object.__setattr__(self, name, positive(getattr(self, name), f"The {name.replace('_', ' ')}"))


def describe_tuning(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, settings: Tuning) -> dict:
    """All that determines what `tune` makes of a base from text, as plain JSON: the recipe for `save_derived`.

    A teacher is not in it; add it: describe_tuning(...) | {"teacher": "sha256:..."}. Arguments and errors as in `tune`.
    """
    return recipe_of("LoRA", VERSION, model, samples_for(model, tokens), plan, **dataclasses.asdict(settings))


def tune(
    model: nn.Module,
    tokens: torch.LongTensor,
    plan: DropPlan,
    folder: Path | str,
    settings: Tuning = Tuning(),
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    teacher: nn.Module | None = None,
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
    teacher: a model of the same vocabulary; the loss is then the divergence from its distributions (distillation.py), as in
        `heal`. The model itself stands for what it is now outside of the plan. It is left as it is, and is neither
        offloaded nor quantised.

    Returns the losses of all steps, those before a resumption included; the first is that of the base. Raises LLMDropError for
    wrong input and for a loss that is not finite, NotAvailable without peft. After any error or interruption the model is bit
    for bit as it was.
    """
    if not isinstance(settings, Tuning):
        raise LLMDropError(f"Expected settings, found {settings!r}. Make them: Tuning(rank=8, learning_rate=2e-4).")
    if n_processes() > 1:
        raise LLMDropError(f"Tuning runs in one process, but `accelerate launch` started {n_processes()}. Start one.")
    peft, folder = library(), Path(folder)
    recipe, tokens = describe_tuning(model, tokens, plan, settings), samples_for(model, tokens)
    apply: Applied = dropped
    if teacher is not None:
        teacher, apply = teacher_of(model, teacher, tokens)
    taught = contextlib.nullcontext() if teacher is None else frozen(teacher)
    with locked(folder), apply(model, plan), frozen(model), taught, random_numbers_of_its_own(settings.seed):
        check_place(model, "tuned")
        # 1. Whatever else determines the result decides whether a checkpoint may be resumed.
        taught_by = None if teacher is None else hash_of_weights(teacher)
        about = {"recipe": recipe, "base": hash_of_weights(model), "teacher": taught_by}
        checkpoint, _ = prepare(folder, "tuning", about)
        with adapted(peft, find_anatomy(model), settings.rank, settings.alpha) as layers:
            # 2. The loop.
            with memory_error(settings.batch_size, tokens.shape[1]):
                losses = train(
                    _Loss(model, teacher, layers),
                    tokens.cpu(),
                    lambda rows: {"input_ids": torch.stack(rows)},
                    settings.epochs,
                    settings,
                    folder,
                    checkpoint,
                    RESUME_POINTS,
                    on_step,
                )
            # 3. All merged weights are made before the first takes its place: an error changes none.
            for weight, merged in merge(layers):
                weight.data = merged
    return losses


class _Loss(nn.Module):
    """Of a batch, as a module whose only parameters are the adapters: these the Trainer optimizes, clips and stores."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, layers: dict[str, Any]):
        super().__init__()
        self.adapters = nn.ModuleList(part for layer in layers.values() for part in (layer.lora_A, layer.lora_B))
        self.unregistered = model, teacher  # in a tuple, where torch does not look for parameters

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        model, teacher = self.unregistered
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        if teacher is not None:
            return {"loss": Divergence.apply(logits, predicted(teacher, input_ids)[:, :-1].to(logits.device))}
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())}
