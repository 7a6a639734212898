"""What documents say about results: sentences with the numbers of the committed tables in them."""

import json
import math

import numpy as np
import pandas as pd
import yaml
from documents import MEDIUM, judged, only, row, scorecard, signed, span, table

from llmdrop_utils import load_profile
from llmdrop_utils.base.files import REFERENCE, ROOT
from llmdrop_utils.base.stats import median_interval
from llmdrop_utils.sources.catalogue import exact_name
from llmdrop_utils.studies.speedup.loads import Speed

# ---- what README says about results -----------------------------------------------------------------------------------


def counts_of_claims() -> list[str]:
    listed = yaml.safe_load((ROOT / "data" / "claims.yaml").read_text())
    notebooks = scorecard()["notebook"]
    of_training, of_encoders = (
        scorecard()[notebooks == name]["verdict"] for name in ("07_training_stages", "12_other_transformers")
    )
    others = ["07_training_stages", "11_sizes_and_causes", "12_other_transformers"]
    verdicts = scorecard()[~notebooks.isin(others)]["verdict"].value_counts()
    of_sizes = judged("ladder")["verdict"].value_counts()
    assert {*of_sizes.index} == {"deviates", "inconclusive"}
    assert {*of_training} == {"deviates"}
    told = of_encoders.value_counts()
    size = only(table("07_training_stages/runs").query("model == 'small-llama'")["parameters"])
    return [
        f"Of {len(listed)} claims {verdicts['reproduced']} are reproduced on one small model, {verdicts['deviates']} deviate "
        f"and {verdicts['inconclusive']} are inconclusive; of {of_sizes.sum()} about sizes and causes {of_sizes['deviates']} "
        f"deviate on five models; {len(of_training)} about training deviate on a Llama of "
        f"{size / 1e6:.1f}M parameters trained here; of {len(of_encoders)} about encoders {told['reproduced']} is reproduced "
        f"and {told['deviates']} deviate; {verdicts['not run']} are not run."
    ]


def dropping() -> list[str]:
    """What dropping costs in tasks, without 8 layers."""
    at_8 = {kind: row("02_drop_curves/average", kind=kind, n=8) for kind in ("attention", "mlp", "block")}
    dense = row("02_drop_curves/average", kind="dense")
    lost = {
        kind: f"{found['points_lost']:.1f} {{}}{span(found, 'points_lost_low', 'points_lost_high')}"
        for kind, found in at_8.items()
    }
    return [
        f"Without 8 of {only(table('02_drop_curves/models')['n_layers'])} layers the mean of {dense['tasks']} tasks, "
        f"{100 * dense['value']:.1f} % for the dense model and {100 * dense['chance']:.1f} % for guessing, falls by "
        f"{lost['attention'].format('points ')} for attention, {lost['mlp'].format('')} for MLP and {lost['block'].format('')} "
        "for blocks.",
    ]


def generation(kind: str, n: int) -> pd.Series:
    return row("05_speedup/speed", what="generation from samples", context=2048, kind=kind, n=n)


def speed() -> list[str]:
    eight, fifteen, dense = generation("attention", 8), generation("attention", 15), generation("dense", 0)
    smaller = [f"{100 * (1 - found['kv_bytes'] / dense['kv_bytes']):.0f} %" for found in (eight, fifteen)]
    ends = {"low": "speedup_low", "high": "speedup_high", "form": ".2f"}
    device = only(table("05_speedup/models")["device"])
    return [
        f"For {eight['context']:,} tokens in and {eight['new_tokens']:,} out in torch on {device}, the model is "
        f"{eight['speedup']:.2f} times as fast {span(eight, **ends)} without 8 attention layers and "
        f"{fifteen['speedup']:.2f} times {span(fifteen, **ends)} without 15. "
        f"Its key-value cache shrinks by {smaller[0]} and {smaller[1]}."
    ]


