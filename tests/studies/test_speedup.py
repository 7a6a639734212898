"""Notebook 05: what is timed, and how its tables follow from the times."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from llmdrop_utils import DropPlan, LLMDropError, Load, NotAvailable, load_profile, select_last
from llmdrop_utils.base import files
from llmdrop_utils.base.errors import DiskFull
from llmdrop_utils.base.provenance import code_provenance
from llmdrop_utils.base.settings import build
from llmdrop_utils.base.stats import median_interval
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.measure.metrics import KINDS
from llmdrop_utils.measure.speed import Limits
from llmdrop_utils.measure.speed import Speed as Measured
from llmdrop_utils.models import locate as models_locate
from llmdrop_utils.models.load import default_dtype
from llmdrop_utils.models.locate import LocatedModel, locate_model
from llmdrop_utils.report.style import FIGURES, draw
from llmdrop_utils.report.tables import read_tables
from llmdrop_utils.report.verdicts import ADVICE
from llmdrop_utils.selection.ranking import select
from llmdrop_utils.studies import run as run_module
from llmdrop_utils.studies.profile import Profile
from llmdrop_utils.studies.run import STUDIES, Run
from llmdrop_utils.studies.speedup import loads
from llmdrop_utils.studies.speedup import study as speedup_study
from llmdrop_utils.studies.speedup.crossover import crossing, crossing_in_words, crossover_rows
from llmdrop_utils.studies.speedup.generation import GENERATION, Timed, compose_generations, integrate, read_timings
from llmdrop_utils.studies.speedup.loads import Speed, SpeedWork, models_or_shapes, n_layers_of, plans_of, speed_work
from llmdrop_utils.studies.speedup.study import limit_rows, protocol_rows
from llmdrop_utils.studies.speedup.trade import sdr, trade_rows
from llmdrop_utils.studies.work import Cell

SETTINGS = Speed(
    repeats=2, batch_size=3, prompt=64, new_tokens=64, contexts=[16, 64, 128, 256], steps=4, n_drop={"attention": [2, 3]},
    sweep_batches=[1, 8], sweep_n=2, compiled={"attention": [3]}, whole={"attention": [2], "mlp": [2]},
)  # fmt: skip
A2, A3, M2 = Cell("attention", 2), Cell("attention", 3), Cell("mlp", 2)


# ---- what is timed ----------------------------------------------------------------------------------------------------


def test_what_is_timed_whole_is_named_by_kind():
    values = SETTINGS.model_dump() | {"whole": [128, 64]}
    with pytest.raises(LLMDropError, match="'whole' in demo.yaml must be lists of positive integers, by name, or null"):
        build(Speed, values, "demo.yaml")
    with pytest.raises(LLMDropError, match="Unknown kind 'tail' in demo.yaml"):
        build(Speed, values | {"whole": {"tail": [2]}}, "demo.yaml")
    assert build(Speed, values | {"whole": None, "batch_size": None, "compiled": None}, "demo.yaml").batch_size is None


@pytest.mark.parametrize("profile", ["cpu", "gpu", "smoke"])
def test_profiles_time_enough_rounds_for_95_percent(profile):
    """And what they time whole is timed in samples too."""
    settings = load_profile(profile).section(Speed)
    assert median_interval(np.arange(settings.repeats))[2] >= 0.95
    assert all(set(counts) <= set(settings.n_drop[kind]) for kind, counts in settings.whole.items())


@pytest.fixture
def some_models_unavailable(monkeypatch):
    """ "away" is unavailable; of "llama-2-13b" and "tiny-llama", which are too, the shapes are known."""

    def locate(name, *kinds):
        if name == "full":
            raise DiskFull("the disk is full")
        if name in ("away", "llama-2-13b", "tiny-llama"):
            raise NotAvailable(f"{name} is not on this machine.")
        return LocatedModel(name, files.CACHE, f"{'random' if name.startswith('random:') else 'sha256'}:{name}")

    monkeypatch.setattr(loads, "locate_model", locate)
    monkeypatch.setattr(models_locate, "locate_model", locate)
    return load_profile("smoke")


def test_shapes_take_the_place_of_unavailable_models(some_models_unavailable):
    located, reasons = models_or_shapes(some_models_unavailable.replacing(models=["llama-2-13b", "mine", "away"]))
    assert [model.name for model in located] == ["random:llama-2-13b", "mine"]
    assert located[0].is_random
    assert reasons == {
        "away": "away is not on this machine.",
        "llama-2-13b": "llama-2-13b is not on this machine. Its shape with random weights was taken instead.",
    }
    located, reasons = models_or_shapes(some_models_unavailable)
    assert [model.name for model in located] == ["random:tiny-llama"]
    with pytest.raises(NotAvailable, match="away is not on this machine"):
        models_or_shapes(some_models_unavailable.replacing(models=["away"]))
    with pytest.raises(DiskFull):
        models_or_shapes(some_models_unavailable.replacing(models=["mine", "full"]))


@pytest.fixture
def tiny():
    """Six layers, random weights, no files needed."""
    return locate_model("random:tiny-llama")


def a_run(profile="smoke", **changes):
    return Run("05_speedup", load_profile(profile).replacing(**changes), STUDIES["05_speedup"].tables)


def test_random_weights_drop_the_last_layers(tiny):
    n_drop = {"attention": [3, 1, 9], "joint": [2]}
    plans = plans_of(a_run(speed={"n_drop": n_drop, "sweep_n": 2}), tiny, ["random-words"])
    assert n_layers_of(tiny) == 6
    assert {cell: (plan.attention, plan.mlp) for cell, plan in plans.items()} == {
        Cell("attention", 1): ((5,), ()),
        A2: ((5, 4), ()),
        A3: ((5, 4, 3), ()),
        M2: ((), (5, 4)),
    }, "nine layers are too many, and a joint ranking needs scores"
    real = dataclasses.replace(tiny, identity="sha256:0")
    assert plans_of(a_run(speed={"n_drop": n_drop, "sweep_n": 2}), real, []) == plans, "nor without a corpus"


def test_models_with_scores_drop_what_notebook_02_drops(tiny, monkeypatch):
    generator = np.random.default_rng(0)
    scores = Importance({kind: generator.random((8, 6)) for kind in KINDS}, np.ones(8), {}, "sha256:0")
    monkeypatch.setattr(run_module, "importance_work", lambda model, corpora, calibration: [corpora])
    monkeypatch.setattr(Run, "measure", lambda run, work, force: None)
    monkeypatch.setattr(Run, "importance", lambda run, item: scores)
    run = a_run(calibration={"n_samples": 4}, speed={"n_drop": {"attention": [2], "joint": [4, 12]}, "sweep_n": 2})
    real = dataclasses.replace(tiny, identity="sha256:0")
    plans = plans_of(run, real, ["random-words"])
    assert set(plans) == {A2, M2, Cell("joint", 4)}, "no joint 12: nothing would be left"
    for cell, plan in plans.items():
        assert plan == select(scores.first(4), cell.kind, cell.n)
    run.not_run[real.name] = "it does not fit"
    assert plans_of(run, real, ["random-words"]) == {}


def profile_of(settings):
    return Profile("hand", "", [], {Speed: settings})


def timed_loads(settings, cells, monkeypatch=None):
    """(what, context, batch, back end, fills, cells) of each item, in order."""
    plans = {cell: select_last(6, cell.kind, cell.n) for cell in cells}
    names = {plan.key: f"{cell.kind[0]}{cell.n}" for cell, plan in plans.items()}
    for item in speed_work(locate_model("random:tiny-llama"), plans, profile_of(settings)):
        load, under = item.load, " ".join(names[plan.key] for plan in item.plans)
        yield load.what, load.context, load.new_tokens, load.batch_size, load.backend, item.fill, under


def test_every_load_is_timed_once_for_all_its_purposes():
    assert list(timed_loads(SETTINGS, [A2, A3, M2])) == [
        ("prefill", 64, 0, 3, "eager", False, "a2 a3"),  # the protocol's prompt
        ("decode", 16, 4, 1, "eager", False, "a2 a3 m2"),  # every context: listed, and the sweep at batch 1
        ("decode", 16, 4, 8, "eager", False, "a2 m2"),  # the sweep at batch 8
        ("decode", 64, 4, 1, "eager", False, "a2 a3 m2"),
        ("decode", 64, 4, 8, "eager", False, "a2 m2"),
        ("decode", 128, 4, 1, "eager", False, "a2 a3 m2"),
        ("decode", 128, 4, 8, "eager", False, "a2 m2"),
        ("decode", 256, 4, 1, "eager", False, "a2 a3 m2"),  # beyond the protocol
        ("decode", 256, 4, 8, "eager", False, "a2 m2"),
        ("decode", 64, 4, 3, "eager", False, "a2 a3"),  # the protocol's decoding at its own batch, at both ends
        ("decode", 128, 4, 3, "eager", False, "a2 a3"),
        ("decode", 64, 4, 3, "compiled", False, "a3"),
        ("prefill", 16, 0, 1, "eager", False, "a2 m2"),  # the sweep over prompts
        ("prefill", 64, 0, 1, "eager", False, "a2 m2"),
        ("generation", 64, 64, 3, "eager", False, "a2 m2"),  # the protocol whole, last: it takes longest
    ]


def test_a_generation_is_timed_whole_once(tiny):
    plans = {cell: select_last(6, cell.kind, cell.n) for cell in (A2, A3)}
    repeats = {(item.load.what, item.repeats) for item in speed_work(tiny, plans, profile_of(SETTINGS))}
    assert repeats == {("prefill", 2), ("decode", 2), ("generation", 1)}
    (whole,) = [item for item in speed_work(tiny, plans, profile_of(SETTINGS)) if item.load.what == "generation"]
    assert [key["repeats"] for key in whole.keys] == [1]
    settings = SETTINGS.model_copy(update={"whole": None})
    assert "generation" not in {item.load.what for item in speed_work(tiny, plans, profile_of(settings))}


def test_a_static_cache_has_room_for_the_whole_generation(tiny):
    work = speed_work(tiny, {A3: select_last(6, "attention", 3)}, profile_of(SETTINGS))
    assert {(item.load.backend, item.load.room) for item in work} == {("eager", None), ("compiled", 64 + 64 + 4)}


def test_a_batch_that_fills_the_gpu_and_positions_that_end(monkeypatch):
    filled = SETTINGS.model_copy(update={"batch_size": None, "compiled": None})
    monkeypatch.setattr(loads, "learned_positions", lambda config: 130)
    assert list(timed_loads(filled, [A2, M2])) == [
        ("prefill", 64, 0, 1, "eager", True, "a2"),
        ("decode", 16, 4, 1, "eager", False, "a2 m2"),
        ("decode", 16, 4, 8, "eager", False, "a2 m2"),
        ("decode", 64, 4, 1, "eager", False, "a2 m2"),
        ("decode", 64, 4, 8, "eager", False, "a2 m2"),  # at 128 the four steps would end beyond what the model knows
        ("decode", 64, 4, 1, "eager", True, "a2"),
        ("prefill", 16, 0, 1, "eager", False, "a2 m2"),
        ("prefill", 64, 0, 1, "eager", False, "a2 m2"),
        ("generation", 64, 64, 1, "eager", True, "a2 m2"),
    ]


def work_item(tiny, load, plans, fill=False, **changes):
    shared = {"model": tiny, "dtype": torch.float32, "attention": "sdpa", "longest": 132, "repeats": 2}
    return SpeedWork(**shared | changes, load=load, fill=fill, plans=tuple(plans))


CODE = {"processor": "P", "gpus": [], "cpu_threads": 2, "versions": {"torch": "2", "transformers": "5", "numpy": "2"}}


def test_keys_of_stored_records_do_not_change(tiny, monkeypatch):
    monkeypatch.setattr(loads, "code_provenance", lambda: CODE)
    plan = DropPlan(attention=(5, 4), n_layers=6, model="any")
    (key,) = work_item(tiny, Load("decode", 64, 4, 3), [plan]).keys
    assert key == {
        "measurement": "speed",
        "version": 1,
        "model": tiny.identity,
        "dtype": "float32",
        "attention": "sdpa",
        "transformers": "5",
        "drawn_on": "cpu",
        "plan": {"attention": [4, 5], "mlp": []},
        "machine": {"processor": "P", "gpus": [], "cpu_threads": 2},
        "libraries": {"torch": "2", "transformers": "5"},
        "load": {"what": "decode", "context": 64, "new_tokens": 4, "batch_size": 3, "backend": "eager", "room": None},
        "repeats": 2,
    }
    (filled,) = work_item(tiny, Load("decode", 64, 4), [plan], fill=True).keys
    assert filled["load"] == key["load"] | {"batch_size": None, "longest": 132}


def test_whatever_changes_a_time_changes_its_key(tiny, monkeypatch):
    """Machine, libraries, dtype, attention, model, plan, load and number of repeats: each alone."""
    load, plan = Load("decode", 64, 4, 3, "eager", 99), select_last(6, "attention", 2)

    def found(code=CODE, load=load, plan=plan, tiny=tiny, fill=False, **changes):
        monkeypatch.setattr(loads, "code_provenance", lambda: code)
        return str(work_item(tiny, load, [plan], fill, **changes).keys)

    loads_ = [
        {"what": "generation"},
        {"context": 65},
        {"new_tokens": 5},
        {"batch_size": 1},
        {"backend": "compiled"},
        {"room": 98},
    ]
    others = [
        *(found(load=dataclasses.replace(load, **change)) for change in loads_),
        *(found(code=CODE | change) for change in ({"processor": "Q"}, {"gpus": ["G"]}, {"cpu_threads": 1})),
        *(found(code=CODE | {"versions": CODE["versions"] | {name: "9"}}) for name in ("torch", "transformers")),
        *(found(**change) for change in ({"dtype": torch.bfloat16}, {"attention": "eager"}, {"repeats": 1}, {"fill": True})),
        found(fill=True, longest=133),
        found(plan=select_last(6, "mlp", 2)),
        found(tiny=dataclasses.replace(tiny, identity="sha256:0")),
    ]
    assert len({found(), *others}) == 1 + len(others)
    assert found(code=CODE | {"versions": CODE["versions"] | {"numpy": "3"}}) == found(), "no number is made with it"


# ---- from times to timings --------------------------------------------------------------------------------------------


def timed(seconds, dense=None, floor=1.0, dense_floor=1.0, asked=1, **row):
    seconds = np.array(seconds)
    row = {"model": "m", "kind": "attention", "n": 2, "backend": "eager", "fill": False, "batch_size": 1, "room": None,
           "new_tokens": 1} | row  # fmt: skip
    return Timed(row, asked, seconds, floor, seconds if dense is None else np.array(dense), dense_floor)


def test_a_row_by_hand():
    """Six rounds: dense 2, 6, 4, 15, 8, 40 s, and with layers dropped 1, 2, 4, 5, 8, 10 s."""
    row = timed(
        [1.0, 2.0, 4.0, 5.0, 8.0, 10.0], [2.0, 6.0, 4.0, 15.0, 8.0, 40.0], floor=0.9, dense_floor=1.8, what="x"
    ).as_row()
    assert row == {
        "model": "m", "kind": "attention", "n": 2, "backend": "eager", "fill": False, "batch_size": 1, "room": None,
        "new_tokens": 1, "what": "x",
        "seconds": 4.5,  # the median, half-way from 4 to 5; the mean is 5
        "seconds_low": 1.0, "seconds_high": 10.0,
        "level": 1 - 2 / 2**6,  # least to greatest of six
        "spread": pytest.approx((7.25 - 2.5) / 4.5),  # quarters at 2 + 0.25 x 2 and 5 + 0.75 x 3
        "dense_spread": pytest.approx((13.25 - 4.5) / 7),  # of 2, 4, 6, 8, 15, 40
        "noisy": True,
        "speedup": 2.5,  # of the ratios 2, 3, 1, 3, 1, 4 by round; the ratio of medians is 7 / 4.5
        "speedup_low": 1.0, "speedup_high": 4.0,
        "predicted": 2.0,  # 1.8 / 0.9
        "share_of_limit": 0.2,  # 0.9 / 4.5
    }  # fmt: skip


def test_nine_rounds_leave_out_the_ends():
    row = timed(np.ones(9), dense=[9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.1]).as_row()
    assert (row["speedup_low"], row["speedup"], row["speedup_high"]) == (1, 4, 7)
    assert row["level"] == 1 - 2 * (1 + 9) / 2**9


STEADY, WILD = [1.0, 1.01, 1.02], [1.0, 1.5, 2.0]


@pytest.mark.parametrize(("plan", "dense", "noisy"), [(STEADY, STEADY, False), (WILD, STEADY, True), (STEADY, WILD, True)])
def test_noise_of_either_side_is_marked(plan, dense, noisy):
    row = timed(plan, dense).as_row()
    assert row["noisy"] is noisy
    assert (row["spread"] > 0.1, row["dense_spread"] > 0.1) == (plan is WILD, dense is WILD)
    assert timed(WILD).as_row()["spread"] == pytest.approx((1.75 - 1.25) / 1.5)


def test_speed_up_is_paired_by_repeat():
    """A round that is slow for all is slow for both: the ratio and its interval know nothing of it."""
    row = timed([1.0, 2.0, 1.1], dense=[2.0, 4.0, 2.2]).as_row()
    assert row["speedup"] == row["speedup_low"] == row["speedup_high"] == 2
    assert row["noisy"]


def test_a_single_repeat_has_no_interval():
    row = timed([2.0], dense=[3.0]).as_row()
    assert (row["seconds"], row["speedup"], row["noisy"]) == (2.0, 1.5, False)
    assert all(
        np.isnan(row[name]) for name in ("seconds_low", "speedup_low", "speedup_high", "level", "spread", "dense_spread")
    )


def a_value(dense, plan, batch_size=1):
    """Of seconds of the dense model and of a plan; the plan needs half of what the dense model needs."""
    shared = {"peak_bytes": None, "batch_size": batch_size}
    return {"dense": {"seconds": dense, "floor_seconds": 0.2, "kv_bytes": 8} | shared,
            "plan": {"seconds": plan, "floor_seconds": 0.1, "kv_bytes": 4} | shared,
            "limits": {"bandwidth": 1.0, "rate": 2.0}}  # fmt: skip


def test_values_become_timings(tiny):
    """The dense model once; a plan that two cells share, for both."""
    plans = {A2: select_last(6, "attention", 2), Cell("joint", 2): select_last(6, "attention", 2), M2: select_last(6, "mlp", 2)}
    item = work_item(tiny, Load("decode", 64, 4, 8), [plans[M2], plans[A2]])
    values = [a_value([4.0, 5.0], [3.0, 1.0], batch_size=2), a_value([5.0, 6.0], [2.0, 3.0], batch_size=2)]
    found = read_timings(item, values, plans)
    times = [(t.cell[1:], t.seconds.tolist(), t.floor, t.dense_seconds.tolist(), t.dense_floor) for t in found]
    assert times == [
        (("dense", 0), [4.0, 5.0], 0.2, [4.0, 5.0], 0.2),
        (("mlp", 2), [3.0, 1.0], 0.1, [4.0, 5.0], 0.2),
        (("attention", 2), [2.0, 3.0], 0.1, [5.0, 6.0], 0.2),
        (("joint", 2), [2.0, 3.0], 0.1, [5.0, 6.0], 0.2),
    ]
    assert {t.asked for t in found} == {8}
    assert found[1].row == {
        "model": "random:tiny-llama", "backend": "eager", "what": "decode", "context": 64, "new_tokens": 4, "room": None,
        "batch_size": 2,  # memory ran out
        "kind": "mlp", "n": 2, "kv_bytes": 4, "peak_bytes": None, "fill": False,
    }  # fmt: skip
    (dense, _) = read_timings(work_item(tiny, Load("prefill", 64), [plans[M2]], fill=True), values[:1], plans)
    assert (dense.asked, dense.row["fill"]) == (None, True)


# ---- whole generations ------------------------------------------------------------------------------------------------


def test_samples_add_up_to_the_whole():
    """Steps whose time grows evenly with the context: the sum over all of them, from three samples of five steps each."""
    step = lambda context: 0.01 + 1e-5 * context  # noqa: E731
    middle = lambda context: step(context + 2)  # noqa: E731 - of the steps after c, ..., c + 4 tokens
    decode = {
        c: timed([middle(c)] * 2, [2 * middle(c)] * 2, middle(c) / 2, middle(c), context=c, new_tokens=5)
        for c in (98, 150, 200)
    }
    whole = integrate(timed([3.0, 3.0], [4.0, 4.0], 1.5, 2.0), decode, 100, 100)
    steps = sum(step(100 + i) for i in range(99))  # the prefill gives the first of 100 tokens
    assert whole.seconds == pytest.approx([3 + steps] * 2)
    assert whole.dense_seconds == pytest.approx([4 + 2 * steps] * 2)
    assert (whole.floor, whole.dense_floor) == pytest.approx((1.5 + steps / 2, 2 + steps))
    assert (whole.row["what"], whole.row["context"], whole.row["new_tokens"]) == (GENERATION, 100, 100)


def test_the_example_of_three_tokens():
    decode = {100: timed([1.0], context=100), 110: timed([2.0], context=110)}
    assert integrate(timed([5.0]), decode, 100, 3).seconds == pytest.approx([5 + 1.0 + 1.1])


def test_a_composed_speed_up_is_paired_by_round():
    """Sums of the two rounds: dense 4 + 10 x 2 and 2 + 10 x 4, dropped 2 + 10 x 1 and 1 + 10 x 2. Twice as fast in each."""
    decode = {c: timed([1.0, 2.0], [2.0, 4.0], context=c) for c in (100, 111)}
    whole = integrate(timed([2.0, 1.0], [4.0, 2.0]), decode, 100, 11)
    assert (whole.seconds.tolist(), whole.dense_seconds.tolist()) == ([12.0, 21.0], [24.0, 42.0])
    row = whole.as_row()
    assert (row["speedup_low"], row["speedup"], row["speedup_high"]) == (2, 2, 2)
    assert (row["seconds_low"], row["seconds"], row["seconds_high"]) == (12, 16.5, 21)


def test_repeats_stay_apart():
    decode = {c: timed([1.0, 10.0], context=c) for c in (100, 200)}
    assert integrate(timed([2.0, 3.0]), decode, 100, 11).seconds == pytest.approx([2 + 10, 3 + 100])


def samples(*sizes, asked=None, backend="eager"):
    loads = [("prefill", 64, "eager"), ("decode", 64, backend), ("decode", 128, backend)]
    return [
        timed([1.0], what=what, context=context, backend=of, asked=asked, batch_size=size)
        for (what, context, of), size in zip(loads, sizes, strict=False)
    ]


def test_only_samples_of_one_batch_are_composed():
    filled = SETTINGS.model_copy(update={"batch_size": None})
    (whole,), not_run = compose_generations(samples(8, 8, 8), filled)
    assert whole.seconds == pytest.approx([1 + 63])  # of 64 new tokens, the prefill gives the first
    assert not_run == {}
    composed, not_run = compose_generations(samples(8, 8, 4), filled)
    assert composed == []
    assert "different batches" in not_run["m, generation from samples, eager"]
    (halved,), not_run = compose_generations(samples(1, 1, 1, asked=3), SETTINGS)
    assert halved.row["batch_size"] == 1, "memory ran out everywhere alike"
    assert compose_generations(samples(8, 8, 8, asked=8), SETTINGS) == ([], {}), "a batch of the sweep"


def test_both_ends_must_be_sampled_but_for_a_static_cache():
    assert compose_generations(samples(3, 3, asked=3), SETTINGS) == ([], {})
    (compiled,), _ = compose_generations(samples(3, 3, asked=3, backend="compiled"), SETTINGS)
    assert compiled.row["backend"] == "compiled"
    assert compiled.seconds == pytest.approx([1 + 63])


def test_composed_from_the_samples_of_its_own_prompt_and_plan():
    """64 in, 64 out: the prefill of 64, and steps from 1 s after 64 tokens to 3 s after 128."""
    mine = {"asked": 3, "batch_size": 3}
    some = [
        timed([2.0], [4.0], what="prefill", context=64, new_tokens=0, **mine),
        timed([9.0], what="prefill", context=16, new_tokens=0, **mine),
        timed([9.0], what="prefill", context=64, new_tokens=0),  # another batch
        timed([9.0], what="prefill", context=64, new_tokens=0, kind="mlp", **mine),  # of which no step was timed
        timed([99.0], what="generation", context=64, new_tokens=64, **mine),
        timed([1.0], [2.0], what="decode", context=64, **mine),
        timed([3.0], [6.0], what="decode", context=128, **mine),
        timed([9.0], what="decode", context=16, **mine),
        timed([9.0], what="decode", context=256, **mine),
    ]
    (whole,), not_run = compose_generations(some, SETTINGS)
    steps = 63 + sum(range(63)) / 32  # 1 + i / 32 s for i = 0 to 62
    assert whole.seconds == pytest.approx([2 + steps])
    assert whole.dense_seconds == pytest.approx([4 + 2 * steps])
    assert (whole.row["context"], whole.row["new_tokens"], whole.row["kind"], not_run) == (64, 64, "attention", {})


# ---- tables -----------------------------------------------------------------------------------------------------------


def speed_table(*rows):
    shared = {"model": "m", "backend": "eager", "what": GENERATION, "batch_size": 1, "context": 64, "new_tokens": 64,
              "room": None, "kind": "attention", "n": 2, "fill": False, "seconds": 1.0, "seconds_low": 0.9, "seconds_high": 1.2,
              "level": 0.96875, "spread": 0.01, "noisy": False, "speedup": 1.25, "speedup_low": 1.2, "speedup_high": 1.5,
              "predicted": 1.3, "share_of_limit": 0.5}  # fmt: skip
    return pd.DataFrame([shared | row for row in rows])


def average(**changes):
    row = {"model": "m", "kind": "attention", "n": 2, "points_lost": 2.0, "points_lost_low": -1.0, "points_lost_high": 4.0}
    return pd.DataFrame([row | {"retained": 0.97} | changes])


def test_sdr_is_points_per_percent():
    assert sdr(2, 1.25) == pytest.approx(0.08)
    assert math.isnan(sdr(2, 1))
    assert math.isnan(sdr(2, 0.8)), "slower and worse, not cheaper than nothing"


def test_trade_divides_points_by_percent():
    (row,) = trade_rows(speed_table({}), average(), SETTINGS)
    assert row == {
        "model": "m", "backend": "eager", "kind": "attention", "n": 2, "speedup": 1.25, "speedup_low": 1.2, "speedup_high": 1.5,
        "noisy": False, "level": 31 / 32, "points_lost": 2.0, "points_lost_low": -1.0, "points_lost_high": 4.0,
        "retained": 0.97, "sdr": pytest.approx(2 / 25),  # percent of speed-up, not 2 / 1.25
        # the widest that both intervals allow: -1 point at 20 %, 4 points at 20 %
        "sdr_low": pytest.approx(-1 / 20), "sdr_high": pytest.approx(4 / 20),
    }  # fmt: skip
    (row,) = trade_rows(speed_table({}), average(points_lost_low=1.0), SETTINGS)
    assert (row["sdr_low"], row["sdr_high"]) == pytest.approx((1 / 50, 4 / 20))
    assert (row["retained"], row["points_lost"]) == (0.97, 2.0)


def test_a_speed_up_within_noise_has_a_ratio_but_no_interval():
    (row,) = trade_rows(speed_table({"speedup_low": 0.99}), average(), SETTINGS)
    assert row["sdr"] == pytest.approx(2 / 25)
    assert math.isnan(row["sdr_low"])
    assert math.isnan(row["sdr_high"])


def test_trade_is_of_the_protocol_and_of_known_quality():
    other = [{"n": 3}, {"context": 16, "new_tokens": 8}, {"what": "decode"}, {"kind": "dense", "n": 0}]
    rows = trade_rows(speed_table({}, *other), average(), SETTINGS)
    assert [(row["n"], row["points_lost"]) for row in rows] == [(2, 2.0), (3, pytest.approx(np.nan, nan_ok=True))]
    nothing = pd.DataFrame(columns=["model", "kind", "n"])
    (row,) = trade_rows(speed_table({}), nothing, SETTINGS)
    assert (row["speedup"], row["noisy"]) == (1.25, False)
    assert math.isnan(row["sdr"])


def test_protocol_compares_samples_with_the_whole():
    """Dense 100 s whole and 98 s from samples, and 80 s and 84 s with layers dropped: of one batch, prompt and back end."""
    no_interval = dict.fromkeys(("seconds_low", "seconds_high", "speedup_low", "speedup_high", "level", "spread"), np.nan)
    whole = {"what": "generation", "seconds": 100.0, "speedup": 1.0, **no_interval}
    sampled = {"seconds": 84.0, "seconds_low": 82.0, "seconds_high": 85.0, "speedup": 1.2, "speedup_low": 1.1}
    table = speed_table(
        {**whole, "kind": "dense", "n": 0}, {**whole, "seconds": 80.0, "speedup": 1.25}, sampled,
        {"kind": "dense", "n": 0, "seconds": 98.0, "seconds_low": 97.0, "seconds_high": 101.0, "speedup": 1.0,
         "speedup_low": 1.0, "speedup_high": 1.0},
        {**whole, "n": 3}, {"n": 4}, {**whole, "kind": "mlp", "batch_size": 2}, {"kind": "mlp"},
        {**sampled, "backend": "compiled", "seconds": 9.0}, {**whole, "context": 16}, {**sampled, "context": 16},
        {**whole, "kind": "block", "new_tokens": 8}, {"kind": "block", "new_tokens": 8},
    )  # fmt: skip
    shared = {
        "model": "m",
        "backend": "eager",
        "batch_size": 1,
        "prompt": 64,
        "new_tokens": 64,
        "level": 0.96875,
        "steps_whole": 63,
        "steps_sampled": 4 * 2,
    }  # fmt: skip - contexts of 64 and 128
    assert protocol_rows(table, SETTINGS) == [
        shared | {"kind": "dense", "n": 0, "whole": 100.0, "from_samples": 98.0, "from_samples_low": 97.0,
                  "from_samples_high": 101.0, "ratio": 0.98, "speedup_whole": 1.0, "speedup": 1.0, "speedup_low": 1.0,
                  "speedup_high": 1.0},
        shared | {"kind": "attention", "n": 2, "whole": 80.0, "from_samples": 84.0, "from_samples_low": 82.0,
                  "from_samples_high": 85.0, "ratio": 1.05, "speedup_whole": 1.25, "speedup": 1.2, "speedup_low": 1.1,
                  "speedup_high": 1.5},
    ]  # fmt: skip
    assert protocol_rows(table[table["what"] == GENERATION], SETTINGS) == [], "nothing was timed whole"


def decode_at(contexts, attention, mlp, half_width=0.01, **more):
    for kind, values in (("attention", attention), ("mlp", mlp)):
        for context, value in zip(contexts, values, strict=True):
            yield {"what": "decode", "kind": kind, "context": context, "speedup": value, "speedup_low": value - half_width,
                   "speedup_high": value + half_width, "predicted": 3 - value} | more  # fmt: skip


def test_crossover_lies_where_the_lines_meet():
    rows = [*decode_at([1024, 2048, 4096], [1.0, 1.1, 1.3], [1.2, 1.2, 1.2], 0.06)]
    (row,) = crossover_rows(speed_table(*rows), 2)
    assert row == {"model": "m", "backend": "eager", "what": "decode", "batch_size": 1, "n": 2, "tried_from": 1024,
                   "tried_to": 4096, "measured": pytest.approx(np.sqrt(2048 * 4096)), "predicted": 0.0,
                   "apart_somewhere": True}  # fmt: skip
    assert crossing_in_words(row) == (
        "dropping 2 attention layers gains more than dropping 2 MLP layers from about 2,896 tokens on (predicted: attention "
        "gains more at every context from 1,024 to 4,096 tokens)"
    )
    (row,) = crossover_rows(speed_table(*decode_at([16, 64], [1.0, 1.01], [1.02, 1.02], 0.1)), 2)
    assert (row["measured"], row["apart_somewhere"]) == (np.inf, False)


@pytest.mark.parametrize(
    ("attention", "mlp", "apart"),
    [
        ([1.0, 1.4], [1.0, 1.2], True),
        ([1.0, 1.2], [1.0, 1.4], True),
        ([1.0, 1.3], [1.0, 1.2], False),
        ([1.0, 1.2], [1.0, 1.3], False),
    ],
)
def test_apart_where_intervals_do_not_overlap(attention, mlp, apart):
    """Of 0.08 on either side: 1.2 and 1.4 are apart, 1.2 and 1.3 are not."""
    (row,) = crossover_rows(speed_table(*decode_at([16, 64], attention, mlp, 0.08)), 2)
    assert row["apart_somewhere"] is apart


def test_crossover_takes_what_was_swept():
    """Both kinds at one n, at several contexts; batches apart; no static caches, no batch that fills the GPU."""
    rows = [
        *decode_at([16, 64], [1.3, 1.3], [1.2, 1.2], n=3),
        *decode_at([64, 16], [1.3, 1.0], [1.2, 1.2]),
        *decode_at([16, 64], [1.0, 1.0], [1.2, 1.2], batch_size=8),
        *decode_at([16, 64], [1.3, 1.3], [1.2, 1.2], batch_size=4, fill=True),
        *decode_at([16, 64], [1.3, 1.3], [1.2, 1.2], batch_size=5, room=99),
        *decode_at([16], [1.3], [1.2], what="prefill"),
    ]
    found = crossover_rows(speed_table(*rows), 2)
    assert [(row["what"], row["batch_size"], row["measured"]) for row in found] == [
        ("decode", 1, pytest.approx(16 * 4 ** (2 / 3))),
        ("decode", 8, np.inf),
    ]
    attention_alone = speed_table(*rows)[lambda table: table["kind"] == "attention"]
    assert crossover_rows(attention_alone, 2) == []


@pytest.mark.parametrize(
    ("gain", "where"),
    [([1, 2, 3], 0), ([-1, -2, -3], np.inf), ([-1, 1, 2], np.sqrt(1024 * 2048)), ([-1, -1, 1], np.sqrt(2048 * 4096))],
)
def test_crossing(gain, where):
    assert crossing(np.array([1024.0, 2048.0, 4096.0]), np.array(gain, float)) == pytest.approx(where)


def test_crossings_in_words():
    row = {"n": 8, "tried_from": 128, "tried_to": 4096, "measured": 1500.2, "predicted": np.inf, "apart_somewhere": False}
    told = crossing_in_words(row)
    assert "cannot be told apart at any context" in told
    assert "1,500" not in told, "a crossing within noise is none"
    assert told.endswith("(predicted: attention gains more at no context up to 4,096 tokens)")


def test_limits_are_the_best_that_was_seen():
    limits = [{"limits": {"bandwidth": b, "rate": r}} for b, r in ((1.0, 9.0), (3.0, 2.0))]
    assert limit_rows({"m": limits, "k": limits[:1]}) == [
        {"model": "m", "bandwidth": 3.0, "rate": 9.0},
        {"model": "k", "bandwidth": 1.0, "rate": 9.0},
    ]


# ---- the whole study --------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A device on which a pass takes 1 s less 0.05 s for each attention layer dropped and 0.02 s for each MLP."""
    calls = []

    def measure(model, load, plans, repeats, on_repeat):
        calls.append(load)
        if load.backend == "compiled":
            raise NotAvailable("there is no compiler")
        taken = [1 - 0.05 * len(plan.attention) - 0.02 * len(plan.mlp) for plan in plans]
        return [Measured((seconds,) * repeats, seconds / 2, 8, None, load.batch_size) for seconds in taken]

    monkeypatch.setattr(loads, "measure_speed", measure)
    monkeypatch.setattr(loads, "device_limits", lambda device, dtype: Limits(1e9, 1e12))
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    return calls


