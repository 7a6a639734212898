"""Notebook 09, what is measured: files of a dropped model, what they hold, and how fast llama.cpp runs them."""

import contextlib
import dataclasses
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import gguf
import torch
from safetensors import safe_open
from torch import nn

from ...base import files
from ...base.provenance import code_provenance
from ...base.settings import Counts, Names, Positive, Settings
from ...dropping.plan import DropPlan
from ...dropping.units import skipping
from ...export.checkpoint import save_dropped
from ...export.gguf import KINDS, export_gguf
from ...export.llamacpp import FTYPES, LlamaCpp
from ...sources.texts import fingerprint
from ..profile import known, section
from ..work import DENSE, Work

VERSION = 1  # raise when a change to the measurement changes what is measured
QUESTION = "Why is the sky blue? Answer in two sentences."


@section("take_away")
class TakeAway(Settings):
    """Which files are written, and how long llama.cpp is timed at each context of the section `speed` up to its prompt."""

    kinds: Annotated[Names, known("GGUF kind", (*KINDS, *FTYPES))]  # of GGUF files: "F16", "Q8_0", "Q4_0", ...
    n_drop: Counts  # attention layers
    steps: Positive  # decode steps that are timed together
    new_tokens: Positive  # at most, of the answer to a question


@dataclasses.dataclass(frozen=True)
class FileWork(Work):
    """What the files of a model under each of several plans hold, beside those of the dense model."""

    plans: tuple[DropPlan, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointWork(FileWork):
    """Checkpoints of transformers."""

    @property
    def keys(self) -> list[dict]:
        return [self._key("checkpoint", VERSION, plan=plan.key.to_json()) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        return 1 + len(self.plans)  # nothing is read: a moment for each

    @property
    def about(self) -> dict:
        return {"file": "checkpoint"}

    def measure(self, model, tokenizer, update) -> list[dict]:
        sizes: list[Sizes] = []
        for plan in (DENSE, *self.plans):
            with _folder() as folder:
                written = save_dropped(model, tokenizer, plan, folder / "checkpoint")
                with skipping(model, plan):
                    left = {name for name, _ in model.named_parameters()}
                gone = {name for name, _ in model.named_parameters()} - left
                sizes.append(_sizes(written.glob("*.safetensors"), gone, sizes[0] if sizes else None))
            update(1)
        return [{"dense": sizes[0].to_json(), "plan": each.to_json()} for each in sizes[1:]]


@dataclasses.dataclass(frozen=True)
class ServedWork(FileWork):
    """GGUF files of one kind, each through its gate; how fast llama.cpp runs them, in turns, and what they answer."""

    kind: str
    tokens: torch.LongTensor  # (longest context + steps,): all files read these
    contexts: tuple[int, ...]
    steps: int
    new_tokens: int
    repeats: int
    tokenizer: str  # fingerprint of what makes tokens, and of the form of a conversation

    @property
    def keys(self) -> list[dict]:
        code = code_provenance()
        machine = {"processor": code["processor"], "cpu_threads": code["cpu_threads"]}
        more = {"kind": self.kind, "tokens": fingerprint(self.tokens[None]), "contexts": list(self.contexts),
                "steps": self.steps, "new_tokens": self.new_tokens, "repeats": self.repeats, "question": QUESTION,
                "machine": machine, "tokenizer": self.tokenizer,
                "llama.cpp": importlib.metadata.version("cyllama")}  # fmt: skip
        return [self._key("served", VERSION, plan=plan.key.to_json(), **more) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        return (1 + len(self.plans)) * self.repeats * sum(self.contexts)

    @property
    def about(self) -> dict:
        return {"file": self.kind, "contexts": list(self.contexts), "repeats": self.repeats,
                "cyllama": importlib.metadata.version("cyllama")}  # fmt: skip

    def measure(self, model, tokenizer, update) -> list[dict]:
        plans = (DENSE, *self.plans)
        question = _question(tokenizer)
        room = max(len(self.tokens), len(question) + self.new_tokens)
        found: list[dict] = []
        sizes: list[Sizes] = []
        with _folder() as folder, contextlib.ExitStack() as opened:
            served = []
            for i, plan in enumerate(plans):
                path = folder / f"{i}.gguf"
                parity = export_gguf(model, tokenizer, plan, path, self.kind)
                sizes.append(_sizes([path], attention_in_gguf(plan), sizes[0] if sizes else None))
                served.append(opened.enter_context(LlamaCpp(path, room, torch.get_num_threads())))
                found.append(sizes[-1].to_json() | dataclasses.asdict(parity))
            done = lambda: update(sum(self.contexts))  # noqa: E731
            seconds = in_turns(served, self.tokens.tolist(), self.contexts, self.steps, self.repeats, done)
            for each, llama, taken in zip(found, served, seconds, strict=True):
                each["seconds"] = taken
                said = tokenizer.decode(answer(llama, question, self.new_tokens, _ends(model, tokenizer)))
                each["answer"] = " ".join("".join(c if c.isprintable() else " " for c in said).split())  # for a table
        return [{"dense": found[0], "plan": each} for each in found[1:]]


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """For files of many megabytes: where the disk is known to have room for models."""
    files.CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files.CACHE, prefix=".take-away-") as folder:
        yield Path(folder)


# ---- what files hold ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of files of weights."""

    tensors: dict[str, int]  # by name
    file_bytes: int  # headers and tokens among them
    dropped_bytes: int = 0  # of those tensors of the dense file that the plan drops
    stand_in_bytes: int = 0  # of what stands in their places: zeros where a program insists on a tensor

    def to_json(self) -> dict:
        sizes = {name: value for name, value in vars(self).items() if name != "tensors"}
        return sizes | {"tensor_bytes": sum(self.tensors.values())}


def _sizes(paths: Iterable[Path], gone: set[str], dense: Sizes | None) -> Sizes:
    """gone: names of the tensors that are dropped. dense: sizes of the dense model's files; None: these are they."""
    paths = list(paths)
    tensors = {name: size for path in paths for name, size in tensor_bytes(path).items()}
    total = sum(path.stat().st_size for path in paths)
    if dense is None:
        return Sizes(tensors, total)
    dropped = sum(size for name, size in dense.tensors.items() if name in gone)
    return Sizes(tensors, total, dropped, sum(size for name, size in tensors.items() if name in gone))


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor in a GGUF or safetensors file, by name."""
    if path.suffix == ".gguf":
        return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    with safe_open(path, "pt") as stored:
        return {name: stored.get_tensor(name).nbytes for name in stored.keys()}  # noqa: SIM118


def attention_in_gguf(plan: DropPlan) -> set[str]:
    """Names under which GGUF files hold the attention of these layers, with its norm."""
    parts = [f"attn_{part}.weight" for part in ("norm", "q", "k", "v", "output")] + [f"attn_{part}.bias" for part in "qkv"]
    return {f"blk.{layer}.{part}" for layer in plan.attention for part in parts}


# ---- llama.cpp ----------------------------------------------------------------------------------------------------------


def in_turns(
    served: Sequence[LlamaCpp],
    tokens: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    repeats: int,
    on_turn: Callable[[], None] = lambda: None,
) -> list[dict[str, list[float]]]:
    """Seconds of prefill and of one decode step at each context, {"prefill 128": [one for each repeat], ...}, for each file.

    The files take turns, repeat by repeat, so that whatever slows the machine meets all of them. All read the same tokens;
    decoding reads the tokens that follow the context, one by one. An untimed warm-up comes first.
    """
    seconds: list[dict[str, list[float]]] = [{} for _ in served]
    for llama in served:
        _timed(llama, tokens[: min(16, min(contexts))], 1)
        _timed(llama, tokens[:1], 1)
    for _ in range(repeats):
        for llama, taken in zip(served, seconds, strict=True):
            for context in contexts:
                llama.forget()
                taken.setdefault(f"prefill {context}", []).append(_timed(llama, tokens[:context], context))
                following = tokens[context : context + steps]
                taken.setdefault(f"decode {context}", []).append(_timed(llama, following, 1) / steps)
            llama.forget()
            on_turn()
    return seconds


def _timed(llama: LlamaCpp, tokens: Sequence[int], at_once: int) -> float:
    started = time.perf_counter()
    for i in range(0, len(tokens), at_once):
        llama.run(tokens[i : i + at_once])
    return time.perf_counter() - started


def answer(llama: LlamaCpp, question: Sequence[int], new_tokens: int, ends: set[int]) -> list[int]:
    """The most probable tokens after a question, up to one that ends an answer."""
    llama.forget()
    llama.run(question)
    said: list[int] = []
    while len(said) < new_tokens and (token := int(llama.logits().argmax())) not in ends:
        said.append(token)
        llama.run([token])
    return said


def _question(tokenizer) -> list[int]:
    """In the model's own form of a conversation, if it has one."""
    if not tokenizer.chat_template:
        return list(tokenizer(QUESTION)["input_ids"])
    asked = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False)
    return list(tokenizer(asked, add_special_tokens=False)["input_ids"])


def _ends(model: nn.Module, tokenizer) -> set[int]:
    """Tokens that end an answer."""
    named = model.generation_config.eos_token_id
    return {token for token in [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])] if token is not None}
