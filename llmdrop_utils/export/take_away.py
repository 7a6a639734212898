"""From the name of a model to folders that other programs serve: scores, plan, exports through their gates, cards."""

import copy
import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import torch
from torch import nn

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import building, need_writable_folder
from ..derive.healing import Healing, heal
from ..derive.repair import repair
from ..dropping.plan import DropPlan
from ..dropping.units import available
from ..measure.importance import Importance, measure_importance
from ..models.config import read_settings
from ..models.families import find_anatomy
from ..models.load import DTYPES, load_located
from ..models.locate import LocatedModel, locate_model
from ..selection.ranking import check_count, drop_sequence, plan_of, select
from ..sources.catalogue import catalogue
from ..sources.texts import load_tokens
from . import llamacpp
from .card import write_card
from .checkpoint import load_dropped, save_dropped
from .deci import SERVERS, export_deci
from .deci import check_supported as check_deci
from .gate import EXACT, check, compare_logits
from .gguf import KINDS, export_gguf
from .gguf import check_supported as check_gguf
from .measured import CORPORA, N_DOCUMENTS, N_SAMPLES, SEQ_LEN, Measured, cached, held_out, speed_ups, tasks_left, text_left

CORPUS, N_CALIBRATION, LENGTH = "web", 32, 512
N_HEALING = 128  # samples of each corpus; read again if the budget is larger
AT_ONCE = 4  # plans that are scored together while the largest number is looked for
FORMATS = ("transformers", *SERVERS, "gguf", *(f"gguf-{kind.lower()}" for kind in (*KINDS, *llamacpp.FTYPES)))


def take_away(
    name: str,
    kind: str,
    to: Path,
    n_drop: int | None = None,
    keep: float | None = None,
    formats: Sequence[str] = ("transformers",),
    repaired: bool = False,
    healing: Healing | None = None,
) -> DropPlan:
    """Drop the most redundant layers of a model, and write what is left for other programs, each with a card.

    Parameters
    ----------
    name: whatever `locate_model` takes.
    kind: "attention", "mlp", "block" or "joint".
    to: a new folder; each format becomes a folder in it. All or nothing is written.
    n_drop: how many. keep: instead, drop as many as keep this share of the dense model's next-token accuracy, by the lower end
        of the 95 % interval on held-out text.
    formats: of `FORMATS`; "gguf" is "gguf-f16".
    repaired: refit what is kept in closed form, on text of all `CORPORA`. healing: distil the dense model into it (after a
        repair, if both are asked for), on other text of these. What is written has the base's shape and other weights.

    Returns the plan. Raises LLMDropError for what a format cannot hold, before anything is measured where that is known then.
    """
    if (n_drop is None) == (keep is None):
        raise LLMDropError("Say either how many layers to drop (-n 8) or how much accuracy to keep (--keep 0.98).")
    if keep is not None and not 0 < keep < 1:
        raise LLMDropError(f"What to keep must be a share between 0 and 1, such as 0.98, but is {keep:g}.")
    if unknown := [one for one in formats if one not in FORMATS]:
        raise LLMDropError(f"There is no format {unknown[0]!r}. There are: {', '.join(FORMATS)}.")
    if to.exists():
        raise LLMDropError(f"{to} exists already. Give the exports a folder of their own.")
    for folder in (to.absolute().parent, files.CACHE):  # before minutes are spent
        need_writable_folder(folder)
    located = locate_model(name)
    if located.is_random:
        raise LLMDropError(f"{name} has random weights, so there is nothing to take away. Give a model with weights.")
    model, tokenizer = load_located(located, torch.float32)
    _check_formats(model, DropPlan(), formats)
    if n_drop is not None:  # before minutes are spent on importance
        parts, anatomy = ("attention", "mlp") if kind == "joint" else (kind,), find_anatomy(model)
        check_count(n_drop, sum(len(available(anatomy, part)) for part in parts), kind)
    print(f"{name}: importance on {N_CALIBRATION} x {LENGTH} tokens of {CORPUS}", flush=True)
    scores = measure_importance(model, load_tokens(CORPUS, tokenizer, N_CALIBRATION, LENGTH))
    plan = select(scores, kind, n_drop) if n_drop is not None else most_that_keep(model, tokenizer, scores, kind, keep or 0)
    print(f"dropped: attention {list(plan.attention)}, MLP {list(plan.mlp)}", flush=True)
    _check_formats(model, plan, formats)
    command = f"llmdrop drop {name} --kind {kind} {f'-n {n_drop}' if keep is None else f'--keep {keep:g}'}"
    command += " --repair" * repaired + ("" if healing is None else f" --heal {budget_of(healing)}")
    dense = copy.deepcopy(model) if repaired or healing else None
    mended = ""
    checkpoints = None if healing is None else _checkpoints_of(located, plan, repaired, healing)
    if dense is not None:
        mended = mend(model, dense, tokenizer, plan, repaired, healing, checkpoints)
        model.llmdrop_identity, plan = None, dataclasses.replace(plan, model=None)  # its weights are those of no known model
    with building(to) as folder:
        checked = {one: _export(one, model, tokenizer, plan, located, folder) for one in formats}
        command += f" --to {to.name} --format {' '.join(formats)}"
        measured = _measure(model, dense, tokenizer, plan, located, command, mended)
        for one, (path, parity) in checked.items():
            write_card(path, measured, WHAT[_family(one)].format(kind=one.upper()), parity)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            print(f"{one}: {size / 1e6:,.0f} MB. {parity}", flush=True)
        plan.save(folder / "plan.json")
        for lock in folder.rglob(".*.lock"):
            lock.unlink()
    if checkpoints is not None:  # until then the same command goes on from them, whatever stopped it
        shutil.rmtree(checkpoints)
    print(f"kept in {to}")
    return plan