def test_random_weights_have_speed_and_no_quality(clock):
    """As on a GPU box without a hub: a profile with the section `speed` alone."""
    profile = load_profile("smoke").replacing(models=["random:tiny-llama"])
    alone = dataclasses.replace(profile, sections={Speed: profile.section(Speed)})
    tables = STUDIES["05_speedup"](alone)
    generation = tables["speed"].query("what == 'generation from samples' and kind == 'attention' and context == 32")
    assert generation.set_index("n")["speedup"].to_dict() == pytest.approx({n: 1 / (1 - 0.05 * n) for n in (2, 3)}, rel=1e-5)
    assert generation["level"].tolist() == pytest.approx([1 - 2 / 2**6] * 2), "six repeats"
    whole = tables["protocol"].set_index(["kind", "n"])
    assert whole["ratio"].to_dict() == pytest.approx({("dense", 0): 32, ("attention", 2): 32, ("attention", 3): 32}, rel=1e-5)
    assert whole["steps_sampled"].unique().tolist() == [4 * 3], "on this clock a generation takes as long as one of its passes"
    assert set(tables["speed"]["model"]) == {"random:tiny-llama"}
    assert tables["trade"]["points_lost"].isna().all()
    (missing,) = tables["not_run"].itertuples()
    assert (missing.what, missing.reason) == ("random:tiny-llama, compiled back end", "there is no compiler")
    code = code_provenance()
    assert tables["models"].values.tolist() == [
        [
            "random:tiny-llama",
            6,
            f"{code['processor']}, {code['cpu_threads']} threads",
            str(default_dtype()).removeprefix("torch."),
        ]
    ]
    eager = [load for load in clock if load.backend == "eager"]
    STUDIES["05_speedup"](alone)
    assert [load for load in clock if load.backend == "eager"] == eager, "what is stored is not timed again"


