"""Notebook 12: from values to rows by hand, tiny encoders end to end, and what is said of models of another kind."""

import dataclasses

import encoder_decoder_families
import encoder_families
import families
import numpy as np
import pandas as pd
import pytest

from llmdrop_utils import (
    DropPlan,
    Importance,
    LLMDropError,
    dropped,
    embed,
    load_encoder,
    load_encoder_decoder,
    load_profile,
    prepare_pairs,
    score_targets,
)
from llmdrop_utils.base import files
from llmdrop_utils.base.errors import NotApplicable
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.kinds import kind_of_model
from llmdrop_utils.report.rules import decide
from llmdrop_utils.report.style import FIGURES
from llmdrop_utils.report.verdicts import ADVICE, CHECKS
from llmdrop_utils.studies.needs import look_up
from llmdrop_utils.studies.other_transformers.pair_rows import pair_importance_rows, target_rows
from llmdrop_utils.studies.other_transformers.rows import (
    MEAN,
    decoder_quality_rows,
    decoder_rows,
    drawn,
    gap_rows,
    half_rows,
    measures_of,
    quality_rows,
)
from llmdrop_utils.studies.other_transformers.study import dropped_counts
from llmdrop_utils.studies.other_transformers.work import AGREEMENT, COSINE, FIRST, NEAREST, RANK, DataSet
from llmdrop_utils.studies.run import STUDIES
from llmdrop_utils.studies.work import DENSE_CELL, Cell

NOTEBOOK = "12_other_transformers"
CELLS = [DENSE_CELL, Cell("attention", 1), Cell("mlp", 1), Cell("block", 1)]


# ---- from embeddings to numbers -----------------------------------------------------------------------------------------


