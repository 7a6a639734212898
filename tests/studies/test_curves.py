"""What notebooks 02 and 03 measure: on which tokens and tasks, under which plans; and the rows of a model as a whole."""

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from llmdrop_utils import DropPlan, NotAvailable
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.models.locate import LocatedModel
from llmdrop_utils.studies import curves
from llmdrop_utils.studies.curves import Measured, Tasks, Text, measure_curves, rank_layers
from llmdrop_utils.studies.profile import Calibration, Profile
from llmdrop_utils.studies.run import Run
from llmdrop_utils.studies.work import DENSE, DENSE_CELL, Cell, ImportanceWork, TextWork

MODEL = LocatedModel("hand", Path(), "sha256:hand")
A1, A2, M1, J1 = Cell("attention", 1), Cell("attention", 2), Cell("mlp", 1), Cell("joint", 1)
STREAM = 1000  # tokens of the corpus in these tests: 0, 1, 2, ...


def a_run(n_samples=2, sample_counts=(1,), seq_len=8, text_len=8, text_n=2, n_drop=(1,), tasks=("piqa",), **task_drop):
    calibration = Calibration(
        corpora=["web", "code"],
        n_samples=n_samples,
        seq_len=seq_len,
        sample_counts=list(sample_counts),
        batch_size=1,
        n_drop=[1],
    )
    sections = {
        Calibration: calibration,
        Text: Text(n_samples=text_n, seq_len=text_len, n_drop=list(n_drop), across=[1]),
        Tasks: Tasks(names=list(tasks), data="package", limit=3, num_fewshot=None, n_drop=task_drop or {"attention": [1]}),
    }
    return Run("02_drop_curves", Profile("hand", "by hand", ["hand"], sections), {})


@pytest.fixture(autouse=True)
def no_files(monkeypatch):
    """A corpus of the tokens 0, 1, 2, ..., and a model and tokenizer of which nothing is read."""
    identity = {"dtype": torch.float32, "attention": "sdpa"}
    monkeypatch.setattr(curves, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(curves, "text_beginning", lambda tokenizer: [])
    monkeypatch.setattr(curves, "fitting_length", lambda model, asked: min(asked, 20))  # positions that it knows
    monkeypatch.setattr(curves, "fingerprint_tokenizer", lambda tokenizer: "byte by byte")
    monkeypatch.setattr(curves, "identity_of", lambda model, profile: {"model": model} | identity)
    load = lambda corpus, tokenizer, n, seq_len: torch.arange(STREAM)[: n * seq_len].view(n, seq_len)  # noqa: E731
    monkeypatch.setattr(curves, "load_tokens", load)


def importance_item(n_samples, seq_len=8):
    tokens = torch.arange(n_samples * seq_len).view(n_samples, seq_len)
    return ImportanceWork(MODEL, torch.float32, "sdpa", corpus="web", tokens=tokens, batch_size=1)


# ---- which text is held out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "seq_len", "text_len", "begin", "first"),
    [
        (2, 8, 8, 0, 16),
        (5, 8, 8, 0, 40),
        (5, 8, 16, 0, 48),  # 40 tokens were seen: two blocks of 16 and half of the third
        (4, 8, 16, 0, 32),
        (2, 8, 4, 0, 16),
        (1, 16, 8, 1, 21),  # of blocks that begin with a token, 15 tokens are text, and 7: two blocks of 7 would not do
    ],
)
def test_text_begins_where_calibration_ended(monkeypatch, samples, seq_len, text_len, begin, first):
    def load(corpus, tokenizer, n, seq_len):
        """Blocks of the tokens 0, 1, 2, ..., each beginning with -1 if `begin` is 1."""
        text = torch.arange(n * (seq_len - begin)).view(n, -1)
        return torch.cat([torch.full((n, begin), -1), text], dim=1)

    monkeypatch.setattr(curves, "load_tokens", load)
    monkeypatch.setattr(curves, "text_beginning", lambda tokenizer: [-1] * begin)
    item = dataclasses.replace(importance_item(1), tokens=load("web", None, samples, seq_len))
    work = curves.text_work(a_run(text_n=2, text_len=text_len), item, [DENSE])
    text = work.tokens[:, begin:].flatten()
    assert text.tolist() == list(range(first, first + 2 * (text_len - begin)))
    assert (work.corpus, work.model, tuple(work.tokens.shape)) == ("web", MODEL, (2, text_len))


