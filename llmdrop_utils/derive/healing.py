"""Healing of a dropped model: what the plan keeps learns to predict what the dense model predicts.

The loss is the divergence from the dense model's next-token distributions (distillation.py). Healing changes every weight of
the kept linear maps and norms, by steps of Muon (muon.py), where LoRA (tuning.py) trains a few adapters. training_loop.py has
the loop, and how a killed run resumes.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.checks import seed_of, whole
from ..base.errors import LLMDropError
from ..base.files import locked
from ..dropping.plan import DropPlan
from ..measure.guard import frozen
from ..models.families import Anatomy, find_anatomy
from .adapters import DTYPES, ROUTERS
from .distillation import Divergence, predicted, teacher_of
from .model import recipe_of
from .muon import Muon
from .processes import agree, is_first, n_processes, once, share_of
from .training_loop import (
    check_place,
    hash_of_weights,
    memory_error,
    positive,
    prepare,
    random_numbers_of_its_own,
    samples_for,
    train,
    write_note,
)

VERSION = 3  # raise when a change alters the weights that come out: it is a part of the recipe
RESUME_POINTS = 5  # how often in a run weights and the optimizer's state are stored: 8 bytes for each trained weight
TIMED_STEPS = 3  # for a budget in minutes; the first one is not counted, as it is slower


@dataclasses.dataclass(frozen=True)
class Healing:
    """How a dropped model is healed. Raises LLMDropError for what is no such setting.

    learning_rate: at its highest, after a twentieth of the steps; then it falls to zero as a cosine. The default is
        the best of those tried on SmolLM2-135M, repaired before or not (docs/repair.md). Muon (muon.py) without weight decay,
        gradients clipped to a norm of 1, no dropout.
    batch_size: samples in a step, whose optimizer takes as long for few as for many. The last batch of all may be short.
    tokens: how many are read, rounded up to whole samples: if more than are given, these are read again in another order.
    minutes: how long the steps take. A few are timed first, and their number is then fixed; checkpoints come on top. Give
        tokens or minutes; without either, the tokens that are given are read once.
    seed: of the order of samples.
    """

    learning_rate: float = 1e-3
    batch_size: int = 8
    tokens: int | None = None
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self):
        if None not in (self.tokens, self.minutes):
            raise LLMDropError(f"The budget is {self.tokens} tokens and {self.minutes} minutes. Give one of them.")
        object.__setattr__(self, "learning_rate", positive(self.learning_rate, "The learning rate"))
        object.__setattr__(self, "batch_size", whole(self.batch_size, "The batch size"))
        object.__setattr__(self, "seed", seed_of(self.seed))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", whole(self.tokens, "The number of tokens"))
        if self.minutes is not None:
            object.__setattr__(self, "minutes", positive(self.minutes, "The number of minutes"))


def describe_healing(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, settings: Healing) -> dict:
    """All that determines what `heal` makes of a base that is its own teacher, as plain JSON: the recipe for `save_derived`.

    A budget in minutes leaves open how many steps were made, and a teacher of its own is not in it; add both:
    describe_healing(...) | {"steps": len(losses), "teacher": "sha256:..."}. Arguments and errors as in `heal`.
    """
    samples = samples_for(model, tokens)
    budget = {"minutes": settings.minutes} if settings.minutes else {"tokens": settings.tokens or samples.numel()}
    how = {"learning_rate": settings.learning_rate, "batch_size": settings.batch_size, "seed": settings.seed}
    return recipe_of("healing", VERSION, model, samples, plan, budget=budget, **how)


def heal(
    model: nn.Module,
    tokens: torch.LongTensor,
    plan: DropPlan,
    folder: Path | str,
    settings: Healing = Healing(),
    teacher: nn.Module | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train what the plan keeps to predict what the dense model predicts, in place; `trained_parameters` says what changes.

    Afterwards the model has the base's shape, and what is dropped has the base's weights. Store it with `save_derived`, and
    measure it under the same plan. Deterministic on a CPU with a given number of threads, but for a budget in minutes. Several
    processes of `accelerate launch` share the samples of each step, and all end with the same weights as one would, but for
    rounding; the number of samples is rounded up to whole steps. Let one of them store the result. If one fails, it is the
    launcher that ends the others.

    Parameters
    ----------
    model: the whole model, on one device (in each process on its own), not quantised. Trained weights are held in float32, or
        in float64 if they are, and are rounded to their own dtype for each forward pass and at the end, so what is trained is
        what is measured later. A model in float16 computes in float32 meanwhile. Each trained weight takes 12 bytes beside the
        model, and logits of a batch are held three times.
    tokens: LongTensor (n_samples, seq_len), seq_len >= 2. As in `score_text`, the last position of a sample does not count.
    plan: what is dropped. Its maps stay as they are.
    folder: for checkpoints, of its own; two fit in at a time, of 8 bytes for each trained weight. If it holds a checkpoint of
        the same healing of the same weights, that is resumed, to the same result as without an interruption, in as many steps;
        otherwise checkpoints in it are deleted. Delete it once the model is stored.
    teacher: a model of the same vocabulary, whose distributions are learned. None: the model itself outside of the plan, as it
        is now; that takes no memory, as weights change only at the end. Give one for a model that was repaired: its kept
        weights are no longer those of the dense model. It is left as it is, and is neither offloaded nor quantised.
    on_step: called in each process after each step with the number of steps done and the step's loss.

    Returns the losses of all steps in nats, each before its step, those before a resumption included. Raises LLMDropError for
    wrong input and for a loss that is not finite. After any error or interruption the model is bit for bit as it was.
    """
    if not isinstance(settings, Healing):
        raise LLMDropError(f"Expected settings, found {settings!r}. Make them: Healing(tokens=1_000_000).")
    share = share_of(settings.batch_size)
    folder, recipe, tokens = Path(folder), describe_healing(model, tokens, plan, settings), samples_for(model, tokens)
    check_place(model, "healed")
    teacher, apply = teacher_of(model, model if teacher is None else teacher, tokens)
    lock = locked(folder) if is_first() else contextlib.nullcontext()
    with lock, apply(model, plan), frozen(model), frozen(teacher), random_numbers_of_its_own(settings.seed):
        # 1. Whatever else determines the result decides whether a checkpoint may be resumed.
        weights = trained_parameters(find_anatomy(model))
        about = {"recipe": recipe, "base": hash_of_weights(model), "teacher": hash_of_weights(teacher)}
        if not agree(about):
            raise LLMDropError("Processes were given different models, text or settings. Give each of them the same.")
        checkpoint, note = once(lambda: prepare(folder, "healing", about))
        advice = "Use a smaller batch or shorter samples, or `tune`, which trains fewer weights."
        with memory_error(settings.batch_size, tokens.shape[1], advice):
            loss, reader = _Distillation(model, teacher, weights), _Reader(tokens, settings)
            # 2. How many samples are read. Steps are timed once, so that a killed run resumes with the same schedule.
            rows = range(math.ceil((settings.tokens or tokens.numel()) / tokens.shape[1]))
            if minutes := settings.minutes:
                if "steps" not in note:
                    note = note | {"steps": once(lambda: _steps_in(minutes, loss, reader, share))}
                    once(lambda: write_note(folder, "healing", note))
                rows = range(note["steps"] * settings.batch_size)
            elif n_processes() > 1:  # whole steps
                rows = range(math.ceil(len(rows) / settings.batch_size) * settings.batch_size)
            # 3. The loop.
            losses = train(
                loss, rows, reader, 1, settings, folder, checkpoint, RESUME_POINTS, on_step, True, Muon, dtype=loss.dtype
            )
            # 4. All healed weights are made before the first takes its place: an error changes none.
            healed = [wide.detach().to(weight.dtype) for wide, weight in zip(loss.weights, weights.values(), strict=True)]
            for (name, weight), values in zip(weights.items(), healed, strict=True):
                if not bool(values.isfinite().all()):
                    raise LLMDropError(f"The healed {name} is not finite in {weight.dtype}. Use a lower learning rate.")
            for weight, values in zip(weights.values(), healed, strict=True):
                weight.data = values
        once(lambda: None)  # the first process may still write a checkpoint, in a folder that the caller may delete
    return losses


