"""Measures of embeddings, on vectors whose cosines are seen at a glance."""

import numpy as np
import pytest

from llmdrop_utils import LLMDropError
from llmdrop_utils.measure.embeddings import cosines, guessed_label, nearest_has_label, rank_agreement, retrieval_ranks


def at(*degrees):
    """Vectors in the plane, of different lengths: lengths must not matter."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, len(degrees) + 1)[:, None]


def test_cosines():
    assert cosines(at(0, 0, 30, 0), at(0, 60, 120, 180)) == pytest.approx([1, 0.5, 0, -1])
    assert list(cosines(at(0), np.zeros((1, 2)))) == [0]  # nothing is left of it


def test_rank_agreement():
    """Four samples, of which the last moves from 90 to 25 degrees. Ranks by similarity of the three others (3: nearest).

    0:  10, 40, 90 have 3 2 1, then 3 1 2: 1 - 6 (0 + 1 + 1) / 24 = 0.5.
    10: 0, 40, 90 have 3 2 1, then 3 1 2: 0.5.
    40: 0, 10, 90 have 2 3 1, then 1 2 3: 1 - 6 (1 + 1 + 4) / 24 = -0.5.
    90: 0, 10, 40 have 1 2 3, then, seen from 25, 1 2.5 2.5: Pearson's correlation of these.
    """
    dense, other = at(0, 10, 40, 90), at(0, 10, 40, 25)
    expected = [0.5, 0.5, -0.5, np.corrcoef([1, 2, 3], [1, 2.5, 2.5])[0, 1]]
    assert rank_agreement(dense, other) == pytest.approx(expected)


def test_rank_agreement_ignores_what_turns_all_alike():
    dense = at(0, 10, 40, 90, 200)
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    assert rank_agreement(dense, dense @ turn) == pytest.approx(np.ones(5))
    assert cosines(dense, dense @ turn) == pytest.approx(np.zeros(5), abs=1e-12)
    assert rank_agreement(dense, np.ones((5, 2))) == pytest.approx(np.zeros(5))  # all the same: no order is left


def test_rank_agreement_needs_an_order():
    with pytest.raises(LLMDropError, match="three samples or more, but there are 2"):
        rank_agreement(at(0, 1), at(0, 1))


def test_retrieval_ranks():
    """Queries at 0, 50 and 100 degrees, candidates at 10, 90 and 95: own distances 10, 40, 5; others of the second 40, 45."""
    assert list(retrieval_ranks(at(0, 50, 100), at(10, 90, 95))) == [1, 1.5, 1]
    assert list(retrieval_ranks(at(0, 50, 100), at(95, 90, 10))) == [3, 1.5, 3]  # the second: 45, 40, 40


def test_embeddings_that_are_all_the_same_find_nothing():
    """In the middle of three, whatever rounding does to equal vectors."""
    same = np.ones((3, 2)) * [[1], [0.1], [1 / 3]]
    assert list(retrieval_ranks(same, same)) == [2, 2, 2]
    assert list(nearest_has_label(same, np.array([0, 0, 1]))) == [0.5, 0.5, 0]


def test_nearest_has_label():
    """At 0, 10, 15, 90 degrees the nearest others are 10, 15, 10 and 15."""
    labels = np.array(["cat", "cat", "dog", "dog"])
    assert list(nearest_has_label(at(0, 10, 15, 90), labels)) == [1, 0, 0, 1]


def test_guessed_label():
    """Three cats and one dog: 3 of 4 find one of 2 cats among 3 others, so 3 x 2 of 4 x 3."""
    assert guessed_label(np.array(["cat", "cat", "dog", "cat"])) == 0.5


def test_infinities_are_no_embeddings():
    with pytest.raises(LLMDropError, match="not finite"):
        cosines(at(0, 1), np.array([[1.0, np.nan], [0, 1]]))