def test_quality_of_notebook_02_stands_beside_the_speed(clock, monkeypatch):
    gap = {"model": "tiny-llama", "n": 2, "kind": "attention", "other": "mlp", "measure": "tasks", "low": 0.05, "high": 0.15}
    gaps = pd.DataFrame([gap | {"difference": 0.1}])
    monkeypatch.setattr(speedup_study, "drop_curves", lambda profile: {"average": average(model="tiny-llama"), "gaps": gaps})
    tables = STUDIES["05_speedup"](load_profile("smoke").replacing(speed={"compiled": None}))
    row = tables["trade"].query("kind == 'attention' and n == 2").iloc[0]
    assert row["sdr"] == pytest.approx(2 / (100 * (1 / 0.9 - 1)), rel=1e-4)

    def unavailable(profile):
        raise NotAvailable("There are no tasks.")

    monkeypatch.setattr(speedup_study, "drop_curves", unavailable)
    tables = STUDIES["05_speedup"](load_profile("smoke").replacing(speed={"compiled": None}))
    assert tables["trade"]["sdr"].isna().all()
    assert tables["not_run"].values.tolist() == [["quality", "There are no tasks."]]


def test_nothing_timed_is_an_error(clock, monkeypatch):
    profile = load_profile("smoke").replacing(models=["random:tiny-llama", "random:llama-2-7b"], speed={"compiled": None})
    monkeypatch.setattr(Run, "measure", lambda run, work, **more: run.not_run.update(m="out of memory"))
    with pytest.raises(NotAvailable, match="Nothing could be timed:\nout of memory"):
        STUDIES["05_speedup"](profile)