def served() -> list[str]:
    """Files in 16 bits without 8 and 15 attention layers, in llama.cpp."""
    ends = {"low": "speedup_low", "high": "speedup_high", "form": ".2f"}
    timed = {what: [row("09_take_away/speed", runtime="llama.cpp F16", what=what, context=2048, n=n) for n in (8, 15)]
             for what in ("prefill", "decode")}  # fmt: skip
    told = {what: [f"{found['speedup']:.2f} {span(found, **ends)}" for found in of] for what, of in timed.items()}
    return [
        f"llama.cpp reads 2,048 tokens {told['prefill'][0]} and {told['prefill'][1]} times as fast, and generates after them "
        f"{told['decode'][0]} and {told['decode'][1]} times as fast.",
    ]


def methods() -> list[str]:
    """The best of the methods beside cosine on the same samples, at eight layers; and whether one is better in all measures."""
    few = "cosine, few samples"
    found = row("04_ablations/quality", measure="text", kind="attention", method="greedy KL", n=8, against=few)
    greedy, once = (row("04_ablations/methods", kind="attention", method=m)["passes"] for m in ("greedy KL", few))
    quality = table("04_ablations/quality").query("kind == 'attention' and n == 8")
    better = quality[quality["outcome"] == "better"].groupby("method").size()
    assert (better < quality["measure"].nunique()).all()
    compared = {*quality["method"]} - {"cosine", few}
    there = table("11_sizes_and_causes/methods", "ladder").query("model == 'qwen2.5-coder-0.5b'").set_index("method")["better"]
    on_qwen = {*there.index} - {few}
    assert on_qwen <= compared
    assert (there.str.split(", ").dropna().map(len) < 3).all()
    assert pd.isna(there["greedy KL"])
    gain = f"{found['difference']:.3f} nats per token of text"
    ends = span(found, low="difference_low", high="difference_high", form=".3f")
    return [
        f"Of {len(compared)} other ways to choose 8 layers none is better on text, tasks and continuations at once, nor of "
        f"{len(on_qwen)} on Qwen2.5-Coder-0.5B; greedy search gains {gain} here {ends}, for "
        f"{greedy / once:.0f} times the passes.",
    ]


def breaks() -> list[str]:
    """What is left of abilities without some layers."""
    percent = lambda x: f"{100 * x:.0f} %"  # noqa: E731

    def copied(run: str, kind: str, n: int = 8) -> str:
        return percent(row("08_what_breaks/long_context", run, probe="copy", context="mean", kind=kind, n=n)["accuracy"])

    here, qwen = (
        [copied(run, "attention"), copied(run, "mlp"), copied(run, "dense", 0)] for run in ("cpu", "ladder-qwen2.5-coder-0.5b")
    )
    large = "ladder-qwen2.5-coder-1.5b"
    (layers,) = table("02_drop_curves/models", large)["n_layers"]
    solved = [row("08_what_breaks/abilities", large, ability="mathematics", n=n) for n in (0, 4, 7)]
    of, counts = solved[0]["samples"], [f"{each['value'] * each['samples']:.0f}" for each in solved]
    choices = row("08_what_breaks/abilities", large, ability="choices", kind="attention", n=7)
    kept = f"{percent(choices['retained'])} {span(choices, 'retained_low', 'retained_high', scale=100, form='.0f')}"
    return [
        f"Of {of} word problems Qwen2.5-Coder-1.5B solves {counts[0]} dense, {counts[1]} without 4 of {layers} "
        f"attention layers and {counts[2]} without 7, which leave {kept} of what is above guessing in {choices['samples']} "
        "multiple-choice questions.",
        f"Without 8 attention layers {here[0]} of a passage is still copied here, without 8 MLPs {here[1]} "
        f"(dense: {here[2]}); on Qwen2.5-Coder-0.5B {qwen[0]} and {qwen[1]} ({qwen[2]}).",
    ]


