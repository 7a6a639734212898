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
from llmdrop_utils.base.settings import build
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.measure.metrics import KINDS
from llmdrop_utils.measure.speed import Limits
from llmdrop_utils.measure.speed import Speed as Measured
from llmdrop_utils.models import locate as models_locate
from llmdrop_utils.models.locate import LocatedModel, locate_model
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.verdicts import ADVICE
from llmdrop_utils.selection.ranking import select
from llmdrop_utils.studies.run import STUDIES, Run
from llmdrop_utils.studies.speedup import loads
from llmdrop_utils.studies.speedup import study as speedup_study
from llmdrop_utils.studies.speedup.crossover import crossing, crossover_rows, in_words
from llmdrop_utils.studies.speedup.generation import GENERATION, Timed, compose_generations, integrate, read_timings
from llmdrop_utils.studies.speedup.loads import Speed, SpeedWork, models_or_shapes, n_layers_of, plans_of, speed_work
from llmdrop_utils.studies.speedup.study import limit_rows, protocol_rows, sdr, trade_rows
from llmdrop_utils.studies.work import Cell

SETTINGS = Speed(
    repeats=2, batch_size=3, prompt=64, new_tokens=64, contexts=[16, 64, 128, 256], steps=4, n_drop={"attention": [2, 3]},
    sweep_batches=[1, 8], sweep_n=2, compiled={"attention": [3]}, whole=[16, 8],
)  # fmt: skip
A2, A3, M2 = Cell("attention", 2), Cell("attention", 3), Cell("mlp", 2)


# ---- what is timed ----------------------------------------------------------------------------------------------------


def test_a_generation_in_one_piece_has_a_prompt_and_new_tokens():
    values = SETTINGS.model_dump() | {"whole": [128]}
    with pytest.raises(LLMDropError, match="'whole' in demo.yaml must hold a prompt and new tokens, but holds 1 numbers"):
        build(Speed, values, "demo.yaml")
    assert build(Speed, values | {"whole": [128, 64], "batch_size": None, "compiled": None}, "demo.yaml").batch_size is None


@pytest.fixture
def some_models_unavailable(monkeypatch):
    """ "away" is unavailable; of "llama-2-13b" and "tiny-llama", which are too, the shapes are known."""

    def locate(name):
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
    monkeypatch.setattr(loads, "importance_work", lambda model, corpora, calibration: [corpora])
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


def timed_loads(settings, cells, monkeypatch=None):
    """(what, context, batch, back end, fills, cells) of each item, in order."""
    plans = {cell: select_last(6, cell.kind, cell.n) for cell in cells}
    names = {plan.key: f"{cell.kind[0]}{cell.n}" for cell, plan in plans.items()}
    for item in speed_work(locate_model("random:tiny-llama"), plans, settings):
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
        ("decode", 24, 4, 1, "eager", False, "a2"),  # the end of the generation in one piece; its start is above
        ("generation", 16, 8, 1, "eager", False, "a2"),
        ("prefill", 16, 0, 1, "eager", False, "a2 m2"),  # the sweep over prompts
        ("prefill", 64, 0, 1, "eager", False, "a2 m2"),
    ]


def test_a_static_cache_has_room_for_the_whole_generation(tiny):
    work = speed_work(tiny, {A3: select_last(6, "attention", 3)}, SETTINGS)
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
        ("decode", 24, 4, 1, "eager", False, "a2"),
        ("generation", 16, 8, 1, "eager", False, "a2"),
        ("prefill", 16, 0, 1, "eager", False, "a2 m2"),
        ("prefill", 64, 0, 1, "eager", False, "a2 m2"),
    ]


def work_item(tiny, load, plans, fill=False):
    shared = {"model": tiny, "dtype": torch.float32, "attention": "sdpa", "longest": 132, "repeats": 2}
    return SpeedWork(**shared, load=load, fill=fill, plans=tuple(plans))


def test_keys_of_stored_records_do_not_change(tiny, monkeypatch):
    code = {"processor": "P", "gpus": [], "cpu_threads": 2, "versions": {"torch": "2", "transformers": "5", "numpy": "2"}}
    monkeypatch.setattr(loads, "code_provenance", lambda: code)
    plan = DropPlan(attention=(5, 4), n_layers=6, model="any")
    (key,) = work_item(tiny, Load("decode", 64, 4, 3), [plan]).keys
    assert key == {
        "measurement": "speed",
        "version": 1,
        "model": tiny.identity,
        "dtype": "float32",
        "attention": "sdpa",
        "plan": {"attention": [4, 5], "mlp": []},
        "machine": {"processor": "P", "gpus": [], "cpu_threads": 2},
        "libraries": {"torch": "2", "transformers": "5"},
        "load": {"what": "decode", "context": 64, "new_tokens": 4, "batch_size": 3, "backend": "eager", "room": None},
        "repeats": 2,
    }
    (filled,) = work_item(tiny, Load("decode", 64, 4), [plan], fill=True).keys
    assert filled["load"] == key["load"] | {"batch_size": None, "longest": 132}


