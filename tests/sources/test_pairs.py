"""Passages in two halves."""

import pytest

from llmdrop_utils import LLMDropError
from llmdrop_utils.sources import pairs as module
from llmdrop_utils.sources.pairs import fingerprint_texts, load_pairs


@pytest.fixture(autouse=True)
def documents(monkeypatch):
    texts = ["a b c d e f", "too short", "g h\n\ni j", "a b c d x", "k l m n"]
    monkeypatch.setattr(module, "load_documents", lambda corpus: texts)


def test_pairs_are_halves_of_documents_of_their_own():
    """The fourth document begins like the first: it would be a second partner."""
    assert load_pairs("hand", 3, words=2) == [("a b", "c d"), ("g h", "i j"), ("k l", "m n")]
    assert load_pairs("hand", 1, words=2, skip=2) == [("k l", "m n")]


def test_too_few_passages():
    with pytest.raises(LLMDropError, match="'hand' holds 3 passages of 4 words, but 4 were asked for"):
        load_pairs("hand", 2, words=2, skip=2)


def test_fingerprint_of_texts():
    assert len({fingerprint_texts(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])}) == 4