def test_text_is_no_longer_than_the_model_reads():
    """40 tokens were seen: two blocks of 20, where 32 were asked for."""
    work = curves.text_work(a_run(text_n=2, text_len=32), importance_item(5), [DENSE])
    assert work.tokens.tolist() == torch.arange(40, 80).view(2, 20).tolist()


def test_each_plan_is_measured_once():
    """Whatever its order, and however many cells have it."""
    plans = {
        DENSE_CELL: DENSE,
        A2: DropPlan(attention=(2, 0)),
        Cell("joint", 2): DropPlan(attention=(0, 2)),
        M1: DropPlan(mlp=(1,)),
    }
    work = curves.text_work(a_run(), importance_item(2), plans.values())
    assert [plan.key for plan in work.plans] == [DENSE.key, plans[A2].key, plans[M1].key]


# ---- tasks ------------------------------------------------------------------------------------------------------------


def test_tasks_are_measured_in_their_cells(monkeypatch):
    monkeypatch.setattr(curves, "fingerprint_task", lambda members, limit: f"{members} {limit}")
    member = types.SimpleNamespace(config=types.SimpleNamespace(num_fewshot=5))
    plans = {DENSE_CELL: DENSE, A1: DropPlan(attention=(2,)), A2: DropPlan(attention=(2, 0)), M1: DropPlan(mlp=(1,))}
    run = a_run(attention=[2], mlp=[1])
    asked = [plans[cell] for cell in curves.cells_for_tasks(plans, run.section(curves.Tasks))]
    (piqa, rte) = curves.task_work(run, MODEL, {"piqa": [member], "rte": [member] * 2}, asked, 3)
    assert piqa.plans == (DENSE, plans[A2], plans[M1])
    assert (piqa.task, piqa.num_fewshot, piqa.limit, piqa.fingerprint) == ("piqa", 5, 3, f"{[member]} 3")
    assert (rte.task, rte.members) == ("rte", (member, member))
    assert piqa.tokenizer == rte.tokenizer == "byte by byte"


def test_tasks_are_loaded_before_anything_is_measured(monkeypatch):
    """With the profile's number of examples and source; of several, one that is unavailable is named."""

    def load(name, num_fewshot, source):
        assert (num_fewshot, source) == (None, "package")
        if name == "away":
            raise NotAvailable("it is away")
        return [name]

    run = a_run(tasks=["piqa", "away"])
    monkeypatch.setattr(curves, "load_task", load)
    monkeypatch.setattr(Run, "models", lambda self: [MODEL])
    monkeypatch.setattr(Run, "corpora", lambda self: ["web", "code"])
    monkeypatch.setattr(curves, "importance_work", lambda model, corpora, profile: [(model, corpora)])
    measured = []
    monkeypatch.setattr(Run, "measure", lambda self, work, force=None: measured.append((work, force)))
    monkeypatch.setattr(Run, "measured", lambda self, work: work)
    scoring, tasks = rank_layers(run)
    assert scoring == [(MODEL, ["web"])], "importance on the first corpus says what is dropped"
    assert measured == [(scoring, False)]
    assert tasks == {"piqa": ["piqa"]}
    assert run.not_run == {"task away": "it is away"}


# ---- which samples say what is dropped ----------------------------------------------------------------------------------


