"""Records know all that determines their values."""

import json
import shutil

import pytest
import torch
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing

from llmdrop_utils import load_model, load_profile, load_tokens, locate_model, score_task
from llmdrop_utils.base.store import Store
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.sources.task_data import fingerprint_task, load_task
from llmdrop_utils.sources.texts import fingerprint_tokenizer
from llmdrop_utils.studies.curves import Tasks, task_work, text_work
from llmdrop_utils.studies.run import Run, importance_work
from llmdrop_utils.studies.work import DENSE

TASKS = {"names": ["winogrande"], "limit": 60, "n_drop": {}}


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A tiny model with a byte tokenizer, in a folder."""
    shutil.copytree(locate_model("tiny-llama").folder, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def run(folder, tmp_path):
    return Run("test", load_profile("smoke", str(folder)).replacing(tasks=TASKS), {}, store=Store(tmp_path / "records"))


def reverse_ids(folder):
    """The 256 bytes get each other's ids."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {byte: 255 - i for byte, i in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))


def prepend_end(folder):
    """Each text begins with the end-of-text token, as in OPT."""
    tokenizer = byte_tokenizer()
    ids = [("<|end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=ids)
    tokenizer.save_pretrained(folder)


def right(run, tasks) -> int:
    """How many documents of Winogrande are right: measured, or stored."""
    (model,) = run.models()
    (work,) = task_work(run, model, tasks, [DENSE], run.section(Tasks).limit)
    run.measure([work])
    return sum(run.values(work)[0]["metrics"]["acc"])


@pytest.mark.parametrize("change", [reverse_ids, prepend_end])
def test_another_tokenizer_is_another_record(run, folder, change):
    """The same weights and questions, other tokens: what was stored is not the answer."""
    members = load_task("winogrande", 0)
    before = right(run, {"winogrande": members})
    change(folder)
    truth = score_task(*load_model(str(folder)), members, limit=60).metrics["acc"].sum()
    assert right(run, {"winogrande": members}) == truth != before


def test_tokenizers_are_told_apart_by_content():
    def normalized(tokenizer):
        tokenizer.backend_tokenizer.normalizer = Lowercase()

    def with_merge(tokenizer):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["model"]["vocab"]["ab"] = 300
        content["model"]["merges"] = [["a", "b"]]
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))

    def beginning(tokenizer):
        special = [("<|end|>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=special)

    changes = [
        normalized,
        with_merge,
        beginning,
        lambda tokenizer: tokenizer.add_tokens(["the"]),
        lambda tokenizer: setattr(tokenizer, "bos_token", "<|end|>"),
        lambda tokenizer: setattr(tokenizer, "model_max_length", 50),
    ]
    prints = {fingerprint_tokenizer(byte_tokenizer())}
    for change in changes:
        tokenizer = byte_tokenizer()
        change(tokenizer)
        prints.add(fingerprint_tokenizer(tokenizer))
    assert len(prints) == 1 + len(changes)


def test_what_leaves_tokens_alone_leaves_the_fingerprint_alone(tmp_path):
    tokenizer = byte_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.padding_side, tokenizer.pad_token = "left", "a"
    assert fingerprint_tokenizer(tokenizer) == before


def test_a_task_is_also_its_answers():
    """The same questions with another key."""
    (task,) = load_task("winogrande", 0)
    before = fingerprint_task([task], 3)
    flip = lambda row: {"answer": {"1": "2", "2": "1"}[row["answer"]]}  # noqa: E731
    task.dataset["validation"] = task.dataset["validation"].map(flip, load_from_cache_file=False, keep_in_memory=True)
    assert fingerprint_task([task], 3) != before


def test_generation_settings_are_in_the_key(run, folder):
    (model,) = run.models()
    key = lambda name: task_work(run, model, {name: load_task(name, 0)}, [DENSE], run.section(Tasks).limit)[0].keys[0]  # noqa: E731
    before = key("gsm8k"), key("winogrande")
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    assert key("gsm8k") != before[0]
    assert key("winogrande") == before[1]


# ---- how texts begin --------------------------------------------------------------------------------------------------


def test_text_that_begins_with_a_token_is_held_out(run, folder):
    """The token takes its place in blocks of both lengths, and no text is in both; the record says which token it is."""
    prepend_end(folder)
    run.profile = run.profile.replacing(text={"seq_len": 16})
    (model,) = run.models()
    (item,) = importance_work(model, ["random-words"], run.profile)
    text = text_work(run, item, [DENSE])
    assert (item.tokens[:, 0] == 256).all()
    assert (text.tokens[:, 0] == 256).all()
    stream = load_tokens("random-words", byte_tokenizer(), 1, 2000).flatten().tolist()
    used, held_out = (tokens[:, 1:].flatten().tolist() for tokens in (item.tokens, text.tokens))
    assert used == stream[: 8 * 63]
    assert held_out == stream[34 * 15 : 34 * 15 + 4 * 15]  # 34 blocks of 15 are the first that cover 8 of 63
    run.measure([item, text])
    for key in (*item.keys, *text.keys):
        assert run.store.get(key)["provenance"]["texts_begin_with"] == [256]


def test_records_say_that_nothing_was_put_before_texts(run):
    (model,) = run.models()
    (item,) = importance_work(model, ["random-words"], run.profile)
    assert torch.equal(item.tokens, load_tokens("random-words", byte_tokenizer(), 8, 64))
    run.measure([item])
    assert run.store.get(item.keys[0])["provenance"]["texts_begin_with"] == []
