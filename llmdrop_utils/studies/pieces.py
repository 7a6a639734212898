"""What each notebook measures of a model, in pieces whose time can be estimated: follows from the sections of a profile."""

import dataclasses
import math

from ..models.outlook import Shape
from ..models.recipe import Recipe
from ..sources.catalogue import catalogue
from ..sources.task_data import known_tasks
from .effort import BATCH, Piece
from .keep_more.work import ORDERS, WAYS

# Notebooks that this file has an estimate for.
ESTIMATED = ("01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12")
TOKENS = 100  # of one question with its choices, and of one example before it
GENERATED, TOGETHER = 200, 8  # tokens of an answer that is generated, and answers generated side by side
SUBJECTS = 57  # of MMLU: a limit counts documents of each
EXPORTING = 1.6e-7  # seconds of a file for each parameter: written twice, opened in llama.cpp, compared
COMPILING = 20  # seconds for each plan on the compiled back end
OF_WORD, OF_IMAGE = 1.4, 257  # tokens of a word, and of an image of 224 x 224 pixels in patches of 14


def pieces_of(notebook: str, profile: dict, model: str, shape: Shape, is_random: bool) -> list[Piece]:
    """What a notebook (its number) measures of a model. `profile`: `Profile.to_json()`."""
    has_scores = not is_random and "calibration" in profile
    has_quality = has_scores and {"text", "tasks"} <= set(profile)
    if notebook == "01":
        return [_importance(profile, i, model, shape) for i in range(len(profile["calibration"]["corpora"]))]
    if notebook in ("02", "03"):
        found = [_importance(profile, 0, model, shape), *_curves(profile, model, shape)]
        return found + (_joint(profile, model, shape) if notebook == "03" else [])
    if notebook == "04":
        return [_importance(profile, 0, model, shape), *_ablations(profile, model, shape)]
    if notebook == "08":
        return [_importance(profile, 0, model, shape), *_abilities(profile, model, shape), *_changes(profile, model, shape)]
    if notebook == "05":
        found = [_importance(profile, 0, model, shape)] if has_scores else []
        return (
            found
            + (_curves(profile, model, shape) if has_quality else [])
            + [_speed(profile["speed"], model, shape, is_random)]
        )
    if notebook == "09" and not is_random:
        return [_importance(profile, 0, model, shape), *_served(profile, model, shape)]
    if notebook == "10":
        return [_importance(profile, 0, model, shape), *_kept(profile, model, shape)]
    if notebook == "11":
        return [_importance(profile, 0, model, shape), *_causes(profile, model, shape)]
    if notebook == "12":
        return [_others(profile["others"], model, shape)]
    return []


def _importance(profile: dict, i: int, model: str, shape: Shape) -> Piece:
    part = profile["calibration"]
    n_samples = max(part["n_samples"], *part["sample_counts"]) if i == 0 else part["n_samples"]
    names = part["corpora"][:1] if i == 0 else part["corpora"][1:] if i == 1 else []  # the others are like the second
    basis = f"importance: {n_samples:,} x {part['seq_len']:,} tokens of {', '.join(names)}" if names else ""
    key = ("importance", model, part["corpora"][i])
    return Piece(key, "importance", shape, basis, 0, n_samples * part["seq_len"], n_samples / part["batch_size"])