# ---- what a reader sees -----------------------------------------------------------------------------------------------


def hand_made(trade=True):
    """Attention gains 10 % for each two layers, MLP 2 %; decoding crosses over at 64 tokens."""
    rows = [
        {"kind": kind, "n": n, "speedup": gain, "speedup_low": gain - 0.01, "speedup_high": gain + 0.01, **load}
        for (kind, n, gain), load in itertools.product(
            [("attention", 2, 1.1), ("attention", 4, 1.2), ("mlp", 2, 1.02)],
            [{}, {"what": "prefill", "new_tokens": 0}, {"what": "decode", "new_tokens": 4}],
        )
    ]
    rows += [*decode_at([16, 256], [1.0, 1.1], [1.1, 1.0], new_tokens=4)]
    rows += [{"kind": "dense", "n": 0, "what": "decode", "context": 16, "share_of_limit": 0.6}]
    rows += [{"kind": "dense", "n": 0, "what": "decode", "context": 64, "share_of_limit": 0.25}]
    rows += [{"kind": "dense", "n": 0, "share_of_limit": 0.12}]
    whole = {"what": "generation", "speedup_low": np.nan, "speedup_high": np.nan, "level": np.nan}
    rows += [{**whole, "kind": "dense", "n": 0, "seconds": 0.98}, {**whole, "seconds": 0.8}]
    speed = speed_table(*rows)
    quality = pd.concat([average(), average(kind="mlp", points_lost=1.0)])
    return {
        "speed": speed,
        "trade": pd.DataFrame(trade_rows(speed, quality if trade else quality.iloc[:0], SETTINGS)),
        "crossover": pd.DataFrame(crossover_rows(speed[speed["context"] != 64], 2)),
        "protocol": pd.DataFrame(protocol_rows(speed, SETTINGS)),
        "models": pd.DataFrame({"model": ["m"], "n_layers": [8], "device": ["a stopwatch"], "dtype": ["float32"]}),
    }


