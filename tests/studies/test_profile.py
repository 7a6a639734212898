"""Profiles are checked before anything costly starts."""

import pytest

from llmdrop_utils import LLMDropError, NotAvailable, load_profile
from llmdrop_utils.base import files
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.studies.profile import Calibration, profile_names

GOOD = (files.PROFILE_DIR / "smoke.yaml").read_text()


@pytest.mark.parametrize("name", profile_names())
def test_committed_profiles_fit_the_sources(name):
    profile = load_profile(name)
    shapes = {f"random:{shape}" for shape in catalogue()["shapes"]}
    assert set(profile.models) <= {*catalogue()["models"], *shapes}
    sections = profile.to_json()
    if speed := sections.get("speed"):
        ends = {speed["prompt"], speed["prompt"] + speed["new_tokens"]}
        assert ends <= set(speed["contexts"]), "both ends of the generation are sampled"
    if "calibration" in sections:
        assert set(sections["calibration"]["corpora"]) <= set(catalogue()["corpora"])


def test_the_paper_s_setting():
    gpu = load_profile("gpu")
    calibration = gpu.section(Calibration)
    assert (calibration.n_samples, calibration.seq_len) == (256, 2048)
    assert calibration.sample_counts == [4, 16, 64, 256, 1024]
    paper = {"llama-2-13b", "mistral-7b-v0.1", "llama-3-8b", "llama-2-70b", "llama-3-70b", "map-neo-7b"}
    assert set(gpu.models) == paper


def test_a_profile_extends_another():
    """gpu-shapes is gpu with other models, and without what random weights say nothing about."""
    gpu, shapes = load_profile("gpu").to_json(), load_profile("gpu-shapes").to_json()
    assert shapes["speed"] == gpu["speed"]
    assert {"calibration", "text", "tasks", "iterative", "stages"} & set(shapes) == set()
    assert all(model.startswith("random:") for model in shapes["models"])
    with pytest.raises(NotAvailable, match="The profile gpu-shapes has no section 'calibration', which this notebook needs"):
        load_profile("gpu-shapes").section(Calibration)


def test_what_is_extended(tmp_path, monkeypatch):
    """Keys of a section are replaced one by one, a section that is null is left out, and a circle is an error."""
    monkeypatch.setattr(files, "PROFILE_DIR", tmp_path)
    (tmp_path / "smoke.yaml").write_text(GOOD)
    (tmp_path / "child.yaml").write_text("extends: smoke\ndescription: Child.\ncalibration: {seq_len: 32}\ntasks: null\n")
    child, smoke = load_profile("child"), load_profile("smoke")
    assert child.section(Calibration).seq_len == 32
    assert child.section(Calibration).corpora == smoke.section(Calibration).corpora
    assert "tasks" not in child.to_json()
    assert child.description == "Child."
    assert child.run == "child"
    (tmp_path / "smoke.yaml").write_text("extends: child\n")
    with pytest.raises(LLMDropError, match="extend each other in a circle: child -> smoke -> child"):
        load_profile("child")


def test_one_model_replaces_models_and_series():
    profile = load_profile("cpu", "gemma3-270m")
    assert profile.models == ["gemma3-270m"]
    assert profile.to_json()["stages"]["series"] == ["gemma3-270m"]
    assert profile.description == "gemma3-270m with the settings of the profile cpu."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_samples: 8", "n_sample: 8", r"Unknown key 'n_sample' in demo.yaml, under calibration. Did you mean 'n_samples'\?"),
        (
            "\n  n_drop: [2]\ntext",
            "\n  n_drop: [2]\ncolour: red\ntext",
            "Unknown key 'colour' in demo.yaml. Known keys: description, models, ",
        ),
        ("  seq_len: 64\n", "", "The key 'seq_len' is missing in demo.yaml, under calibration"),
        ("seq_len: 64", "seq_len: long", "'seq_len' .* must be a positive integer, but is 'long'"),
        (
            "  n_drop: [2]\ntext",
            "  n_drop: [0]\ntext",
            "'n_drop' in demo.yaml, under calibration must be a list of positive integers",
        ),
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
        ("limit: 10", "limit: 0", "'limit' in demo.yaml, under tasks must be a positive integer, or null, but is 0"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, old, new, message):
    assert old in GOOD
    (tmp_path / "demo.yaml").write_text(GOOD.replace(old, new))
    monkeypatch.setattr(files, "PROFILE_DIR", tmp_path)
    with pytest.raises(LLMDropError, match=message):
        load_profile("demo")


def test_unknown_profile():
    with pytest.raises(LLMDropError, match=r"Unknown profile 'tpu'. The profiles in data/profiles are: cpu, cpu-bfloat16, "):
        load_profile("tpu")


@pytest.mark.parametrize(
    ("model", "run"),
    [
        (None, "cpu"),
        ("Qwen/Qwen3-8B", "cpu-qwen--qwen3-8b"),
        ("Qwen/Qwen3-8B@" + "a" * 40, "cpu-qwen--qwen3-8b@aaaaaaaa"),
        ("gemma3-270m", "cpu-gemma3-270m"),
        ("medium-llama", "cpu-medium-llama"),
        ("random:llama-3-8b", "cpu-random-llama-3-8b"),
    ],
)
def test_run_names(model, run):
    profile = load_profile("cpu", model)
    assert profile.run == run
    assert profile.models == ([model] if model else ["smollm2-135m"])
