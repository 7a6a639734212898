"""Notebook 06: bytes of keys and values, by hand and as its tables have them."""

import dataclasses
import math

import families
import pandas as pd
import pytest
import torch

from llmdrop_utils import DropPlan, NotAvailable, load_profile
from llmdrop_utils.base import files
from llmdrop_utils.models import locate as models_locate
from llmdrop_utils.models.load import model_of_shape
from llmdrop_utils.models.locate import locate_folder, locate_model
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.verdicts import ADVICE
from llmdrop_utils.studies.kv_cache.study import cache_rows, counted_bytes, fit_rows, paper_row
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.speedup import loads
from llmdrop_utils.studies.speedup.loads import Speed

PER_TOKEN = 2 * 2 * 8  # numbers in one layer of tiny-llama: keys and values of 2 heads of size 8


@pytest.fixture(scope="module")
def tiny():
    """6 layers, hidden 32, MLP 64, 4 heads and 2 key-value heads of 8, vocabulary 257, untied."""
    return locate_model("random:tiny-llama")


@pytest.fixture
def windows(tmp_path):
    """Three layers: a window of 4, full attention, a window of 4; 2 key-value heads of 8."""
    families.tiny("gemma3").save_pretrained(tmp_path / "windows")
    return locate_folder("windows", tmp_path / "windows")


def test_counted_in_a_cache_without_memory(tiny):
    shape = model_of_shape(tiny, torch.bfloat16, "meta")
    plan = DropPlan(attention=(5, 1))
    assert counted_bytes(shape, DropPlan(), 3, 10) == 6 * PER_TOKEN * 3 * 10 * 2
    assert counted_bytes(shape, plan, 3, 10) == 4 * PER_TOKEN * 3 * 10 * 2
    assert counted_bytes(shape, DropPlan(), 3, 10) == 6 * PER_TOKEN * 3 * 10 * 2, "the model is whole again"


def test_a_row_of_table_4(tiny):
    claim = {"model": "Tiny", "n_drop": 2, "what": "KV cache, seq 16, batch 3, 4 attention layers, 16-bit", "value": 7}
    assert paper_row(claim, tiny) == {
        "model": "Tiny", "n_layers": 6, "n": 2, "batch_size": 3, "length": 16, "paper_gib": 7,
        "formula_bytes": 4 * PER_TOKEN * 3 * 16 * 2, "counted_bytes": 4 * PER_TOKEN * 3 * 16 * 2,
        "dense_bytes": 6 * PER_TOKEN * 3 * 16 * 2,
    }  # fmt: skip