def test_takeaways_tell_the_numbers():
    tables, told = hand_made(), {}
    for name in ("figS8_speedup", "figS9_context", "figS10_limit", "figS11_trade"):
        told[name] = FIGURES[name].draw(tables).takeaway
    assert "1.10 with 2 attention layers dropped" in told["figS8_speedup"]
    assert "1.02 with 2 MLP layers dropped" in told["figS8_speedup"]
    assert "dropping 2 attention layers gains more than dropping 2 MLP layers" in told["figS9_context"]
    assert "2 MLP layers from about 64 tokens on" in told["figS9_context"]
    assert "With 16 tokens in the cache, dense decoding reaches 60 %, and with 64 it reaches 25 %" in told["figS10_limit"]
    assert "with 2 dropped: 0.20 for attention layers, 0.50 for MLP layers" in told["figS11_trade"]


def test_takeaways_of_generations_tell_of_the_whole():
    """1 s from samples: whole, the dense model took 0.98 s, and 0.8 s with two attention layers dropped."""
    compared = (
        "Timed whole, once, the speed-up is 1.25 with 2 attention layers dropped; whole generations took 0.80 to 0.98 times as "
        "long as their samples say."
    )
    tables = hand_made()
    for name in ("figS8_speedup", "figS11_trade"):
        assert compared in FIGURES[name].draw(tables).takeaway
    tables["protocol"] = tables["protocol"].iloc[:0]
    assert "was not timed whole" in FIGURES["figS8_speedup"].draw(tables).takeaway