def mended() -> list[str]:
    """What repair and healing regain without 12 attention layers, chosen by cosine or by the search; and on other models."""

    def regained(way: str, run: str = "cpu") -> tuple[str, str]:
        found = row("10_keep_more/regained", run, layers="cosine", way=way, against="plain")
        return f"{100 * found['regained']:.0f} %", span(found, scale=100, form=".0f")

    def times(layers: str, way: str) -> str:
        measure = "perplexity over dense (mean)"
        return f"{row('10_keep_more/quality', measure=measure, layers=layers, way=way, n=12)['value']:.2f}"

    of = lambda *args: " ".join(regained(*args))  # noqa: E731
    gemma, qwen, maps = "ladder-gemma3-270m", "ladder-qwen2.5-coder-0.5b", "linear maps (NBL)"
    made = table("10_keep_more/made").query("layers == 'cosine'").set_index("way")
    assert not made.loc["repair", "parameters"]
    (tokens,) = {*table("10_keep_more/made", gemma)["tokens"], *table("10_keep_more/made", qwen)["tokens"]} - {0}
    share, ends = regained(maps, qwen)
    return [
        f"Without 12 attention layers perplexity, here in bfloat16, is {times('cosine', 'plain')} times the dense model's, as "
        f"a mean of 4 corpora. Refitted in closed form on {made.loc['repair', 'tokens']:,} tokens, at no cost in inference, "
        f"what is kept regains {of('repair')} of the nats and leaves {times('cosine', 'repair')} times; on layers that a "
        f"search with repair chose {times('search with repair', 'repair')}.",
        f"On {tokens:,} it regains {of('repair', gemma)} on Gemma-3-270M, where linear maps in the dropped places regain "
        f"{of(maps, gemma)}, and {of('repair', qwen)} on Qwen2.5-Coder-0.5B ({share}, {ends[1:-1]}).",
        f"Distillation over {made.loc['healing', 'tokens']:,} regains {of('healing')} here, {of('repair, healing')} once "
        "repaired.",
    ]


def limits() -> list[str]:
    tasks = table("02_drop_curves/tasks")
    dense, attention, mlp = (
        row("02_drop_curves/average", kind=kind, n=n) for kind, n in (("dense", 0), ("attention", 8), ("mlp", 8))
    )
    gaps = table("02_drop_curves/gaps").query("measure == 'tasks'")
    inside, parts = moved(), {"low": "retained_low", "high": "retained_high", "form": ".0f", "scale": 100}
    dense_scores = tasks[tasks["kind"] == "dense"]
    below = dense_scores[dense_scores["value"] < dense_scores["chance"]]["task"]
    assert {*below} == {"boolq", "winogrande"}
    rules = [claim for claim in yaml.safe_load((ROOT / "data" / "claims.yaml").read_text()) if "check" in claim]
    return [
        f"They are {only(tasks['num_fewshot'])}-shot, on {only(tasks['documents'])} documents each.",
        f"Guessing alone retains {100 * dense['chance'] / dense['value']:.0f} % of the dense mean, and the dense model is "
        f"below guessing in {len(below)} of {len(dense_scores)}, BoolQ and WinoGrande.",
        f"Of what is above guessing, {100 * attention['retained']:.0f} % {span(attention, **parts)} is left without 8 "
        f"attention layers and {100 * mlp['retained']:.0f} % {span(mlp, **parts)} without 8 MLPs.",
        f"A true gap under {100 * gaps['detectable'].max():.1f} points is missed in more than one run of five.",
        f"{sum('history' in rule for rule in rules)} of {len(rules)} were changed after numbers had been seen",
        f"In {only(inside['dtype_there'])} {100 * inside['inside'].mean():.0f} % of the {len(inside):,} numbers of notebooks "
        f"{inside['notebook'].min()[:2]} to {inside['notebook'].max()[:2]} stay inside theirs.",
    ]


def on_gpu() -> list[str]:
    """The whole generation of the paper's shapes without half of their attention, as timed on a GPU; of Qwen on a CPU."""

    def generation(model: str, n: int) -> pd.Series:
        where = {"model": f"random:{model}", "backend": "compiled", "kind": "attention", "n": n}
        return row("05_speedup/speed", "gpu-shapes", what="generation from samples", **where)

    llama_2, llama_3 = generation("llama-2-13b", 20), generation("llama-3-8b", 16)
    device = only(table("05_speedup/models", "gpu-shapes")["device"])
    of_qwen = "ladder-qwen2.5-coder-1.5b"
    qwen = row("05_speedup/speed", of_qwen, what="generation from samples", kind="attention", n=14)
    assert "Intel" in only(table("05_speedup/models", of_qwen)["device"])
    assert not any(found["noisy"] for found in (llama_2, llama_3, qwen))
    return [
        f"Compiled, with random weights on one {device} at batch {only([llama_2['batch_size'], llama_3['batch_size']])} "
        f"([scorecard]), Llama-2-13B without half of its attention layers is {llama_2['speedup']:.2f} times as fast "
        f"(predicted: {llama_2['predicted']:.2f}), Llama-3-8B {llama_3['speedup']:.2f} "
        f"(predicted: {llama_3['predicted']:.2f}); not compiled, on a CPU, Qwen2.5-Coder-1.5B {qwen['speedup']:.2f} "
        f"{span(qwen, low='speedup_low', high='speedup_high', form='.2f')}."
    ]