def test_caches_of_the_run(tiny):
    """Dense, then each number dropped that the model has, at each length."""
    rows = pd.DataFrame(cache_rows(tiny, [2, 6], [8, 20], torch.float32))
    assert rows["n"].tolist() == [0, 0, 2, 2], "with all six dropped nothing is left"
    assert rows["length"].tolist() == [8, 20, 8, 20]
    dense = [6 * PER_TOKEN * length * 4 for length in (8, 20)]
    assert rows["dense_bytes"].tolist() == dense * 2
    assert rows["formula_bytes"].tolist() == [*dense, *(value * 4 // 6 for value in dense)]
    assert rows["counted_bytes"].tolist() == rows["formula_bytes"].tolist()
    assert rows["full_attention"].all()


def test_sliding_windows_keep_what_the_next_token_sees(windows):
    """w - 1 tokens for a window of w, however long the context: the last layer dropped is one."""
    rows = pd.DataFrame(cache_rows(windows, [1], [2, 20], torch.float32))
    assert not rows["full_attention"].any()
    assert rows["dense_bytes"].tolist() == [PER_TOKEN * 4 * tokens for tokens in (2 + 2 + 2, 3 + 20 + 3)] * 2
    assert rows["counted_bytes"].tolist() == rows["formula_bytes"].tolist()
    assert rows["counted_bytes"].tolist()[2:] == [PER_TOKEN * 4 * tokens for tokens in (2 + 2, 3 + 20)]


def tiny_weights(n_attention):
    """Parameters with so many attention layers: attention 32 x (32 + 16 + 16 + 32), its norm 32; MLP 3 x 32 x 64, its norm."""
    return n_attention * (32 * 96 + 32) + 6 * (3 * 32 * 64 + 32) + 2 * 257 * 32 + 32


def test_what_fits(tiny):
    rows = pd.DataFrame(fit_rows("tiny-llama", tiny)).set_index(["n", "gpu", "gpus"])
    assert len(rows) == 3 * 3 * 2
    for n in (0, 1, 3):
        row = rows.loc[n, "80 GB", 4]
        assert row["weights_bytes"] == 2 * tiny_weights(6 - n)
        free, per_token = 0.9 * 4 * 80e9 - 2 * tiny_weights(6 - n), (6 - n) * PER_TOKEN * 2
        assert row["batch_at_4096"] == free // (4096 * per_token)
        assert row["context_of_one"] == pytest.approx(free / per_token, abs=1)
    assert rows.loc[3, "48 GB", 1]["context_of_one"] > 1.9 * rows.loc[0, "48 GB", 1]["context_of_one"]


def test_weights_that_do_not_fit_leave_nothing(tiny, monkeypatch):
    monkeypatch.setattr("llmdrop_utils.studies.kv_cache.study.GPUS", {"tiny": 2.0 * tiny_weights(6)})
    alone, four, *_ = fit_rows("tiny-llama", tiny)
    assert (alone["batch_at_4096"], alone["context_of_one"]) == (0, 0)
    free = 0.9 * 4 * 2 * tiny_weights(6) - 2 * tiny_weights(6)
    assert four["context_of_one"] == free // (6 * PER_TOKEN * 2)


def test_a_window_ends_growth(windows):
    (row, *_) = fit_rows("windows", windows)
    assert math.isnan(row["context_of_one"])
    assert row["batch_at_4096"] > 0


# ---- the whole study --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Of a profile with the section `speed` alone, and a model that is unavailable beside one of known shape."""
    profile = load_profile("smoke").replacing(models=["away", "tiny-llama"], speed={"contexts": [8], "n_drop": {"mlp": [2]}})

    def locate(name, *kinds):
        if name.startswith("random:"):
            return locate_model(name)
        raise NotAvailable(f"{name} is not on this machine.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loads, "locate_model", locate)
        patch.setattr(models_locate, "locate_model", locate)
        patch.setattr(files, "RESULTS", tmp_path_factory.mktemp("results"))
        return STUDIES["06_kv_cache"](dataclasses.replace(profile, sections={Speed: profile.section(Speed)}))


def test_table_4_is_counted_to_the_byte(tables):
    paper = tables["paper"]
    assert (paper["counted_bytes"] == paper["formula_bytes"]).all()
    assert (paper["dense_bytes"] * (paper["n_layers"] - paper["n"]) == paper["counted_bytes"] * paper["n_layers"]).all()
    gib = {(row.model, row.n): (row.counted_bytes / 2**30, row.paper_gib) for row in paper.itertuples()}
    assert gib == {
        ("Mistral-7B", 0): (16, 16), ("Mistral-7B", 12): (10, 10),
        ("Llama-2-13B", 0): (50, 52), ("Llama-2-13B", 20): (25, 26),
        ("Llama-2-70B", 0): (20, 20), ("Llama-2-70B", 40): (10, 10),
        ("Llama-3-8B", 0): (16, 16), ("Llama-3-8B", 12): (10, 10),
        ("Llama-3-70B", 0): (20, 20), ("Llama-3-70B", 40): (10, 10),
    }  # fmt: skip


def test_fits_are_of_the_paper_s_models(tables):
    assert set(tables["fits"]["model"]) == {"llama-2-13b", "llama-2-70b", "mistral-7b-v0.1", "llama-3-8b", "llama-3-70b"}
    assert tables["fits"].groupby("model")["context_of_one"].apply(lambda column: column.isna().any())["mistral-7b-v0.1"]


def test_unavailable_models_are_named(tables):
    assert tables["caches"]["model"].tolist() == ["random:tiny-llama"]
    assert tables["not_run"].values.tolist() == [
        ["away", "away is not on this machine."],
        ["tiny-llama", "tiny-llama is not on this machine. Its shape with random weights was taken instead."],
    ]


# ---- what a reader sees -----------------------------------------------------------------------------------------------


def test_takeaway_names_the_paper_s_slip(tables):
    takeaway = FIGURES["figS12_kv_cache"].draw(tables).takeaway
    assert takeaway.startswith("Formula and count agree to the byte in 10 of 10 rows.")
    assert takeaway.endswith("prints 52 and 26 for Llama-2-13B, where its own formula gives 50 and 25 GiB: the paper's slip.")
    assert takeaway.count("slip") == 1


def test_advice_counts_what_a_dropped_layer_saves(tiny, windows):
    rows = cache_rows(tiny, [3], [8, 20], torch.float32) + cache_rows(windows, [1], [8, 20], torch.float32)
    full, sliding = ADVICE["06_kv_cache"]({"caches": pd.DataFrame(rows)}).split("\n\n")
    assert "768 bytes per token, and every attention layer that you drop saves 128 of them" in full
    assert "With 3 of 6 dropped, 20 tokens take 50 % of the dense cache, so the same memory holds 2.0 times" in full
    assert "sliding windows" in sliding
    assert "With 1 of 3 dropped, 20 tokens take 88 %" in sliding, "23 of 26 tokens"
