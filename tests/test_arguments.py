"""What public functions take, and the one clear error for anything else."""

import families
import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from llmdrop_utils import (
    DropPlan,
    FastLM,
    LLMDropError,
    Load,
    dropped,
    find_anatomy,
    fingerprint,
    greedy,
    kv_bytes,
    load_task,
    load_tokens,
    measure_importance,
    measure_speed,
    perplexity,
    run_tasks,
    score_task,
    score_text,
    select,
    select_at_random,
    select_by,
    select_consecutive_blocks,
    select_iteratively,
    select_last,
)
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.selection.methods import Context
from llmdrop_utils.sources.texts import pack

ROWS = [[3, 4, 5, 6], [7, 8, 9, 10]]
TOKENS = torch.tensor(ROWS)
TINY = families.tiny("llama", vocab_size=257, max_position_embeddings=2048)
SCORES = measure_importance(TINY, TOKENS)
TOKENIZER = byte_tokenizer()

NOT_WHOLE = [0.5, 2.0, True, float("nan"), "2", None, [1], np.float64(2), np.True_, torch.tensor(1.5)]
WHOLE = [2, np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)]


# ---- numbers ----------------------------------------------------------------------------------------------------------

# Each takes one number; with 2 it works.
COUNTS = {
    "select": lambda n: select(SCORES, "attention", n),
    "select joint": lambda n: select(SCORES, "joint", n),
    "select_by": lambda n: select_by("one-shot", Context(TINY, TOKENS), "mlp", n),
    "select_iteratively": lambda n: select_iteratively(TINY, TOKENS, "attention", n),
    "select_consecutive_blocks": lambda n: select_consecutive_blocks(TINY, TOKENS, n),
    "select_last": lambda n: select_last(3, "block", n),
    "select_last, layers": lambda n: select_last(n, "block", 1),
    "select_at_random": lambda n: select_at_random(3, "mlp", n, 0),
    "select_at_random, layers": lambda n: select_at_random(n, "mlp", 1, 0),
    "select_at_random, seed": lambda n: select_at_random(3, "mlp", 1, n),
    "batch size of importance": lambda n: measure_importance(TINY, TOKENS, n),
    "batch size of iterative": lambda n: select_iteratively(TINY, TOKENS, "mlp", 1, n),
    "batch size of consecutive": lambda n: select_consecutive_blocks(TINY, TOKENS, 1, n),
    "batch size of FastLM": lambda n: FastLM(TINY, TOKENIZER, batch_size=n),
    "n_samples": lambda n: load_tokens("random-words", TOKENIZER, n, 8),
    "seq_len": lambda n: load_tokens("random-words", TOKENIZER, 1, n),
    "pack": lambda n: pack(["some text"], TOKENIZER, n),
    "new_tokens": lambda n: greedy(TINY, TOKENS, n),
    "repeats": lambda n: measure_speed(TINY, Load("decode", 4, 1), repeats=n),
    "context": lambda n: Load("decode", n, 1),
    "steps": lambda n: Load("decode", 4, n),
    "batch size of a load": lambda n: Load("decode", 4, 1, n),
    "kv_bytes": lambda n: kv_bytes(TINY.config, DropPlan(), n, 8, 4),
    "kv_bytes, length": lambda n: kv_bytes(TINY.config, DropPlan(), 1, n, 4),
}
OPTIONAL = {
    "limit": lambda n: run_tasks(TINY, TOKENIZER, "winogrande", n, 0),
    "limit of score_task": lambda n: score_task(TINY, TOKENIZER, load_task("winogrande", 0), limit=n),
    "num_fewshot": lambda n: load_task("winogrande", n),
    "room": lambda n: Load("decode", 1, 1, room=n),
}


@pytest.mark.parametrize("name", [*COUNTS, *OPTIONAL])
def test_counts_are_whole_numbers(name):
    function = (COUNTS | OPTIONAL)[name]
    for value in [value for value in NOT_WHOLE if value is not None or name in COUNTS]:
        with pytest.raises(LLMDropError, match="must be a whole number, but is"):
            function(value)
    with pytest.raises(LLMDropError):
        function(-1)
    for value in WHOLE:
        function(value)


def test_numpy_numbers_choose_the_same():
    assert select(SCORES, "attention", np.int32(2)) == select(SCORES, "attention", 2)
    assert select_at_random(3, "mlp", np.int8(2), np.int64(5)) == select_at_random(3, "mlp", 2, 5)


# ---- tokens -----------------------------------------------------------------------------------------------------------

TAKE_TOKENS = {
    "measure_importance": lambda tokens: measure_importance(TINY, tokens).fingerprint,
    "perplexity": lambda tokens: perplexity(TINY, tokens),
    "score_text": lambda tokens: score_text(TINY, tokens).nll.tolist(),
    "select_iteratively": lambda tokens: select_iteratively(TINY, tokens, "mlp", 1),
    "select_consecutive_blocks": lambda tokens: select_consecutive_blocks(TINY, tokens, 1),
    "greedy": lambda tokens: greedy(TINY, tokens, 2).tolist(),
}


@pytest.mark.parametrize("name", TAKE_TOKENS)
def test_tokens_in_every_plain_form(name):
    expected = TAKE_TOKENS[name](TOKENS)
    mask = torch.ones_like(TOKENS)
    forms = [
        ROWS,
        tuple(map(tuple, ROWS)),
        np.array(ROWS),
        np.array(ROWS, dtype=np.uint16),
        TOKENS.int(),
        list(TOKENS),
        [np.array(row) for row in ROWS],
        {"input_ids": ROWS},
        BatchEncoding({"input_ids": TOKENS, "attention_mask": mask}),
        BatchEncoding({"input_ids": ROWS, "attention_mask": mask.tolist()}),
    ]
    for form in forms:
        assert TAKE_TOKENS[name](form) == expected, form


