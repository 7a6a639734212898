"""Every rule on tables that are worked out by hand, on those that once misled it, and on the paper's own numbers."""

import fnmatch

import numpy as np
import pandas as pd
import pytest
from studies.paper_tables import paper_tables

from llmdrop_utils.base import files, stats
from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.measure.metrics import KINDS
from llmdrop_utils.models.series import Series, Stage
from llmdrop_utils.report import verdicts
from llmdrop_utils.report.rules import DEVIATES, INCONCLUSIVE, NOT_RUN, REPRODUCED
from llmdrop_utils.report.tables import read_tables
from llmdrop_utils.studies.curve_rows import TaskValues, TextValues, average_rows, share_of_dense
from llmdrop_utils.studies.joint_drop.study import further_rows
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.similarity.study import _corpora_rows, _depth_rows, _sample_agreement_rows
from llmdrop_utils.studies.sizes_and_causes.compare import ALL
from llmdrop_utils.studies.speedup.generation import GENERATION
from llmdrop_utils.studies.speedup.trade import pair_rows
from llmdrop_utils.studies.training_stages.rows import Followed, StageValues
from llmdrop_utils.studies.training_stages.verdicts import _lacking, _size
from llmdrop_utils.studies.work import DENSE_CELL, Cell

CLAIMS = {claim["check"]: claim for claim in verdicts.load_claims() if "check" in claim}
NAN = float("nan")


def frame(**columns):
    return pd.DataFrame({"model": "m"} | columns)


def ends(name, low, high, triples):
    """Columns of several numbers (value, low, high)."""
    return dict(zip((name, low, high), map(list, zip(*triples, strict=True)), strict=True))


def judge(check, tables):
    """Verdict and evidence. All columns must be those that the notebook writes."""
    claim = CLAIMS[check]
    declared = STUDIES[claim["notebook"]].tables
    for name, content in tables.items():
        for column in content.columns:
            assert any(fnmatch.fnmatch(column, known.name) for known in declared[name]), f"{name} has no column {column}"
    return verdicts.verdict_of(claim, tables | {"not_run": pd.DataFrame(columns=["what", "reason"])})


# ---- tables with the columns that a rule reads, and a number that decides --------------------------------------------------

SAMPLES = {"text": frame(samples=[64, 64])}
IMPORTANCE = {"importance": frame(n_samples=[32])}
TASKS = {"tasks": frame(documents=[500, 900])}
MODEL = pd.DataFrame({"model": ["m"]})


def contrast(*number):
    """Of MLP it is clear; the number is that of block."""
    means = {"attention": 0.1, "compared": 0.2, "attention_median": 0.1, "compared_median": 0.2}
    difference = ends("difference", "low", "high", [(-0.1, -0.2, -0.05), number])
    rows = frame(corpus="web", other=["mlp", "block"], **means, **difference, layers_lower=3, n_layers=4)
    return IMPORTANCE | {"contrast": rows}


def encoders(reads, tables):
    """What a rule for decoders reads, of an encoder."""
    return tables | {"models": frame(reads=[reads])}


def gaps_of_encoders(reads, measure, *number):
    """Beside MLPs it is clear, beside blocks it is the number; three of four layers are more than half."""
    rows = ends("difference", "low", "high", [(0.2, 0.1, 0.3), number, (-0.5, -0.6, -0.4)])
    rows |= {"measure": measure, "other": ["mlp", "block", "mlp"], "n": [2, 2, 3], "share": [0.5, 0.5, 0.75]}
    return encoders(reads, {"gaps": frame(**rows), "quality": frame(data=["web", "mean"], samples=[60, 120])})


def half_of_encoder(*number):
    """Two of four layers, as a mean over data sets."""
    rows = ends("retained", "retained_low", "retained_high", [number, (0.1, 0, 0.2), (0.1, 0, 0.2)])
    rows |= {
        "measure": "nearest neighbour",
        "kind": "attention",
        "n": [2, 3, 2],
        "data": ["mean", "mean", "digits"],
        "samples": 60,
    }
    return {"quality": frame(**rows), "models": frame(reads=["images"], n_layers=4)}


def importance(attention, mlp=(0.3, 0.28, 0.32), block=(0.4, 0.38, 0.42)):
    """The least important of four layers of each kind, on a second corpus; on the first, all is clear."""
    clear = {"attention": (0.01, 0.005, 0.015), "mlp": (0.3, 0.28, 0.32), "block": (0.4, 0.38, 0.42)}
    tables = []
    for corpus, least in (("web", clear), ("code", {"attention": attention, "mlp": mlp, "block": block})):
        for kind, number in least.items():
            rows = ends("importance", "low", "high", [(0.5, 0.4, 0.6), number, (0.6, 0.5, 0.7), (0.7, 0.6, 0.8)])
            tables.append(frame(corpus=corpus, kind=kind, n_samples=32, **rows))
    return {"importance": pd.concat(tables, ignore_index=True)}


def depth(*number):
    rows = ends("correlation", "low", "high", [(-0.9, -1, -0.8), (-0.8, -0.9, -0.7), number])
    return IMPORTANCE | {"depth": frame(corpus=["web", "web", "code"], kind=["attention", "mlp", "mlp"], **rows)}


def corpora(*number):
    rows = ends("correlation", "low", "high", [(0.9, 0.85, 0.95), (0.91, 0.86, 0.94), number])
    pairs = {"a": ["x", "x", "y"], "b": ["y", "z", "z"], "kind": "mlp"}
    return IMPORTANCE | {"corpora": frame(**pairs, **rows)}


def agreement_of_samples(*number):
    """Four is nearest to the count of the claim; single samples agree less, sixteen more."""
    rows = ends("correlation", "low", "high", [(0.1, 0, 0.2), (0.95, 0.93, 0.97), number, (1, 1, 1)])
    count = {"n_samples": [1, 4, 4, 16], "groups": [64, 16, 16, 4], "kind": ["mlp", "attention", "mlp", "mlp"]}
    return {"sample_agreement": frame(**count, **rows)}


def published(*number):
    """Of lists of four and eight layers, on the first corpus; on another, none is shared."""
    rows = ends("shared", "low", "high", [(4, 4, 4), number, (0, 0, 0)])
    lists = {"corpus": ["web", "web", "code"], "kind": ["mlp", "attention", "attention"], "n_drop": [4, 8, 8], "by_chance": 2.0}
    return {"importance": frame(n_samples=[32]), "published": frame(**lists, **rows)}


def average(*number):
    """With 8 of 30 layers dropped; 4 and 15 are further from a quarter, and MLP is another kind."""
    rows = ends("retained", "retained_low", "retained_high", [(1, 1, 1), (1, 1, 1), number, (0.1, 0, 0.2), (0.1, 0, 0.2)])
    kinds = {"kind": ["dense", "attention", "attention", "attention", "mlp"], "n": [0, 4, 8, 15, 7], "tasks": 2}
    return TASKS | {"models": frame(n_layers=[30]), "average": frame(**kinds, **rows)}


def gaps(*number):
    """Of text, and of joint drop, the rule says nothing."""
    rows = ends("difference", "low", "high", [(0.02, 0.01, 0.03), number, (-1, -1, -1), (-1, -1, -1)])
    kinds = {"kind": ["attention", "attention", "attention", "joint"], "other": ["mlp", "block", "block", "mlp"]}
    table = frame(n=8, measure=["tasks", "tasks", "text", "tasks"], **kinds, **rows)
    return TASKS | {"average": MODEL, "gaps": table}


def of_model(name, tables):
    return {table: content.assign(model=name) for table, content in tables.items()}


