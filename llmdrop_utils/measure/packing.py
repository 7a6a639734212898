"""Requests for log-likelihoods -> rows of tokens in which nothing that they share is computed twice.

A request is a context and a continuation to score. Requests with a common beginning (the choices of one question) form a
tree; trees stand side by side in a row, and each token sees only its ancestors. A long beginning that many requests share
(the examples before all questions of a subject) is kept apart as a prefix that every row sees.
"""

import dataclasses

import numpy as np
import torch

Request = tuple[list[int], list[int]]  # token ids of context (one at least) and of continuation

ROW = 144  # tokens in a row: longer rows waste attention on what is masked, shorter ones leave gaps; a tree may be longer

ALIGN = 16  # attention is fast, and takes a mask as it is, over a multiple of so many keys

PREFIX = 128  # a common beginning is kept apart from this length on; below it, computing it with each row costs less

TOKEN = 1024  # what a token costs besides attention, in tokens that it could see instead


@dataclasses.dataclass
class Row:
    """Trees of tokens. A token's parent is the one before it in its own sequence."""

    tokens: list[int]
    parents: list[int]  # index in this row; -1: the first after the prefix
    scored: list[tuple[int, int, int]]  # request, index of the token that predicts, token to predict

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """One sequence alone: ordinary causal attention."""
        return self.parents == list(range(-1, len(self) - 1))

    def absorb(self, other: "Row") -> None:
        """Put the trees of `other` beside those of this row."""
        shift = len(self)
        self.tokens += other.tokens
        self.parents += [parent if parent < 0 else parent + shift for parent in other.parents]
        self.scored += [(request, index + shift, target) for request, index, target in other.scored]


