"""Rows of tokens against the plain meaning of a request: what is read before each scored token, and how often."""

import random

import numpy as np
import pytest
import torch

from llmdrop_utils.measure import packing
from llmdrop_utils.measure.packing import Group, Request, pack


def plain(request: Request, max_length: int) -> list[tuple[list[int], int]]:
    """For each scored token, what is read before it, and the token: as lm-eval does, one request alone."""
    context, continuation = request
    sequence = (context + continuation)[-(max_length + 1) :]
    first = max(1, len(sequence) - len(continuation))
    return [(sequence[:end], sequence[end]) for end in range(first, len(sequence))]


def read_back(groups: list[Group], n_requests: int) -> list[list[tuple[list[int], int]]]:
    """The same from rows, by each scored token's chain of parents."""
    found = [[] for _ in range(n_requests)]
    for group in groups:
        for row in (row for batch in group.batches for row in batch.rows):
            for request, index, target in row.scored:
                found[request].append((group.prefix + [row.tokens[i] for i in chain(row, index)], target))
    return found


def chain(row: packing.Row, index: int) -> list[int]:
    """Indices of a token's ancestors and of itself, the first first."""
    indices = []
    while index >= 0:
        indices.append(index)
        index = row.parents[index]
    return indices[::-1]


def computed(groups: list[Group]) -> int:
    """Number of tokens that the model reads."""
    return sum(len(group.prefix) + sum(len(row) for batch in group.batches for row in batch.rows) for group in groups)


def distinct(requests: list[Request]) -> int:
    """Number of different beginnings of what the requests read: nothing less suffices."""
    inputs = [(context + continuation)[:-1] for context, continuation in requests]
    return len({tuple(tokens[:end]) for tokens in inputs for end in range(1, len(tokens) + 1)})


def words(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(3, 1000), k=n)


def question(seed: int, n_context: int, n_answers: int = 4, n_answer: int = 30, before: tuple[int, ...] = ()) -> list[Request]:
    context = [*before, *words(seed, n_context)]
    return [(context, words(1000 * seed + k, n_answer)) for k in range(1, n_answers + 1)]


def random_requests(seed: int) -> list[Request]:
    """Few different tokens, so that much is shared by chance; and what is shared by intent."""
    rng = random.Random(seed)
    some = lambda low, high: [rng.randrange(3) for _ in range(rng.randint(low, high))]  # noqa: E731
    requests = [(some(1, 20), some(1, 6)) for _ in range(12)]
    prefix = some(10, 20)
    requests += [(prefix + some(0, 9), some(1, 5)) for _ in range(rng.randint(1, 12))]
    requests += rng.choices(requests, k=4)  # duplicates
    for context, continuation in rng.choices(requests, k=4):  # the same tokens, divided elsewhere; a beginning; an extension
        whole = context + continuation
        middle = rng.randint(1, len(whole) - 1)
        requests += [(whole[:middle], whole[middle:]), (whole[:middle], [1]), (whole, some(1, 9))]
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_length", [100, 15, 4])  # 15, 4: many lose their beginning, some a part of their continuation
@pytest.mark.parametrize("sizes", [{}, {"PREFIX": 6, "ROW": 24, "TOKEN": 10}, {"PREFIX": 1, "ROW": 1, "TOKEN": 10**6}], ids=str)
def test_every_request_reads_its_own_sequence(monkeypatch, sizes, max_length, share):
    for name, size in sizes.items():
        monkeypatch.setattr(packing, name, size)
    for seed in range(25):
        requests = random_requests(seed)
        expected = [plain(request, max_length) for request in requests]
        assert read_back(pack(requests, max_length, 64, share), len(requests)) == expected


def test_a_long_prefix_is_kept_apart_and_read_once():
    prefix = tuple(words(1, 600))
    requests = [request for seed in range(2, 42) for request in question(seed, 50, 4, 3, prefix)]
    groups = pack(requests, 2048, 1024)
    assert [len(group.prefix) for group in groups] == [600]
    assert computed(groups) == distinct(requests)
    assert read_back(groups, len(requests)) == [plain(request, 2048) for request in requests]


def test_what_predicts_is_not_part_of_the_prefix():
    prefix = words(1, 200)
    requests = [(prefix, [7]), (prefix[:-3], [*prefix[-3:], 8]), *((prefix + words(k, 60), [9]) for k in range(2, 9))]
    (group, *_) = pack(requests, 2048, 1024)
    assert group.prefix == prefix[:-4]
    assert read_back([group], len(requests)) == [plain(request, 2048) for request in requests]