# ---- from times to timings --------------------------------------------------------------------------------------------


def timed(seconds, dense=None, floor=1.0, dense_floor=1.0, asked=1, **row):
    seconds = np.array(seconds)
    row = {"model": "m", "kind": "attention", "n": 2, "backend": "eager", "fill": False, "batch_size": 1, "room": None} | row
    return Timed(row, asked, seconds, floor, seconds if dense is None else np.array(dense), dense_floor)


def test_noise_is_marked():
    calm, wild = [1.0, 1.01, 1.02], [1.0, 1.5, 2.0]
    assert not timed(calm).as_row()["noisy"]
    row = timed(wild).as_row()
    assert row["noisy"]
    assert (row["seconds"], row["spread"]) == (1.5, pytest.approx((1.75 - 1.25) / 1.5))


def test_speed_up_is_paired_by_repeat():
    """A round that is slow for all is slow for both: the ratio and its interval know nothing of it."""
    row = timed([1.0, 2.0, 1.1], dense=[2.0, 4.0, 2.2], floor=0.5, dense_floor=0.75).as_row()
    assert row["speedup"] == row["speedup_low"] == row["speedup_high"] == 2
    assert row["predicted"] == 1.5
    assert row["share_of_limit"] == pytest.approx(0.5 / 1.1)
    assert row["noisy"]
    row = timed([1.0, 1.0, 1.0], dense=[1.0, 2.0, 3.0]).as_row()
    assert (row["speedup_low"], row["speedup"], row["speedup_high"]) == (1, 2, 3)


def a_value(dense, plan, batch_size=1):
    times = [{"seconds": seconds, "floor_seconds": 0.1, "kv_bytes": 8, "peak_bytes": None} for seconds in (dense, plan)]
    dense, plan = ({"batch_size": batch_size} | part for part in times)
    return {"dense": dense, "plan": plan, "limits": {"bandwidth": 1.0, "rate": 2.0}}


def test_values_become_timings(tiny):
    """The dense model once; a plan that two cells share, for both."""
    plans = {A2: select_last(6, "attention", 2), Cell("joint", 2): select_last(6, "attention", 2), M2: select_last(6, "mlp", 2)}
    item = work_item(tiny, Load("decode", 64, 4, 8), [plans[M2], plans[A2]])
    values = [a_value([4.0], [3.0], batch_size=2), a_value([5.0], [2.0], batch_size=2)]
    found = read_timings(item, values, plans)
    assert [(t.row["kind"], t.row["n"], t.seconds.tolist(), t.dense_seconds.tolist()) for t in found] == [
        ("dense", 0, [4.0], [4.0]),
        ("mlp", 2, [3.0], [4.0]),
        ("attention", 2, [2.0], [5.0]),
        ("joint", 2, [2.0], [5.0]),
    ]
    assert {(t.asked, t.row["batch_size"]) for t in found} == {(8, 2)}, "memory ran out"
    (dense, _) = read_timings(work_item(tiny, Load("prefill", 64), [plans[M2]], fill=True), values[:1], plans)
    assert dense.asked is None


# ---- whole generations ------------------------------------------------------------------------------------------------


def test_samples_add_up_to_the_whole():
    """Steps whose time grows evenly with the context: the sum over all of them, from three samples."""
    step = lambda context: 0.01 + 1e-5 * context  # noqa: E731
    decode = {c: timed([step(c)] * 2, [2 * step(c)] * 2, step(c) / 2, step(c)) for c in (100, 150, 200)}
    whole = integrate(timed([3.0, 3.0], [4.0, 4.0], 1.5, 2.0), decode, 100, 100)
    steps = sum(step(100 + i + 0.5) for i in range(99))
    assert whole.seconds == pytest.approx([3 + steps] * 2)
    assert whole.dense_seconds == pytest.approx([4 + 2 * steps] * 2)
    assert (whole.floor, whole.dense_floor) == pytest.approx((1.5 + steps / 2, 2 + steps))
    assert (whole.row["what"], whole.row["context"], whole.row["new_tokens"]) == (GENERATION, 100, 100)


def test_the_example_of_three_tokens():
    decode = {100: timed([1.0]), 110: timed([2.0])}
    assert integrate(timed([5.0]), decode, 100, 3).seconds == pytest.approx([5 + 1.05 + 1.15])


def test_repeats_stay_apart():
    decode = {100: timed([1.0, 10.0]), 200: timed([1.0, 10.0])}
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
    assert whole.seconds == pytest.approx([1 + 63])
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


def test_the_generation_in_one_piece_is_composed_too():
    short = [
        timed([2.0], what="prefill", context=16),
        timed([9.0], what="prefill", context=64),
        timed([1.0], what="decode", context=16),
        timed([3.0], what="decode", context=24),
    ]
    (whole,), _ = compose_generations(short, SETTINGS)
    assert (whole.row["context"], whole.row["new_tokens"]) == (16, 8)
    assert whole.seconds == pytest.approx([2 + sum(1 + 2 * (i + 0.5) / 8 for i in range(7))])


# ---- tables -----------------------------------------------------------------------------------------------------------