def _checkpoints_of(located: LocatedModel, plan: DropPlan, repaired: bool, healing: Healing) -> Path:
    """Where a healing keeps them: a folder of its own for each model, plan, and way to mend it."""
    what = [located.identity, plan.key.to_json(), repaired, dataclasses.asdict(healing)]
    return files.CACHE / "healing" / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def mend(
    model: nn.Module,
    dense: nn.Module,
    tokenizer,
    plan: DropPlan,
    repaired: bool,
    healing: Healing | None,
    checkpoints: Path | None,
) -> str:
    """Repair and heal the model in place; says what was done.

    dense: a copy of the model as it is. checkpoints: the folder of those of healing, which a stopped one goes on from.
    """
    told = []
    if repaired:
        tokens = _mixed(tokenizer, 0, N_CALIBRATION)
        print(f"repair: {tokens.numel():,} tokens of {len(CORPORA)} corpora", flush=True)
        repair(model, tokens, plan)
        told.append(f"refitted in closed form on {tokens.numel():,} tokens of {len(CORPORA)} corpora")
    if healing and checkpoints:
        first = N_CALIBRATION + -(-N_SAMPLES * SEQ_LEN // LENGTH) + 1  # after what quality is measured on
        text = _mixed(tokenizer, first, N_HEALING)
        print(f"healing: {budget_of(healing)}, of {text.numel():,} tokens of other text", flush=True)
        losses = heal(model, text, plan, checkpoints, healing, teacher=dense)
        samples = len(losses) * healing.batch_size if healing.tokens is None else -(-healing.tokens // LENGTH)
        read = samples * LENGTH
        told.append(f"healed by distillation from the dense model, reading {read:,} tokens of other text of these")
    return f"The weights that are kept were {', then '.join(told)}."


def _mixed(tokenizer, first: int, n_samples: int) -> torch.LongTensor:
    """Samples of each corpus from the `first` one on, in turns."""
    blocks = [load_tokens(corpus, tokenizer, first + n_samples, LENGTH)[first:] for corpus in CORPORA]
    return torch.stack(blocks, 1).flatten(0, 1)


def healing_of(budget: str) -> Healing:
    """What "10min" or a number of tokens asks for. Raises LLMDropError for anything else."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(min)?", budget.strip())
    if not found or (not found[2] and "." in found[1]):
        raise LLMDropError(
            f"Healing takes a number of minutes or of tokens, such as 10min or 200000, but was given {budget!r}."
        )
    return Healing(minutes=float(found[1])) if found[2] else Healing(tokens=int(found[1]))


def budget_of(healing: Healing) -> str:
    """The inverse of `healing_of`."""
    return f"{Decimal(repr(healing.minutes)):f}min" if healing.minutes else f"{healing.tokens}"


def most_that_keep(model: nn.Module, tokenizer, scores: Importance, kind: str, keep: float) -> DropPlan:
    """The largest plan up to which every plan keeps this share of next-token accuracy, by the lower end of its interval."""
    sequence = drop_sequence(scores, kind)
    tokens = held_out(tokenizer, CORPUS, N_CALIBRATION * LENGTH)
    kept = plan_of([], scores)
    for start in range(1, len(sequence), AT_ONCE):
        plans = [plan_of(sequence[:n], scores) for n in range(start, min(start + AT_ONCE, len(sequence)))]
        for n, (plan, text) in enumerate(zip(plans, text_left(model, tokens, plans), strict=True), start):
            print(
                f"  without {n}: {text.retained[0]:.1%} ({text.retained[1]:.1%} to {text.retained[2]:.1%})",
                flush=True,
            )
            if not all(map(math.isfinite, text.retained)):
                raise LLMDropError(
                    f"The dense model predicts too few tokens of {CORPUS} text to tell what share of them is kept. Say how "
                    "many layers to drop (-n 8)."
                )
            if text.retained[1] < keep:
                if not kept.n_drop:
                    raise LLMDropError(
                        f"Not even one {kind} layer can be dropped if {keep:.1%} of the accuracy are to be kept."
                    )
                return kept
            kept = plan
    return kept


def _family(one: str) -> str:
    return one.partition("-")[0]


def _kind_of(one: str) -> str:
    return one.partition("-")[2].upper() or "F16"


def _check_formats(model: nn.Module, plan: DropPlan, formats: Sequence[str]) -> None:
    for one in formats:
        if _family(one) == "gguf":
            llamacpp.library()
            check_gguf(model, plan, _kind_of(one))
        elif one in SERVERS:
            check_deci(model, plan, one)


WHAT = {
    "transformers": "A transformers checkpoint: `import llmdrop_utils`, then `AutoModelForCausalLM.from_pretrained`.",
    "vllm": "For vLLM and SGLang (`DeciLMForCausalLM`, with trust_remote_code).",
    "mlx": "For MLX-LM and ExLlamaV3 (`nemotron-nas`).",
    "gguf": "A {kind} file for llama.cpp (architecture `deci`).",
}


def _export(one: str, model: nn.Module, tokenizer, plan: DropPlan, located: LocatedModel, folder: Path) -> tuple[Path, str]:
    """Write one format through its gate; returns its folder, and how it was checked."""
    path, as_zeroed = folder / one, "the same model with the terms of these layers set to zero"
    if one == "transformers":
        stored = read_settings(located.name, located.folder)
        dtype = (DTYPES | {"float16": torch.float16}).get(stored.get("dtype") or stored.get("torch_dtype"), torch.float32)
        save_dropped(model.to(dtype), tokenizer, plan, path)
        loaded, _ = load_dropped(path, torch.float32)
        parity = compare_logits(lambda prompts: _logits(loaded, prompts), model.to(torch.float32), tokenizer, plan)
        check("The checkpoint", parity.log_probability, EXACT)
        return path, f"Loaded again, it is {parity.log_probability:.1g} nats from {as_zeroed}, at most."
    if one in SERVERS:
        parity = export_deci(model, tokenizer, plan, path, one)
        return path, f"Read by its schema, it is {parity.log_probability:.1g} nats from {as_zeroed}, at most."
    path.mkdir()
    parity = export_gguf(
        model, tokenizer, plan, path / f"{located.name.rsplit('/')[-1]}-dropped-{_kind_of(one)}.gguf", _kind_of(one)
    )
    return path, f"In llama.cpp it diverges by {parity.divergence:.1g} nats from {as_zeroed} in float32."


@torch.inference_mode()
def _logits(model: nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([prompt], device=model.device)).logits[0, -1].float().cpu() for prompt in prompts]


def _measure(
    model: nn.Module,
    dense: nn.Module | None,
    tokenizer,
    plan: DropPlan,
    located: LocatedModel,
    command: str,
    mended: str,
) -> Measured:
    print(
        f"quality on {len(CORPORA)} x {N_SAMPLES} x {SEQ_LEN} tokens and {N_DOCUMENTS} documents of each task, speed",
        flush=True,
    )
    used = N_CALIBRATION * LENGTH
    skipped = {CORPUS: used} if dense is None else dict.fromkeys(CORPORA, used)
    known = catalogue()["models"].get(located.name, {})
    return Measured(
        base=located.name,
        identity=located.identity,
        licence=known.get("licence", "that of the base model"),
        plan=plan,
        calibration=f"{N_CALIBRATION} samples of {LENGTH} tokens of the corpus {CORPUS}",
        held_out=f"{N_SAMPLES} samples of {SEQ_LEN} tokens of each corpus, in float32.",
        command=command,
        text={
            corpus: text_left(model, held_out(tokenizer, corpus, skipped.get(corpus, 0)), [plan], dense)[0]
            for corpus in CORPORA
        },
        tasks=tasks_left(model, tokenizer, plan, dense),
        speed=speed_ups(model, plan),
        kv_bytes=cached(model, plan),
        mended=mended,
    )