def half(*number, model="Llama-2-70B-hf"):
    lost = ends("points_lost", "points_lost_low", "points_lost_high", [(9, 9, 9), number, (9, 9, 9)])
    rows = frame(kind=["mlp", "attention", "attention"], n=[40, 40, 48], **lost)
    return of_model(model, TASKS | {"models": frame(n_layers=[80]), "average": rows})


def sizes(*change, models="llama-2-70b minus llama-2-13b", text=(0.1, 0.09, 0.11)):
    """How much more of the tasks, and of text, is retained without half of the attention layers."""
    rows = {"what": "retained without half", "measure": ["tasks", "text"], "models": models}
    other = pd.DataFrame({"what": ["share of the layers that can go"], "measure": "tasks", "models": models})
    other = other.assign(change=-1.0, low=-1.0, high=-1.0)  # no rule is about it
    return {"sizes": pd.concat([pd.DataFrame(rows | ends("change", "low", "high", [change, text])), other])}


def causes(*correlation, n_models=5):
    """Entropy as given, and two others that go with importance."""
    rows = {"cause": ["entropy", "rank", "output", "sink"], "target": "importance", "models": n_models}
    numbers = [correlation, (0.8, 0.7, 0.9), (0.9, 0.8, 0.95), (-0.9, -1, -0.8)]
    here = pd.DataFrame(rows | ends("correlation", "low", "high", numbers))
    return {"overall": pd.concat([here, here.assign(target="damage", correlation=-1.0, low=-1.0, high=-1.0)])}


def rank_gaps(*difference):
    return {"rank_gaps": frame(n=[2, 4], **ends("difference", "low", "high", [(30, 20, 40), difference]))}


def further(*number, is_cut=False, same_up_to=8):
    rows = ends("difference", "low", "high", [(9, 8, 10), (7, 6, 8), number])
    table = frame(
        other=["mlp", "block", "attention"], joint=12, compared=10, is_cut=is_cut, same_up_to=[0, 0, same_up_to], **rows
    )
    return SAMPLES | {"further": table}


def first_mlp(*number):
    return {"first_mlp": frame(n_layers=[32], **ends("attention_before", "low", "high", [number]))}


def iterative(*number):
    rows = ends("difference", "low", "high", [(0.2, 0.1, 0.3), number])
    return SAMPLES | {"iterative": frame(n=[4, 8], shared=[4, 6], **rows)}


def half_speed(*number, noisy=False, level=0.97, model="random:llama-2-70b"):
    """Compiled half of the attention; on the eager back end, and with other loads, it is another number."""
    right = {"what": GENERATION, "kind": "attention", "n": 40, "context": 2048, "new_tokens": 2048, "backend": "compiled"}
    clear = {"backend": "eager", "speedup": 1.2, "speedup_low": 1.18, "speedup_high": 1.22, "noisy": False}
    others = [{"what": "decode"}, {"kind": "mlp"}, {"n": 48}, {"context": 512}, {"new_tokens": 512}]
    rows = [right | clear, right | dict(zip(("speedup", "speedup_low", "speedup_high"), number, strict=True))]
    rows += [right | {"speedup": 9.0, "speedup_low": 8.9, "speedup_high": 9.1} | other for other in others]
    table = pd.DataFrame(rows).assign(noisy=[False, noisy] + [False] * 5, level=[0.97, level] + [0.97] * 5)
    return of_model(model, {"speed": table, "models": frame(n_layers=[80])})


def trade(*number):
    rows = ends("difference", "low", "high", [(-0.4, -0.5, -0.3), number])
    return {"trade_pairs": frame(n=8, backend="eager", other=["mlp", "block"], **rows), "models": MODEL}


def caches(counted=500, formula=500, gib=500 / 2**30, **own):
    """Half of the layers of a cache of 1,000 bytes, in the paper and in the run."""
    paper = frame(n_layers=[40], n=20, dense_bytes=1000, formula_bytes=formula, counted_bytes=counted, paper_gib=gib)
    run = {"full_attention": True, "n_layers": 4, "n": 1, "dense_bytes": 4, "formula_bytes": 3, "counted_bytes": 3}
    return {"paper": paper, "caches": frame(**{name: [value] for name, value in (run | own).items()})}


STAGES = {"stage": ["step-0", "step-1", "step-9"], "position": [0, 1, 2], "progress": [0.0, 0.5, 1.0]}


def by_seed(rows):
    """The same for two seeds."""
    return pd.concat([rows.assign(seed=seed) for seed in (0, 1)], ignore_index=True)


def means(*number):
    """By how much block exceeds attention half-way, the first layer left out. With random weights it may fall short."""
    tables = []
    for kind in KINDS:
        for layers in ("all layers", "all but the first"):
            decides = (kind, layers) == ("block", "all but the first")
            middle = number if decides else (0, 0, 0) if kind == "attention" else (0.2, 0.1, 0.3)
            rows = ends("above_attention", "above_low", "above_high", [(-0.2, -0.3, -0.1), middle, (0.2, 0.1, 0.3)])
            tables.append(frame(**STAGES, kind=kind, layers=layers, **rows))
    return {"means": by_seed(pd.concat(tables, ignore_index=True))}


def change(*mlp, attention=(-0.02, -0.05, 0.01)):
    """From the first of two stages after a ninth of the training to the last, with the first layer and without it."""
    numbers = {"attention": attention, "mlp": mlp, "block": (0.3, 0.25, 0.35)}
    clear = {"attention": (0, -0.01, 0.01), "mlp": (0.3, 0.25, 0.35), "block": (0.3, 0.25, 0.35)}
    later = dict.fromkeys(numbers, (-1, -1, -1))
    tables = [
        frame(position=position, stage=f"step-{position}", progress=progress, layers=layers, kind=list(numbers),
              **ends("change", "low", "high", several.values()))
        for position, progress, layers, several in (
            (0, 0.0, "all layers", later), (1, 0.5, "all layers", clear), (1, 0.5, "all but the first", numbers),
            (2, 0.8, "all layers", later),
        )
    ]  # fmt: skip
    return {"change": by_seed(pd.concat(tables, ignore_index=True)), "means": pd.DataFrame({"model": "m", "seed": [0, 1]})}


def same_layers(*number):
    """Random weights, MLP, and the last stage itself are beside the point."""
    rows = ends("correlation", "low", "high", [(0, -0.1, 0.1), number, (1, 1, 1)])
    attention = frame(**STAGES, kind="attention", n=2, shared=2, **rows)
    mlp = attention.assign(kind="mlp", correlation=0.0, low=-0.1, high=0.1)
    return {"agreement": by_seed(pd.concat([attention, mlp], ignore_index=True))}


def random_weights(*number):
    """The least important of four layers at step 0."""
    least = ends("importance", "low", "high", [(0.5, 0.4, 0.6), number, (0.5, 0.4, 0.6), (0.5, 0.4, 0.6)])
    tables = [frame(kind=kind, position=step, step=step, stage=f"step-{step}", **least) for kind, step in
              (("attention", 0), ("attention", 1), ("mlp", 0))]  # fmt: skip
    tables[1]["importance"], tables[2]["importance"] = 9.0, 9.0
    return {"importance": by_seed(pd.concat(tables, ignore_index=True))}