def moved(run: str = "cpu") -> pd.DataFrame:
    """How far numbers move in the other dtype."""
    return pd.read_csv(ROOT / "figures" / run / "dtypes.csv")


def of_dtypes() -> list[str]:
    """Numbers and verdicts of notebooks 01 to 03 in the other dtype."""
    for run, other in (("cpu", "cpu-bfloat16"), ("ladder-gemma3-270m", "ladder-float32-gemma3-270m")):
        here, there = (card[card["notebook"] < "04"].set_index("id")["verdict"] for card in (scorecard(run), scorecard(other)))
        assert (here == there).all()
    here, gemma = moved(), moved("ladder-gemma3-270m")
    gemma = gemma[gemma["notebook"] < "04"]
    assert here["inside"].all()
    assert gemma["inside"].all()
    return [
        f"Measured in the other dtype, all {len(here):,} numbers of notebooks 01 to 03 of SmolLM2-135M and all {len(gemma):,} "
        "of Gemma-3-270M stay inside their intervals, and no verdict differs"
    ]


def ladder() -> list[str]:
    """What the models of the profile ladder say together."""
    of_text = table("11_sizes_and_causes/reach", "ladder").query("measure == 'text'")
    reach, by_model = of_text.groupby("kind")["share"], of_text.pivot(index="model", columns="kind", values="n")
    assert (by_model["attention"] > by_model[["mlp", "block"]].max(axis=1)).all()
    apart = {measure: kinds_apart(measure) for measure in ("text", "tasks")}
    assert not apart["tasks"].any()
    of_tasks = table("11_sizes_and_causes/reach", "ladder").query("measure == 'tasks'")
    by_task = of_tasks.pivot(index="model", columns="kind", values="n")
    first = by_task["attention"] > by_task[["mlp", "block"]].max(axis=1)
    share = {
        kind: f"{100 * reach.min()[kind]:.0f} to {100 * reach.max()[kind]:.0f} %" for kind in ("attention", "mlp", "block")
    }
    half = table("11_sizes_and_causes/half", "ladder").query("measure == 'text'")["retained"]
    claims = table("11_sizes_and_causes/claims", "ladder").set_index("claim")
    least = claims.loc["attention-most-redundant"].set_index("model")["verdict"]
    assert {*least.index} == {*load_profile("ladder").models}
    assert list(least.index[least == "deviates"]) == ["gemma3-270m"]
    assert list(least.index[least == "inconclusive"]) == ["qwen2.5-coder-1.5b"]
    sizes = table("11_sizes_and_causes/sizes", "ladder").query("measure == 'text' and kind == 'attention'").set_index("what")
    pair = sizes[sizes["n_models"] == 2]
    assert {*pair["models"]} == {"qwen2.5-coder-1.5b minus qwen2.5-coder-0.5b"}
    fewer, more = pair.loc["share of the layers that can go"], pair.loc["retained without half"]
    slope = sizes[sizes["n_models"] > 2].loc["share of the layers that can go"]
    assert slope["low"] < 0 < slope["high"]
    overall = table("11_sizes_and_causes/overall", "ladder").set_index(["cause", "target"]).loc["importance", "damage"]
    return [
        f"Keeping 90 % of the dense model's next-token accuracy on held-out web text, {share['attention']} of the attention "
        f"layers can go, {share['mlp']} of the MLPs and {share['block']} of the blocks; on each model it is attention that "
        f"goes furthest, intervals apart on {apart['text'].sum()} of {len(apart['text'])}. On tasks it does so on "
        f"{first.sum()}, and none are apart.",
        f"Half is too much: it leaves {100 * half.min():.0f} to {100 * half.max():.0f} %.",
        f"Its importance (1 − cosine of input and output) is the least of the three on {(least == 'reproduced').sum()} of "
        f"{len(least)} models, on each of 4 corpora; Qwen2.5-Coder-1.5B is open, and Gemma-3-270M deviates.",
        "From Qwen2.5-Coder-0.5B to 1.5B the share of attention layers that can go falls by "
        f"{-100 * fewer['change']:.0f} points ({-100 * fewer['high']:.0f} to {-100 * fewer['low']:.0f}), while half gone "
        f"leaves {100 * more['change']:.0f} points more {span(more, scale=100, form='.0f')}; over all five models no trend can "
        "be told.",
        "What dropping a single attention layer costs goes with its importance: over layers, the rank correlation is "
        f"{overall['correlation']:.2f} {span(overall, form='.2f')} in the mean.",
    ]


