"""Profiles are checked before anything costly starts."""

import pytest

from llmdrop_utils import LLMDropError, load_profile
from llmdrop_utils.base import files
from llmdrop_utils.sources.catalogue import catalogue

GOOD = (files.PROFILE_DIR / "smoke.yaml").read_text()


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu", "h200"])
def test_committed_profiles_fit_the_sources(name):
    profile = load_profile(name)
    shapes = {f"random:{shape}" for shape in catalogue()["shapes"]}
    assert set(profile.models) <= {*catalogue()["models"], *shapes}
    part = profile.speed
    assert {part.prompt, part.prompt + part.new_tokens} <= set(part.contexts), "both ends of the generation are sampled"
    assert set(profile.calibration.corpora) <= set(catalogue()["corpora"])


def test_the_paper_s_setting():
    gpu = load_profile("gpu")
    assert (gpu.calibration.n_samples, gpu.calibration.seq_len) == (256, 2048)
    assert gpu.calibration.sample_counts == [4, 16, 64, 256, 1024]
    paper = {"llama-2-13b", "mistral-7b-v0.1", "llama-3-8b", "llama-2-70b", "llama-3-70b", "map-neo-7b"}
    assert set(gpu.models) == paper


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_samples: 8", "n_sample: 8", r"Unknown key 'n_sample' in demo.yaml, under calibration. Did you mean 'n_samples'\?"),
        ("\nn_drop: [2]", "\ncolour: red", r"Unknown key 'colour' in demo.yaml. Known keys: name, "),
        ("  seq_len: 64\n", "", "The key 'seq_len' is missing in demo.yaml, under calibration"),
        ("seq_len: 64", "seq_len: long", "'seq_len' .* must be a positive integer, but is 'long'"),
        ("\nn_drop: [2]", "\nn_drop: [0]", "'n_drop' in demo.yaml must be a list of positive integers"),
        ("models: [tiny-llama]", "models: []", "'models' in demo.yaml must be a list of names"),
        ("models: [tiny-llama]", "models: [a: b", "demo.yaml is not valid YAML"),
        ("models: [tiny-llama]", "model: tiny-llama", "The key 'model' does not belong in demo.yaml"),
        (GOOD, "", "demo.yaml must hold the keys of a profile"),
        ("calibration:", "calibration: 3\nrest:", "demo.yaml must hold the key 'calibration' with keys of its own"),
        ("attention: [2, 3]", "heads: [2, 3]", "Unknown kind 'heads' in demo.yaml, under tasks. Known kinds: attention, mlp"),
        ("attention: [2, 3]", "attention: 2", "'n_drop' in demo.yaml, under tasks must be lists of positive integers, by name"),
        ("mlp: [2], block: [2]}\n  sweep", "tail: [2]}\n  sweep", "Unknown kind 'tail' in demo.yaml, under speed"),
        (
            "compiled: {attention: [2]}",
            "compiled: 3",
            "'compiled' .* integers, by name, or null, but is 3",
        ),
        ("limit: 10", "limit: -1", "'limit' in demo.yaml, under tasks must be an integer, or null, but is -1"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, old, new, message):
    assert old in GOOD
    (tmp_path / "demo.yaml").write_text(GOOD.replace(old, new))
    monkeypatch.setattr(files, "PROFILE_DIR", tmp_path)
    with pytest.raises(LLMDropError, match=message):
        load_profile("demo")


def test_unknown_profile():
    with pytest.raises(LLMDropError, match=r"Unknown profile 'tpu'. The profiles in data/profiles are: cpu, gpu, h200, smoke"):
        load_profile("tpu")


@pytest.mark.parametrize(
    ("model", "run"),
    [
        (None, "cpu"),
        ("Qwen/Qwen3-8B@" + "a" * 40, "cpu-qwen3-8b"),
        ("/data/My Model/", "cpu-my-model"),
        ("/home/me@work/models/Llama", "cpu-llama"),
        ("files/SmolLM2.Q4_1.gguf", "cpu-smollm2.q4_1"),
        ("gemma3-270m", "cpu-gemma3-270m"),
    ],
)
def test_run_names(model, run):
    profile = load_profile("cpu", model)
    assert profile.run == run
    assert profile.models == ([model] if model else ["smollm2-135m"])