def methods(*number, residual=False):
    """At the larger of two numbers dropped; tasks, cosine itself and another kind or method are beside the point."""
    difference = ends(
        "difference", "difference_low", "difference_high", [number, number, (0.0, 0.0, 0.0), (5, 4, 6), (5, 4, 6)]
    )
    told = ["without residual", "without residual", "cosine", "Taylor", "without residual"]
    if not residual:
        told = ["relative magnitude", "random", "cosine", "Taylor", "reverse order"]
        difference["difference"][4], difference["difference_low"][4], difference["difference_high"][4] = -1.0, -1.1, -0.9
    measures = ["text", "text", "text", "text", "tasks" if residual else "text"]
    kinds = ["attention", "mlp" if residual else "attention", "attention", "attention", "attention"]
    rows = frame(kind=kinds, method=told, n=8, measure=measures, outcome="", **difference)
    rows.loc[len(rows)] = rows.iloc[0].to_dict() | {"outcome": "the same layers", "difference": 0, "difference_low": 0,
                                                    "difference_high": 0}  # fmt: skip
    fewer = rows.assign(n=4, **dict.fromkeys(("difference", "difference_low", "difference_high"), -3.0 if residual else 3.0))
    return {"models": MODEL, "quality": pd.concat([rows, fewer[fewer["method"] == told[0]]], ignore_index=True)}


def saved_files(saved=90, counted=256):
    """100 bytes are dropped, and 10 bytes of zeros stand in their place; the dense file is beside the point."""
    sizes = {"saved_bytes": [0, saved], "stand_in_bytes": [0, 10], "dropped_bytes": [0, 100]}
    caches = {"counted_bytes": [384, counted], "formula_bytes": [384, 256]}
    return {"files": frame(file="GGUF F16", n=[0, 8], **sizes), "caches": frame(file="GGUF F16", n=[0, 8], **caches)}


def served(*number, noisy=False):
    """Prefill twice as fast as predicted, decoding at this speed-up where 1.2 is predicted; torch and noise have no say."""
    times = ends("speedup", "speedup_low", "speedup_high", [(3, 2.9, 3.1), number, (0.1, 0.1, 0.1), (0.1, 0.1, 0.1), (1, 1, 1)])
    runtimes = ["llama.cpp F16", "llama.cpp F16", "torch", "llama.cpp F16", "llama.cpp F16"]
    load = {"what": ["prefill", "decode", "decode", "decode", "decode"], "context": 2048, "n": [8, 8, 8, 15, 0]}
    quiet = {"noisy": [False, noisy, False, True, False], "level": 0.97, "predicted": [1.5, 1.2, 1.2, 1.3, 1.0]}
    return {"speed": frame(runtime=runtimes, **load, **quiet, **times)}


def quantised(*number):
    """What 4 bits cost without layers; the dense model is clear. Other bits, and text, are beside the point."""
    cost = ends("cost", "cost_low", "cost_high", [(-0.002, -0.004, 0), number, (-0.5, -0.6, -0.4), (-0.5, -0.6, -0.4)])
    told = {"change": ["4 bits", "4 bits", "8 bits", "4 bits"], "measure": ["tasks", "tasks", "tasks", "text"]}
    return {"changes": frame(n=[0, 8, 8, 8], **told, **cost)}


def pruned(*number, faster=(1.2, 1.15, 1.25)):
    """Without 8 layers; the dense model's own speed and the gap on text are beside the point."""
    gaps = ends("difference", "low", "high", [number, (-5.0, -5.1, -4.9)])
    speeds = ends("speedup", "low", "high", [(1, 1, 1), faster, (1, 0.98, 1.02)])
    return {"pruned": frame(n=8, measure=["tasks", "text"], **gaps),
            "speed": frame(method=["none", "none", "Wanda"], n=[0, 8, 8], **speeds)}  # fmt: skip


def mathematics(*number):
    """Without 4 layers; 8 are too many, and MLPs and other abilities beside the point."""
    retained = ends("retained", "retained_low", "retained_high", [(1, 1, 1), number, (0.1, 0, 0.2), (0, 0, 0), (0, 0, 0)])
    asked = {"ability": ["mathematics"] * 4 + ["choices"], "kind": ["dense", "attention", "attention", "mlp", "attention"]}
    return {"abilities": frame(n=[0, 4, 8, 4, 4], **asked, samples=50, value=0.5, low=0.4, high=0.6, **retained)}


def contexts(*number, told=True):
    """Copying is clear; the number is that of retrieval."""
    gaps = ends("difference", "low", "high", [(0.5, 0.4, 0.6), number])
    return {"context_gaps": frame(probe=["copy", "retrieval"], n=4, told=[True, told], **gaps)}


def tuned(*number):
    """Of text it is clear; the number is that of tasks. MLPs are beside the point."""
    shares = ends("recovered", "low", "high", [(0.9, 0.8, 1), number, (0, 0, 0)])
    return {"recovered": frame(kind=["attention", "attention", "mlp"], n=8, measure=["text", "tasks", "text"], **shares)}


def regained(
    way,
    *number,
    share=(0.6, 0.5, 0.7),
    others=("plain", "linear maps (NBL)", "ReplaceMe", "LinearPatch", "Prune&Comp", "healing"),
):
    """The number is that against the last; other layers, and other ways, are beside the point."""
    known = [*[(0.2, 0.1, 0.3)] * (len(others) - 1), number or (0.2, 0.1, 0.3), (-1, -1.1, -0.9), (-1, -1.1, -0.9)]
    differences = ends("difference", "difference_low", "difference_high", known) if number else {}
    shares = {} if number else ends("regained", "low", "high", [share] * len(others) + [(0, 0, 0)] * 2)
    rows = {"layers": ["cosine"] * (len(others) + 1) + ["search with repair"], "way": [way] * len(others) + ["ReplaceMe", way],
            "against": [*others, "plain", others[-1]]}  # fmt: skip
    return {"regained": frame(n=8, **rows, **differences, **shares)}


def ranking_of_made(*number):
    """After healing it is clear; the number is that after a repair. Other ways, kinds and layers are beside the point."""
    clear, poor = (0.95, 0.9, 0.98), (0, -0.1, 0.1)
    rows = ends("correlation", "low", "high", [clear, clear, number, poor, poor, poor])
    rows |= {"way": ["healing", "repair, healing", "repair", "plain", "repair", "repair"]}
    rows |= {"kind": ["attention"] * 4 + ["mlp", "attention"], "layers": ["cosine"] * 5 + ["search with repair"]}
    return {"rankings": frame(n=8, samples=32, **rows)}


def test_without_healing_nothing_is_said_of_rankings():
    """The claim is about repair and healing: a run of one of them is not judged."""
    rows = ranking_of_made(0.9, 0.85, 0.95)["rankings"]
    for way in ("healing", "repair", "repair, healing"):
        assert judge("ranking_stays", {"rankings": rows[rows["way"] != way]})[0] == NOT_RUN


PUBLISHED = ("plain", "healing", "linear maps (NBL)", "ReplaceMe", "LinearPatch", "Prune&Comp")


