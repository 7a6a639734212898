"""Notebook 09: bytes of files by hand, timing in turns, and what its tables and rules make of stored values."""

import dataclasses

import families
import numpy as np
import pytest
import torch
from gguf_files import make_llama, tiny
from safetensors.torch import save_file

from llmdrop_utils import DropPlan, load_profile
from llmdrop_utils.base.errors import NotApplicable
from llmdrop_utils.models.locate import locate_model
from llmdrop_utils.report.rules import DEVIATES, INCONCLUSIVE, REPRODUCED
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.tables import frame
from llmdrop_utils.report.verdicts import ADVICE, load_claims, verdict_of
from llmdrop_utils.studies.run import NOT_RUN
from llmdrop_utils.studies.speedup.generation import Timed
from llmdrop_utils.studies.take_away.study import TABLES, cache_rows, file_rows, gate_rows, servable, served_rows, torch_row
from llmdrop_utils.studies.take_away.work import (
    CheckpointWork,
    ServedWork,
    _ends,
    _question,
    _sizes,
    answer,
    attention_in_gguf,
    in_turns,
    tensor_bytes,
)

# Bytes of one attention layer of tiny-llama, norm included: 32 x (32 + 16 + 16 + 32) weights and 32 of the norm.
LAYER = {"F32": 4 * 3072 + 4 * 32, "F16": 2 * 3072 + 4 * 32, "Q4_0": 3072 // 32 * 18 + 4 * 32}


# ---- what files hold ----------------------------------------------------------------------------------------------------


def test_bytes_of_tensors(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert tensor_bytes(tmp_path / "model.safetensors") == {"a": 48, "b": 10}


def test_what_a_file_saves(tmp_path):
    """The dense files hold 40 bytes in two tensors of layer 3 and 48 beside them; the dropped ones keep zeros for one."""
    for name, content in {
        "dense-1": {"3.q": torch.zeros(6), "embedding": torch.zeros(12)},
        "dense-2": {"3.norm": torch.zeros(4)},
        "dropped": {"3.q": torch.zeros(2), "embedding": torch.zeros(12)},
    }.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    dense = _sizes(sorted(tmp_path.glob("dense-*")), set(), None)
    found = _sizes([tmp_path / "dropped.safetensors"], {"3.q", "3.norm"}, dense).to_json()
    assert dense.to_json() | {"file_bytes": 0} == {"file_bytes": 0, "dropped_bytes": 0, "stand_in_bytes": 0, "tensor_bytes": 88}
    assert found == {
        "file_bytes": (tmp_path / "dropped.safetensors").stat().st_size,
        "dropped_bytes": 40,
        "stand_in_bytes": 8,
        "tensor_bytes": 56,
    }
    assert dense.file_bytes == sum(path.stat().st_size for path in tmp_path.glob("dense-*"))


def test_names_of_attention_in_gguf():
    assert attention_in_gguf(DropPlan(mlp=(0,))) == set()
    names = attention_in_gguf(DropPlan(attention=(2,)))
    assert {f"blk.2.attn_{part}.weight" for part in ("norm", "q", "k", "v", "output")} < names
    assert "blk.2.attn_q.bias" in names
    assert all(name.startswith("blk.2.attn_") for name in names)


# ---- llama.cpp ----------------------------------------------------------------------------------------------------------


class Recorder:
    """Writes down what is asked of it."""

    def __init__(self, name, log, likeliest=()):
        self.name, self.log, self.likeliest = name, log, list(likeliest)

    def run(self, tokens):
        self.log.append((self.name, list(tokens)))

    def forget(self):
        self.log.append((self.name, "forget"))

    def logits(self):
        return np.eye(9)[self.likeliest.pop(0)]


def test_files_take_turns_on_the_same_tokens():
    log: list = []
    turns: list = []
    found = in_turns([Recorder("a", log), Recorder("b", log)], [5, 6, 7, 8], (1, 2), 2, 3, lambda: turns.append(len(log)))
    warm_up, rest = log[: log.index(("a", "forget"))], log[log.index(("a", "forget")) :]
    assert [name for name, _ in warm_up] == ["a", "a", "b", "b"]
    turn = ["forget", [5], [6], [7], "forget", [5, 6], [7], [8], "forget"]
    assert rest == [(name, what) for _ in range(3) for name in "ab" for what in turn]
    assert len(turns) == 6
    assert [list(each) for each in found] == [["prefill 1", "decode 1", "prefill 2", "decode 2"]] * 2
    assert all(len(seconds) == 3 and min(seconds) > 0 for each in found for seconds in each.values())


def test_seconds_are_of_one_step(monkeypatch):
    """A clock that advances by a second whenever a file reads something, however much."""
    log: list = []
    monkeypatch.setattr("llmdrop_utils.studies.take_away.work.time.perf_counter", lambda: len(log))
    (found,) = in_turns([Recorder("a", log)], list(range(9)), (4,), 5, 1)
    assert found == {"prefill 4": [1.0], "decode 4": [1.0]}


def test_an_answer_ends():
    log: list = []
    assert answer(Recorder("a", log, [4, 5, 8, 6]), [1, 2], 10, {8, 7}) == [4, 5]
    assert log == [("a", "forget"), ("a", [1, 2]), ("a", [4]), ("a", [5])]
    assert answer(Recorder("a", [], [4, 5, 8]), [1], 2, {8}) == [4, 5]


def test_a_question_has_the_form_of_a_conversation():
    model, tokenizer = make_llama()
    assert tokenizer.decode(_question(tokenizer)).startswith("Why is the sky blue?")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<you>"
    assert tokenizer.decode(_question(tokenizer)) == "<user>Why is the sky blue? Answer in two sentences.<you>"
    model.generation_config.eos_token_id = [3, 4]
    assert _ends(model, tokenizer) == {3, 4, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = None
    assert _ends(model, tokenizer) == {tokenizer.eos_token_id}


# ---- on a real model ----------------------------------------------------------------------------------------------------


def work_of(cls, model, **more):
    shared = {"model": model, "dtype": torch.float32, "attention": "sdpa", "plans": (DropPlan(attention=(5, 0)),)}
    return cls(**shared, **more)


def test_a_checkpoint_loses_its_layers():
    model, tokenizer = tiny(num_hidden_layers=6)
    item = work_of(CheckpointWork, locate_model("tiny-llama"))
    (value,) = item.measure(model, tokenizer, lambda _: None)
    dense, plan = value["dense"], value["plan"]
    assert plan["dropped_bytes"] == dense["tensor_bytes"] - plan["tensor_bytes"] == 2 * LAYER["F32"]
    assert dense["tensor_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert plan["stand_in_bytes"] == 0


def test_a_served_file_loses_its_layers_and_answers():
    """Layer 0 keeps a matrix of zeros, since llama.cpp reads the size of a head from it."""
    pytest.importorskip("cyllama", reason="llama.cpp is an optional extra")
    model, tokenizer = tiny(num_hidden_layers=6)
    done: list[float] = []
    tokens = torch.arange(12)
    item = work_of(
        ServedWork,
        locate_model("tiny-llama"),
        kind="F16",
        tokens=tokens,
        contexts=(4, 8),
        steps=4,
        new_tokens=5,
        repeats=2,
        tokenizer="t",
    )
    (value,) = item.measure(model, tokenizer, done.append)
    dense, plan = value["dense"], value["plan"]
    assert plan["dropped_bytes"] == 2 * LAYER["F16"]
    assert plan["stand_in_bytes"] == 2 * 32 * 32 + 4 * 32
    assert dense["tensor_bytes"] - plan["tensor_bytes"] + plan["stand_in_bytes"] == plan["dropped_bytes"]
    assert (dense["cached_bytes"], plan["cached_bytes"]) == (6 * 2 * 2 * 8 * 2, 4 * 2 * 2 * 8 * 2)
    assert max(dense["divergence"], plan["divergence"]) < 0.001
    assert all(len(seconds) == 2 for each in (dense, plan) for seconds in each["seconds"].values())
    assert sum(done) == item.tokens_to_pass == 2 * 2 * 12
    assert plan["answer"].isprintable()


# ---- from values to rows ------------------------------------------------------------------------------------------------

DENSE_SECONDS = {"prefill 4": [2.0, 4.0, 2.2], "decode 4": [0.2, 0.2, 0.2]}
SECONDS = {"prefill 4": [1.0, 2.0, 1.1], "decode 4": [0.1, 0.16, 0.2]}
FOUND = {"divergence": 0.01, "log_probability": 0.1, "equal_tokens": 7, "answer": "so"}


def stored():
    """Six layers of tiny-llama; without two of them."""
    dense = {"file_bytes": 1000, "tensor_bytes": 900, "dropped_bytes": 0, "stand_in_bytes": 0, "cached_bytes": 384}
    plan = {"file_bytes": 750, "tensor_bytes": 660, "dropped_bytes": 250, "stand_in_bytes": 10, "cached_bytes": 256}
    return [{"dense": dense | FOUND | {"seconds": DENSE_SECONDS}, "plan": plan | FOUND | {"seconds": SECONDS}}]


@pytest.fixture(scope="module")
def served():
    more = {
        "kind": "F16",
        "tokens": torch.arange(8),
        "contexts": (4,),
        "steps": 4,
        "new_tokens": 5,
        "repeats": 3,
        "tokenizer": "t",
    }
    return work_of(ServedWork, locate_model("tiny-llama"), **more)


def timed(n, floor, seconds, what="prefill"):
    row = {"model": "tiny-llama", "what": what, "context": 4, "n": n}
    return Timed(row, 1, np.array(seconds), floor, np.array(DENSE_SECONDS[f"{what} 4"]), 3.0)


def test_rows_of_files(served):
    dense, dropped = file_rows(served, stored())
    assert dropped == {"model": "tiny-llama", "file": "GGUF F16", "n": 2, "file_bytes": 750, "dense_file_bytes": 1000,
                       "saved_bytes": 240, "dropped_bytes": 250, "stand_in_bytes": 10}  # fmt: skip
    assert (dense["n"], dense["file_bytes"], dense["saved_bytes"]) == (0, 1000, 0)
    checkpoint = work_of(CheckpointWork, served.model)
    assert {row["file"] for row in file_rows(checkpoint, stored())} == {"transformers float32"}


def test_rows_of_caches_and_gates(served):
    """Keys and values of 2 heads of 8, 2 bytes each, in 6 and 4 layers."""
    dense, dropped = cache_rows(served, stored())
    assert (dense["counted_bytes"], dense["formula_bytes"], dense["dense_bytes"]) == (384, 384, 384)
    assert (dropped["counted_bytes"], dropped["formula_bytes"], dropped["dense_bytes"]) == (256, 256, 384)
    assert gate_rows(served, stored())[1] == {"model": "tiny-llama", "file": "GGUF F16", "n": 2, "divergence": 0.01,
                                              "log_probability": 0.1, "equal_tokens": 7}  # fmt: skip


def test_rows_of_times(served):
    """Ratios of the same rounds: 2, 2 and 2 of the prefill; 2, 1.25 and 1 of decoding. By torch's bytes it is 3 / 2."""
    rows = served_rows(served, stored(), [timed(2, 2.0, SECONDS["prefill 4"])])
    found = {(row["what"], row["n"]): row for row in rows}
    assert list(found) == [("prefill", 0), ("decode", 0), ("prefill", 2), ("decode", 2)]
    prefill, decode = found["prefill", 2], found["decode", 2]
    assert prefill["runtime"] == "llama.cpp F16"
    assert (prefill["speedup"], prefill["predicted"], prefill["tokens_per_second"]) == (2.0, 1.5, 4 / 1.1)
    assert (decode["speedup"], decode["tokens_per_second"]) == (1.25, 1 / 0.16)
    assert np.isnan(decode["predicted"]), "torch has no such load"
    assert found["prefill", 0]["speedup"] == 1.0
    row = torch_row(timed(2, 2.0, SECONDS["prefill 4"]))
    assert (row["runtime"], row["speedup"], row["predicted"], row["context"]) == ("torch", 2.0, 1.5, 4)
    assert set(row) == set(rows[0]) == {column.name for column in TABLES["speed"]}


# ---- which models -------------------------------------------------------------------------------------------------------


def test_models_that_llama_cpp_cannot_run_are_not_run(tmp_path, monkeypatch):
    pytest.importorskip("cyllama", reason="llama.cpp is an optional extra")
    _, tokenizer = make_llama()
    families.tiny("gemma3").save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    smoke = load_profile("smoke")
    with pytest.raises(NotApplicable, match="This gemma3_text model cannot be exported for llama.cpp"):
        servable(smoke.replacing(models=[str(tmp_path / "gemma")]))
    with pytest.raises(NotApplicable, match="Random weights have no tokenizer"):
        servable(smoke.replacing(models=["random:tiny-llama"]))
    found, unavailable = servable(smoke.replacing(models=["tiny-llama", str(tmp_path / "gemma")]))
    assert [model.name for model in found] == ["tiny-llama"]
    (reason,) = unavailable.values()
    assert "Llama-shaped" in reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(NotApplicable, match="torch takes the GPU here: hide it"):
            servable(smoke)
    monkeypatch.setitem(__import__("sys").modules, "cyllama.llama.llama_cpp", None)
    with pytest.raises(NotApplicable, match="llama.cpp cannot be used"):
        servable(smoke)


def test_keys_tell_measurements_apart(served):
    """What changes a value is in its key; other plans do not change it."""
    (key,) = served.keys
    for change in (
        {"kind": "Q8_0"},
        {"steps": 5},
        {"contexts": (2,)},
        {"repeats": 4},
        {"new_tokens": 6},
        {"tokens": torch.arange(9)},
    ):
        assert dataclasses.replace(served, **change).keys != [key], change
    more = dataclasses.replace(served, plans=(DropPlan(attention=(1,)), *served.plans))
    assert more.keys[1] == key
    assert more.only([1]) == served


# ---- rules, figures, advice ---------------------------------------------------------------------------------------------


def tables(saved=240, counted=256, speedups=(1.6, 1.3), noisy=False, low=0.98):
    """Of a model without two attention layers; prefill and decode in llama.cpp, predicted 1.5 and 1.2."""
    row = {"model": "m", "file": "GGUF F16"}
    files = [row | {"n": n, "file_bytes": 1000 - 250 * (n > 0), "dense_file_bytes": 1000, "saved_bytes": saved * (n > 0),
                    "dropped_bytes": 250 * (n > 0), "stand_in_bytes": 10 * (n > 0)} for n in (0, 2)]  # fmt: skip
    caches = [row | {"n": n, "counted_bytes": counted if n else 384, "formula_bytes": 256 if n else 384, "dense_bytes": 384}
              for n in (0, 2)]  # fmt: skip
    gate = [row | {"n": n, "divergence": 0.002, "log_probability": 0.1, "equal_tokens": 7} for n in (0, 2)]
    speed = [
        {"model": "m", "runtime": runtime, "what": what, "context": 128, "n": n, "seconds": 1.0, "seconds_low": 1.0,
         "seconds_high": 1.0, "tokens_per_second": 1.0, "level": 0.97, "spread": 0.0, "dense_spread": 0.0, "noisy": noisy,
         "speedup": s if n else 1.0, "speedup_low": low * s, "speedup_high": s / low, "predicted": p}
        for runtime in ("torch", "llama.cpp F16") for n in (0, 2)
        for what, s, p in zip(("prefill", "decode"), speedups if runtime != "torch" else (0.5, 0.5), (1.5, 1.2), strict=True)
    ]  # fmt: skip
    about = {"model": "m", "n_layers": 6, "device": "a CPU", "dtype": "float32", "torch": "1", "llama_cpp": "1"}
    rows = {"files": files, "caches": caches, "gate": gate, "speed": speed, "answers": [], "models": [about], "not_run": []}
    return {name: frame(name, content, TABLES | NOT_RUN) for name, content in rows.items()}


CLAIMS = {claim["id"]: claim for claim in load_claims() if claim["notebook"] == "09_take_away"}


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [({}, REPRODUCED), ({"saved": 239}, DEVIATES), ({"saved": 250}, DEVIATES), ({"counted": 384}, DEVIATES)],
)
def test_files_must_shrink_exactly(changes, outcome):
    assert verdict_of(CLAIMS["files-shrink"], tables(**changes))[0] == outcome


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, REPRODUCED),
        ({"speedups": (1.5, 1.2)}, REPRODUCED),  # 98 % of the prediction at the lower end
        ({"speedups": (1.6, 1.0)}, DEVIATES),
        ({"speedups": (1.6, 1.2), "low": 0.9}, INCONCLUSIVE),
        ({"noisy": True}, "not run"),
    ],
)
def test_another_runtime_must_be_as_fast_as_predicted(changes, outcome):
    """Torch's own times, far below the prediction here, do not count."""
    assert verdict_of(CLAIMS["faster-in-another-runtime"], tables(**changes))[0] == outcome


def test_what_a_reader_sees():
    drawn = {name: FIGURES[name].draw(tables()) for name in ("figS22_files", "figS23_served")}
    assert drawn["figS22_files"].takeaway == (
        "Without 2 attention layers files are smaller by 25 % (GGUF F16), and the cache by 33 %."
    )
    assert drawn["figS23_served"].takeaway == (
        "With 128 tokens and 2 layers dropped: prefill 0.50 times as fast in torch, 1.60 times as fast in llama.cpp F16; "
        "decode 0.50 times as fast in torch, 1.30 times as fast in llama.cpp F16. Timed on a CPU; bars cover 97.0 % over "
        "repeats, in which files take turns."
    )
    first, _ = ADVICE["09_take_away"](tables()).split("\n\n")
    assert "takes 0 MB instead of 0. A token takes 256 bytes of cache instead of 384. At 128 tokens it reads a prompt" in first
    assert "1.60 times as fast (1.57 to 1.63) and it generates 1.30 times as fast (1.27 to 1.33)." in first
    assert "with these layers set to zero, 0.002 nats apart" in first
    assert "(1.57 to 1.63, noisy)" in ADVICE["09_take_away"](tables(noisy=True))