def at(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_passages():
    """Two passages: first halves at 0 and 90, second halves at 10 and 50 degrees; without layers the last is at 4 instead.

    Cosines are 1, 1, 1 and cos 46, in twos: 1 and (1 + cos 46) / 2. The first then finds the other's half (4) before its own
    (10): rank 2; the second (90) its own at 4 behind that at 10: rank 2.
    """
    data = DataSet("hand", ("a", "b", "c", "d"), None, np.arange(2))
    dense, other = at(0, 90, 10, 50), at(0, 90, 10, 4)
    found = data.compare(dense, other)
    assert found[COSINE] == pytest.approx([1, (1 + np.cos(np.radians(46))) / 2])
    assert (found[FIRST], found[RANK]) == ([0, 0], [0.5, 0.5])
    assert data.compare(dense, dense)[FIRST] == [1, 1]
    assert data.compare(dense, dense)[AGREEMENT] == pytest.approx([1, 1])
    assert data.chances == {FIRST: 0.5, RANK: 0.75}  # ranks 1 and 2 as often: (1 + 1/2) / 2


def test_images():
    data = DataSet("hand", (np.zeros((2, 2, 3), np.uint8),) * 3, np.array(["a", "a", "b"]), np.array([0, 0, 1]))
    found = data.compare(at(0, 10, 90), at(0, 60, 90))
    assert found[NEAREST] == [1, 0, 0]  # the second is now nearer to the third
    assert data.chances == {NEAREST: pytest.approx(1 / 3)}  # 2 of 6 ordered pairs
    assert set(found) == {COSINE, AGREEMENT, NEAREST}


def test_fingerprints_tell_inputs_and_labels_apart():
    image, other = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    sets = [
        DataSet("hand", inputs, labels, np.arange(2))
        for inputs, labels in [
            ((image, other), np.array(["a", "b"])),
            ((other, image), np.array(["a", "b"])),
            ((image, other), np.array(["a", "a"])),
            (("a", "b"), None),
            (("b", "a"), None),
        ]
    ]
    assert len({data.fingerprint for data in sets}) == 5


# ---- from numbers to rows -----------------------------------------------------------------------------------------------


def test_samples_of_a_group_are_drawn_together():
    """Groups of 3 and 1: means 2/3 and 0, weights 3 and 1. Each draw of two groups is 2/3, 1/2 or 0."""
    found = drawn([[1, 1, 0, 0]], np.array([5, 5, 5, 9]), chance=0.0, seed=0)
    assert found.values == pytest.approx([0.5])
    assert {round(float(value), 6) for value in found.draws[:, 0]} == {0.666667, 0.5, 0.0}
    assert (found.n, found.samples) == (2, 4)


def two_sets():
    """Dense, without attention, without MLP, without block, of four samples each, 1 where found."""
    a = [{"found": [1, 1, 1, 1]}, {"found": [1, 1, 1, 0]}, {"found": [1, 0, 0, 0]}, {"found": [0, 0, 0, 0]}]
    b = [{"found": [1, 1, 0, 0]}, {"found": [1, 1, 0, 0]}, {"found": [1, 0, 0, 0]}, {"found": [0, 0, 0, 0]}]
    return measures_of({"a": (a, np.arange(4), {"found": 0.2}), "b": (b, np.arange(4), {"found": 0.0})})


def test_quality_rows():
    """Of a: 1, 0.75, 0.25, 0, of b: 0.5, 0.5, 0.25, 0. Guessing is 0.2, 0 and in the mean 0.1."""
    rows = pd.DataFrame(quality_rows(CELLS, two_sets(), n_layers=2)).set_index(["data", "kind"])
    assert list(rows.loc[MEAN, "value"]) == [0.75, 0.625, 0.25, 0]
    assert rows.loc[("a", "attention"), "retained"] == pytest.approx(0.55 / 0.8)
    assert rows.loc[(MEAN, "attention"), "retained"] == pytest.approx(0.525 / 0.65)
    assert rows.loc[(MEAN, "block"), "retained"] == pytest.approx(-0.1 / 0.65)
    assert list(rows.loc["b", "samples"]) == [4] * 4
    assert rows.loc[(MEAN, "dense"), "samples"] == 8
    assert list(rows.loc["a", "share"]) == [0, 0.5, 0.5, 0.5]
    dense = rows.loc[("a", "dense")]
    assert (dense["low"], dense["high"], dense["retained_low"], dense["retained_high"]) == (1, 1, 1, 1)


def test_a_dense_model_that_only_guesses_has_nothing_to_retain():
    values = [{"found": [1, 0]}, {"found": [1, 1]}]
    measures = measures_of({"a": (values, np.arange(2), {"found": 0.5})})
    rows = quality_rows(CELLS[:2], measures, n_layers=2)
    assert np.isnan(rows[1]["retained"])


def test_gaps_and_half():
    measures = two_sets()
    rows = pd.DataFrame(gap_rows(CELLS, measures, n_layers=2)).set_index("other")
    assert list(rows["difference"]) == [0.375, 0.625]
    assert list(rows["n"]) == [1, 1]
    assert list(rows["share"]) == [0.5, 0.5]
    (half,) = half_rows(CELLS, measures, n_layers=2)
    assert (half["dense"], half["attention"], half["mlp"], half["difference"]) == (0.75, 0.625, 0.25, 0.375)
    assert (half["chance"], half["n"]) == (pytest.approx(0.1), 1)
    assert half["low"] < 0.375 < half["high"]
    assert half_rows(CELLS, measures, n_layers=6) == []  # three layers were not dropped


@pytest.mark.parametrize(
    ("n_layers", "steps", "expected"),
    [(12, 6, [2, 4, 6, 8, 10, 12]), (6, 6, [1, 2, 3, 4, 5, 6]), (3, 6, [1, 2, 3]), (1, 6, [1]), (24, 4, [6, 12, 18, 24])],
)
def test_dropped_counts(n_layers, steps, expected):
    assert dropped_counts(n_layers, steps)[-1] == n_layers
    assert set(expected) <= set(dropped_counts(n_layers, steps))


def test_the_decoder_beside_them():
    importance = pd.DataFrame({"model": ["m", "m", "n"], "corpus": ["web", "code", "web"], "kind": "mlp", "layer": 0,
                               "n_samples": 4, "importance": [0.1, 0.2, 0.3], "low": 0.0, "high": 1.0})  # fmt: skip
    (row,) = decoder_rows({"importance": importance})
    assert row == {"model": "m", "kind": "mlp", "layer": 0, "importance": 0.1, "low": 0.0, "high": 1.0}
    text = pd.DataFrame({"model": "m", "corpus": [*3 * ["web"], "code"], "kind": ["dense", "mlp", "joint", "mlp"],
                         "n": [0, 3, 3, 3], "retained": [1, 0.5, 0.6, 0.7], "retained_low": 0, "retained_high": 1})  # fmt: skip
    rows = decoder_quality_rows({"text": text, "models": pd.DataFrame({"model": ["m"], "n_layers": [30]})})
    assert [(row["kind"], row["share"], row["retained"]) for row in rows] == [("dense", 0, 1), ("mlp", 0.1, 0.5)]
    assert decoder_rows({}) == decoder_quality_rows({}) == []


def test_importance_of_encoder_decoders_by_depth():
    """An encoder of one layer and a decoder of two; samples of 1 and 3 source tokens and of 2 and 2 target tokens.

    Encoder attention: (1 x 0.2 + 3 x 0.6) / 4 = 0.5; cross-attention of the last layer (0.1 + 0.3) / 2 = 0.2.
    """
    attention, cross = [[0.2, 0.4, 0.6], [0.6, 0.6, 0.6]], [[np.nan, 0.5, 0.1], [np.nan, 0.5, 0.3]]
    rows = {"attention": attention, "mlp": attention, "block": attention, "cross_attention": cross}
    weights = np.array([[1, 2, 2], [3, 2, 2]])
    scores = Importance({kind: np.array(values) for kind, values in rows.items()}, weights, {})
    first, second = pair_importance_rows({"web": scores})
    assert (first["corpus"], first["layer"], second["layer"]) == ("web", 0, 1)
    assert first["encoder_attention"] == first["encoder_mlp"] == pytest.approx(0.5)
    assert (first["self_attention"], second["self_attention"]) == pytest.approx((0.5, 0.6))
    assert (first["cross_attention"], second["cross_attention"]) == pytest.approx((0.5, 0.2))
    assert np.isnan([second[f"encoder_{name}"] for name in ("attention", "mlp", "attention_low", "mlp_high")]).all()
    assert second["cross_attention_low"] <= 0.2 <= second["cross_attention_high"]
    assert first["cross_attention_low"] == first["cross_attention_high"] == pytest.approx(0.5)


def test_intervals_of_a_decoder_weigh_samples_by_their_targets():
    """One source is as long as a hundred others, and all targets are as long as each other."""
    values = np.linspace(0.1, 0.9, 9)
    weights = np.array([[100 if i == 8 else 1, 2] for i in range(9)])
    rows = {kind: np.stack([values, values], 1) for kind in ("attention", "mlp", "block")}
    rows["cross_attention"] = np.stack([np.full(9, np.nan), values], 1)
    (row,) = pair_importance_rows({"web": Importance(rows, weights, {})})
    assert row["cross_attention"] == row["self_attention"] == pytest.approx(0.5)
    assert row["encoder_attention"] > 0.85
    assert row["self_attention_low"] + row["self_attention_high"] == pytest.approx(1, abs=0.01)  # as far down as up
    assert row["encoder_attention_low"] + row["encoder_attention_high"] > 1.05


def test_what_targets_cost():
    """Targets of 1 and 3 tokens: dense (4 + 3 x 2) / 4 = 2.5, without cross-attention (5 + 3 x 3) / 4 = 3.5: 1 more, surely."""
    cells = [DENSE_CELL, Cell("cross_attention", 1), Cell("attention", 2)]
    values = [{"nll": nll, "tokens": [1, 3]} for nll in ([4.0, 2.0], [5.0, 3.0], [4.0, 3.0])]
    dense, cross, attention = target_rows(cells, values, {"cross_attention": 2, "attention": 8})
    assert (dense["nats"], dense["added"], dense["share"]) == (2.5, 0, 0)
    assert (cross["nats"], cross["added"], cross["added_low"], cross["added_high"]) == (3.5, 1, 1, 1)
    assert (cross["share"], attention["share"]) == (0.5, 0.25)
    assert (attention["added"], attention["samples"], attention["tokens"]) == (0.75, 2, 4)
    assert attention["added_low"] < 0.75 < attention["added_high"]


# ---- end to end ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(files, "RESULTS", tmp_path / "results")


def test_tables(results):
    """The profile smoke: numbers of one plan are those that the public functions give."""
    tables = STUDIES[NOTEBOOK](load_profile("smoke"))
    models = tables["models"].set_index("model")
    assert list(models["reads"]) == ["text", "images"]
    assert list(models["n_layers"]) == [4, 4]
    assert models.loc["tiny-vit", "input"] == "16 x 16 pixels, mean 0.5/0.5/0.5, standard deviation 0.5/0.5/0.5"
    assert set(tables["not_run"]["what"]) == {"notebook 01 of smoke", "notebook 02 of smoke"}
    quality = tables["quality"].set_index(["model", "data", "measure", "kind", "n"])["value"]
    model, reader = load_encoder("tiny-bert", load_profile("smoke").dtype)
    data = DataSet.of_passages("random-words", 12, 8, skip=6)
    order = tables["importance"].query("model == 'tiny-bert' and corpus == 'random-words' and kind == 'mlp'")
    plan = DropPlan(mlp=tuple(order.sort_values("importance")["layer"][:2]))
    dense = embed(model, reader, data.inputs, batch_size=4)
    with dropped(model, plan):
        expected = data.compare(dense, embed(model, reader, data.inputs, batch_size=4))
    for measure, values in expected.items():
        assert quality["tiny-bert", "random-words", measure, "mlp", 2] == pytest.approx(np.mean(values), rel=1e-4)


def test_one_model_of_the_user_s(results, tmp_path):
    """An encoder in a folder: notebook 12 measures it alone, the others say what it is."""
    folder = tmp_path / "mine"
    encoder_families.tiny("bert", vocab_size=257, num_hidden_layers=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    profile = load_profile("smoke", str(folder))
    tables = STUDIES[NOTEBOOK](profile)
    assert list(tables["models"]["reads"]) == ["text"]
    for name, study in STUDIES.items():
        if name != NOTEBOOK:
            with pytest.raises(NotApplicable, match=r"mine-\w+ is a text encoder: it predicts no next token\. Notebook 12"):
                study(profile)


@pytest.mark.parametrize(
    ("name", "texts", "images"),
    [
        ("tiny-vit", [], ["photographs"]),
        ("tiny-bert", ["random-words", "random-digits"], []),
        ("tiny-t5", ["random-words", "random-digits"], []),
    ],
)
def test_what_is_not_read_is_not_planned(name, texts, images):
    """Texts for encoders of text and for encoder-decoders, images for those of images."""
    profile = load_profile("smoke", name)
    (others,) = [section for section in profile.sections if section.__name__ == "Others"]
    settings = profile.sections[others].model_copy(update={"images": ["photographs", "digits"]})
    needed = look_up(dataclasses.replace(profile, sections=profile.sections | {others: settings}))
    assert [item.name for item in needed.items if item.what == "text"] == texts
    assert [item.name for item in needed.items if item.what == "images"] == images
    assert needed.chosen == ["12"]


def test_a_model_of_unknown_kind_may_read_anything(monkeypatch):
    """Its configuration could not be read: the hub is away."""
    monkeypatch.setattr("llmdrop_utils.studies.needs.kind_of_model", lambda name, hub: None)
    needed = look_up(load_profile("smoke", "tiny-bert"))
    assert needed.reads("text encoder")
    assert needed.reads("vision encoder")


def test_a_decoder_of_the_user_s(results, tmp_path):
    folder = tmp_path / "mine"
    families.tiny("llama").save_pretrained(folder)
    with pytest.raises(NotApplicable, match="is a decoder, and this notebook is about encoders of text and of images"):
        STUDIES[NOTEBOOK](load_profile("smoke", str(folder)))
    assert STUDIES["01_similarity"].passes_over(str(folder)) is None
    assert STUDIES["01_similarity"].passes_over(None) is None


def test_tables_of_an_encoder_decoder(results):
    """Numbers of one plan are those that the public functions give."""
    tables = STUDIES[NOTEBOOK](load_profile("smoke").replacing(others={"models": ["tiny-t5"]}))
    about = tables["pairs"].iloc[0]
    assert (about["model"], about["encoder_layers"], about["decoder_layers"]) == ("tiny-t5", 4, 3)
    assert tables["models"].empty
    assert list(tables["pair_importance"]["layer"]) == [0, 1, 2, 3] * 2
    model, tokenizer = load_encoder_decoder("tiny-t5", load_profile("smoke").dtype)
    assert about["parameters"] == sum(p.numel() for p in model.parameters())
    data = DataSet.of_passages("random-digits", 12, 8, skip=6)
    given = prepare_pairs(tokenizer, data.inputs[:12], data.inputs[12:])
    cross = tables["pair_importance"].query("corpus == 'random-words'")["cross_attention"].dropna()
    rows = tables["targets"].set_index(["corpus", "kind", "n"])
    assert sorted(n for _, kind, n in rows.loc[["random-digits"]].index if kind == "cross_attention") == [1, 2, 3]
    for plan, place in ((DropPlan(), ("dense", 0)), (DropPlan(cross_attention=(4 + cross.argmin(),)), ("cross_attention", 1))):
        with dropped(model, plan):
            expected = np.log(score_targets(model, given).perplexity)
        assert rows.loc[("random-digits", *place), "nats"] == pytest.approx(expected, rel=1e-4)
    assert rows.loc[("random-digits", "cross_attention", 3), "share"] == 1
    assert ADVICE[NOTEBOOK](tables).startswith("**tiny-t5**, 4 layers in the encoder and 3 in the decoder: by the upper end")
    for name in ("figS34_importance", "figS35_curves"):
        assert FIGURES[name].draw(tables).takeaway == ""


def test_an_encoder_decoder_of_the_user_s(results, tmp_path):
    """Notebook 12 measures it alone, and the others say what it is."""
    folder = tmp_path / "mine"
    encoder_decoder_families.tiny("bart", vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    profile = load_profile("smoke", str(folder))
    assert len(STUDIES[NOTEBOOK](profile)["pairs"]) == 1
    for name, study in STUDIES.items():
        if name != NOTEBOOK:
            with pytest.raises(
                NotApplicable, match=r"mine-\w+ is an encoder-decoder: it predicts a target from a source. Noteb"
            ):
                study(profile)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("minilm-l6", "text encoder"), ("vit-s-focus", "vision encoder"), ("smollm2-135m", "decoder"), ("small-llama", "decoder"),
     ("random:llama-2-7b", "decoder"), ("tiny-t5", "encoder-decoder"), ("no such model", None)],
)  # fmt: skip
def test_kinds_of_names(name, kind):
    assert kind_of_model(name) == kind


def test_a_model_of_another_kind_in_the_section(results):
    profile = load_profile("smoke").replacing(others={"models": ["tiny-llama"]})
    with pytest.raises(LLMDropError, match="tiny-llama is a causal language model, no encoder"):
        STUDIES[NOTEBOOK](profile)


# ---- rules and advice ---------------------------------------------------------------------------------------------------


def tables_of(**changes):
    """Two models that read text, and one that reads images; attention is best in all."""
    models = pd.DataFrame({"model": ["a", "b", "v"], "reads": ["text", "text", "images"], "n_layers": [4, 4, 4]})
    contrast = pd.DataFrame({
        "model": ["a", "b", "v"], "corpus": "c", "other": "mlp", "attention": 0.1, "compared": 0.2, "attention_median": 0.1,
        "compared_median": 0.2, "difference": -0.1, "low": -0.12, "high": -0.08, "layers_lower": 4, "n_layers": 4,
    })  # fmt: skip
    gaps = pd.DataFrame([
        {"model": model, "measure": measure, "other": "mlp", "n": n, "share": n / 4, "difference": 0.2, "low": 0.1, "high": 0.3}
        for model, measure in (("a", RANK), ("b", RANK), ("v", NEAREST)) for n in (1, 2, 3)
    ])  # fmt: skip
    quality = pd.DataFrame([
        {"model": model, "data": data, "measure": measure, "kind": "attention", "n": n, "samples": 50, "retained": 0.95,
         "retained_low": 0.92, "retained_high": 0.98}
        for model, measure in (("a", RANK), ("b", RANK), ("v", NEAREST)) for n in (1, 2, 3) for data in ("c", MEAN)
    ])  # fmt: skip
    half = pd.DataFrame({"model": ["a", "b", "v"], "measure": COSINE, "n": 2, "attention": 0.87})
    tables = {"models": models, "contrast": contrast, "importance": pd.DataFrame({"model": ["a", "b", "v"], "n_samples": 9}),
              "gaps": gaps, "quality": quality, "half": half}  # fmt: skip
    for name, (where, columns) in changes.items():
        for column, value in columns.items():
            tables[name].loc[tables[name].eval(where), column] = value
    return tables


OF_TEXT = ("attention_most_redundant_in_text_encoders", {}), ("attention_drop_keeps_retrieval", {"layers": 0.5})
OF_IMAGES = ("attention_most_redundant_in_vision_transformers", {}), ("attention_drop_keeps_neighbours", {"layers": 0.5})


@pytest.mark.parametrize(("check", "thresholds"), [*OF_TEXT, *OF_IMAGES, ("half_of_attention_can_go", {"retained": 0.9})])
def test_rules_hold_for_what_they_are_about(check, thresholds):
    """Worse numbers of the models of the other kind, and of other measures, change nothing; those of one of its own do."""
    verdict = lambda tables: decide(CHECKS[check](tables, **thresholds))[0]  # noqa: E731
    assert verdict(tables_of()) == "reproduced"
    worse = {"contrast": {"difference": 0.1, "low": 0.1, "high": 0.1}, "gaps": {"difference": -0.2, "low": -0.3, "high": -0.2},
             "quality": {"retained": 0.5, "retained_low": 0.4, "retained_high": 0.6}}  # fmt: skip
    for model in ("b", "v"):
        own = check == "half_of_attention_can_go" or (check in dict(OF_TEXT)) == (model == "b")
        changed = {name: (f"model == '{model}'", columns) for name, columns in worse.items()}
        assert verdict(tables_of(**changed)) == ("deviates" if own else "reproduced")


def test_what_a_rule_does_not_look_at():
    """More than half of the layers; data sets alone; other numbers of attention layers than half."""
    far = tables_of(gaps=("n == 3", {"difference": -0.2, "low": -0.3, "high": -0.1}))
    assert decide(CHECKS["attention_drop_keeps_retrieval"](far, layers=0.5))[0] == "reproduced"
    apart = tables_of(quality=("data == 'c' or n != 2", {"retained": 0.1, "retained_low": 0.0, "retained_high": 0.2}))
    assert decide(CHECKS["half_of_attention_can_go"](apart, retained=0.9))[0] == "reproduced"
    tables = tables_of()
    tables["models"]["n_layers"] = 12  # so that half was not tried
    (first, *_) = CHECKS["half_of_attention_can_go"](tables, retained=0.9)
    assert first.text == "this run does not drop 6 of its 12 attention layers"


def test_advice():
    """Three layers keep 92 % by the lower end in a; b keeps that much with one alone."""
    tables = tables_of(quality=("model == 'b' and n > 1", {"retained_low": 0.89}))
    first, second, _ = ADVICE[NOTEBOOK](tables).split("\n\n")
    assert (
        "90 % of what is found above guessing (reciprocal rank) is retained without 3 attention layers, without 0 MLPs" in first
    )
    assert "without 1 attention layers" in second
    assert "Without 2 attention layers embeddings have a cosine of 0.87" in first