CASES = [  # rule, and tables by which it is reproduced, deviates, and is inconclusive
    ("attention_most_redundant", contrast(-0.1, -0.2, -0.01), contrast(0.1, 0.05, 0.2), contrast(-0.1, -0.3, 0.01)),
    ("near_zero_attention", importance((0.01, 0, 0.049)), importance((0.2, 0.15, 0.25)), importance((0.04, 0.02, 0.06))),
    (
        "near_zero_attention",
        importance((0.01, 0, 0.02), mlp=(0.04, 0.03, 0.05)),
        importance((0.04, 0.035, 0.045), block=(0.02, 0.015, 0.025)),
        importance((0.01, 0, 0.02), block=(0.02, 0.01, 0.03)),
    ),
    ("deeper_more_redundant", depth(-0.6, -0.7, -0.5), depth(-0.2, -0.3, -0.1), depth(-0.6, -0.7, -0.4)),
    ("corpus_does_not_matter", corpora(0.85, 0.8, 0.9), corpora(0.7, 0.65, 0.75), corpora(0.82, 0.78, 0.86)),
    (
        "sample_count_does_not_matter",
        agreement_of_samples(0.95, 0.9, 1),
        agreement_of_samples(0.8, 0.75, 0.85),
        agreement_of_samples(0.93, 0.88, 0.98),
    ),
    ("published_lists", published(7, 6, 8), published(4, 3, 5), published(6, 5, 7)),
    ("quarter_of_attention_keeps_quality", average(0.99, 0.978, 1), average(0.9, 0.88, 0.92), average(0.98, 0.952, 1.008)),
    ("attention_beats_mlp_and_block", gaps(0.02, 0.001, 0.03), gaps(-0.02, -0.03, -0.01), gaps(0.01, -0.001, 0.02)),
    ("half_of_attention", half(2, 1, 2.45), half(4, 3.5, 4.5), half(2, 1, 3)),
    ("larger_models_lose_less", sizes(0.05, 0.01, 0.09), sizes(-0.1, -0.12, -0.08), sizes(0.01, -0.02, 0.04)),
    (
        "larger_models_lose_less_across",
        sizes(0.05, 0.01, 0.09, models=ALL),
        sizes(0.05, 0.01, 0.09, models=ALL, text=(-0.1, -0.12, -0.08)),
        sizes(0.01, -0.02, 0.04, models=ALL),
    ),
    ("causes_predict_importance", causes(0.7, 0.55, 0.85), causes(0.1, -0.1, 0.3), causes(0.6, 0.4, 0.8)),
    ("mlp_keeps_tokens_apart", rank_gaps(10, 5, 15), rank_gaps(-10, -15, -5), rank_gaps(5, -5, 15)),
    ("joint_goes_furthest", further(4, 2, 5), further(-3, -4, -2), further(2, -1, 4)),
    ("attention_goes_first", first_mlp(16, 14, 18), first_mlp(8, 7, 9), first_mlp(15, 13, 17)),
    ("iterative_no_better", iterative(-0.02, -0.05, 0.01), iterative(-0.2, -0.25, -0.15), iterative(0, -0.1, 0.1)),
    ("half_of_attention_is_faster", half_speed(1.6, 1.5, 1.7), half_speed(1.3, 1.2, 1.4), half_speed(1.5, 1.4, 1.6)),
    ("attention_is_best_trade", trade(-0.2, -0.3, -0.1), trade(0.2, 0.1, 0.3), trade(-0.1, -0.3, 0.1)),
    ("cache_shrinks_in_proportion", caches(), caches(counted=501), None),  # a count has no interval
    ("cache_shrinks_in_proportion", caches(gib=520 / 2**30), caches(counted=520, formula=520), None),
    ("cache_shrinks_in_proportion", caches(n=0, counted_bytes=4, formula_bytes=4), caches(counted_bytes=2), None),
    ("redundant_from_the_start", means(0.2, 0.01, 0.3), means(-0.2, -0.3, -0.1), means(0.1, -0.1, 0.3)),
    ("others_rise", change(0.2, 0.15, 0.25), change(-0.2, -0.25, -0.15), change(0.1, -0.05, 0.25)),
    (
        "others_rise",
        change(0.2, 0.15, 0.25, attention=(-0.05, -0.1, -0.01)),
        change(0.2, 0.15, 0.25, attention=(-0.5, -0.6, -0.4)),
        change(0.2, 0.15, 0.25, attention=(-0.15, -0.25, -0.05)),
    ),
    ("same_layers_at_every_stage", same_layers(0.9, 0.8, 1), same_layers(0.6, 0.5, 0.7), same_layers(0.85, 0.7, 1)),
    ("cosine_beats_baselines", methods(-0.2, -0.3, -0.1), methods(0.2, 0.1, 0.3), methods(-0.1, -0.3, 0.1)),
    (
        "residual_matters",
        methods(-0.2, -0.3, -0.1, residual=True),
        methods(0.2, 0.1, 0.3, residual=True),
        methods(-0.1, -0.3, 0.1, residual=True),
    ),
    ("smaller_by_what_is_dropped", saved_files(), saved_files(saved=89), None),  # a count has no interval
    ("smaller_by_what_is_dropped", saved_files(), saved_files(saved=100), None),
    ("smaller_by_what_is_dropped", saved_files(), saved_files(counted=384), None),
    ("faster_in_another_runtime", served(1.3, 1.2, 1.4), served(1.0, 0.9, 1.1), served(1.15, 1.1, 1.2)),
    ("quantising_costs_little", quantised(-0.005, -0.009, -0.001), quantised(-0.03, -0.04, -0.02), quantised(-0.005, -0.02, 0)),
    ("dropping_beats_pruning", pruned(0, -0.009, 0.009), pruned(-0.03, -0.04, -0.02), pruned(0, -0.03, 0.03)),
    (
        "dropping_beats_pruning",
        pruned(0, -0.009, 0.009),
        pruned(0, -0.009, 0.009, faster=(0.9, 0.88, 0.92)),
        pruned(0, -0.009, 0.009, faster=(1.01, 0.96, 1.06)),
    ),
    ("mathematics_holds", mathematics(1, 0.9, 1.1), mathematics(0.5, 0.4, 0.6), mathematics(0.95, 0.8, 1.1)),
    ("attention_drop_keeps_context", contexts(0.2, 0.1, 0.3), contexts(-0.2, -0.3, -0.1), contexts(0.2, -0.1, 0.4)),
    ("tuning_recovers", tuned(0.7, 0.5, 0.9), tuned(0.2, 0.1, 0.3), tuned(0.6, 0.4, 0.8)),
    (
        "repair_regains",
        regained("repair"),
        regained("repair", share=(0.3, 0.2, 0.4)),
        regained("repair", share=(0.55, 0.45, 0.65)),
    ),
    (
        "repair_beats_published",
        regained("repair", 0.1, 0.05, 0.2, others=PUBLISHED),
        regained("repair", -0.2, -0.3, -0.1, others=PUBLISHED),
        regained("repair", 0.1, -0.1, 0.2, others=PUBLISHED),
    ),
    (
        "repair_helps_healing",
        regained("repair, healing", 0.1, 0.05, 0.2),
        regained("repair, healing", -0.2, -0.3, -0.1),
        regained("repair, healing", 0.1, -0.1, 0.2),
    ),
    ("ranking_stays", ranking_of_made(0.9, 0.85, 0.95), ranking_of_made(0.5, 0.4, 0.6), ranking_of_made(0.85, 0.75, 0.9)),
    *(
        (check, *(encoders(reads, contrast(*n)) for n in ((-0.1, -0.2, -0.01), (0.1, 0.05, 0.2), (-0.1, -0.21, 0.01))))
        for check, reads in (
            ("attention_most_redundant_in_text_encoders", "text"),
            ("attention_most_redundant_in_vision_transformers", "images"),
        )
    ),
    *(
        (check, *(gaps_of_encoders(reads, measure, *n) for n in ((0.1, 0.05, 0.2), (-0.2, -0.3, -0.1), (0.1, -0.1, 0.2))))
        for check, reads, measure in (
            ("attention_drop_keeps_retrieval", "text", "reciprocal rank"),
            ("attention_drop_keeps_neighbours", "images", "nearest neighbour"),
        )
    ),
    (
        "half_of_attention_can_go",
        half_of_encoder(0.95, 0.9, 1),
        half_of_encoder(0.5, 0.4, 0.6),
        half_of_encoder(0.95, 0.8, 1.1),
    ),
    ("redundant_at_random", random_weights(0.03, 0.01, 0.05), random_weights(0.2, 0.15, 0.25), random_weights(0.04, 0, 0.08)),
]  # fmt: skip


