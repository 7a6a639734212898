"""Passages in two halves: texts whose partner is known, so that retrieval needs no labels."""

import hashlib
import json
from collections.abc import Sequence

from ..base.checks import whole
from ..base.errors import LLMDropError
from .texts import load_documents

Pair = tuple[str, str]  # the first half of a passage, and its second half


def load_pairs(corpus: str, n: int, words: int, skip: int = 0) -> list[Pair]:
    """The beginnings of n documents of a corpus, each cut into two halves of so many words; the first `skip` are left out.

    Each pair is of a document of its own, so the other pairs are about something else. Words, not tokens: all models read the
    same text. Raises LLMDropError if too few documents are long enough.
    """
    n, words = whole(n, "The number of passages"), whole(words, "The number of words")
    skip = whole(skip, "The number of passages to skip", at_least=0)
    split = (document.split() for document in load_documents(corpus))
    pairs = [(" ".join(w[:words]), " ".join(w[words : 2 * words])) for w in split if len(w) >= 2 * words]
    pairs = list(dict.fromkeys(pairs))
    if len(pairs) < skip + n:
        raise LLMDropError(
            f"The corpus {corpus!r} holds {len(pairs)} passages of {2 * words} words, but {skip + n} were asked for. Ask "
            "for fewer or shorter ones, or name another corpus."
        )
    return pairs[skip : skip + n]


def fingerprint_texts(texts: Sequence[str]) -> str:
    """sha256 of texts, in hex: what the key of a result records about its input."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
