"""Notebook 01: each number of its tables, from scores that are worked out by hand."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from llmdrop_utils.measure.importance import Importance
from llmdrop_utils.measure.metrics import BIN_EDGES
from llmdrop_utils.models.locate import LocatedModel
from llmdrop_utils.report.tables import frame
from llmdrop_utils.studies import paper, run
from llmdrop_utils.studies.profile import Calibration, Profile
from llmdrop_utils.studies.run import importance_work
from llmdrop_utils.studies.similarity.study import TABLES, _rows

MODEL = LocatedModel("hand", Path(), "sha256:hand")
ATTENTION, MLP, BLOCK = [0.1, 0.3, 0.2, 1.0], [0.2, 0.1, 0.5, 2.0], [0.5, 0.6, 0.7, 3.4]


def two_samples(attention=ATTENTION, mlp=MLP, block=BLOCK):
    """Samples of 10 and 30 tokens that hold 2 and 2/3 times what is given: its mean over tokens is 1, over samples 4/3.

    A quarter of the draws of two samples is the first one twice, and a quarter the second: these are the ends of intervals.
    """
    rows = {kind: np.outer([2, 2 / 3], values) for kind, values in (("attention", attention), ("mlp", mlp), ("block", block))}
    return scores(weights=[10, 30], **rows)


def scores(attention, mlp=None, block=None, weights=None):
    """Rows are samples. All tokens of layer i are in bin 10 + i of the histogram."""
    attention = np.array(attention, dtype=float)
    per_sample = {"attention": attention, "mlp": attention if mlp is None else np.array(mlp, dtype=float)}
    per_sample["block"] = attention if block is None else np.array(block, dtype=float)
    n_samples, n_layers = attention.shape
    counts = np.zeros((n_layers, len(BIN_EDGES) - 1), dtype=int)
    counts[range(n_layers), range(10, 10 + n_layers)] = 40
    return Importance(per_sample, np.array(weights or [8] * n_samples), dict.fromkeys(per_sample, counts))


def calibration(n_samples=2, sample_counts=(1,), n_drop=(1,)):
    counts = {"sample_counts": list(sample_counts), "n_drop": list(n_drop)}
    return Calibration(corpora=["web", "code"], n_samples=n_samples, seq_len=8, batch_size=1, **counts)


def table(name, by_corpus, **settings):
    return _rows(by_corpus, MODEL, calibration(**settings))[name]


def one(rows, **wanted):
    """The one row with these values."""
    (row,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def three(row, name):
    return [row[name], row["low"], row["high"]]


def test_rows_are_as_declared():
    both = {"web": two_samples(), "code": two_samples()}
    rows = _rows(both, MODEL, calibration(sample_counts=[1, 2]))
    assert set(rows) == set(TABLES)
    for name, content in rows.items():
        frame(name, [{"model": "hand"} | row for row in content], TABLES)
    assert len(rows["importance"]) == len(rows["order"]) == len(rows["distribution"]) == 2 * 3 * 4
    assert [(row["corpus"], row["other"]) for row in rows["contrast"]] == [
        ("web", "mlp"), ("web", "block"), ("code", "mlp"), ("code", "block"),
    ]  # fmt: skip


# ---- single layers ------------------------------------------------------------------------------------------------------


def test_importance_is_a_mean_over_tokens():
    rows = table("importance", {"web": two_samples()})
    for layer, value in enumerate(MLP):
        row = one(rows, kind="mlp", layer=layer)
        assert three(row, "importance") == pytest.approx([value, value * 2 / 3, value * 2])
        assert (row["corpus"], row["n_samples"]) == ("web", 2)
    assert one(rows, kind="attention", layer=3)["importance"] == pytest.approx(1.0)
    assert one(rows, kind="block", layer=3)["importance"] == pytest.approx(3.4)


def test_only_the_first_samples_count():
    """What is measured for the study of sample counts stays out of all other tables, but for single tokens."""
    more = scores([[1, 2], [3, 4], [90, 10]])
    tables = _rows({"web": more}, MODEL, calibration(sample_counts=[1, 2, 3]))
    assert [row["importance"] for row in tables["importance"] if row["kind"] == "mlp"] == [2, 3]
    assert {row["n_samples"] for row in tables["importance"]} == {2}
    assert [row["layer"] for row in tables["order"] if row["kind"] == "mlp"] == [0, 1]
    counted = {(row["n_samples"], row["layer"]): row["importance"] for row in tables["sample_count"] if row["kind"] == "mlp"}
    assert counted == pytest.approx({(1, 0): 1, (1, 1): 2, (2, 0): 2, (2, 1): 3, (3, 0): 94 / 3, (3, 1): 16 / 3})


def test_order_is_least_important_first():
    rows = table("order", {"web": two_samples()})
    found = lambda kind: [(row["position"], row["layer"]) for row in rows if row["kind"] == kind]  # noqa: E731
    assert found("attention") == [(0, 0), (1, 2), (2, 1), (3, 3)]
    assert found("mlp") == [(0, 1), (1, 0), (2, 2), (3, 3)]


def test_quantiles_of_single_tokens():
    """All tokens of layer 2 are in bin 12: quantile q is at the share q of the bin, on a logarithmic axis."""
    width = (np.log10(2) + 7) / 146
    row = one(table("distribution", {"web": two_samples()}), kind="block", layer=2)
    for name, q in (("q05", 0.05), ("q25", 0.25), ("q50", 0.5), ("q75", 0.75), ("q95", 0.95)):
        assert row[name] == pytest.approx(10 ** (-7 + (12 + q) * width))


# ---- attention against the others ---------------------------------------------------------------------------------------


def test_contrast():
    """Attention: mean 0.4, median 0.25. MLP: 0.7 and 0.35, lower in layer 1 alone. Block: 1.3 and 0.65, lower nowhere."""
    rows = table("contrast", {"web": two_samples()})
    mlp, block = one(rows, other="mlp"), one(rows, other="block")
    for row, mean, median, lower in ((mlp, 0.7, 0.35, 3), (block, 1.3, 0.65, 4)):
        assert (row["attention"], row["compared"]) == pytest.approx((0.4, mean))
        assert (row["attention_median"], row["compared_median"]) == pytest.approx((0.25, median))
        assert (row["layers_lower"], row["n_layers"]) == (lower, 4)
        # Twice the difference in the first sample, two thirds of it in the second.
        assert three(row, "difference") == pytest.approx([0.4 - mean, 2 * (0.4 - mean), (0.4 - mean) * 2 / 3])


def test_equal_importance_is_not_lower():
    row = one(table("contrast", {"web": two_samples(mlp=[0.1, 0.4, 0.2, 0.9])}), other="mlp")
    assert row["layers_lower"] == 1


def test_contrast_is_paired_by_sample():
    """Attention is 0.1 below MLP and 0.3 below block in every sample, and samples differ by much more."""
    attention = np.array([[1, 2], [5, 9], [3, 1], [7, 2]])
    rows = table("contrast", {"web": scores(attention, attention + 0.1, attention + 0.3)}, n_samples=4)
    assert three(one(rows, other="mlp"), "difference") == pytest.approx([-0.1] * 3)
    assert three(one(rows, other="block"), "difference") == pytest.approx([-0.3] * 3)


# ---- depth --------------------------------------------------------------------------------------------------------------


def test_depth_leaves_the_last_layer_out():
    """Ranks 1 3 2 of three layers: rho = 1 - 6 x 2 / 24 = 0.5. With the last it is -0.4, without the first -1."""
    rows = table("depth", {"web": two_samples(attention=[0.1, 0.3, 0.2, 0.05], mlp=[3, 2, 1, 9], block=[1, 2, 3, 0])})
    assert three(one(rows, kind="attention"), "correlation") == pytest.approx([0.5] * 3)
    assert three(one(rows, kind="mlp"), "correlation") == pytest.approx([-1] * 3)  # deeper layers change less
    assert three(one(rows, kind="block"), "correlation") == pytest.approx([1] * 3)


def test_depth_has_an_interval_over_samples():
    """Importance falls with depth in the second sample, which has three times the tokens, and grows in the first."""
    rows = table("depth", {"web": scores([[1, 2, 3, 0], [3, 2, 1, 0]], weights=[10, 30])})
    assert three(one(rows, kind="mlp"), "correlation") == pytest.approx([-1, -1, 1])


# ---- corpora ------------------------------------------------------------------------------------------------------------


def test_agreement_of_corpora():
    """Attention: ranks 1 3 2 4 and 2 3 1 4, so rho = 1 - 6 x 2 / 60 = 0.8; orders 0 2 1 3 and 2 0 1 3."""
    by_corpus = {
        "web": two_samples(),
        "code": two_samples(attention=[0.2, 0.3, 0.1, 1.0], mlp=MLP[::-1]),
        "math": two_samples(block=BLOCK[::-1]),
    }
    rows = table("corpora", by_corpus, n_drop=[1, 2, 3, 5])
    assert [(row["a"], row["b"]) for row in rows[::3]] == list(itertools.combinations(by_corpus, 2))
    row = one(rows, a="web", b="code", kind="attention")
    assert three(row, "correlation") == pytest.approx([0.8] * 3)
    assert (row["shared_1"], row["shared_2"], row["shared_3"]) == (0, 2, 3)
    assert "shared_5" not in row, "there are four layers"
    # MLP: ranks 2 1 3 4 and 4 3 1 2, d = 2 2 2 2, so rho = 1 - 6 x 16 / 60; orders 1 0 2 3 and 2 3 1 0.
    row = one(rows, a="web", b="code", kind="mlp")
    assert three(row, "correlation") == pytest.approx([-0.6] * 3)
    assert (row["shared_1"], row["shared_2"], row["shared_3"]) == (0, 0, 2)
    assert one(rows, a="web", b="math", kind="mlp")["correlation"] == pytest.approx(1)
    assert one(rows, a="code", b="math", kind="block")["correlation"] == pytest.approx(-1)


def test_corpora_are_drawn_independently():
    """Two samples rank two layers in opposite ways. With the same draws, two equal corpora would never disagree."""
    row = one(table("corpora", {"web": scores([[1, 2], [2, 1]]), "code": scores([[1, 2], [2, 1]])}), kind="mlp")
    assert (row["low"], row["high"]) == pytest.approx((-1, 1))


def test_samples_of_corpora(monkeypatch):
    """As many as the profile calibrates on; of the first corpus as many as the study of sample counts needs."""
    identity = {"dtype": None, "attention": "sdpa"}
    monkeypatch.setattr(run, "identity_of", lambda model, profile: {"model": model} | identity)
    monkeypatch.setattr(run, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(run, "fitting_length", lambda model, asked: asked)
    monkeypatch.setattr(run, "load_tokens", lambda corpus, tokenizer, n, seq_len: np.zeros((n, seq_len)))
    profile = lambda n: Profile("hand", "by hand", [], {Calibration: calibration(n, sample_counts=[1, 5])})  # noqa: E731
    work = importance_work(MODEL, ["web", "code"], profile(2))
    few = importance_work(MODEL, ["web"], profile(6))
    assert [(item.corpus, item.tokens.shape) for item in work] == [("web", (5, 8)), ("code", (2, 8))]
    assert few[0].tokens.shape == (6, 8)


# ---- sample counts ------------------------------------------------------------------------------------------------------


def test_agreement_of_groups_of_samples():
    """Each of three samples against the mean of the two others: ranks 1 2 3 and 3 2 1, 1 3 2 and 3 2 1, 3 2 1 and 1 2 3."""
    rows = table("sample_agreement", {"web": scores([[1, 2, 4], [1, 3, 2], [9, 6, 3]])}, sample_counts=[1, 2])
    assert {(row["corpus"], row["n_samples"], row["groups"]) for row in rows} == {("web", 1, 3)}
    row = one(rows, kind="mlp")
    assert row["correlation"] == pytest.approx(-2.5 / 3)
    # Standard deviation 0.5 / root of 3, so standard error 1 / 6; Student's quantile for three values is 4.3027.
    assert (row["low"], row["high"]) == pytest.approx((-2.5 / 3 - 4.3027 / 6, -2.5 / 3 + 4.3027 / 6), abs=1e-4)
    assert row["lowest"] == -1


@pytest.mark.parametrize(("n_samples", "counted"), [(5, [1]), (6, [1, 2]), (8, [1, 2]), (9, [1, 2, 3])])
def test_three_groups_at_least(n_samples, counted):
    rows = table("sample_agreement", {"web": scores([[1, 2]] * n_samples)}, sample_counts=[1, 2, 3])
    found = {row["n_samples"]: row["groups"] for row in rows}
    assert found == {n: n_samples // n for n in counted}


def test_groups_weigh_samples_by_their_tokens():
    """Others of the first sample: (1 x [1, 3] + 9 x [2, 1]) / 10 = [1.9, 1.2], whose ranks are opposite. So it is for all."""
    rows = table("sample_agreement", {"web": scores([[1, 2], [1, 3], [2, 1]], weights=[1, 1, 9])})
    assert three(one(rows, kind="attention"), "correlation") == pytest.approx([-1] * 3)


def test_sample_counts_are_of_the_first_corpus():
    tables = _rows({"web": two_samples(), "code": two_samples()}, MODEL, calibration())
    assert {row["corpus"] for row in tables["sample_count"]} == {"web"}


# ---- the authors' lists -------------------------------------------------------------------------------------------------


def test_published_lists(monkeypatch):
    """Ours begin 0 2 for attention and 1 0 2 for MLP; two of four layers share 2 x 2 / 4 by chance."""
    lists = {"theirs": [("attention", [3, 2]), ("mlp", [2, 3, 1])]}
    monkeypatch.setattr(paper, "drop_lists", lambda name: lists.get(name, []))
    assert table("published", {"web": two_samples()}) == []
    model = LocatedModel("hand", Path(), "sha256:hand", published_lists="theirs")
    by_corpus = {"web": two_samples(), "code": two_samples(attention=ATTENTION[::-1])}
    attention, reverse, mlp, _ = _rows(by_corpus, model, calibration())["published"]
    assert attention == {
        "corpus": "web", "kind": "attention", "n_drop": 2, "shared": 1, "low": 1, "high": 1, "by_chance": 1.0, "theirs": "3 2",
        "ours": "0 2",
    }  # fmt: skip
    assert (reverse["corpus"], reverse["shared"], reverse["ours"]) == ("code", 1, "3 1")
    assert (mlp["n_drop"], mlp["shared"], mlp["by_chance"], mlp["ours"]) == (3, 2, 9 / 4, "1 0 2")


def test_what_is_shared_has_an_interval_over_samples(monkeypatch):
    """The second sample, which has three times the tokens, drops layer 0; the first drops layer 1, as they do."""
    monkeypatch.setattr(paper, "drop_lists", lambda name: [("mlp", [1])])
    model = LocatedModel("hand", Path(), "sha256:hand", published_lists="theirs")
    (row,) = _rows({"web": scores([[2, 1], [1, 2]], weights=[10, 30])}, model, calibration())["published"]
    assert three(row, "shared") == [0, 0, 1]