@pytest.mark.parametrize(("check", "good", "bad", "open_"), CASES, ids=[f"{i} {case[0]}" for i, case in enumerate(CASES)])
def test_rules_come_out_each_way(check, good, bad, open_):
    for tables, outcome in ((good, REPRODUCED), (bad, DEVIATES), (open_, INCONCLUSIVE)):
        if tables is not None:
            verdict, evidence = judge(check, tables)
            assert verdict == outcome, evidence
            assert ("To settle it: " in evidence) == (outcome == INCONCLUSIVE)


def test_every_rule_is_tried():
    assert {case[0] for case in CASES} == set(CLAIMS) == set(verdicts.CHECKS)


@pytest.mark.parametrize("check", CLAIMS)
def test_tables_of_an_older_version_are_named(check):
    """The tables above have what a rule reads and nothing more: without any column or table it cannot be judged."""
    good = next(case[1] for case in CASES if case[0] == check)
    number = CLAIMS[check]["notebook"][:2]
    made_anew = f"`make reproduce NOTEBOOKS={number}` makes them anew"
    for name, content in good.items():
        for column in content.columns:
            verdict, evidence = judge(check, good | {name: content.drop(columns=column)})
            assert (verdict, made_anew in evidence) == (NOT_RUN, True), f"{name} without {column}: {evidence}"
            assert f"of an older version, without '{column}'" in evidence
        verdict, evidence = judge(check, {other: content for other, content in good.items() if other != name})
        assert (verdict, f"without '{name}': {made_anew}" in evidence) == (NOT_RUN, True), f"without {name}: {evidence}"


@pytest.mark.parametrize(
    ("check", "note"),
    [
        ("attention_most_redundant", "about 39 samples of text instead of 32"),  # (0.11 / 0.1)^2 x 32
        ("near_zero_attention", "about 130 samples of text instead of 32"),  # (0.02 / 0.01)^2
        ("deeper_more_redundant", "samples of text instead of 32"),
        ("corpus_does_not_matter", "samples of text instead of 32"),
        ("sample_count_does_not_matter", "groups of 4 samples instead of 16"),
        ("published_lists", "too close to the threshold to say"),
        ("quarter_of_attention_keeps_quality", "documents of each task instead of 500"),
        ("attention_beats_mlp_and_block", "documents of each task instead of 500"),
        ("half_of_attention", "documents of each task instead of 500"),
        ("larger_models_lose_less", "about 9.0 times as many documents or samples"),  # (0.03 / 0.01)^2
        ("larger_models_lose_less_across", "about 9.0 times as many documents or samples"),
        ("causes_predict_importance", "about 20 models instead of 5"),  # (0.2 / 0.1)^2 x 5
        ("mlp_keeps_tokens_apart", "about 4.0 times as many samples of text"),  # (10 / 5)^2
        ("joint_goes_furthest", "samples of text instead of 64"),
        ("attention_goes_first", "times as many samples of text"),
        ("iterative_no_better", "about 260 samples of text instead of 64"),  # (0.1 / 0.05)^2 x 64
        ("half_of_attention_is_faster", "times as many repeats"),
        ("attention_is_best_trade", "about 4.0 times as many documents and repeats"),  # (0.2 / 0.1)^2
        ("redundant_from_the_start", "about 4.0 times as many samples of text"),
        ("others_rise", "about 3.7 times as many samples of text"),  # 0.1 - 0.02; 0.15^2 + 0.03^2 = 0.153^2; (0.153 / 0.08)^2
        ("same_layers_at_every_stage", "times as many samples of text"),
        ("redundant_at_random", "about 16 times as many samples of text"),  # (0.04 / 0.01)^2
    ],
)
def test_what_would_settle_a_claim(check, note):
    open_ = next(case[3] for case in CASES if case[0] == check)
    assert note in judge(check, open_)[1].split("To settle it: ")[1]


# ---- what once misled a rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["mlp", "block"])
def test_another_kind_in_the_place_of_attention_shows(other):
    """All least important layers are near zero, so only the comparison of kinds tells them apart."""
    tables = importance((0.01, 0.005, 0.015), mlp=(0.03, 0.028, 0.032), block=(0.04, 0.038, 0.042))
    assert judge("near_zero_attention", tables)[0] == REPRODUCED
    swapped = tables["importance"].replace({"kind": {other: "attention", "attention": other}})
    assert judge("near_zero_attention", {"importance": swapped})[0] == DEVIATES
    rows = tables["importance"]
    copied = pd.concat([rows[rows["kind"] != "attention"], rows[rows["kind"] == other].assign(kind="attention")])
    assert judge("near_zero_attention", {"importance": copied})[0] != REPRODUCED


def test_a_noisy_timing_has_no_say():
    """Eager 1.2 is clear, and a noisy 1.2 (0.9 to 1.6) holds 1.48; but a noisy 1.6 does not speak for the claim either."""
    verdict, evidence = judge("half_of_attention_is_faster", half_speed(1.2, 0.9, 1.6, noisy=True))
    assert verdict == DEVIATES
    assert evidence.endswith("eager 1.20 (1.18 to 1.22); compiled: not judged, too noisy")
    assert judge("half_of_attention_is_faster", half_speed(1.6, 1.5, 1.7, noisy=True))[0] == DEVIATES
    alone = half_speed(1.6, 1.5, 1.7, noisy=True)
    alone["speed"] = alone["speed"][alone["speed"]["backend"] == "compiled"]
    assert judge("half_of_attention_is_faster", alone)[0] == NOT_RUN


def test_two_repeats_have_no_say():
    """Their range covers 50 %."""
    verdict, evidence = judge("half_of_attention_is_faster", half_speed(1.6, 1.5, 1.7, level=0.5))
    assert verdict == DEVIATES
    assert "compiled: not judged, too few repeats" in evidence


def test_the_nearest_number_to_a_quarter():
    """Of two that are as near the larger one, and none that is further off than a twentieth of the layers."""
    of_24 = average(0.9, 0.88, 0.92)  # 8 of 24 layers; the neighbours retain everything
    of_24["models"]["n_layers"] = 24
    of_24["average"]["n"] = [0, 4, 8, 15, 7]
    assert judge("quarter_of_attention_keeps_quality", of_24)[0] == NOT_RUN, "4 and 8 are a twelfth away from 6"
    of_32 = average(0.9, 0.88, 0.92)
    of_32["models"]["n_layers"] = 28
    of_32["average"]["n"] = [0, 6, 8, 15, 7]
    verdict, evidence = judge("quarter_of_attention_keeps_quality", of_32)
    assert verdict == DEVIATES
    assert "Attn-8 of 28" in evidence
    assert judge("half_of_attention_is_faster", half_speed(1.2, 0.9, 1.4))[0] == DEVIATES


def test_one_pair_of_corpora_with_a_wide_interval_is_seen():
    """Although its own correlation is the highest."""
    verdict, evidence = judge("corpus_does_not_matter", corpora(0.92, 0.5, 0.97))
    assert verdict == INCONCLUSIVE
    assert "mlp, y and z 0.92 (0.50 to 0.97), where the threshold is 0.80" in evidence


def test_the_paper_s_column_of_caches_is_read():
    tables = caches()
    assert judge("cache_shrinks_in_proportion", tables)[0] == REPRODUCED
    assert judge("cache_shrinks_in_proportion", caches(gib=999))[0] == DEVIATES
    assert judge("cache_shrinks_in_proportion", caches(gib=531 / 2**30))[0] == DEVIATES