def kinds_apart(measure: str) -> pd.Series:
    """Whether the share of attention that can go is clearly larger than that of both other kinds, by model."""
    ends = table("11_sizes_and_causes/reach", "ladder").query(f"measure == '{measure}'").pivot(index="model", columns="kind")
    return ends["share_low"]["attention"] > ends["share_high"][["mlp", "block"]].max(axis=1)


def ladder_cells() -> dict[str, str]:
    """Of how many models of the ladder a claim is reproduced, of those on which it was judged; or the verdict over all."""
    verdicts = table("11_sizes_and_causes/claims", "ladder").groupby("claim")["verdict"]
    together = judged("ladder")
    cells = {claim: f"{(found == 'reproduced').sum()} of {len(found)}" for claim, found in verdicts}
    return cells | dict(zip(together["id"], together["verdict"], strict=True))


def encoders() -> list[str]:
    """Which kind changes the stream least, and what is found without half of the attention layers."""
    contrast = table("12_other_transformers/contrast")
    beside = contrast[contrast["other"] == "mlp"].groupby("model")["difference"].max()
    assert {*beside.index[beside < 0]} == {"minilm-l6", "mpnet-base"}
    assert contrast[contrast["model"] == "vit-s-focus"].query("other == 'mlp'")["low"].min() > 0
    half = table("12_other_transformers/half").query("measure == 'reciprocal rank'").set_index("model")
    falls = [f"from {half.loc[name, 'dense']:.2f} to {half.loc[name, 'attention']:.2f}" for name in ("minilm-l6", "mpnet-base")]
    return [
        "Attention changes the stream least in two sentence encoders; in a vision transformer MLPs do.",
        f"Without half of the attention layers retrieval (reciprocal rank) falls {falls[0]} and {falls[1]}.",
    ]


def speed_records() -> list[dict]:
    records = json.loads((REFERENCE / "cpu" / "05_speedup" / "provenance.json").read_text())
    return [record for record in records if "repeats" in record]


def longer_training() -> list[str]:
    here, longer = (card.set_index("id")["verdict"] for card in (scorecard(), scorecard(MEDIUM)))
    of_07 = scorecard().set_index("id")["notebook"] == "07_training_stages"
    same = (here[of_07] == longer[of_07]).sum()
    return [
        f"Why {len(scorecard()) - len(judged_anywhere())} claims were not run, the [scorecard] says.",
        f"On those of notebook 07 a [longer training] agrees on {same} of {of_07.sum()}.",
    ]


def judged_anywhere() -> pd.DataFrame:
    """The rows of the scorecard of the run `cpu` with a verdict there, or in that of the run `ladder`."""
    return scorecard()[scorecard()["id"].isin([*judged()["id"], *judged("ladder")["id"]])]


# ---- training stages --------------------------------------------------------------------------------------------------


def stages(name: str, kind: str | None = None, run: str = "cpu") -> pd.DataFrame:
    """A table of notebook 07 for the series that was trained here, from a ninth of the training on."""
    rows = table(f"07_training_stages/{name}", run)
    rows = rows[(rows["model"] == rows["model"].iloc[0]) & (rows["progress"] >= 1 / 9)]
    return rows if kind is None else rows[rows["kind"] == kind]