def test_figures_of_times_name_machine_and_dtype_and_what_bars_cover():
    """A time means nothing without its machine; an interval of six repeats covers 96.9 %, not 95 %."""
    for name in ("figS8_speedup", "figS9_context", "figS10_limit", "figS11_trade"):
        drawing = FIGURES[name].draw(hand_made())
        assert drawing.takeaway.endswith("Timed on a stopwatch, in float32.")
        title = drawing.figure.get_suptitle()
        assert "m on a stopwatch, in float32" in title
        assert ("intervals that cover 96.9 % over repeats" in title) == (name != "figS10_limit")


def test_a_low_share_says_what_else_is_timed():
    low, high = "reaches 12 % of what bytes and operations allow", "overhead and cache copies are timed too"
    tables = hand_made()
    for name in ("figS8_speedup", "figS10_limit"):
        assert high in FIGURES[name].draw(tables).takeaway
    assert low in FIGURES["figS8_speedup"].draw(tables).takeaway
    tables["speed"]["share_of_limit"] = 0.7
    for name in ("figS8_speedup", "figS10_limit"):
        assert high not in FIGURES[name].draw(tables).takeaway


def test_figures_say_what_is_missing():
    tables = hand_made(trade=False)
    assert FIGURES["figS11_trade"].draw(tables).takeaway == ""
    nothing = tables | {"speed": tables["speed"].query("what == 'prefill'"), "crossover": tables["crossover"].iloc[:0]}
    for name in ("figS8_speedup", "figS9_context", "figS10_limit"):
        drawing = FIGURES[name].draw(nothing)
        assert len(drawing.figure.axes) == 1
        assert drawing.takeaway == ""