LACKING = [
    ("redundant_from_the_start", means(0.2, 0.1, 0.3), "means", 1),
    ("others_rise", change(0.2, 0.15, 0.25), "change", 1),
    ("same_layers_at_every_stage", same_layers(0.9, 0.85, 1), "agreement", 1),
    ("redundant_at_random", random_weights(0.01, 0, 0.02), "importance", 0),
]


@pytest.mark.parametrize(("check", "tables", "name", "position"), LACKING)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_stage_that_a_seed_lacks_is_seen(check, tables, name, position, seed):
    assert judge(check, tables)[0] == REPRODUCED
    rows = tables[name]
    fewer = rows[~((rows["seed"] == seed) & (rows["position"] == position))]
    verdict, evidence = judge(check, tables | {name: fewer})
    assert verdict == INCONCLUSIVE
    assert f"Left open: seed {seed} lacks the stage step-{position}" in evidence


@pytest.mark.parametrize(("check", "tables", "name", "position"), LACKING)
def test_a_stage_that_all_seeds_lack_is_no_reason(check, tables, name, position):
    fewer = tables[name][tables[name]["position"] != position]
    assert judge(check, tables | {name: fewer})[0] in (NOT_RUN, DEVIATES), "others_rise then begins at a later stage"


def test_every_seed_must_hold():
    good, bad = same_layers(0.9, 0.85, 1)["agreement"], same_layers(0.6, 0.5, 0.7)["agreement"]
    mixed = pd.concat([good[good["seed"] == 0], bad[bad["seed"] == 1]])
    verdict, evidence = judge("same_layers_at_every_stage", {"agreement": mixed})
    assert verdict == DEVIATES
    assert "lowest rank correlation with the last stage 0.60 (0.50 to 0.70; seed 1, step-1; 2 of the 2" in evidence


def shuffled(seed, n=30):
    return np.random.default_rng(seed).permutation(n)


def scores(order, samples=32):
    """Importance of 30 layers that falls with depth, of each sample in this order of layers."""
    falling = np.linspace(1, 0.1, 30) + np.random.default_rng(1).normal(0, 0.002, (samples, 30))
    rows = falling[np.arange(samples)[:, None], order]
    return Importance(dict.fromkeys(KINDS, rows), np.ones(samples), {})


def drawn(importance):
    return {kind: stats.text_means(importance.per_sample[kind], importance.weights) for kind in KINDS}


IN_ORDER, ONCE, EACH = np.arange(30), shuffled(2), np.array([shuffled(seed) for seed in range(32)])


@pytest.mark.parametrize(("order", "outcome"), [(IN_ORDER, REPRODUCED), (ONCE, DEVIATES)])
def test_shuffled_layers_have_no_depth(order, outcome):
    several = {"web": scores(order)}
    rows = _depth_rows(several, {corpus: drawn(s) for corpus, s in several.items()})
    assert judge("deeper_more_redundant", IMPORTANCE | {"depth": frame(**pd.DataFrame(rows))})[0] == outcome


@pytest.mark.parametrize(("order", "outcome"), [(IN_ORDER, REPRODUCED), (ONCE, DEVIATES)])
def test_shuffled_layers_agree_with_no_other_corpus(order, outcome):
    several = {"web": scores(IN_ORDER), "code": scores(order)}
    rows = _corpora_rows(several, {corpus: drawn(s) for corpus, s in several.items()}, [4])
    assert judge("corpus_does_not_matter", IMPORTANCE | {"corpora": frame(**pd.DataFrame(rows))})[0] == outcome


@pytest.mark.parametrize(("order", "outcome"), [(IN_ORDER, REPRODUCED), (ONCE, REPRODUCED), (EACH, DEVIATES)])
def test_samples_of_shuffled_layers_do_not_agree(order, outcome):
    """Shuffled alike they do: then it is only another model."""
    rows = _sample_agreement_rows(scores(order), [4], "web")
    assert judge("sample_count_does_not_matter", {"sample_agreement": frame(**pd.DataFrame(rows))})[0] == outcome


@pytest.mark.parametrize(("order", "outcome"), [(IN_ORDER, REPRODUCED), (ONCE, DEVIATES)])
def test_shuffled_layers_at_an_earlier_stage(order, outcome):
    stages = tuple(Stage(f"step-{i}", step=i, tokens=i, model=None) for i in range(3))
    measured = dict(enumerate(StageValues(scores(of), {}) for of in (ONCE, order, IN_ORDER)))
    rows = Followed(Series("m", 0, stages), {}, measured)._agreement_rows()
    assert judge("same_layers_at_every_stage", {"agreement": frame(seed=0, **pd.DataFrame(rows))})[0] == outcome


def test_no_smaller_is_enough_for_a_larger_model():
    """The paper's claim holds if both keep all."""
    assert judge("larger_models_lose_less", sizes(0, 0, 0))[0] == REPRODUCED
    assert judge("larger_models_lose_less", sizes(-0.001, -0.001, -0.001))[0] == DEVIATES
    assert "llama-3-8b and llama-3-70b: not run: both are needed" in judge("larger_models_lose_less", sizes(0, 0, 0))[1]
    for check in ("larger_models_lose_less", "larger_models_lose_less_across"):
        other = sizes(0.05, 0.01, 0.09, models="a minus b")
        assert judge(check, other)[0] == NOT_RUN, "neither a series that is known nor all models"


def test_causes_that_are_not_judged():
    """Of two models, and where a cause is not known at all: the claim names three."""
    for tables in (
        causes(0.7, 0.55, 0.85, n_models=2),
        {"overall": causes(0.7, 0.55, 0.85)["overall"].query("cause != 'entropy'")},
    ):
        verdict, evidence = judge("causes_predict_importance", tables)
        assert (verdict, "all three, of three models or more" in evidence) == (NOT_RUN, True)


def test_99_in_98_is_open():
    """98.0 % (95.2 to 100.8) of 500 documents, against 97.8 % and against 99 %."""
    verdict, evidence = judge("quarter_of_attention_keeps_quality", average(0.98, 0.952, 1.008))
    assert verdict == INCONCLUSIVE
    assert "Attn-8 of 30 retains 98.0 % (95.2 to 100.8 %) of what lies above guessing in the mean over 2 tasks" in evidence
    (finding,) = verdicts.CHECKS["quarter_of_attention_keeps_quality"](
        average(0.98, 0.952, 1.008), layers=0.25, retained=0.99, near=0.05
    )
    assert finding.comparisons[0].outcome == INCONCLUSIVE
    assert finding.comparisons[0].needed() * 500 == pytest.approx(3920)


def test_joint_drop_is_judged_where_text_is_predicted_well():
    """With 5 sub-layers joint drop is far better than all, but nothing retains 90 % there: each reaches 4, block with 2."""
    kinds = {"joint": 0.6, "attention": 0.3, "mlp": 0.2, "block": 0.1}  # of the dense model's accuracy with 5 dropped
    cells = [DENSE_CELL] + [Cell(kind, n) for kind in kinds for n in (2, 4, 5)]
    good = lambda kind: [0.99, 0.95 if kind != "block" else 0.5]  # noqa: E731
    share = [1.0] + [value for kind, low in kinds.items() for value in (*good(kind), low)]
    hits = np.linspace(0.4, 0.5, 16)[:, None] * np.array(share)
    rows = further_rows(TextValues(cells, hits, hits, hits), {})
    assert [(row["other"], row["joint"], row["compared"]) for row in rows] == [
        ("attention", 4, 4), ("mlp", 4, 4), ("block", 4, 4),
    ]  # fmt: skip
    tables = SAMPLES | {"further": frame(**pd.DataFrame(rows))}
    assert judge("joint_goes_furthest", tables)[0] == DEVIATES


