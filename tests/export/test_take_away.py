"""One command from a model's name to folders that other programs serve, each with a card; all or nothing is written."""

import json
import types

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from llmdrop_utils import DropPlan, cli, load_dropped, load_model, score_text
from llmdrop_utils.base import files
from llmdrop_utils.derive.healing import Healing
from llmdrop_utils.export import measured, take_away
from llmdrop_utils.export.measured import Text, held_out, of_scores
from llmdrop_utils.measure.text import TextScores


@pytest.fixture
def small(monkeypatch):
    """Less text, on a random model."""
    monkeypatch.setattr(take_away, "CORPUS", "random-words")
    monkeypatch.setattr(take_away, "CORPORA", ("random-words",))
    monkeypatch.setattr(take_away, "N_CALIBRATION", 4)
    monkeypatch.setattr(take_away, "LENGTH", 32)
    monkeypatch.setattr(measured, "N_SAMPLES", 8)
    monkeypatch.setattr(measured, "SEQ_LEN", 32)
    monkeypatch.setattr(measured, "N_DOCUMENTS", 4)
    monkeypatch.setattr(measured, "TASKS", ("openbookqa",))


def command(to, *more):
    return ["drop", "tiny-llama", "--to", str(to), *more]


def test_two_formats(small, tmp_path, capsys):
    pytest.importorskip("cyllama", reason="llama.cpp is an optional extra")
    to = tmp_path / "out"
    assert cli.main(command(to, "-n", "2", "--kind", "joint", "--format", "transformers", "gguf-q8_0")) == 0
    plan = DropPlan.load(to / "plan.json")
    assert plan.n_drop == 2
    loaded = AutoModelForCausalLM.from_pretrained(to / "transformers")
    assert loaded.llmdrop_plan.key == plan.key
    (file,) = (to / "gguf-q8_0").glob("*.gguf")
    assert file.name == "tiny-llama-dropped-Q8_0.gguf"
    for folder in ("transformers", "gguf-q8_0"):
        card = (to / folder / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front == {
            "license": "other",
            "license_name": "none (generated)",
            "base_model": "tiny-llama",
            "tags": ["llmdrop"],
        }
        assert "llmdrop drop tiny-llama --kind joint -n 2 --to out --format transformers gguf-q8_0" in card
        for kind, name in (("attention", "attention"), ("mlp", "MLP")):
            if layers := getattr(plan, kind):
                assert f"- {name} of layers {', '.join(map(str, layers))} (of 6), most droppable first" in card
        record = json.loads((to / folder / "results.json").read_text())
        score = record["results"]["openbookqa"]["acc_norm,none"]
        assert (
            f"| openbookqa (0-shot) | acc_norm | {record['results_of_dense_model']['openbookqa']['acc_norm,none']:.1%} ±"
            in card
        )
        assert record["config"]["model_args"] == {"base": "tiny-llama", **plan.key.to_json()}
        (entry,) = yaml.safe_load((to / folder / ".eval_results/openbookqa.yaml").read_text())
        assert entry["dataset"] == {"id": "allenai/openbookqa", "task_id": "main"}
        assert entry["value"] == pytest.approx(100 * score, abs=0.01)
        more, low, high = record["text"]["random-words"]["relative_perplexity"]
        assert f"| {more:.2f} ({low:.2f} to {high:.2f}) |\n" in card
    assert not list(to.rglob("*.lock"))
    assert "gguf-q8_0: " in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "told"), [
    (["--repair"], "refitted in closed form on 1,024 tokens of 1 corpora."),
    (["--heal", "256"], "healed by distillation from the dense model, reading 256 tokens of other text of these."),
    (["--heal", "40"], "healed by distillation from the dense model, reading 64 tokens of other text of these."),
    (["--repair", "--heal", "0.01 min"], "refitted in closed form on 1,024 tokens of 1 corpora, then healed"),
])  # fmt: skip
def test_what_is_kept_makes_up_for_it(small, tmp_path, monkeypatch, asked, told):
    """The checkpoint has other weights, is compared with the dense model, and is not taken for the base."""
    monkeypatch.setattr(take_away, "N_CALIBRATION", 32)
    monkeypatch.setattr(take_away, "N_HEALING", 8)
    to = tmp_path / "out"
    assert cli.main(command(to, "-n", "2", *asked)) == 0
    loaded, tokenizer = load_dropped(to / "transformers")
    dense, _ = load_model("tiny-llama")
    kept = {name: weight for name, weight in loaded.state_dict().items() if "layers" in name}
    assert any(not torch.equal(weight, dense.state_dict()[name].to(weight.dtype)) for name, weight in kept.items())
    assert loaded.llmdrop_identity != dense.llmdrop_identity
    card = (to / "transformers" / "README.md").read_text()
    assert f"The weights that are kept were {told}" in card
    assert " ".join(asked).replace("0.01 min", "0.01min") in card
    tokens = held_out(tokenizer, "random-words", 32 * 32)
    ours, whole = (score_text(each, tokens).nll[0].mean() for each in (loaded, dense))
    record = json.loads((to / "transformers" / "results.json").read_text())
    value, low, high = record["text"]["random-words"]["relative_perplexity"]
    assert value == pytest.approx(np.exp(ours - whole), rel=0.01)  # measured in float32, stored in the dtype of the base
    assert low <= value <= high