@dataclasses.dataclass
class Batch:
    """Rows that go through the model together, padded on the right to (B, T)."""

    rows: list[Row]
    width: int  # T

    def halves(self) -> tuple["Batch", "Batch"]:
        middle = len(self.rows) // 2
        return Batch(self.rows[:middle], self.width), Batch(self.rows[middle:], self.width)

    def tokens(self) -> torch.LongTensor:
        """Token ids (B, T)."""
        tokens = torch.zeros(len(self.rows), self.width, dtype=torch.long)
        for out, row in zip(tokens, self.rows, strict=True):
            out[: len(row)] = torch.tensor(row.tokens)
        return tokens

    def positions(self, n_prefix: int) -> torch.LongTensor:
        """Positions (B, T): a token's distance from the beginning of its own sequence, the prefix included."""
        positions = torch.zeros(len(self.rows), self.width, dtype=torch.long)
        for out, row in zip(positions, self.rows, strict=True):
            depth: list[int] = []
            for parent in row.parents:
                depth.append(n_prefix if parent < 0 else depth[parent] + 1)
            out[: len(row)] = torch.tensor(depth)
        return positions

    def mask(self, n_prefix: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to attention scores, (B, 1, T, n_prefix + T): 0 for prefix, ancestors and itself, otherwise the
        lowest number; None if ordinary causal attention does."""
        if n_prefix == 0 and all(row.is_chain for row in self.rows):
            return None
        seen = np.zeros((len(self.rows), self.width, self.width), dtype=bool)
        seen[:, range(self.width), range(self.width)] = True  # padding sees itself: no row without a score
        for ancestors, row in zip(seen, self.rows, strict=True):
            for index, parent in enumerate(row.parents):
                if parent >= 0:
                    ancestors[index] |= ancestors[parent]
        mask = torch.zeros(len(self.rows), 1, self.width, n_prefix + self.width, dtype=dtype)
        mask[..., n_prefix:].masked_fill_(~torch.from_numpy(seen)[:, None], torch.finfo(dtype).min)
        return mask

    def scored(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions that predict (n,), as indices into (B * T); and for each token to predict (m,): its request, which of
        the n predicts it, and the token."""
        flat = [
            (request, b * self.width + index, target)
            for b, row in enumerate(self.rows)
            for request, index, target in row.scored
        ]
        request, index, target = np.array(flat, dtype=np.int64).reshape(-1, 3).T
        unique, which = np.unique(index, return_inverse=True)
        return unique, request, which, target


@dataclasses.dataclass
class Group:
    """Batches whose sequences all continue one prefix."""

    prefix: list[int]
    batches: list[Batch]


def pack(
    requests: list[Request], max_length: int, batch_tokens: int, share: bool = True, alone_from: int | None = None
) -> list[Group]:
    """Arrange requests for scoring; `share=False` gives every distinct sequence a row of its own.

    As in lm-eval, the last token is predicted but never read, and a sequence longer than `max_length` + 1 loses its
    beginning. Sequences that read `alone_from` tokens or more get a batch of their own, and come first, the longest ahead,
    which is the order of lm-eval.
    """
    sequences = [((context + continuation)[-(max_length + 1) :], len(continuation)) for context, continuation in requests]
    inputs = [sequence[:-1] for sequence, _ in sequences]
    order = sorted(range(len(requests)), key=inputs.__getitem__)
    loose, groups = [], []
    if alone_from is not None:
        long = [i for i in order if len(inputs[i]) >= alone_from]
        order = [i for i in order if len(inputs[i]) < alone_from]
        if long:
            groups.append(Group([], _batches(_trees(long, inputs, sequences, 0, branch=False), 1, 0)))
    for members in _shared_beginnings(order, inputs, sequences) if share else []:
        n_prefix = _common(inputs[members[0]], inputs[members[-1]])
        n_prefix = min(n_prefix, *(len(inputs[i]) - sequences[i][1] for i in members))  # what predicts stays in the rows
        trees = _trees(members, inputs, sequences, n_prefix)
        if n_prefix >= PREFIX and sum(map(len, trees)) > n_prefix:
            rows = _side_by_side(trees, n_prefix)
            groups.append(Group(inputs[members[0]][:n_prefix], _batches(rows, batch_tokens, n_prefix)))
        else:
            loose += members
    if not share:
        rows = _trees(order, inputs, sequences, 0, branch=False)
    else:
        rows = _side_by_side(_trees(loose, inputs, sequences, 0), 0)
    return groups + ([Group([], _batches(rows, batch_tokens, 0))] if rows else [])


def _shared_beginnings(order: list[int], inputs: list[list[int]], sequences: list) -> list[list[int]]:
    """Runs of sorted requests that have PREFIX tokens or more in common."""
    runs: list[list[int]] = []
    for i in order:
        if runs and _common(inputs[runs[-1][0]], inputs[i], PREFIX) >= PREFIX:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _trees(members: list[int], inputs: list[list[int]], sequences: list, n_prefix: int, branch: bool = True) -> list[Row]:
    """Sorted requests, less their prefix, as trees: each continues what it shares with the one before."""
    trees: list[Row] = []
    before: list[int] = []  # the sequence before, and where its tokens are in the last tree
    path: list[int] = []
    for i in members:
        tokens = inputs[i][n_prefix:]
        shared = _common(before, tokens)
        same = shared == len(before) == len(tokens)
        new = len(tokens) - shared
        # In one tree, what is shared is computed once, but all the rest of the tree is there to be masked.
        worth = branch and trees and shared * TOKEN > 2 * new * len(trees[-1])
        if not (same or worth):
            trees.append(Row([], [], []))
            shared, path = 0, []
        tree = trees[-1]
        path = path[:shared]
        for token in tokens[shared:]:
            tree.parents.append(path[-1] if path else -1)
            path.append(len(tree.tokens))
            tree.tokens.append(token)
        sequence, n_scored = sequences[i]
        n_scored = min(n_scored, len(tokens))  # a continuation that fills the model's length loses its beginning
        tree.scored += [(i, index, target) for index, target in zip(path[-n_scored:], sequence[-n_scored:], strict=True)]
        before = tokens
    return trees


def _aligned(length: int, n_prefix: int) -> int:
    return length + -(n_prefix + length) % ALIGN


def _side_by_side(trees: list[Row], n_prefix: int) -> list[Row]:
    """First fit, longest first: rows of ROW tokens, or of one tree that is longer."""
    limit = _aligned(ROW, n_prefix)
    rows: list[Row] = []
    open_rows: list[Row] = []
    for tree in sorted(trees, key=len, reverse=True):
        row = next((row for row in open_rows if len(row) + len(tree) <= limit), None)
        if row is None:
            rows.append(tree)
            open_rows.append(tree)
        else:
            row.absorb(tree)
        open_rows = [row for row in open_rows if len(row) < limit - 4]
    return rows


def _batches(rows: list[Row], batch_tokens: int, n_prefix: int) -> list[Batch]:
    """Rows of similar length together, the longest first, so that memory runs out at once if it does.

    Cut where it costs least: a batch costs its area, padding included, and a sixteenth of a full one besides.
    """
    rows = sorted(rows, key=len, reverse=True)
    widths = [_aligned(len(row), n_prefix) for row in rows]
    cost, cut = [0.0] + [float("inf")] * len(rows), [0] * (len(rows) + 1)  # of the first n rows; where their last batch starts
    for start, width in enumerate(widths):
        most = max(1, batch_tokens // width)
        for end in range(start + 1, min(start + most, len(rows)) + 1):
            total = cost[start] + (end - start) * width + batch_tokens / 16
            if total < cost[end]:
                cost[end], cut[end] = total, start
    batches: list[Batch] = []
    end = len(rows)
    while end:
        batches.append(Batch(rows[cut[end] : end], widths[cut[end]]))
        end = cut[end]
    return batches[::-1]


def _common(a: list[int], b: list[int], at_most: int | None = None) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b)) if at_most is None else min(len(a), len(b), at_most)
    return next((i for i in range(n) if a[i] != b[i]), n)