def test_plans_come_from_the_samples_that_the_profile_calibrates_on(monkeypatch, tmp_path):
    """The first two rank layer 1 lowest; with the third, which the study of sample counts needs, it would be layer 0."""
    rows = np.array([[2.0, 1.0, 3.0], [2.0, 1.0, 3.0], [0.0, 9.0, 0.0]])
    scores = Importance(dict.fromkeys(("attention", "mlp", "block"), rows), np.array([8, 8, 8]), {})
    item, done = importance_item(3), []
    monkeypatch.setattr(Run, "importance", lambda self, work: scores)
    monkeypatch.setattr(Run, "measure", lambda self, work: done.extend(work))
    further = {"hand": {Cell("attention", 1, "iterative"): DropPlan(attention=(2,))}, "other": {A2: DropPlan()}}
    (m,) = measure_curves(a_run(sample_counts=[3]), [item], {}, ("attention",), further)
    assert list(m.plans) == [DENSE_CELL, A1, Cell("attention", 1, "iterative")], "those of another model are not its own"
    assert m.plans[A1].attention == (1,)
    assert len(m.scores.weights) == 2
    assert done == m.work == [m.text_work]
    assert len(m.text_work.plans) == 3
    assert m.text_work.tokens.min() == 3 * 8, "held-out text begins behind all samples"


# ---- the rows of a model ------------------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    """Two documents and two samples that differ much. Lost with attention, MLP and joint drop: 0.05, 0.3, 0.2."""
    lost = {DENSE.key: 0.0, DropPlan(attention=(2,)).key: 0.05, DropPlan(mlp=(1,)).key: 0.3, DropPlan(mlp=(0,)).key: 0.2}
    plans = {DENSE_CELL: DENSE, A1: DropPlan(attention=(2,)), M1: DropPlan(mlp=(1,)), J1: DropPlan(mlp=(0,))}

    def values(item):
        by_plan = [lost[plan.key] for plan in item.plans]
        if isinstance(item, TextWork):
            return [{"nll": [2 + x, 6 + x], "hits": [0.4 * (1 - x), 0.8 * (1 - x)], "kl": [x, x]} for x in by_plan]
        return [{"metrics": {"acc": [0.9 - x, 0.5 - x]}, "chance": 0.2} for x in by_plan]

    text = TextWork(MODEL, torch.float32, "sdpa", "web", torch.zeros(2, 4).long(), tuple(plans.values()))
    task = types.SimpleNamespace(task="elsewhere", num_fewshot=0, plans=tuple(plans.values()))
    run = types.SimpleNamespace(values=values, section=a_run(attention=[1], mlp=[1], joint=[1]).section)
    scores = Importance({"block": np.ones((1, 3))}, np.array([8]), {})
    return Measured(run, MODEL, scores, plans, text, [task, task]).rows()


def test_gaps_of_a_model(rows):
    """Positive where the first kind keeps more: a higher score, or fewer nats per token. Paired, so of no width."""
    found = {(row["measure"], row["kind"], row["other"]): row for row in rows["gaps"]}
    expected = {("attention", "mlp"): 0.3 - 0.05, ("joint", "attention"): 0.05 - 0.2, ("joint", "mlp"): 0.3 - 0.2}
    assert set(found) == {(measure, *pair) for measure in ("tasks", "text") for pair in expected}
    for (measure, *pair), row in found.items():
        difference = expected[tuple(pair)]
        assert [row["difference"], row["low"], row["high"]] == pytest.approx([difference] * 3), (measure, pair)


def test_what_a_model_loses(rows):
    text = {row["kind"]: row for row in rows["text"]}
    assert text["dense"]["perplexity"] == pytest.approx(np.exp(4))
    assert text["mlp"]["perplexity"] == pytest.approx(np.exp(4.3))
    assert [text[kind]["kl"] for kind in ("dense", "attention", "mlp", "joint")] == [0, 0.05, 0.3, 0.2]
    for name in ("", "_low", "_high"):
        assert text["mlp"][f"retained{name}"] == pytest.approx(0.7)
    average = {row["kind"]: row for row in rows["average"]}
    assert (average["mlp"]["value"], average["mlp"]["retained"]) == pytest.approx((0.4, 0.2 / 0.5)), "above guessing, 0.2"
    assert [average["mlp"][f"points_lost{end}"] for end in ("", "_low", "_high")] == pytest.approx([30] * 3)
    assert rows["models"] == [{"n_layers": 3}]
    assert {row["kind"]: row["n"] for row in rows["reach"]} == {"attention": 1, "mlp": 0, "joint": 0}
