"""llama.cpp: what it tokenizes, predicts and caches, and its quantiser. An optional extra, `llmdrop-utils[llamacpp]`.

llama.cpp ends the whole process when it meets a file that it does not expect. So a file that was not checked yet is opened in
a process of its own: `answers` starts this module.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import LLMDropError, NotAvailable

FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # llama_ftype in llama.h


def library() -> Any:
    """The bindings. Raises NotAvailable if they are not installed."""
    try:
        cpp = importlib.import_module("cyllama.llama.llama_cpp")
    except ImportError as error:
        raise NotAvailable(
            f"llama.cpp cannot be used ({error}). Install it beside this package: pip install 'llmdrop-utils[llamacpp]'."
        ) from error
    cpp.disable_logging()
    cpp.llama_backend_init()
    return cpp


class LlamaCpp:
    """A GGUF file, opened in llama.cpp on the CPU, with a cache for one sequence. A context manager.

    n_context: how many tokens the cache has room for. exact: keys and values are kept in float32 instead of float16.
    Raises LLMDropError for a file that llama.cpp refuses, NotAvailable without llama.cpp.
    """

    def __init__(self, path: Path | str, n_context: int = 512, n_threads: int = 2, exact: bool = False):
        self.cpp = library()
        self.name, self.n_past = Path(path).name, 0
        options = self.cpp.LlamaModelParams()
        options.n_gpu_layers = 0
        settings = self.cpp.LlamaContextParams()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = n_context, n_context, min(n_context, 512)
        settings.n_threads = settings.n_threads_batch = n_threads
        if exact:
            settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
            settings.flash_attn_type = 0
        # The bindings look for this attribute when they hand out logits, and have it elsewhere.
        model = type("Model", (self.cpp.LlamaModel,), {"n_vocab": property(lambda model: model.get_vocab().n_vocab)})
        try:
            self.model = model(path_model=str(path), params=options, verbose=False)
            self.context = self.cpp.LlamaContext(model=self.model, params=settings, verbose=False)
        except (ValueError, RuntimeError, OSError) as error:
            raise LLMDropError(f"llama.cpp cannot open {self.name}: {error}") from error
        self.batch = self.cpp.LlamaBatch(n_tokens=n_context, embd=0, n_seq_max=1)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_) -> None:
        for part in (self.batch, self.context, self.model):
            part.close()

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text. Special tokens that it names are among them, but none is added."""
        return list(self.model.get_vocab().tokenize(text, False, True))

    def run(self, tokens: Sequence[int]) -> None:
        """Append tokens to what the cache holds, and wait until that is done."""
        self.batch.set_batch([int(token) for token in tokens], self.n_past, False)
        try:
            self.context.decode(self.batch)
        except (ValueError, RuntimeError) as error:
            raise LLMDropError(f"llama.cpp cannot run {self.name} on {len(tokens)} tokens: {error}") from error
        self.context.synchronize()
        self.n_past += len(tokens)

    def logits(self) -> np.ndarray:
        """After the last token: float32 (vocabulary,)."""
        return np.array(self.context.get_logits_ith(-1), np.float32)

    def forget(self) -> None:
        """Empty the cache."""
        self.context.kv_cache_clear(True)
        self.n_past = 0

    def cached_bytes(self) -> int:
        """Size of the sequence in the cache, with a few bytes for each token that describe it."""
        return int(self.context.get_state_seq_size(0))


def quantise(source: Path, target: Path, kind: str) -> None:
    """Quantise a GGUF file by llama.cpp's own quantiser. kind: one of `FTYPES`."""
    cpp = library()
    settings = cpp.LlamaModelQuantizeParams()
    settings.ftype = FTYPES[kind]
    try:
        cpp.model_quantize(str(source), str(target), settings)
    except RuntimeError as error:
        raise LLMDropError(f"llama.cpp cannot quantise {source.name} to {kind}: {error}") from error


# ---- in a process of its own ---------------------------------------------------------------------------------------------

DESCRIPTION = 12  # bytes that llama.cpp stores for each cached token beside keys and values


@dataclasses.dataclass(frozen=True)
class Answers:
    """What llama.cpp makes of a file: for each prompt the logits after it, float32 (prompts, vocabulary), and what follows."""

    logits: np.ndarray
    continuations: list[list[int]]  # greedy
    cached_bytes: int  # keys and values of one token, in all layers
    tokens: list[list[int]]  # of the texts


def answers(
    path: Path, prompts: Sequence[Sequence[int]] = (), n_tokens: int = 0, texts: Sequence[str] = (), exact: bool = False
) -> Answers:
    """Ask llama.cpp in a process of its own. n_tokens: how many follow each prompt.

    Raises LLMDropError if llama.cpp refuses the file, or ends.
    """
    library()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "logits.npy"
        question = {"path": str(path), "made": str(made), "prompts": [list(map(int, prompt)) for prompt in prompts],
                    "n_tokens": n_tokens, "texts": list(texts), "exact": exact, "path_of_modules": sys.path}  # fmt: skip
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
        if child.returncode or not child.stdout.strip():
            lines = [line for line in child.stderr.splitlines() if line.strip()] or ["it says nothing"]
            said = next((line for line in lines if "error" in line.lower() or "assert" in line.lower()), lines[-1])
            raise LLMDropError(f"llama.cpp cannot run {path.name} ({said.removeprefix('error: ')}).")
        said = json.loads(child.stdout.splitlines()[-1])
        return Answers(np.load(made), said["continuations"], said["cached_bytes"], said["tokens"])


CHILD = """
import json, sys
question = json.load(sys.stdin)
sys.path[:] = question.pop("path_of_modules")
from llmdrop_utils.export.llamacpp import answer
answer(**question)
"""


def answer(path: str, made: str, prompts: list[list[int]], n_tokens: int, texts: list[str], exact: bool) -> None:
    """What `answers` asks for, in the process that it starts: logits go to a file, the rest is printed."""
    try:
        room = max((len(prompt) for prompt in prompts), default=0) + n_tokens + 64
        with LlamaCpp(path, room, exact=exact) as cpp:
            logits, continuations, sizes = [], [], []
            for prompt in prompts:
                cpp.forget()
                cpp.run(prompt)
                logits.append(cpp.logits())
                following: list[int] = []
                for _ in range(n_tokens):
                    following.append(int(cpp.logits().argmax()))
                    cpp.run(following[-1:])
                continuations.append(following)
            for n in (1, 2) if prompts else ():
                cpp.forget()
                cpp.run(prompts[0][:n])
                sizes.append(cpp.cached_bytes())
            per_token = sizes[1] - sizes[0] - DESCRIPTION if sizes else 0
            tokens = [cpp.tokenize(text) for text in texts]
    except LLMDropError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    np.save(made, np.array(logits, np.float32))
    print(json.dumps({"continuations": continuations, "cached_bytes": per_token, "tokens": tokens}))