def mlp_is_least_at_random(run: str = "cpu", layers: tuple[str, ...] = ("all layers", "all but the first")) -> bool:
    rows = table("07_training_stages/means", run)
    rows = rows[(rows["progress"] == 0) & rows["layers"].isin(layers)]
    random = rows[rows["kind"] == "mlp"]
    assert len(random) >= 2 * len(layers)
    return bool((random["above_high"] < 0).all())


# ---- what docs/ says about results ------------------------------------------------------------------------------------


def of_checkpoints() -> list[str]:
    runs = table("07_training_stages/runs", MEDIUM)
    seen, text = only(runs["tokens"]), only(runs["text_tokens"])
    last = table("07_training_stages/stages", MEDIUM).groupby("seed").last()
    perplexity = last["nll"].map(math.exp)
    means = table("07_training_stages/means", MEDIUM)
    mlp = means[means["kind"] == "mlp"].set_index(["layers", "tokens", "seed"])[["above_low", "above_high"]]
    all_layers, without = (mlp.loc[layers].groupby("tokens") for layers in ("all layers", "all but the first"))
    others = means[(means["layers"] == "all layers") & (means["kind"] != "attention")].groupby("tokens")["above_low"].min()
    first = others[others > 0].index.min()
    assert (others[others.index >= first] > 0).all()
    assert (all_layers["above_high"].max()[lambda high: high.index < first] < 0).all()
    assert mlp_is_least_at_random(MEDIUM)
    more = without["above_low"].min()[lambda low: low > 0].index
    assert list(more) == list(others.index[others.index >= first][: len(more)])
    assert (without["above_high"].max()[lambda high: high.index > more.max()] < 0).all()
    return [
        f"The committed run of `medium-llama` has {only(runs['n_layers'])} layers and {only(runs['parameters']) / 1e6:.1f} "
        f"million parameters. It was trained on {seen / 1e6:.1f} million tokens.",
        f"Its text has {text / 1e6:.2f} million tokens, so each was read {seen / text:.1f} times. Perplexity on held-out text "
        f"is {perplexity[0]:.0f} for seed 0 and {perplexity[1]:.0f} for seed 1.",
        f"From {first:,} tokens on it is attention, over all layers and in both seeds.",
        f"without the first layer, MLP is more important than attention at {' and '.join(f'{n:,}' for n in more)} tokens only",
    ]


def of_costs() -> list[str]:
    shares = [100 * generation(kind, n)["share_of_limit"] for kind, n in (("dense", 0), ("attention", 8))]
    found = generation("attention", 8)
    assert found["speedup_low"] <= found["predicted"] <= found["speedup_high"]
    settings = load_profile("cpu").section(Speed)
    whole = [("dense", 0), *((kind, k) for kind, several in settings.whole.items() for k in several)]
    seconds = sum(generation(kind, k)["seconds"] for kind, k in whole)
    dtype, n = only(record["dtype"] for record in speed_records()), settings.repeats
    level = {k: f"{100 * median_interval(np.arange(k))[2]:.1f} %" for k in (n, 9)}
    assert median_interval(np.arange(n))[:2] == (0, n - 1)  # the least and the greatest
    assert median_interval(np.arange(9))[:2] == (1, 7)
    assert median_interval(np.arange(n - 1))[2] < 0.95 <= median_interval(np.arange(n))[2]
    longer = 1 / table("05_speedup/protocol")["ratio"]
    return [
        f"Timed whole, once, they took {longer.min():.2f} to {longer.max():.2f} times as long.",
        f"The long generation of notebook 05 ({found['context']:,} tokens in, {found['new_tokens']:,} out) takes minutes",
        f"The dense long generation reaches {shares[0]:.0f} % of what bytes and operations allow, and without 8 attention "
        f"layers {shares[1]:.0f} %.",
        f"The estimate from bytes and operations predicts a speed-up of {found['predicted']:.2f} without 8 attention layers, "
        "which the interval of the measured one holds",
        f"Its interval goes from the least to the greatest of {n} repeats, which covers the true median in {level[n]} of cases",
        f"With 9 repeats it would leave out one at either end, at {level[9]}, and fewer than {n} cannot reach 95 %.",
        f"by their samples about {seconds / 60:.0f} minutes in {dtype}.",
    ]