def speed_table(*rows):
    shared = {"model": "m", "backend": "eager", "what": GENERATION, "batch_size": 1, "context": 64, "new_tokens": 64,
              "room": None, "kind": "attention", "n": 2, "fill": False, "seconds": 1.0, "spread": 0.01, "noisy": False,
              "speedup": 1.25, "speedup_low": 1.2, "speedup_high": 1.5, "predicted": 1.3, "share_of_limit": 0.5}  # fmt: skip
    return pd.DataFrame([shared | row for row in rows])


def average(**changes):
    row = {"model": "m", "kind": "attention", "n": 2, "points_lost": 2.0, "points_lost_low": -1.0, "points_lost_high": 4.0}
    return pd.DataFrame([row | {"retained": 0.97} | changes])


def test_sdr_is_points_per_percent():
    assert sdr(2, 1.25) == pytest.approx(0.08)
    assert sdr(2, 0.8) == pytest.approx(-0.1), "slower, and worse"
    assert math.isnan(sdr(2, 1))


def test_trade_divides_points_by_percent():
    (row,) = trade_rows(speed_table({}), average(), SETTINGS)
    assert row["sdr"] == pytest.approx(2 / 25)
    # the widest that both intervals allow: -1 point at 20 %, 4 points at 20 %
    assert (row["sdr_low"], row["sdr_high"]) == pytest.approx((-1 / 20, 4 / 20))
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
    same = {"context": 16, "new_tokens": 8}
    table = speed_table(
        {**same, "seconds": 1.2, "spread": 0.02}, {**same, "what": "generation", "seconds": 1.0, "spread": 0.03}, {"n": 3}
    )
    assert protocol_rows(table, SETTINGS) == [
        {"model": "m", "backend": "eager", "kind": "attention", "n": 2, "prompt": 16, "new_tokens": 8, "whole": 1.0,
         "whole_spread": 0.03, "from_samples": 1.2, "from_samples_spread": 0.02, "ratio": 1.2, "steps_whole": 7,
         "steps_sampled": 8}
    ]  # fmt: skip


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
    assert in_words(row["measured"], 1024, 4096) == "at about 2,896 tokens"
    (row,) = crossover_rows(speed_table(*decode_at([16, 64], [1.0, 1.01], [1.02, 1.02], 0.1)), 2)
    assert (row["measured"], row["apart_somewhere"]) == (np.inf, False)


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
    assert in_words(0, 128, 4096) == "below 128 tokens"
    assert in_words(np.inf, 128, 4096) == "beyond 4,096 tokens"
    assert in_words(1500.2, 128, 4096) == "at about 1,500 tokens"


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
    assert set(tables["speed"]["model"]) == {"random:tiny-llama"}
    assert tables["trade"]["points_lost"].isna().all()
    (missing,) = tables["not_run"].itertuples()
    assert (missing.what, missing.reason) == ("random:tiny-llama, compiled back end", "there is no compiler")
    assert tables["models"]["n_layers"].tolist() == [6]
    eager = [load for load in clock if load.backend == "eager"]
    STUDIES["05_speedup"](alone)
    assert [load for load in clock if load.backend == "eager"] == eager, "what is stored is not timed again"


def test_quality_of_notebook_02_stands_beside_the_speed(clock, monkeypatch):
    quality = average(model="tiny-llama")
    monkeypatch.setattr(speedup_study, "drop_curves", lambda profile: {"average": quality})
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
    rows += [{"kind": "dense", "n": 0, "what": "decode", "context": c, "share_of_limit": 0.25} for c in (16, 64)]
    speed = speed_table(*rows)
    quality = pd.concat([average(), average(kind="mlp", points_lost=1.0)])
    return {
        "speed": speed,
        "trade": pd.DataFrame(trade_rows(speed, quality if trade else quality.iloc[:0], SETTINGS)),
        "crossover": pd.DataFrame(crossover_rows(speed[speed["context"] != 64], 2)),
        "models": pd.DataFrame({"model": ["m"], "n_layers": [8], "device": ["a stopwatch"]}),
    }


def test_takeaways_tell_the_numbers():
    tables, told = hand_made(), {}
    for name in ("figS8_speedup", "figS9_context", "figS10_limit", "figS11_trade"):
        told[name] = FIGURES[name].draw(tables).takeaway
    assert "1.10 with 2 attention layers dropped" in told["figS8_speedup"]
    assert "1.02 with 2 MLP layers dropped" in told["figS8_speedup"]
    assert "dropping 2 attention layers gains more than dropping 2 MLP layers" in told["figS9_context"]
    assert "the lines cross at about 64 tokens" in told["figS9_context"]
    assert "4.0 times the least that the device would need with 16 tokens" in told["figS10_limit"]
    assert "with 2 dropped: 0.20 for attention layers, 0.50 for MLP layers" in told["figS11_trade"]


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
    assert "at about 64 tokens in the cache" in text
    text = ADVICE["05_speedup"](hand_made(trade=False))
    assert "with 4 attention layers dropped, the whole generation is 1.20 times as fast" in text
    assert "run notebook 02" in text
