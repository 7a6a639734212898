"""Questions whose answer stands in what was read: copying, retrieval, and classification by many examples.

Each is a request for `score`: a context, and the tokens that should follow it. It is answered right if each of these tokens is
the most probable one, which is what greedy decoding would write.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..base.checks import whole
from ..base.errors import LLMDropError
from .catalogue import catalogue
from .fetch import fetch_hub
from .task_data import drawn
from .texts import as_tokens

Request = tuple[list[int], list[int]]  # context, continuation

CUE, COPIED = 8, 16  # tokens of a passage that are shown again, and those after them that are to be copied
NAMES = ("Amber", "Birch", "Cedar", "Delta", "Ember", "Falcon", "Granite", "Harbor")  # of what has a code
DIGITS = 5  # of a code

INSTRUCTION = (
    "Given a customer service query, please predict the intent of the query. The predicted answer must come from the "
    "demonstration examples with the exact format. The examples are as follows:\n"
)


def copy_probes(blocks: torch.LongTensor, n_begin: int = 0, seed: int = 0) -> list[Request]:
    """A passage that makes no sense, much later its first tokens again: does the model go on with the rest of it?

    blocks: text (n, length), of which each begins with `n_begin` tokens that are no text. The passage is CUE + COPIED of the
    block's own tokens in random order, so that nothing but the context tells what follows. It stands at a depth that differs
    from block to block, the cue is the end of the block; a request reads `length` tokens before the first that it predicts.
    """
    blocks = as_tokens(blocks, shortest=n_begin + 2 * CUE + COPIED)
    rng = np.random.default_rng(seed)
    requests = []
    for i, block in enumerate(blocks.tolist()):
        text = block[n_begin : len(block) - CUE]
        passage = rng.choice(text, CUE + COPIED).tolist()
        start = round((len(text) - len(passage)) * _depth(i, len(blocks)))
        text[start : start + len(passage)] = passage
        requests.append((block[:n_begin] + text + passage[:CUE], passage[CUE:]))
    return requests


def retrieval_probes(blocks: torch.LongTensor, tokenizer, n_begin: int = 0, seed: int = 0) -> list[Request]:
    """Eight sentences that give a name a code, spread over a text; at its end one of the names: which is its code?

    blocks: as in `copy_probes`; a block is cut so that a request reads no more than `length` tokens. Codes are random, and the
    name that is asked for differs from block to block, so that its sentence stands at another depth. Raises LLMDropError for
    blocks that are too short to hold the sentences.
    """
    blocks = as_tokens(blocks)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    rng = np.random.default_rng(seed)
    requests = []
    for i, block in enumerate(blocks.tolist()):
        codes = [ids(" " + "".join(map(str, rng.integers(10, size=DIGITS)))) for _ in NAMES]
        openings = [ids(f"\nThe code of {name} is") for name in NAMES]
        facts = [opening + code + ids(".\n") for opening, code in zip(openings, codes, strict=True)]
        asked = i % len(NAMES)
        room = len(block) - n_begin - sum(map(len, facts)) - len(openings[asked])
        if room < 0:
            raise LLMDropError(
                f"Contexts of {len(block)} tokens are too short for retrieval: its sentences alone take {len(block) - room}."
            )
        context, text = block[:n_begin], block[n_begin : n_begin + room]
        ends = np.linspace(0, room, len(facts) + 2).round().astype(int)  # text before, between and after the sentences
        for fact, start, end in zip(facts, ends, ends[1:], strict=False):
            context = context + text[start:end] + fact
        requests.append((context + text[ends[-2] :] + openings[asked], codes[asked]))
    return requests


def _depth(i: int, n: int) -> float:
    """From 0 to 1 over the probes: where in the text the passage stands."""
    return i / (n - 1) if n > 1 else 0.5


# ---- classification by many examples (BANKING77) --------------------------------------------------------------------------


def load_intents(name: str = "banking77") -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Queries with their intents, (text, label), to show and to ask about. Raises what `fetch_hub` raises."""
    source = catalogue()["classification"][name]
    folder = fetch_hub(source["hub"], source["revision"], source["files"])
    shown, asked = (_read(folder / file, source["fields"]) for file in source["files"])
    return shown, asked


def _read(file: Path, fields: Sequence[str]) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        return [tuple(str(row[field]).strip() for field in fields) for row in rows]  # type: ignore[misc]
    except KeyError as error:
        raise LLMDropError(
            f"{file.name} lacks the field {error}: it is not the file that data/sources.yaml describes."
        ) from error


def many_shot_probes(
    shown: Sequence[tuple[str, str]],
    asked: Sequence[tuple[str, str]],
    tokenizer,
    shots: int,
    limit: int | None,
    begin: Sequence[int] = (),
) -> list[Request]:
    """Queries to classify after `shots` examples of each label, in rounds, as in LongICLBench (Li et al. 2024).

    limit: of `asked`, drawn by a fixed seed; None: all. begin: token ids that a text begins with. An answer is a label and the
    end of its line. Raises LLMDropError if a label has too few examples.
    """
    shots = whole(shots, "The number of examples of each label")
    by_label: dict[str, list[str]] = defaultdict(list)
    for text, label in shown:
        by_label[label].append(text)
    if few := [label for label, texts in by_label.items() if len(texts) < shots]:
        raise LLMDropError(f"The label {few[0]!r} has {len(by_label[few[0]])} examples, but {shots} were asked for.")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(shots):
        for label in rng.permutation(sorted(by_label)).tolist():
            lines.append(f"service query: {by_label[label][i]}\nintent category: {label}\n")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    beginning = [*begin, *ids(INSTRUCTION + "".join(lines))]
    chosen = drawn(len(asked), limit)
    requests = []
    for text, label in asked if chosen is None else [asked[i] for i in chosen]:
        question = f"service query: {text}\nintent category:"
        read, with_answer = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (question, f"{question} {label}\n")
        )
        n = _common(read, with_answer)
        requests.append((beginning + with_answer[:n], with_answer[n:]))
    return requests


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
