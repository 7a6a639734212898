"""Confidence in choices, by hand and beside lm-eval's own accuracy."""

import math

import families
import numpy as np
import pytest
import torch

from llmdrop_utils import LLMDropError
from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.measure.confidence import binned_gaps, calibration_error, score_choices
from llmdrop_utils.measure.scoring import score
from llmdrop_utils.measure.tasks import score_task
from llmdrop_utils.sources.task_data import load_task

PLANS = (DropPlan(), DropPlan(attention=(1,), mlp=(2,)))


@pytest.fixture(scope="module")
def small_model(tiny_model):
    torch.manual_seed(0)
    return families.tiny("llama", vocab_size=257, max_position_embeddings=4096), tiny_model[1]


@pytest.mark.parametrize("name", ["openbookqa", "winogrande"])
def test_right_where_lm_eval_says_so(small_model, name):
    found = score_choices(*small_model, load_task(name, 0), PLANS, limit=6)
    scores = score_task(*small_model, load_task(name, 0), PLANS, limit=6)
    assert np.array_equal(found.right, scores.metrics["acc"])
    assert found.chance == scores.chance


def test_confidence_is_the_softmax_over_choices(small_model):
    """WinoGrande puts each choice into the context, and asks for the rest of the sentence."""
    model, tokenizer = small_model
    members = load_task("winogrande", 0)
    found = score_choices(model, tokenizer, members, limit=1)
    first = [instance.arguments for instance in members[0].instances]
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    logprobs = score(model, [(ids(context), ids(rest)) for context, rest in first]).logprob[0]
    odds = [math.exp(value - logprobs.max()) for value in logprobs]
    assert found.confidence[0, 0] == pytest.approx(max(odds) / sum(odds))


def test_a_task_without_choices(small_model):
    with pytest.raises(LLMDropError, match="this task has none"):
        score_choices(*small_model, load_task("gsm8k", 0), PLANS, limit=1)


def test_calibration_error_by_hand():
    """Bins (0.9, 1] with 0.95, 0.95, right and wrong, and (0.3, 0.4] with 0.4, right: 2/3 x 0.45 + 1/3 x 0.6."""
    confidence, right = np.array([0.95, 0.95, 0.4]), np.array([1.0, 0.0, 1.0])
    assert calibration_error(confidence, right) == pytest.approx(2 / 3 * 0.45 + 1 / 3 * 0.6)
    gaps = binned_gaps(confidence, right)
    assert gaps[:, 9] == pytest.approx([0.05, -0.95, 0])
    assert gaps[:, 3] == pytest.approx([0, 0, 0.6])
    assert np.abs(gaps).sum() == pytest.approx(1.6), "each document is in one bin"
    assert calibration_error(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0


def test_an_edge_belongs_to_the_lower_bin():
    assert calibration_error(np.array([0.5, 0.45]), np.array([1.0, 0.0])) == pytest.approx(abs(1 - 0.95) / 2)