# As in HellaSwag, PIQA and ARC, without and with examples before the question; 300 and more is longer than a row.
@pytest.mark.parametrize("n_context", [8, 20, 60, 100, 140, 300, 1200])
@pytest.mark.parametrize("n_questions", [1, 30])
def test_choices_share_their_question(n_context, n_questions):
    requests = [request for seed in range(1, n_questions + 1) for request in question(seed, n_context)]
    assert computed(pack(requests, 2048, 1024)) == distinct(requests)


@pytest.mark.parametrize("n_questions", [2, 5, 20])
def test_questions_share_their_examples(n_questions):
    """Few of them are not worth a prefix, yet nothing is computed twice."""
    examples = tuple(words(99, 500))
    requests = [request for seed in range(1, n_questions + 1) for request in question(seed, 40, 4, 3, examples)]
    assert computed(pack(requests, 2048, 1024)) == distinct(requests)


def test_without_sharing_each_sequence_is_a_row():
    requests = question(1, 40, 4, 2) + question(1, 40, 4, 2) + [(words(1, 40), [5]), (words(1, 40), [6])]
    (group,) = pack(requests, 2048, 1024, share=False)
    rows = [row for batch in group.batches for row in batch.rows]
    assert all(row.is_chain for row in rows)
    assert len(rows) == len({tuple((context + continuation)[:-1]) for context, continuation in requests}) == 5
    assert not group.prefix
    assert all(batch.mask(0, torch.float32) is None for batch in group.batches)


@pytest.mark.parametrize("n_prefix", [0, 5])
def test_masks_show_ancestors_alone(monkeypatch, n_prefix):
    monkeypatch.setattr(packing, "ROW", 40)
    (group,) = pack(random_requests(3), 100, 200)
    assert any(batch.mask(0, torch.bfloat16) is not None for batch in group.batches)
    for batch in group.batches:
        mask, positions = batch.mask(n_prefix, torch.bfloat16), batch.positions(n_prefix)
        if mask is None:
            assert n_prefix == 0
            assert all(row.is_chain for row in batch.rows)
            continue
        expected = np.zeros((len(batch.rows), batch.width, n_prefix + batch.width), dtype=bool)
        expected[:, :, :n_prefix] = True
        for b, row in enumerate(batch.rows):
            assert batch.tokens()[b, : len(row)].tolist() == row.tokens
            for index in range(len(row)):
                ancestors = chain(row, index)
                expected[b, index, [n_prefix + i for i in ancestors]] = True
                assert positions[b, index] == n_prefix + len(ancestors) - 1
            for index in range(len(row), batch.width):
                expected[b, index, n_prefix + index] = True  # padding
        assert mask.dtype == torch.bfloat16
        assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}
        np.testing.assert_array_equal((mask[:, 0] == 0).numpy(), expected)


def test_batches_keep_to_their_size():
    requests = [request for seed in range(1, 40) for request in question(seed, 20 + seed)]
    (group,) = pack(requests, 2048, 1024)
    assert len(group.batches) > 5
    assert all(len(batch.rows) * batch.width <= 1024 for batch in group.batches)
    first, second = group.batches[0].halves()
    assert first.rows + second.rows == group.batches[0].rows


def test_batches_are_cut_where_it_costs_least():
    for seed in range(30):
        rng = random.Random(seed)
        rows = [packing.Row([1] * length, [], []) for length in rng.choices(range(1, 150), k=8)]
        n_prefix = rng.choice([0, 5, 130])
        found = packing._batches(list(rows), 640, n_prefix)
        ordered = sorted(rows, key=len, reverse=True)
        assert [row for batch in found for row in batch.rows] == ordered
        assert all((batch.width + n_prefix) % 16 == 0 for batch in found)
        assert all(0 <= batch.width - max(map(len, batch.rows)) < 16 for batch in found)
        every = []
        for cuts in range(2**7):  # a bit for each gap between rows
            ends = [i + 1 for i in range(7) if cuts >> i & 1] + [8]
            sizes = [(end - start, len(ordered[start])) for start, end in zip([0, *ends], ends, strict=False)]
            areas = [n * (length + -(length + n_prefix) % 16) for n, length in sizes]
            if all(area <= 640 for area in areas):
                every.append(sum(area + 40 for area in areas))
        assert sum(len(batch.rows) * batch.width + 40 for batch in found) == min(every)


def test_what_is_shared_must_be_worth_its_mask():
    """A token costs as much as attention to TOKEN others: two long questions that begin alike are better kept apart."""
    short = [(words(1, 20) + words(k, 20), [7]) for k in (2, 3)]
    long = [(words(1, 20) + words(k, 200), [7]) for k in (2, 3)]
    assert computed(pack(short, 2048, 1024)) == distinct(short) == 20 + 2 * 20
    assert computed(pack(long, 2048, 1024)) == 2 * 220


def test_no_requests():
    assert pack([], 2048, 1024) == []