def of_tasks() -> list[str]:
    tasks, dense = table("02_drop_curves/tasks"), row("02_drop_curves/average", kind="dense")
    boolq = row("02_drop_curves/tasks", task="boolq", kind="dense")
    gaps = table("02_drop_curves/gaps").query("measure == 'tasks'")
    without = table("02_drop_curves/without").query("n == 8")
    lead = {
        kind: f"{100 * rows['difference'].min():.1f} to {100 * rows['difference'].max():.1f}"
        for kind, rows in without.groupby("other")
    }
    return [
        f"Tasks are {only(tasks['num_fewshot'])}-shot, on {only(tasks['documents'])} documents each, drawn by a fixed seed.",
        f"BoolQ is taken as it is: the dense model scores {100 * boolq['value']:.1f} %, where guessing gives "
        f"{100 * boolq['chance']:.1f} %.",
        f"With any one task left out, attention leads by {lead['mlp']} points over MLP and by {lead['block']} over blocks at 8 "
        "layers.",
        f"A true difference of {100 * gaps['detectable'].min():.1f} to {100 * gaps['detectable'].max():.1f} points is found in "
        "80 % of such runs.",
        f"Guessing gives {100 * dense['chance']:.1f} % in the mean of the six tasks, and the dense model "
        f"{100 * dense['value']:.1f} %. {100 * dense['chance'] / dense['value']:.0f} % of it is therefore what guessing alone "
        "reaches, so retained shares are of what lies above guessing.",
    ]


def of_rules() -> list[str]:
    """What deviations.md says about the paper's numbers."""
    paper = json.loads((ROOT / "data" / "paper_claims.json").read_text())
    llama = table("06_kv_cache/paper").query("model == 'Llama-2-13B'").sort_values("n")
    printed, counted = llama["paper_gib"], llama["formula_bytes"] / 2**30
    return [
        f"lists each of the {len(paper['claims'])} numbers of [data/paper_claims.json]",
        f"Table 4 prints {printed.iloc[0]:.0f} and {printed.iloc[1]:.0f} GB for Llama-2-13B, where the formula that gives its "
        f"other rows yields {counted.iloc[0]:.0f} and {counted.iloc[1]:.0f} GiB.",
    ]


def repairs() -> list[str]:
    """Lines of a table: perplexity over dense with its interval, and seconds, of each way on each model of the ladder."""
    kept = table("11_sizes_and_causes/kept", "ladder").query("n > 0")
    models = table("11_sizes_and_causes/models", "ladder").set_index("model")["n_layers"]
    dropped = kept.groupby("model", sort=False)["n"].first()
    heads = [f"{exact_name(model).split(' ')[0]}, {n} of {models[model]}" for model, n in dropped.items()]
    lines = ["| Layers by, way | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for (layers, way), rows in kept.groupby(["layers", "way"], sort=False):
        cells = []
        for model in dropped.index:
            found = rows[rows["model"] == model]
            cell = "not run"
            for of in found.itertuples():
                cell = f"{of.perplexity:.2f} ({of.perplexity_low:.2f} to {of.perplexity_high:.2f})"
                cell += f", {of.seconds:.0f} s" if of.tokens else ""
            cells.append(cell)
        lines.append(f"| {layers}, {way} | " + " | ".join(cells) + " |")
    return lines


def repairs_beside_others() -> list[str]:
    """How many nats per token more a repair loses than linear maps and ReplaceMe, on the same samples, on each model."""
    told = []
    for model in table("11_sizes_and_causes/kept", "ladder")["model"].unique():
        rows = table("10_keep_more/regained", f"ladder-{model}").query("layers == 'cosine' and way == 'repair'")
        for against, difference, low, high in rows[["against", "difference", "difference_low", "difference_high"]].to_numpy():
            if against in ("linear maps (NBL)", "ReplaceMe"):
                ends = f"({signed(-high, '+.2f')} to {signed(-low, '+.2f')})"
                told.append(f"{exact_name(model).split(' ')[0]}, {against}: {signed(-difference, '+.2f')} {ends}")
    return told