def test_what_stops_a_command_keeps_the_healing(small, tmp_path, monkeypatch, cache):
    """Whatever comes after it: the same command makes no step twice, whatever other commands healed meanwhile."""
    monkeypatch.setattr(take_away, "N_CALIBRATION", 32)
    monkeypatch.setattr(take_away, "N_HEALING", 8)
    steps: list[int] = []
    heal, measure = take_away.heal, take_away._measure

    def counted(*arguments, **more):
        return heal(*arguments, **more, on_step=lambda step, loss: steps.append(step))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(take_away, "heal", counted)
    monkeypatch.setattr(take_away, "tasks_left", lambda *_: {})  # they are downloaded
    monkeypatch.setattr(take_away, "_measure", stopped)
    mended = ["-n", "2", "--repair", "--heal", "512"]
    for asked, made in ((mended, [1, 2]), (mended, []), (["-n", "2", "--heal", "512"], [1, 2]), (mended, [])):
        assert cli.main(command(tmp_path / "out", *asked)) == 130
        assert steps == made
        steps.clear()
    monkeypatch.setattr(take_away, "_measure", measure)
    assert cli.main(command(tmp_path / "out", *mended)) == 0
    assert not steps
    assert len([*(files.CACHE / "healing").glob("[!.]*")]) == 1, "that of the command that was never finished"


def test_every_healing_has_checkpoints_of_its_own():
    one, other = (types.SimpleNamespace(identity=identity) for identity in ("one", "other"))
    made = [(one, DropPlan((1,)), True, Healing(tokens=8)), (other, DropPlan((1,)), True, Healing(tokens=8)),
            (one, DropPlan((2,)), True, Healing(tokens=8)), (one, DropPlan((1,)), False, Healing(tokens=8)),
            (one, DropPlan((1,)), True, Healing(minutes=8))]  # fmt: skip
    assert len({take_away._checkpoints_of(*each) for each in made}) == len(made)


@pytest.mark.parametrize("special", [0, 1])
def test_quality_is_measured_on_text_that_was_not_read_before(special, monkeypatch):
    """Samples may begin with a token of the tokenizer's own, so longer ones reach further in the same text."""
    monkeypatch.setattr(measured, "load_tokens", lambda corpus, tokenizer, n, length: blocks(n, length))

    def blocks(n, length):
        positions = torch.arange(n * (length - special)).view(n, length - special)
        return torch.cat([torch.full((n, special), -1), positions], 1)

    used = take_away.N_CALIBRATION * take_away.LENGTH
    read = blocks(take_away.N_CALIBRATION, take_away.LENGTH)
    quality = held_out(None, "web", used)
    first = take_away.N_CALIBRATION + -(-measured.N_SAMPLES * measured.SEQ_LEN // take_away.LENGTH) + 1
    healing = blocks(first + 1, take_away.LENGTH)[first:]
    assert len(quality) == measured.N_SAMPLES
    assert read.max() < quality[quality >= 0].min()
    assert quality.max() < healing[healing >= 0].min()
    assert held_out(None, "web").flatten()[special] == 0


@pytest.mark.parametrize("budget", ["ten", "-5", "0.5", "10min later", "1e6", "", "9" * 5000])
def test_budgets_that_are_none(small, tmp_path, capsys, budget):
    assert cli.main(command(tmp_path / "out", "-n", "1", f"--heal={budget}")) == 1
    assert "Healing takes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["to", "cache"])
def test_what_cannot_be_written_is_told_before_anything_is_measured(small, tmp_path, monkeypatch, capsys, where):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(take_away, "measure_importance", lambda *given: pytest.fail("that takes minutes"))
    if where == "cache":
        monkeypatch.setattr(files, "CACHE", tmp_path / "file" / "cache")
    to = tmp_path / "out" if where == "cache" else tmp_path / "file" / "out"
    assert cli.main(command(to, "-n", "1", "--repair")) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "budget", [{"minutes": 2.5}, {"tokens": 300}, {"minutes": 1234567.5}, {"minutes": 10.12345}, {"minutes": 1e-5}]
)
def test_a_budget_is_told_as_it_is_asked_for(budget):
    assert take_away.healing_of(take_away.budget_of(Healing(**budget))) == Healing(1e-3, 8, **budget)


def test_the_checkpoint_has_the_dtype_of_the_base(small, tmp_path):
    model, tokenizer = load_model("tiny-llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert cli.main(["drop", str(tmp_path / "base"), "-n", "1", "--to", str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/transformers").dtype == torch.bfloat16