def test_joint_drop_is_not_compared_with_itself():
    """Up to 12 sub-layers it is attention drop, and both retain 90 % up to there or less."""
    verdict, evidence = judge("joint_goes_furthest", further(0, 0, 0, same_up_to=13))
    assert verdict == INCONCLUSIVE
    assert evidence.endswith("Left open: up to 13 it is attention drop, so they cannot be compared")
    assert judge("joint_goes_furthest", further(0, 0, 0, same_up_to=12))[0] == DEVIATES


@pytest.mark.parametrize(
    ("check", "tables", "why"),
    [
        ("mathematics_holds", mathematics(np.nan, np.nan, np.nan), "no better than guessing, so there is nothing to keep"),
        ("attention_drop_keeps_context", contexts(0.2, 0.1, 0.3, told=False), "at guessing without any dropped: retrieval"),
        ("tuning_recovers", tuned(np.nan, np.nan, np.nan), "of tasks, 8 dropped"),
    ],
)
def test_what_a_dense_model_cannot_do_leaves_a_rule_open(check, tables, why):
    verdict, evidence = judge(check, tables)
    assert verdict == INCONCLUSIVE
    assert why in evidence


def test_joint_drop_that_was_tried_too_little_is_not_run():
    verdict, evidence = judge("joint_goes_furthest", further(4, 2, 5, is_cut=[False, False, True]))
    assert verdict == NOT_RUN
    assert "up to the largest number that was tried" in evidence


def test_eight_of_thirty_are_less_than_the_paper_s():
    tables = first_mlp(8, 8, 8)
    tables["first_mlp"]["n_layers"] = 30
    assert judge("attention_goes_first", tables)[0] == DEVIATES


def test_a_clear_trade_whose_corners_overlap():
    """Attention loses 1 (-0.5 to 2.5) points and MLP 3 (1.5 to 4.5); but by document, attention loses 2 less (1.6 to 2.4)."""
    speed = {"backend": "eager", "n": 8, "speedup": 1.2, "speedup_low": 1.19, "speedup_high": 1.21, "model": "m"}
    speed |= {"noisy": False, "level": 0.97}
    lost = [("attention", 1, -0.5, 2.5), ("mlp", 3, 1.5, 4.5)]
    rows = [speed | {"kind": kind, "points_lost": value, "points_lost_low": low, "points_lost_high": high, "sdr": value / 20}
            for kind, value, low, high in lost]  # fmt: skip
    gap = frame(kind=["attention"], other="mlp", n=8, measure="tasks", difference=0.02, low=0.016, high=0.024)
    assert 2.5 / 19 > 1.5 / 21, "the corners overlap"
    pairs = pd.DataFrame(pair_rows(rows, gap))
    assert judge("attention_is_best_trade", {"trade_pairs": pairs, "models": MODEL})[0] == REPRODUCED
    unpaired = pd.DataFrame(pair_rows(rows, gap.assign(low=-0.001, high=0.041)))
    assert judge("attention_is_best_trade", {"trade_pairs": unpaired, "models": MODEL})[0] == INCONCLUSIVE


def test_iterative_with_a_wide_interval_says_nothing():
    """0.01 (-0.3 to 0.3): it was once said to be no better."""
    assert judge("iterative_no_better", iterative(0.01, -0.3, 0.3))[0] == INCONCLUSIVE


def test_a_dense_model_that_guesses_has_nothing_to_retain():
    """Of ten documents it has two right where guessing gives a quarter."""
    assert np.isnan(share_of_dense(np.array([0.2, 0.1]), 0.25)).all()
    cells = [DENSE_CELL, Cell("attention", 8)]
    task = TaskValues("piqa", "acc", 0, np.repeat([[1.0, 0.0], [0.0, 1.0]], [2, 8], axis=0)[:, [0, 0]], 0.25, 0)
    rows = frame(**pd.DataFrame(average_rows(cells, [task])))
    tables = TASKS | {"models": frame(n_layers=[30]), "average": rows}
    verdict, evidence = judge("quarter_of_attention_keeps_quality", tables)
    assert verdict == NOT_RUN
    assert "the dense model is not above guessing, so there is nothing to retain" in evidence


# ---- what is not judged ---------------------------------------------------------------------------------------------------


def test_claims_about_other_models_are_not_run():
    for check, tables, reason in (
        ("half_of_attention", half(2, 1, 2.4, model="smollm2-135m"), "the claim is about a 70B model"),
        ("half_of_attention_is_faster", half_speed(1.6, 1.5, 1.7, model="m"), "the claim is about Llama-2-70B on a GPU"),
        ("attention_is_best_trade", trade(0, 0, 0) | {"models": MODEL.replace("m", "n")}, "no quality and speed"),
        ("published_lists", published(8, 8, 8) | {"importance": frame(n_samples=[1]).assign(model="n")}, "is known for n;"),
        ("quarter_of_attention_keeps_quality", of_kind("mlp"), "drops no attention layers"),
        ("attention_beats_mlp_and_block", gaps(1, 1, 1) | {"gaps": gaps(1, 1, 1)["gaps"].iloc[2:]}, "no two kinds"),
    ):  # fmt: skip
        verdict, evidence = judge(check, tables)
        assert (verdict, reason in evidence) == (NOT_RUN, True), evidence
    assert (
        "(in this run, Attn-40 of 80: 1.20 x)" in judge("half_of_attention_is_faster", half_speed(1.6, 1.5, 1.7, model="m"))[1]
    )


def of_kind(kind):
    tables = average(1, 1, 1)
    return tables | {"average": tables["average"].assign(kind=kind)}


def test_the_model_of_a_claim_is_found_by_its_name_on_the_hub():
    assert judge("half_of_attention_is_faster", half_speed(1.6, 1.5, 1.7, model="meta-llama/Llama-2-70b-hf"))[0] == REPRODUCED


def test_a_speed_up_within_noise_is_not_judged():
    verdict, evidence = judge("attention_is_best_trade", trade(-0.2, NAN, NAN))
    assert verdict == REPRODUCED, "by the other pair"
    assert "not judged, since a speed-up is not clear of noise, or both gain points: n = 8, eager: block" in evidence
    rows = trade(-0.2, NAN, NAN)["trade_pairs"].iloc[1:]
    assert judge("attention_is_best_trade", trade(0, 0, 0) | {"trade_pairs": rows})[0] == NOT_RUN


def test_windows_are_not_judged_by_share():
    verdict, evidence = judge("cache_shrinks_in_proportion", caches(full_attention=False, counted_bytes=1))
    assert verdict == REPRODUCED, "by the paper's caches"
    assert "m: not run: its sliding windows hold a fixed number of tokens" in evidence


def test_a_single_trained_checkpoint_has_no_course():
    for check, tables, name in (
        ("redundant_from_the_start", means(1, 1, 1), "means"),
        ("others_rise", change(1, 1, 1), "change"),
        ("same_layers_at_every_stage", same_layers(1, 1, 1), "agreement"),
    ):
        rows = tables[name]
        kept = rows[rows["position"] == 0] if name == "change" else rows[rows["position"] != 1]
        verdict, evidence = judge(check, tables | {name: kept})
        assert (verdict, "it has no" in evidence) == (NOT_RUN, True), check
    trained = random_weights(1, 1, 1)["importance"].query("step == 1")
    assert "its untrained weights are unavailable" in judge("redundant_at_random", {"importance": trained})[1]


def test_when_attention_begins_to_be_most_redundant():
    assert "it is so for all seeds from step-9 on" in judge("redundant_from_the_start", means(0.1, -0.1, 0.3))[1]
    assert "it is so for all seeds from step-1 on" in judge("redundant_from_the_start", means(0.2, 0.1, 0.3))[1]
    never = means(0.2, 0.1, 0.3)["means"].assign(above_low=-0.1)
    assert "it is not so at the last stage" in judge("redundant_from_the_start", {"means": never})[1]