def trained_parameters(anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """What healing changes, by layer and name: "3.self_attn.q_proj.weight". anatomy: of the model inside of `dropped`.

    That is the weights of linear maps and norms in the layers. Biases, embeddings, final norm, LM head, and maps that stand in
    dropped places stay; so do, in a mixture of experts, routers and experts whose weights are one tensor. Raises LLMDropError
    if that leaves nothing, if a weight is quantised, and for a model with adapters.
    """
    found: dict[str, nn.Parameter] = {}
    for index, layer in enumerate(anatomy.layers):
        for name, module in layer.block.named_modules():
            weight: Any = getattr(module, "weight", None)
            if "base_layer" in name:
                raise LLMDropError("The model has adapters of peft. Merge them first, with merge_and_unload().")
            if ROUTERS & {*name.split(".")}:
                continue
            if isinstance(module, nn.Linear | Conv1D):
                if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
                    what = f"The weight of {index}.{name} is quantised ({weight.dtype}), so it cannot be trained"
                    raise LLMDropError(f"{what}. Heal the model before it is quantised.")
            elif not isinstance(weight, nn.Parameter) or weight.ndim != 1:  # no norm; maps of a plan are matrices
                continue
            found[f"{index}.{name}.weight"] = weight
    if not found:
        raise LLMDropError("Nothing is left to heal: the plan drops all attention and MLPs. Use a plan that drops less.")
    return found


# ---- what is read -------------------------------------------------------------------------------------------------------


class _Reader:
    """Rows become a batch. Each len(tokens) rows are a pass over all samples, in an order of its own, drawn from the seed."""

    def __init__(self, tokens: torch.LongTensor, settings: Healing):
        self.tokens, self.batch_size, self.seed = tokens.cpu(), settings.batch_size, settings.seed
        self._order = functools.lru_cache(maxsize=2)(self._draw)

    def __call__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        passes = [divmod(row, len(self.tokens)) for row in rows]
        return {"input_ids": self.tokens[[int(self._order(n)[index]) for n, index in passes], :-1]}

    def _draw(self, n: int) -> np.ndarray:
        return np.random.default_rng((self.seed, n)).permutation(len(self.tokens))


def _steps_in(minutes: float, loss: "_Distillation", reader: _Reader, share: int) -> int:
    """How many steps take so long, at least one. Those that are timed have a rate of zero, so they change no weight.

    share: how many samples of a batch this process reads. What several processes tell each other is not timed.
    """
    device, size, seconds = next(loss.parameters()).device, reader.batch_size, []
    optimizer = Muon(loss.parameters(), lr=0.0, dtype=loss.dtype)
    for step in range(TIMED_STEPS):
        batch = {name: part.to(device) for name, part in reader([*range(step * size, step * size + share)]).items()}
        begun = time.perf_counter()
        loss(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return max(1, int(60 * minutes / statistics.mean(seconds[1:])))


# ---- the loss -----------------------------------------------------------------------------------------------------------


class _Distillation(nn.Module):
    """The loss, as a module whose only parameters are wide copies of those that are trained: these the Trainer optimizes.

    For each forward pass they stand in the place of the model's own, rounded to its dtype.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, weights: dict[str, nn.Parameter]):
        super().__init__()
        wide = (w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True) for w in weights.values())
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in wide)
        names = {id(weight): name for name, weight in model.named_parameters()}
        # Small gradients would be zero in float16: all weights are float32 meanwhile.
        dtypes = {names[id(w)]: torch.float32 if w.dtype == torch.float16 else w.dtype for w in weights.values()}
        others = {n: w.float() for n, w in model.named_parameters() if w.dtype == torch.float16 and n not in dtypes}
        # Products of the optimizer are as exact as those of a forward pass.
        self.dtype = torch.bfloat16 if torch.bfloat16 in dtypes.values() else self.weights[0].dtype
        self.unregistered = model, teacher, dtypes, others  # in a tuple, where torch does not look for parameters

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        model, teacher, dtypes, others = self.unregistered
        target = predicted(teacher, input_ids)
        now = {name: weight.to(dtype) for (name, dtype), weight in zip(dtypes.items(), self.weights, strict=True)}
        logits = torch.func.functional_call(model, now | others, (input_ids,), {"use_cache": False}).logits
        return {"loss": Divergence.apply(logits, target.to(logits.device))}