def test_as_many_as_keep_the_accuracy(small, tmp_path, monkeypatch, capsys):
    """Of plans that retain 99, 98.5, 97 and 99.5 %, less half a point below, the largest before the first that fails."""
    middles = {1: 0.99, 2: 0.985, 3: 0.97, 4: 0.995, 5: 0.9}

    def left(model, tokens, plans, dense=None):
        return [Text((m, m - 0.005, 1.0), (1.0, 1.0, 1.0)) for m in (middles[max(plan.n_drop, 1)] for plan in plans)]

    monkeypatch.setattr(take_away, "text_left", left)
    for keep, n in ((0.98, 2), (0.984, 1), (0.96, 4)):
        assert cli.main(command(tmp_path / f"out{n}", "--keep", str(keep))) == 0
        assert DropPlan.load(tmp_path / f"out{n}/plan.json").n_drop == n
    card = (tmp_path / "out2/transformers/README.md").read_text(encoding="utf-8")
    assert "| random-words | 98.5% (98.0% to 100.0%) | 1.00 (1.00 to 1.00) |" in card
    assert cli.main(command(tmp_path / "none", "--keep", "0.99")) == 1
    assert "Not even one attention layer can be dropped if 99.0% of the accuracy are to be kept" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_is_left_by_hand():
    """Of 0.5, 0.6, 0.4 and 0.5 hit, 0.4, 0.6, 0.3 and 0.5 are left: 1.8 of 2.0; 0.1 nats more are a factor of 1.105."""
    hits = np.array([[0.5, 0.6, 0.4, 0.5], [0.4, 0.6, 0.3, 0.5]])
    nll = np.array([[2.0, 2.0, 2.0, 2.0], [2.1, 2.1, 2.1, 2.1]])
    text = of_scores(TextScores(nll, hits, np.zeros_like(nll)), 1)
    assert text.retained[0] == pytest.approx(0.9)
    assert 0.75 < text.retained[1] < 0.9 < text.retained[2] <= 1.0
    assert text.perplexity == pytest.approx((1.10517, 1.10517, 1.10517), abs=1e-4)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("dense", [[0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])  # in the second, in many draws
def test_a_dense_model_that_predicts_nothing(small, tmp_path, monkeypatch, capsys, dense):
    """No share of it can be kept, so none is said to be; all else of the card is as ever."""
    hits = np.array([dense, [0.1, 0.1, 0.0, 0.0]])
    text = of_scores(TextScores(np.ones_like(hits), hits, np.zeros_like(hits)), 1)
    monkeypatch.setattr(take_away, "text_left", lambda model, tokens, plans, dense=None: [text] * len(plans))
    assert cli.main(command(tmp_path / "kept", "--keep", "0.9")) == 1
    assert "The dense model predicts too few tokens of random-words text to tell" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
    assert cli.main(command(tmp_path / "out", "-n", "1")) == 0
    assert "| random-words | not known: the dense model predicts too few tokens | 1.00 (" in (
        tmp_path / "out/transformers/README.md"
    ).read_text(encoding="utf-8")
    record = json.loads((tmp_path / "out/transformers/results.json").read_text(), parse_constant=pytest.fail)
    assert record["text"]["random-words"]["relative_perplexity"] == [1, 1, 1]
    assert None in record["text"]["random-words"]["retained_accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either how many layers to drop"),
        (["-n", "1", "--keep", "0.9"], "either how many layers to drop"),
        (["--keep", "98"], "a share between 0 and 1, such as 0.98, but is 98"),
        (["-n", "1", "--format", "onnx"], "There is no format 'onnx'. There are: transformers, vllm, mlx, gguf, gguf-f32"),
        (["-n", "9"], "Cannot drop 9 attention layers: this model has 6 to drop"),
        (["-n", "-1"], "Cannot drop -1 attention layers: this model has 6 to drop"),
        (["-n", "13", "--kind", "joint"], "Cannot drop 13 joint layers: this model has 12 to drop"),
        (["-n", "1", "--format", "vllm"], "the width of its MLP, 64, is no multiple of 256"),
    ],
)
def test_bad_input(small, tmp_path, capsys, monkeypatch, arguments, message):
    """It is told before minutes are spent on importance."""
    monkeypatch.setattr(take_away, "measure_importance", None)
    assert cli.main(command(tmp_path / "out", *arguments)) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_taken_away(small, tmp_path, capsys):
    assert cli.main(["drop", "random:tiny-llama", "-n", "1", "--to", str(tmp_path / "out")]) == 1
    assert "has random weights, so there is nothing to take away" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    assert cli.main(command(tmp_path / "mine", "-n", "1")) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_failing_gate_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(take_away, "EXACT", -1.0)
    assert cli.main(command(tmp_path / "out", "-n", "1")) == 1
    assert "The checkpoint does not predict what the model with these layers set to zero does" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