# ---- what rules are made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ((3, 2, 4), (3, 2, 4)),
        ((-3, -4, -2), (3, 2, 4)),
        ((-3, -4, 1), (3, 0, 4)),  # no change is among what it may be
        ((1, -2, 5), (1, 0, 5)),
        ((-1, -5, 0), (1, 0, 5)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_the_size_of_a_change(change, size):
    assert _size(change) == size


def test_what_seeds_lack():
    """Stages 1 and 2 that one of three seeds has are asked of all; stage 3, which none has, of none."""
    rows = pd.DataFrame({"seed": [0, 0, 1], "position": [1, 2, 1], "stage": ["a", "b", "a"]})
    lacking = _lacking(rows, pd.DataFrame({"seed": [0, 0, 1, 1, 2]}))
    assert [c.what for c in lacking] == [
        "seed 1 lacks the stage b", "seed 2 lacks the stage a", "seed 2 lacks the stage b",
    ]  # fmt: skip
    assert {c.outcome for c in lacking} == {INCONCLUSIVE}
    assert _lacking(rows, pd.DataFrame({"seed": [0]})) == []


# ---- the paper's own numbers ----------------------------------------------------------------------------------------------

# What has no number in the paper's tables, and why. The rest is fed below.
PICTURES = {
    "attention-most-redundant": "Figs. 2 and 3 are heat maps and curves; no mean importance is printed",
    "near-zero-attention": "Fig. 3 shows it; no importance is printed",
    "deeper-more-redundant": "Figs. 2, 3, 6, 10 and 11 show it",
    "corpus-does-not-matter": "Figs. 2 and 3 show it, with no correlation",
    "sample-count-does-not-matter": "Fig. 10 shows it for 4 to 1,024 samples, with no correlation",
    "iterative-no-better": "Fig. 9 has task scores, of which the rule says nothing: it is about held-out text",
    "redundant-from-the-start": "Fig. 7 shows it",
    "others-rise": "Fig. 7 shows it",
    "same-layers-at-every-stage": "Fig. 7 shows it",
    "causes-of-redundancy": "a sentence of an abstract, without a number",
    "mlp-keeps-tokens-apart": "a sentence of an abstract, without a number",
    "cosine-is-the-better-metric": "Table 7 has task scores, of which the rule says nothing: it is about held-out text",
    "residual-matters": "Table 6 likewise",
    "mathematics-holds": "Fig. 12 is a curve, and Table 10 a single question",
    "redundant-at-random": "a sentence of an abstract, without a number",
}
OURS = {"larger-models-lose-less-across", "files-shrink", "faster-in-another-runtime"}  # no claims of the paper
OURS |= {"repair-regains", "repair-beats-published", "repair-and-healing-add-up", "half-of-attention-in-encoders"}
OURS |= {"attention-most-redundant-in-text-encoders", "attention-most-redundant-in-vision-transformers"}
OURS |= {"ranking-stays-after-repair"}
OURS |= {"attention-drop-keeps-retrieval", "attention-drop-keeps-neighbours"}
FED = {
    "published-lists", "attention-drop-keeps-quality", "attention-beats-mlp-and-block", "half-the-attention",
    "larger-models-lose-less", "joint-goes-furthest", "attention-goes-first",
    "attention-drop-is-fast", "best-trade-off", "cache-shrinks-in-proportion", "goes-with-quantisation",
    "beats-unstructured-pruning", "long-context-prefers-attention-drop", "fine-tuning-recovers",
}  # fmt: skip


def test_every_claim_is_fed_or_rests_on_a_picture():
    assert not FED & set(PICTURES)
    assert FED | set(PICTURES) | OURS == {claim["id"] for claim in CLAIMS.values()}


@pytest.fixture(scope="module")
def printed():
    return paper_tables()


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS.values() if claim["id"] in FED], ids=lambda claim: claim["id"])
def test_the_paper_reproduces_itself(printed, claim):
    verdict, evidence = judge(claim["check"], without_not_run(printed[claim["notebook"]]))
    assert verdict == REPRODUCED, evidence


@pytest.mark.parametrize(
    "claim", [claim for claim in CLAIMS.values() if claim["id"] in PICTURES], ids=lambda claim: claim["id"]
)
def test_pictures_have_no_numbers(printed, claim):
    """So none of these is in the list by mistake."""
    tables = printed.get(claim["notebook"], {})
    assert not tables or judge(claim["check"], without_not_run(tables))[0] == NOT_RUN


def without_not_run(tables):
    return {name: content for name, content in tables.items() if name != "not_run"}


def test_what_of_the_paper_is_fed(printed):
    """Each model that a claim is about takes part."""
    evidence = lambda check: judge(check, without_not_run(printed[CLAIMS[check]["notebook"]]))[1]  # noqa: E731
    kept = evidence("quarter_of_attention_keeps_quality")
    for told in ("13B base: Attn-8 of 40 retains 99.7 %", "Mistral-7B-v0.1 base: Attn-8 of 32 retains 98.5 %",
                 "2-70B base: Attn-16 of 80 retains 99.7 %", "8B base: Attn-8 of 32 retains 99.4 %",
                 "3-70B base: Attn-16 of 80 retains 99.8 %"):  # fmt: skip
        assert told in kept
    half_lost = evidence("half_of_attention")
    assert "Llama-2-70B base: Attn-40 of 80 loses, in points, 2.40" in half_lost
    assert "Llama-3-70B base: Attn-40 of 80 loses, in points, 1.80" in half_lost
    larger = evidence("larger_models_lose_less")
    assert "llama-2-70b minus llama-2-13b, what lies above guessing in the tasks, +4.2 %" in larger  # 93.41 and 89.25
    assert "llama-3-70b minus llama-3-8b, what lies above guessing in the tasks, +29.5 %" in larger  # 95.9 and 66.4
    verdict, across = judge("larger_models_lose_less_across", without_not_run(printed["11_sizes_and_causes"]))
    assert verdict == INCONCLUSIVE
    assert "per tenfold number of parameters, what lies above guessing in the tasks, +" in across
    assert evidence("attention_is_best_trade").count(" minus ") == 2 * (2 + 2 + 4)
    assert evidence("attention_beats_mlp_and_block").count("Attn-") == 2 * (2 + 2 + 4)
    assert "14 of 32" in evidence("attention_goes_first")
    assert "18 of 40" in evidence("attention_goes_first")
    assert "up to 31 sub-layers, further than attention by +19" in evidence("joint_goes_furthest")
    assert "eager 1.48" in evidence("half_of_attention_is_faster")


def test_the_paper_s_caches_against_its_formula():
    """Table 4 prints 52 and 26 GB for Llama-2-13B, where its formula gives 50 and 25: 3.8 % off, which the tolerance allows."""
    tables = read_tables(files.REFERENCE / "cpu" / "06_kv_cache")
    rows = tables["paper"]
    off = rows[rows["counted_bytes"] != rows["paper_gib"] * 2**30]
    assert [(row.model, row.paper_gib, row.counted_bytes / 2**30) for row in off.itertuples()] == [
        ("Llama-2-13B", 52, 50), ("Llama-2-13B", 26, 25),
    ]  # fmt: skip
    check = verdicts.CHECKS["cache_shrinks_in_proportion"]
    outcomes = lambda tolerance: {c.outcome for f in check(tables, tolerance=tolerance) for c in f.comparisons}  # noqa: E731
    assert outcomes(0.05) == {REPRODUCED}
    assert outcomes(0.035) == {REPRODUCED, DEVIATES}
