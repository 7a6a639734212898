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
    """gpu-shapes is gpu with other models, fewer loads, and without what random weights say nothing about."""
    gpu, shapes = load_profile("gpu").to_json(), load_profile("gpu-shapes").to_json()
    assert {key: shapes["speed"][key] for key in ("prompt", "new_tokens", "repeats", "sweep_n")} == {
        "prompt": 2048, "new_tokens": 2048, "repeats": 6, "sweep_n": 8,
    }  # fmt: skip
    assert shapes["speed"]["contexts"] == [128, 2048, 4096] != gpu["speed"]["contexts"]
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


OWN = "{calibration: {seq_len: 32}, tasks: {limit: 3, n_drop: {mlp: [1]}}, stages: null}"
EACH = f"models:\n  tiny-llama:\n  smollm2-135m: {OWN}\n"


def test_models_with_sizes_of_their_own(tmp_path, monkeypatch):
    """Each is a run of its own; what it does not say is the profile's, key by key."""
    monkeypatch.setattr(files, "PROFILE_DIR", tmp_path)
    (tmp_path / "demo.yaml").write_text(GOOD.replace("models: [tiny-llama]\n", EACH))
    profile = load_profile("demo")
    assert profile.one_by_one
    assert profile.several
    assert profile.models == ["tiny-llama", "smollm2-135m"]
    assert profile.run == "demo"
    assert profile.section(Calibration).seq_len == 64
    own = profile.of("smollm2-135m")
    assert (own.one_by_one, own.run, own.models) == (False, "demo-smollm2-135m", ["smollm2-135m"])
    assert own.section(Calibration).seq_len == 32
    assert own.section(Calibration).n_samples == profile.section(Calibration).n_samples
    assert own.to_json()["tasks"]["n_drop"] == {"mlp": [1]}
    assert own.to_json()["tasks"]["names"] == profile.to_json()["tasks"]["names"]
    assert "stages" not in own.to_json()
    assert profile.of("tiny-llama").section(Calibration).seq_len == 64
    assert profile.of("gemma3-270m").section(Calibration).seq_len == 64, "any other model has the profile's own sizes"
    assert not load_profile("demo", "tiny-llama").one_by_one
    assert not load_profile("demo").replacing(models=["tiny-llama"], one_by_one=False).several


def test_sizes_are_extended():
    """A profile that extends another chooses among its models, and each keeps its own sizes."""
    ladder, again = load_profile("ladder"), load_profile("ladder-float32")
    assert again.models == ["smollm2-135m", "gemma3-270m"]
    for name in again.models:
        old, new = ladder.of(name).to_json(), again.of(name).to_json()
        assert (old["dtype"], new["dtype"]) == ("torch.bfloat16", "torch.float32")
        assert {key: new[key] for key in new if key not in ("name", "dtype")} == {
            key: old[key] for key in old if key not in ("name", "dtype")
        }
    assert again.of("gemma3-270m").to_json()["tasks"]["limit"] < again.to_json()["tasks"]["limit"]


def test_the_ladder():
    """Five models; half of the attention layers of each are dropped for the tasks, and larger ones have fewer samples."""
    ladder = load_profile("ladder")
    assert len(ladder.models) == 5
    for name in ladder.models:
        settings, layers = ladder.of(name).to_json(), catalogue()["models"][name]["shape"]["num_hidden_layers"]
        assert layers / 2 in settings["tasks"]["n_drop"]["attention"]
        assert {1, 2, 4} <= {*settings["tasks"]["n_drop"]["mlp"]} & {*settings["tasks"]["n_drop"]["block"]}
        assert 3 * min(settings["calibration"]["sample_counts"]) <= max(settings["calibration"]["sample_counts"])
    limits = [ladder.of(name).to_json()["tasks"]["limit"] for name in ladder.models]
    assert limits == sorted(limits, reverse=True)
    assert [name for name in ladder.models if "speed" in ladder.of(name).to_json()] == ["qwen2.5-coder-1.5b"]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            "models: {tiny-llama: {calibration: {seq_lem: 3}}}",
            "'seq_lem' in demo.yaml, under tiny-llama, under calib",
        ),
        (
            "models: {tiny-llama: {speed: {prompt: 8}}}",
            "'contexts' in demo.yaml, under tiny-llama, under speed must hold the ends",
        ),
        (
            "models: {tiny-llama: {calibratoin: {seq_len: 3}}}",
            "Unknown section 'calibratoin' in demo.yaml, under tiny-l",
        ),
        ("models: {tiny-llama: {calibration: 3}}", "demo.yaml, under tiny-llama must hold the key 'calibration' with keys"),
        ("models: {tiny-llama: 3}", "'models' in demo.yaml must be a list of names, or a mapping"),
        ("models: {}", "'models' in demo.yaml must be a list of names, or a mapping, but is {}"),
        ("models: {tiny-llama: {text: {n_samples: 0}}}", "'n_samples' in demo.yaml, under tiny-llama, under text must be a"),
    ],
)
def test_mistakes_in_sizes(tmp_path, monkeypatch, new, message):
    """They are found before the first model is measured, whichever model they are about."""
    monkeypatch.setattr(files, "PROFILE_DIR", tmp_path)
    (tmp_path / "demo.yaml").write_text(GOOD.replace("models: [tiny-llama]", new))
    for model in (None, "gemma3-270m"):
        with pytest.raises(LLMDropError, match=message):
            load_profile("demo", model)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "contexts: [16, 32, 48, 64]",
            "contexts: [16, 32, 48]",
            r"'contexts' in demo.yaml, under speed must hold the ends of the generation, 32 \(prompt\) and 64 \(prompt and",
        ),
        (
            "contexts: [16, 32, 48, 64]",
            "contexts: [16, 64]",
            r"ends of the generation, .* but is \[16, 64\]",
        ),
        (
            "n_drop: [2], task_n: [2]",
            "n_drop: [2], task_n: [2, 3]",
            r"'task_n' in demo.yaml, under iterative must hold numbers of 'n_drop', \[2\], but is \[2, 3\]",
        ),
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