def _curves(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Text and tasks under the plans that drop one kind, and on the dense model."""
    text, tasks = profile["text"], profile["tasks"]["n_drop"]
    counts = {kind: {n for n in (*text["n_drop"], *tasks.get(kind, [])) if n < shape.layers} for kind in SINGLE}
    n_tasks = 1 + sum(n < shape.layers for kind in SINGLE for n in tasks.get(kind, []))
    corpora = len(profile["calibration"]["corpora"])
    across = 1 + corpora * sum(n < shape.layers for n in text["across"])  # plans, on each corpus
    return [_text(text, ("text", model), shape, 1 + sum(map(len, counts.values()))),
            *([_across(text, model, shape, across, corpora)] if corpora > 1 else []),
            *_tasks(profile["tasks"], model, shape, n_tasks, "single")]  # fmt: skip


SINGLE = ("attention", "mlp", "block")


def _joint(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """What notebook 03 adds. A joint plan is taken to drop no MLP, and to be measured already, up to half of the layers."""
    text, tasks, part = profile["text"], profile["tasks"]["n_drop"].get("joint", []), profile["iterative"]
    new = {n for n in (*text["n_drop"], *tasks) if shape.layers / 2 < n < 2 * shape.layers}
    one_by_one = max([n for n in part["n_drop"] if n < shape.layers], default=0)
    basis = f"one by one: {part['n_samples']:,} x {profile['calibration']['seq_len']:,} tokens x {one_by_one} layers"
    tokens = part["n_samples"] * profile["calibration"]["seq_len"] * one_by_one
    passes = part["n_samples"] / profile["calibration"]["batch_size"] * one_by_one
    # One-shot on the same samples is a plan of the curve where all samples are the same.
    asked, again = (
        [n for n in part["task_n"] or () if n < shape.layers],
        part["n_samples"] != profile["calibration"]["n_samples"],
    )
    beside = sum(1 + (again or n not in profile["tasks"]["n_drop"].get("attention", [])) for n in asked)
    n_tasks = sum(n in new for n in tasks) + beside
    return [
        Piece(("iterative", model), "iterative", shape, basis, 0, tokens, passes),
        _text(text, ("joint text", model), shape, len(new) + len(part["n_drop"])),
        *(_tasks(profile["tasks"], model, shape, n_tasks, "joint") if n_tasks else []),
    ]


def _causes(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Causes and ranks of hidden states, and each attention layer dropped alone: half of a pass on average."""
    part, seq_len = profile["causes"], profile["calibration"]["seq_len"]
    plans = 2 + 2 * sum(n < shape.layers for n in part["n_drop"])  # all causes, the dense model, and both kinds
    basis = f"causes: {part['n_samples']:,} x {seq_len:,} tokens x {plans} passes"
    tokens = part["n_samples"] * seq_len * plans
    causes = Piece(("causes", model), "importance", shape, basis, 0, tokens, part["n_samples"] * plans)
    return [causes, _text(profile["text"], ("damage", model), shape, 1 + shape.layers)]


def _others(part: dict, model: str, shape: Shape) -> Piece:
    """Importance, and embeddings or targets of all samples under each plan, which has two thirds of the layers on average."""
    is_text = shape.vocabulary > 0
    one = 2 * part["words"] * OF_WORD if is_text else OF_IMAGE
    sets, plans = part["texts" if is_text else "images"], 1 + 3 * min(part["steps"], shape.layers)
    tokens = len(sets) * one * (part["n_samples"] + part["n_tested"] * (2 + plans * 2 / 3))
    what = f"passages of 2 x {part['words']} words" if is_text else "images"
    basis = f"other transformers: {len(sets)} x {part['n_tested']} {what} x {{plans}} plans"
    return Piece(("others", model), "importance", shape, basis, plans, tokens, plans)


def _across(text: dict, model: str, shape: Shape, plans: int, corpora: int) -> Piece:
    """Layers that each corpus chooses, on held-out text of all."""
    basis = f"text of {corpora} corpora: {text['n_samples']:,} x {text['seq_len']:,} tokens x {plans} plans each"
    return dataclasses.replace(_text(text, ("across text", model), shape, plans * corpora), basis=basis)


def _text(text: dict, key: tuple, shape: Shape, plans: int) -> Piece:
    basis = f"text: {text['n_samples']:,} x {text['seq_len']:,} tokens x {{plans}} plans"
    tokens = text["n_samples"] * text["seq_len"] * plans
    return Piece(key, "text", shape, basis, plans, tokens, math.ceil(tokens / plans / BATCH) * plans)


def _tasks(part: dict, model: str, shape: Shape, plans: int, which: str) -> list[Piece]:
    """Multiple choice and generated answers. A task that is in no list is taken to have 1,000 documents."""
    documents = tokens = steps = context = 0.0
    for task in part["names"]:
        about = catalogue()["task_sets"].get(task, {"documents": 1000})
        limit = part["limit"] * (SUBJECTS if "subjects" in known_tasks().get(task, {}) else 1) if part["limit"] else math.inf
        n = min(about["documents"], limit)
        shots = known_tasks().get(task, {}).get("num_fewshot", 0) if part["num_fewshot"] is None else part["num_fewshot"]
        documents += n
        tokens += n * TOKENS * (1 + shots)
        if about.get("generates"):
            steps += n * GENERATED / TOGETHER
            context += n * GENERATED * (TOKENS * (1 + shots) + GENERATED / 2)
    basis = f"tasks: {documents:,.0f} documents of {len(part['names'])} tasks, {tokens / 1e6:.2g} M tokens, x {{plans}} plans"
    key, passes = ("tasks", model, which), math.ceil(tokens / BATCH) * plans
    return [Piece(key, "tasks", shape, basis, plans, tokens * plans, passes, steps * plans, context * plans)]


def _speed(part: dict, model: str, shape: Shape, is_random: bool) -> Piece:
    """All loads of notebook 05 (`speedup/loads.py`), each under its plans and on the dense model."""
    listed = 1 + sum(n < shape.layers for several in part["n_drop"].values() for n in several)
    swept = 1 + 2 * (part["sweep_n"] < shape.layers)
    compiled = sum(n < shape.layers for several in (part["compiled"] or {}).values() for n in several)
    whole = sum(n < shape.layers for several in (part["whole"] or {}).values() for n in several)
    whole += bool(whole)  # and the dense model
    batch = part["batch_size"] or 8  # a GPU is filled: with about so many
    rounds = part["repeats"]
    prefill = part["prompt"] * batch * listed + sum(c for c in part["contexts"] if c <= part["prompt"]) * swept
    timed: dict[tuple[int, int], int] = {}  # context, batch -> plans; a load that serves several purposes is timed once
    for context in part["contexts"]:
        sizes = [(1, listed), *((size, swept) for size in part["sweep_batches"])]
        if part["prompt"] <= context <= part["prompt"] + part["new_tokens"]:
            sizes.append((batch, listed))
        for size, plans in sizes:
            timed[context, size] = max(plans, timed.get((context, size), 0))
    decode = [(context, size, plans) for (context, size), plans in timed.items()]
    decode += [(part["prompt"], batch, 1 + compiled)] if compiled else []
    each = part["steps"] + 1  # one untimed step before those that are timed
    steps = rounds * sum(plans for *_, plans in decode) * each + whole * part["new_tokens"]
    context = rounds * sum(c * b * plans for c, b, plans in decode) * each
    context += whole * part["new_tokens"] * batch * (part["prompt"] + part["new_tokens"] / 2)
    tokens = rounds * prefill + whole * part["prompt"] * batch
    basis = f"timing: {steps:,.0f} decode steps, prompts of {tokens / 1e6:.2g} M tokens"
    key, passes = ("speed", model), tokens / part["prompt"]
    fixed = COMPILING * (1 + compiled) if compiled else 0
    return Piece(key, "prefill", shape, basis, 0, tokens, passes, steps, context, fixed, is_random)


def _served(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Exports with their gates, their times in llama.cpp, and those in torch that notebook 05 does not take."""
    part, speed = profile["take_away"], profile["speed"]
    contexts = [c for c in speed["contexts"] if c <= speed["prompt"]]
    plans = 1 + sum(n < shape.layers for n in part["n_drop"])
    files, rounds = plans * len(part["kinds"]), speed["repeats"]
    basis = f"{files} GGUF files, each on {rounds} x {sum(contexts):,} tokens in llama.cpp"
    tokens, new = rounds * files * sum(contexts), rounds * plans * sum(c for c in contexts if c < speed["prompt"])
    fixed = EXPORTING * shape.parameters * files
    served = Piece(("served", model), "served", shape, basis, 0, tokens, fixed=fixed)
    return [served, Piece(("served in torch", model), "prefill", shape, "", 0, new)]


def _ablations(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Rankings (a gradient counts as three passes, a layer less at a time as half a pass each), and what tests the plans."""
    part, text, seq_len = profile["ablations"], profile["text"], profile["calibration"]["seq_len"]
    several = {"Taylor": 3, "output change": 1 + shape.layers / 2, "reverse order": 0, "random": 0}
    passes = 1 + sum(several.get(method, 1) for method in part["methods"])
    passes += len(part["samples"]) + len(part["lengths"]) + len(profile["calibration"]["corpora"]) - 1
    most = max([n for n in part["n_drop"] if n < shape.layers], default=0)
    steps = sum(most * (1 + shape.layers / 2) if "greedy" in method else most for method in part["stepwise"])
    tokens = seq_len * (passes * part["n_samples"] + steps * part["stepwise_samples"])
    methods = 1 + len(part["methods"]) + len(part["stepwise"]) + (part["seeds"] - 1) * ("random" in part["methods"])
    plans = len(part["n_drop"]) * (methods + 2) + len(part["samples"]) + len(part["lengths"]) + 3 + 4 * len(part["blocks"])
    text = text | {"n_samples": min(text["n_samples"], part["text_samples"])}
    asked = (methods + 2) * sum(n < shape.layers for n in part["task_n"])  # and two ways to choose MLPs
    on_tasks = _tasks(profile["tasks"] | {"limit": part["task_limit"]}, model, shape, asked, "methods")
    rankings = f"rankings: {methods} methods on {part['n_samples']:,} x {seq_len:,} tokens, {tokens / 1e6:.2g} M in all"
    continued = text | {"seq_len": part["prompt"] + part["new_tokens"]}
    return [
        Piece(("rankings", model), "text", shape, rankings, 0, tokens),
        _text(text, ("methods text", model), shape, plans),
        dataclasses.replace(_text(continued, ("continuations", model), shape, methods * len(part["n_drop"])), basis=""),
        *on_tasks,
    ]


def _abilities(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Text of all corpora, questions about the context, choices, answers, and what the model writes, under each plan."""
    part, text, corpora = profile["what_breaks"], profile["text"], len(profile["calibration"]["corpora"])
    plans = 1 + 2 * sum(n < shape.layers for n in part["n_drop"])
    answers = 1 + sum(n < shape.layers for n in part["answers_n"]) if part["answers_n"] else 0
    some = text | {"n_samples": min(text["n_samples"], part["text_samples"])}
    asked = len(part["questions"]) * part["probes"] * sum(part["contexts"])
    steps = part["new_tokens"] * (plans + 1) + part["answer_tokens"] * answers
    basis = f"questions about the context: {asked / 1e3:,.0f} thousand tokens x {plans} plans, and texts of the model's own"
    of_choices = [name for name in profile["tasks"]["names"] if name != "gsm8k"]
    choices = profile["tasks"] | {"names": of_choices, "limit": part["task_limit"]}
    mathematics = profile["tasks"] | {"names": ["gsm8k"], "limit": part["answers_limit"], "num_fewshot": None}
    return [
        _across(some, model, shape, plans, corpora),
        Piece(("questions", model), "text", shape, basis, 0, asked * plans, part["probes"] * plans, steps),
        *_tasks(choices, model, shape, plans, "choices"),
        *(_tasks(mathematics, model, shape, answers, "answers") if answers else []),
    ]


def _changes(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Changed weights: text and tasks of each version, pruning (two passes), tuning (three), and decoding."""
    if (part := profile.get("changes")) is None:
        return []
    dropped = sum(n < shape.layers for n in part["n_drop"])
    tuned = sum(n < shape.layers for several in part["tuned"].values() for n in several)
    versions = (1 + dropped) * (1 + len(part["bits"])) + dropped + 2 * tuned + 1
    read = profile["calibration"]["seq_len"]
    tokens = read * (2 * dropped * part["n_samples"] + 3 * (1 + tuned) * part["tuning_samples"] * part["tuning_epochs"])
    basis = f"changed weights: {versions} versions, {tokens / 1e3:,.0f} thousand tokens for pruning and tuning"
    some = profile["text"] | {"n_samples": min(profile["text"]["n_samples"], part["text_samples"])}
    steps = part["repeats"] * part["steps"] * ((1 + dropped) * (1 + len(part["bits"])) + dropped)
    return [
        Piece(("changed", model), "text", shape, basis, 0, tokens, steps=steps),
        dataclasses.replace(_text(some, ("changed text", model), shape, versions), basis=""),
        *_tasks(profile["tasks"] | {"limit": part["task_limit"]}, model, shape, versions, "changed"),
    ]


def _kept(profile: dict, model: str, shape: Shape) -> list[Piece]:
    """Making each version (a step of healing counts as four passes), choosing layers, ranking what is left, and what each
    version is asked."""
    part, seq_len, corpora = profile["keep_more"], profile["calibration"]["seq_len"], len(profile["calibration"]["corpora"])
    counts = [n for n in part["n_drop"] if n < shape.layers]
    chosen = part["chosen"] or {}
    ways = [*part["ways"], *(way for some in chosen.values() for way in some)] * len(counts)
    versions = 1 + len(counts) + len(ways)
    healed = 4 * part["healing_tokens"] * sum("healing" in way for way in ways)
    fitted = corpora * part["n_samples"] * seq_len * sum(WAYS[way].passes for way in ways)
    passes = sum(ORDERS[by].passes(max(counts, default=0), part["candidates"]) for by in chosen)
    ranked = len(counts) * (1 + len(part["ways"]))  # of them importance is measured, and text under two plans more
    ranking = ranked * profile["calibration"]["n_samples"] * seq_len
    tokens = healed + fitted + ranking + passes * corpora * part["search_samples"] * seq_len
    some = profile["text"] | {"n_samples": min(profile["text"]["n_samples"], part["text_samples"])}
    asked = part["probes"] * part["context"] + part["prompts"] * (part["prompt"] + part["new_tokens"])
    choices = [name for name in profile["tasks"]["names"] if name != "gsm8k"]
    basis = f"made models: {versions} versions, {tokens / 1e6:,.2g} M tokens to make them"
    return [
        Piece(("made", model), "importance", shape, basis, 0, tokens),
        Piece(("asked of them", model), "text", shape, "", 0, asked * versions, versions, part["new_tokens"]),
        dataclasses.replace(_across(some, model, shape, versions + 2 * ranked, corpora), key=("made text", model)),
        *_tasks(profile["tasks"] | {"names": choices, "limit": part["task_limit"]}, model, shape, versions, "made"),
    ]


def stage_pieces(part: dict, series: str, shape: Shape, stages: int) -> list[Piece]:
    """Importance and text at each stage of a series. `part`: the section stages."""
    n, m = part["n_samples"], part["text_samples"]
    basis = f"{stages} stages of {series}: {n} x {part['seq_len']:,} tokens, and {m} x {part['seq_len']:,} x 7 plans"
    passes = stages * (n / part.get("batch_size", 4) + 7)
    scores = Piece(("stages", series), "importance", shape, basis, 0, stages * n * part["seq_len"], passes)
    text = Piece(("stages text", series), "text", shape, "", 0, stages * m * part["seq_len"] * 7, passes)  # dense and six plans
    return [scores, text]


def training_piece(series: str, shape: Shape, recipe: Recipe, seeds: int) -> Piece:
    """Training a series under each seed that is not trained yet."""
    basis = f"training {series}: {recipe.tokens / 1e6:,.2g} M tokens x {seeds} {'seed' if seeds == 1 else 'seeds'}"
    return Piece(("training", series), "training", shape, basis, 0, recipe.tokens * seeds)