def test_advice_names_price_and_context():
    text = ADVICE["05_speedup"](hand_made())
    assert "with 2 attention layers dropped, the whole generation is 1.10 times as fast (1.09 to 1.11), for 2.0 points" in text
    assert "from about 64 tokens on" in text
    text = ADVICE["05_speedup"](hand_made(trade=False))
    assert "with 4 attention layers dropped, the whole generation is 1.20 times as fast" in text
    assert "run notebook 02" in text


@pytest.mark.parametrize("name", ["figS8_speedup", "figS9_context", "figS10_limit"])
def test_titles_of_several_shapes_have_room(name, tmp_path):
    """Panels name the shape; that its weights are random stands above them once."""
    fig = draw(name, read_tables(files.REFERENCE / "gpu-shapes/05_speedup"), tmp_path).figure
    assert fig.get_suptitle().startswith("random weights, on NVIDIA H200")
    drawn = [ax for ax in fig.axes if ax.axison]
    boxes = {}  # row of panels -> the places of their titles, from left to right
    for ax in drawn:
        assert "random" not in ax.get_title()
        boxes.setdefault(round(ax.get_position().y0, 2), []).append(ax.title.get_window_extent())
    for places in boxes.values():
        places.sort(key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(places))
    for ax in drawn:
        labels = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text() and label.get_visible()]
        labels = sorted((box for box in labels if box.width > 1), key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(labels)), ax.get_title()
