"""Questions about the context: what is asked, and that a model which copies answers them."""

import json

import pytest
import torch

from llmdrop_utils import LLMDropError, NotAvailable
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.sources import probes
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.sources.probes import (
    COPIED,
    CUE,
    NAMES,
    copy_probes,
    load_intents,
    many_shot_probes,
    retrieval_probes,
)

BLOCKS = torch.arange(3 * 100).view(3, 100)


def places(part: list[int], whole: list[int]) -> list[int]:
    return [i for i in range(len(whole) - len(part) + 1) if whole[i : i + len(part)] == part]


def test_what_follows_the_cue_stands_in_the_context():
    requests = copy_probes(BLOCKS)
    starts = []
    for block, (context, answer) in zip(BLOCKS.tolist(), requests, strict=True):
        cue = context[-CUE:]
        first, last = places(cue, context)  # once in the passage, once at the end
        assert last == len(context) - CUE
        assert context[first + CUE :][:COPIED] == answer
        assert len(context) == len(block)
        assert set(cue + answer) <= set(block), "a passage of the block's own tokens"
        assert cue + answer != sorted(cue + answer), "in random order"
        starts.append(first)
    assert starts == [0, (100 - CUE - CUE - COPIED) // 2, 100 - CUE - CUE - COPIED], "from the beginning to the end of the text"
    assert requests == copy_probes(BLOCKS)
    assert requests != copy_probes(BLOCKS, seed=1)


def test_what_begins_a_block_stays_where_it_is():
    blocks = torch.cat([torch.full((3, 2), 999), BLOCKS], dim=1)
    for context, answer in copy_probes(blocks, n_begin=2):
        assert context[:2] == [999, 999]
        assert 999 not in context[2:] + answer


def test_the_code_of_each_name_stands_in_the_text_once():
    tokenizer = byte_tokenizer()
    text = torch.tensor([tokenizer("x")["input_ids"] * 600] * (len(NAMES) + 1))
    requests = retrieval_probes(text, tokenizer)
    for i, (context, answer) in enumerate(requests):
        read, code = tokenizer.decode(context), tokenizer.decode(answer)
        name = NAMES[i % len(NAMES)]
        assert len(context) == 600
        assert read.endswith(f"\nThe code of {name} is")
        assert read.count(f"\nThe code of {name} is{code}.\n") == 1
        assert all(read.count(f"The code of {other} is ") == 1 for other in NAMES)
        assert code.strip().isdigit()
        assert len(code) == 6
    read = tokenizer.decode(requests[0][0])
    runs = [len(run) for run in read.replace("\n", "|").split("|") if set(run) == {"x"}]
    assert len(runs) == len(NAMES) + 1, "text before, between and after the sentences"
    assert max(runs) - min(runs) <= 1
    assert len({tokenizer.decode(answer) for _, answer in requests}) == len(requests)


def test_too_short_for_the_sentences():
    with pytest.raises(LLMDropError, match="Contexts of 100 tokens are too short for retrieval: its sentences alone take 257"):
        retrieval_probes(torch.zeros(1, 100, dtype=torch.long), byte_tokenizer())


SHOWN = [(f"query {label}{i}", label) for i in range(2) for label in ("lost card", "top up")]


def test_examples_of_each_label_in_rounds():
    tokenizer = byte_tokenizer()
    ((context, answer),) = many_shot_probes(SHOWN, [("where is it?", "lost card")], tokenizer, 2, None, begin=[7])
    assert context[0] == 7
    read = tokenizer.decode(context[1:])
    assert read.endswith("service query: where is it?\nintent category:")
    assert tokenizer.decode(answer) == " lost card\n"
    labels = [line.split(": ")[1] for line in read.splitlines() if line.startswith("intent category: ")]
    assert [sorted(labels[:2]), sorted(labels[2:])] == [["lost card", "top up"]] * 2
    assert [read.count(text) for text, _ in SHOWN] == [1] * 4


def test_a_label_with_too_few_examples():
    with pytest.raises(LLMDropError, match="The label 'lost card' has 2 examples, but 3 were asked for"):
        many_shot_probes(SHOWN, SHOWN, byte_tokenizer(), 3, None)


def test_intents_from_the_hub(network):
    """The files of data/sources.yaml, by the hub's protocol."""
    source = catalogue()["classification"]["banking77"]
    rows = lambda *pairs: "\n".join(json.dumps({"text": t, "label": 0, "label_text": n}) for t, n in pairs).encode()  # noqa: E731
    files = dict(zip(source["files"], (rows(*SHOWN), rows(("where?", "lost card"))), strict=True))
    network.repositories[f"datasets/{source['hub']}"] = {source["revision"]: files}
    assert load_intents() == (SHOWN, [("where?", "lost card")])


def test_intents_without_a_hub(network, monkeypatch):
    source = catalogue()["classification"]["banking77"] | {"hub": "org/unseen"}  # of the other, files are stored by now
    monkeypatch.setattr(probes, "catalogue", lambda: {"classification": {"banking77": source}})
    network.down = True
    with pytest.raises(NotAvailable, match="hub could not be reached"):
        load_intents()


def test_another_file_than_expected(network, monkeypatch):
    source = catalogue()["classification"]["banking77"]
    monkeypatch.setattr(probes, "catalogue", lambda: {"classification": {"other": source | {"hub": "org/other"}}})
    network.repositories["datasets/org/other"] = {source["revision"]: dict.fromkeys(source["files"], b'{"query": "a"}\n')}
    with pytest.raises(LLMDropError, match="lacks the field 'text'"):
        load_intents("other")