@pytest.mark.parametrize("name", TAKE_TOKENS)
@pytest.mark.parametrize(
    "tokens",
    [
        [], [[]], torch.empty(0, 4, dtype=torch.long), [3, 4, 5], TOKENS[0], TOKENS[None], TOKENS.float(), TOKENS.bool(),
        [[3.0, 4.0]], [[3, 4], [5]], "some text", ["some", "text"], None, 5, {"ids": ROWS},
        BatchEncoding({"input_ids": [3, 4]}),
        BatchEncoding({"input_ids": [[3, 4], [5]], "attention_mask": [[1, 1], [1]]}),
    ],
    ids=repr,
)  # fmt: skip
def test_other_tokens_are_refused(name, tokens):
    with pytest.raises(LLMDropError, match="Expected token ids"):
        TAKE_TOKENS[name](tokens)


@pytest.mark.parametrize("name", TAKE_TOKENS)
@pytest.mark.parametrize("token", [-1, 257, 10**9])
def test_unknown_tokens_are_refused(name, token):
    with pytest.raises(LLMDropError, match="another model's tokenizer"):
        TAKE_TOKENS[name]([[3, token, 4]])


def test_padding_is_not_text():
    padded = BatchEncoding({"input_ids": ROWS, "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]})
    with pytest.raises(LLMDropError, match="hold padding, which would be measured as text"):
        perplexity(TINY, padded)
    scores = measure_importance(TINY, padded)
    assert scores.weights.tolist() == [4, 2]
    assert (
        scores.fingerprint
        == measure_importance(TINY, TOKENS, attention_mask=torch.tensor(padded["attention_mask"])).fingerprint
    )


def test_no_mask_is_no_padding():
    assert perplexity(TINY, {"input_ids": ROWS, "attention_mask": None}) == perplexity(TINY, TOKENS)


@pytest.mark.parametrize("mask", [[[1, 1, 1, 1], [1]], "abc", [[1, 1]], torch.zeros(2, 4), 5])
def test_other_masks_are_refused(mask):
    with pytest.raises(LLMDropError, match="The attention mask must have the shape of the tokens"):
        measure_importance(TINY, TOKENS, attention_mask=mask)


def test_fingerprints_are_of_token_ids():
    for wrong in (ROWS, TOKENS.float(), None):
        with pytest.raises(LLMDropError, match="Expected a tensor of token ids"):
            fingerprint(wrong)


# ---- models, tokenizers, plans, tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["smollm2-135m", (TINY, TOKENIZER), None])
def test_a_model_is_a_model(model):
    for function in (measure_importance, perplexity, find_anatomy, lambda m, *_: dropped(m, DropPlan()).__enter__()):
        with pytest.raises(LLMDropError, match="Expected a model, found"):
            function(*((model, TOKENS) if function is not find_anatomy else (model,)))


@pytest.mark.parametrize("tokenizer", [None, "smollm2-135m"])
def test_a_tokenizer_is_a_tokenizer(tokenizer):
    for function in (
        lambda: load_tokens("random-words", tokenizer, 1, 8),
        lambda: run_tasks(TINY, tokenizer, "winogrande", 1, 0),
        lambda: FastLM(TINY, tokenizer),
    ):
        with pytest.raises(LLMDropError, match="Expected a tokenizer, found"):
            function()


def test_one_plan_is_a_list_of_one():
    plan = DropPlan((1,))
    assert score_text(TINY, TOKENS, plan).nll.tolist() == score_text(TINY, TOKENS, [plan]).nll.tolist()
    assert len(measure_speed(TINY, Load("prefill", 4), plan, repeats=1)) == 1
    members = load_task("winogrande", 0)
    assert score_task(TINY, TOKENIZER, members, plan, limit=2).metrics["acc"].shape == (1, 2)


@pytest.mark.parametrize("plans", [[], [None], [(1, 2)], ["attention"], [DropPlan(), 3]])
def test_plans_are_plans(plans):
    for function in (
        lambda: score_text(TINY, TOKENS, plans),
        lambda: measure_speed(TINY, Load("prefill", 4), plans),
        lambda: score_task(TINY, TOKENIZER, load_task("winogrande", 0), plans),
    ):
        with pytest.raises(LLMDropError, match="drop plan"):
            function()


def test_other_things_are_named():
    for function, message in (
        (lambda: run_tasks(TINY, TOKENIZER, 5), "Expected names of tasks, found 5"),
        (lambda: run_tasks(TINY, TOKENIZER, ["piqa", None]), "Expected names of tasks"),
        (lambda: score_task(TINY, TOKENIZER, "piqa"), "Expected what `load_task` returns, found 'piqa'"),
        (lambda: select({"attention": [1.0]}, "attention", 1), "Expected what `measure_importance` returns, found dict"),
        (lambda: select(SCORES, ["attention"], 1), "Unknown kind"),
        (lambda: measure_speed(TINY, "decode"), "Expected a Load"),
        (lambda: greedy(TINY, TOKENS, 2, "fast"), "Unknown back end 'fast'"),
        (lambda: load_tokens(["web"], TOKENIZER, 1, 8), "Expected the name of one corpus"),
        (lambda: load_task(["boolq"]), "Expected the name of one task"),
    ):
        with pytest.raises(LLMDropError, match=message):
            function()
