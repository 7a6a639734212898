"""The edits of mutations.py: wrong changes, and the tests that must notice them."""

from typing import NamedTuple

SIMILARITY, KEYS, CURVES = (f"tests/studies/test_{name}.py" for name in ("similarity", "keys", "curves"))
ROWS, JOINT = f"tests/studies/test_drop_curves.py {CURVES}", "tests/studies/test_joint_drop.py"
STAGES, KV, SPEED = (f"tests/studies/test_{name}.py" for name in ("training_stages", "kv_cache", "speedup"))
STATS = "tests/base/test_stats.py"


class Edit(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # files, separated by spaces

    @property
    def where(self) -> str:
        return self.file.removeprefix("llmdrop_utils/")


def edits(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Edit]:
    """Edits of one file: (name, old text, new text)."""
    return [Edit(name, f"llmdrop_utils/{file}", old, new, tests) for name, old, new in changes]


# ---- what a review once changed without any test failing -----------------------------------------------------------------

REVIEW = [
    *edits(
        "studies/curve_rows.py", ROWS,
        ("unpaired gaps", "interval(draws[:, i] - draws[:, j])\n", "interval(draws[:, i] - draws[::-1, j])\n"),
        ("denominator of shares", "dense = above[..., :1]", "dense = above[..., -1:]"),
        ("sign of points lost", "100 * (mean[0] - mean)", "100 * (mean - mean[0])"),
        ("reach off by one", "return np.array([0, *counts])[without_break]", "return np.array([*counts, 0])[without_break]"),
        ("sign of text gaps", '-text.nll.mean(0), -text.draws("nll")', 'text.nll.mean(0), text.draws("nll")'),
    ),
    *edits(
        "studies/curves.py", CURVES,
        ("held-out text is calibration text", "skip:]\n    check_held_out(tokens, item.tokens, n_begin)",
         ": text.n_samples]"),
    ),
    *edits("studies/curves.py", ROWS, ("one seed for all tasks", 'rows[0]["chance"], seed)', 'rows[0]["chance"], 0)')),
    *edits(
        "studies/joint_drop/study.py", JOINT,
        ("sign of iterative", '(text.nll[:, i] - text.nll[:, j]).mean()', '(text.nll[:, j] - text.nll[:, i]).mean()'),
        ("max for min in first_mlp", 'draws["mlp"].min(1', 'draws["mlp"].max(1'),
    ),
    *edits(
        "studies/training_stages/rows.py", STAGES,
        ("sign of stage change", '"change": last - mean', '"change": mean - last'),
        ("agreement with the first stage", "last = self.scores[-1]\n", "last = self.scores[0]\n"),
    ),
    *edits("studies/training_stages/study.py", STAGES,
           ("scores on the text's tokens", "tokens=self.for_scores", "tokens=self.for_text")),
    *edits(
        "studies/similarity/study.py", SIMILARITY,
        ("contrast against MLP twice", 'for other in ("mlp", "block")', 'for other in ("mlp", "mlp")'),
        ("depth leaves out the wrong layer", "depth, s.importance[kind][:-1]", "depth, s.importance[kind][1:]"),
        ("mean for median", "np.median(attention)", "np.mean(attention)"),
    ),
    *edits("studies/speedup/trade.py", SPEED,
           ("denominator of SDR", "percent = 100 * (speedup - 1)", "percent = 100 * speedup")),
    *edits(
        "studies/work.py", KEYS,
        ("keys of plans without tokens", "version, tokens=tokens, plan", "version, plan"),
        ("keys without dtype", '"dtype": dtype, "attention"', '"attention"'),
    ),
    *edits("studies/speedup/loads.py", KEYS,
           ("speed keys without machine", '"machine": machine, "libraries"', '"libraries"')),
]  # fmt: skip

# ---- tables -----------------------------------------------------------------------------------------------------------------

TABLES = [
    *edits(
        "studies/similarity/study.py", SIMILARITY,
        ("draws of depth leave out the first layer", "draws[corpus][kind][:, :-1]", "draws[corpus][kind][:, 1:]"),
        ("median for mean", '"attention": attention.mean()', '"attention": np.median(attention)'),
        ("sign of the contrast", "(attention - compared).mean()", "(compared - attention).mean()"),
        ("the contrast's interval compares with MLP", 'draws[corpus][other]).mean(1)', 'draws[corpus]["mlp"]).mean(1)'),
        ("kinds drawn apart", "s.weights, seed) for kind in KINDS}", "s.weights, hash(kind)) for kind in KINDS}"),
        ("corpora drawn together", "s.weights, seed) for", "s.weights, 0) for"),
        ("lower or equal", "(attention < compared).sum()", "(attention <= compared).sum()"),
        ("shared with itself", "orders = scores[a].order(kind), scores[b]", "orders = scores[a].order(kind), scores[a]"),
        ("all samples for importance", "s.first(calibration.n_samples) for", "s for"),
        ("groups of few", "if 3 * n <= len(scores.weights)", "if 2 * n <= len(scores.weights)"),
        ("by chance without a square", "len(theirs) ** 2 /", "len(theirs) /"),
        ("ours as many as there are", "[: len(theirs)]", "[:]"),
        ("quantiles swapped", '"q25": 0.25', '"q25": 0.75'),
    ),
    *edits(
        "studies/curve_rows.py", ROWS,
        ("perplexity of means of samples", "np.exp(text.nll.mean(0))", "np.exp(text.nll).mean(0)"),
        ("share of the mean", 'share_of_dense(draws["accuracy"])', 'draws["accuracy"] / points["accuracy"][0]'),
        ("population for sample variance", "std(0, ddof=1)", "std(0, ddof=0)"),
        ("error without root", "/ np.sqrt(n_documents)", "/ n_documents"),
        ("tasks weighed by documents", "np.mean([task.scores.mean(0) for task in tasks], axis=0)",
         "np.concatenate([task.scores for task in tasks]).mean(0)"),
        ("chance of one task", "np.mean([task.chance for task in tasks])", "tasks[0].chance"),
        ("reach of the last that holds", "holds.argmin(1)", "holds.sum(1)"),
        ("more than 90 %", "for n in counts]] >= keep", "for n in counts]] > keep"),
        ("points lost unpaired", "100 * (draws[:, :1] - draws)", "100 * (mean[0] - draws)"),
        ("gaps of other methods", " and cell.on_curve and other.on_curve\n", "\n"),
        ("blocks count once", "plans[cell].n_drop}", "cell.n}"),
        ("gaps at any n", "if cell.n == other.n and other.kind", "if other.kind"),
        ("interval of the largest task", "return min(len(task.scores)", "return max(len(task.scores)"),
        ("a task is never left out", "if task is not left_out]", "]"),
        ("retained of all, not above chance", "share_of_dense(mean, chance)", "share_of_dense(mean)"),
        ("found in half of the runs", "stats.detectable(low, high)", "high - low"),
        ("joint is not compared with block", '"joint": ("attention", "mlp", "block")', '"joint": ("attention", "mlp")'),
    ),
    *edits(
        "studies/curves.py", ROWS,
        ("plans of all samples", ".first(run.section(Calibration).n_samples)", ""),
        ("half a block of calibration", "skip = -(-item.tokens", "skip = (item.tokens"),
        ("beginnings counted as text", "(seq_len - n_begin))\n    tokens", "seq_len)\n    tokens"),
        ("counts of text alone", "{*text.n_drop, *tasks.n_drop.get(kind, [])}", "{*text.n_drop}"),
        ("metric that lm-eval lists first", 'known_tasks().get(task, {}).get("metric") or next', "next"),
    ),
    *edits(
        "studies/drop_curves/across.py", ROWS,
        ("excess over dense", "nll[plan.key] - nll[own.key]", "nll[plan.key] - nll[DENSE.key]"),
        ("own layers of the other corpus", "own = plans[tested_on, n]", "own = plans[chosen_on, n]"),
        ("sign of cost across corpora", "nll[plan.key] - nll[DENSE.key], ", "nll[DENSE.key] - nll[plan.key], "),
    ),
    *edits(
        "studies/joint_drop/study.py", JOINT,
        ("a block is one sub-layer", '2 if other == "block" else 1', "1"),
        ("further unpaired", "joint[1:] - compared[1:])", "joint[1:] - compared[:0:-1])"),
        ("never cut", "tried_of(text.cells, kind)[-1] for", "-1 for"),
        ("iterative unpaired", "draws[:, i] - draws[:, j])", "draws[:, i] - draws[::-1, j])"),
        ("first MLP by a strict comparison", 'draws["attention"] <= draws["mlp"]', 'draws["attention"] < draws["mlp"]'),
        ("iterative sees all samples", "item.tokens[:n_samples]", "item.tokens"),
        ("positions from zero", '"position": i + 1', '"position": i'),
        ("ways swapped", '"one_shot": np.exp(text.nll[:, j].mean())', '"one_shot": np.exp(text.nll[:, i].mean())'),
    ),
    *edits(
        "studies/training_stages/rows.py", STAGES,
        ("above attention unpaired", "interval(draws - attention_draws)", "interval(draws - attention_draws[::-1])"),
        ("change with the first layer always", "self._mean(i, kind, first), self._mean(-1, kind, first)",
         "self._mean(i, kind, 0), self._mean(-1, kind, 0)"),
        ("change unpaired", "interval(last_draws - draws)", "interval(last_draws - draws[::-1])"),
        ("settled one stage late", "len(differs) - differs[::-1]", "len(differs) + 1 - differs[::-1]"),
        ("settled where first seen", "np.where(differs.any(0), len(differs) - differs[::-1].argmax(0), 0)",
         "(~differs).argmax(0)"),
        ("last loss for mean loss", '"loss": "mean"', '"loss": "last"'),
        ("cost against the first sample", 'np.array(value["nll"]) - dense', 'np.array(value["nll"]) - dense[0]'),
        ("sign of cost", '"cost": added.mean()', '"cost": -added.mean()'),
        ("a half is a quarter", '"half": 0.5', '"half": 0.25'),
        ("progress by stages", "return values[i] / values[-1]", "return i / (len(values) - 1)"),
        ("shared of a half", "last.order(kind), n)", "last.order(kind), 2 * n)"),
    ),
    *edits("studies/training_stages/study.py", STAGES,
           ("cost on the text of the scores", "tokens=self.for_text", "tokens=self.for_scores"),
           ("held out twice", "tokens[stages.n_samples :]", "tokens[: stages.text_samples]")),
    *edits(
        "studies/kv_cache/study.py", KV,
        ("no memory kept free", "KEPT_FREE = 0.1", "KEPT_FREE = 0.0"),
        ("weights beside every GPU", "* memory * count - weights", "* (memory - weights) * count"),
        ("weights of the dense model", "with dropped(shape, plan):", "with dropped(shape, DENSE):"),
        ("two bytes whatever the dtype", "(config, p, 1, length, dtype.itemsize)", "(config, p, 1, length, 2)"),
        ("counted dense", "dropped(model, plan):\n        find_anatomy", "dropped(model, DENSE):\n        find_anatomy"),
        ("layers dropped and kept swapped", "(kv_bytes(config, p, batch_size, length, 2) for p in (plan, DENSE))",
         "(kv_bytes(config, p, batch_size, length, 2) for p in (DENSE, plan))"),
    ),
]  # fmt: skip

DISTANCE = edits(
    "report/distance.py", "tests/report/test_distance.py",
    ("relative to this run", "difference[~near] / a[~near].abs()", "difference[~near] / b[~near].abs()"),
    ("nothing is near zero", "NEAR_ZERO = 0.01", "NEAR_ZERO = 0.0"),
    ("this run's interval", "old.loc[a.index, end]", "new.loc[a.index, end]"),
    ("extra rows for missing ones", '"missing": len(old) - len(common)', '"missing": len(new) - len(common)'),
    ("ranks over all kinds", 'GROUP = ("model", "kind")', 'GROUP = ("model",)'),
    ("highest correlation", 'np.fmin(row["correlation"]', 'np.fmax(row["correlation"]'),
    ("verdicts that stay", '"verdict_reference"] != both[', '"verdict_reference"] == both['),
    ("the dtype of the first record", 'sorted({entry["dtype"] for entry in _provenance(folder)})', '["float32"]'),
    ("numbers on one side are no difference", '(a.isna() != b.isna()).sum()', "0"),
)  # fmt: skip

# ---- keys and statistics ----------------------------------------------------------------------------------------------------

KEY_EDITS = [
    *edits(
        "studies/work.py", KEYS,
        ("keys without model", '{"model": self.model.identity, ', "{"),
        ("keys by name of the model", "self.model.identity", "self.model.name"),
        ("keys without attention implementation", '"attention": self.attention, "transformers"', '"transformers"'),
        ("text keys without plan", 'tokens=tokens, plan=plan.key.to_json()) for', "tokens=tokens) for"),
        ("importance keys without tokens", "IMPORTANCE_VERSION, tokens=fingerprint(self.tokens), ", "IMPORTANCE_VERSION, "),
        ("iterative keys without tokens", 'more = {"tokens": fingerprint(self.tokens), "n_drop"', 'more = {"n_drop"'),
        ("iterative keys without n", ', "n_drop": self.n_drop, "kind"', ', "kind"'),
        ("task keys without tokenizer", '"tokenizer": self.tokenizer, "lm_eval"', '"lm_eval"'),
        ("keys without transformers", ', "transformers": transformers}', "}"),
        ("random weights of any device", "if self.model.is_random:", "if False:"),
        ("task keys without lm-eval", ', "lm_eval": harness}', "}"),
        ("keys without version", '"measurement": measurement, "version": version}', '"measurement": measurement}'),
        ("keys with the batch", 'identity = {"model"', 'identity = {"batch": getattr(self, "batch_size", 0), "model"'),
    ),
    *edits(
        "studies/speedup/loads.py", KEYS,
        ("speed keys without libraries", '"machine": machine, "libraries": libraries, ', '"machine": machine, '),
        ("speed keys without load", '"load": load, "repeats"', '"repeats"'),
        ("speed keys without repeats", '"load": load, "repeats": self.repeats}', '"load": load}'),
        ("speed keys without threads", '("processor", "gpus", "cpu_threads")', '("processor", "gpus")'),
    ),
    *edits("dropping/plan.py", KEYS,
           ("keys of plans without maps", 'lists | ({"maps"', 'lists | ({} if True else {"maps"'),
           ("keys of plans in drop order", "PlanKey(tuple(sorted(self.attention))", "PlanKey(tuple(self.attention)")),
    *edits("sources/texts.py", KEYS, ("tokens without shape", "str(tuple(content.shape)).encode() + ", "")),
    *edits(
        "base/stats.py", f"{STATS} {SIMILARITY} {ROWS}",
        ("weights ignored", "minlength=n) * weights", "minlength=n)"),
        ("neighbours not drawn together", "np.arange(block)) % n)", "rng.integers(n, size=block)) % n)"),
        ("90 % intervals", "LEVEL = 0.95", "LEVEL = 0.9"),
        ("percentiles of many draws", "norm.cdf(math.sqrt(n / (n - 1)) * t.ppf", "norm.cdf(t.ppf"),
        ("text of as many draws as samples", "return n_samples / block_length(n_samples)", "return float(n_samples)"),
        ("ranks without ties", "rankdata(a, axis=-1), rankdata(b, axis=-1)", "a.argsort().argsort(), b.argsort().argsort()"),
        ("groups against all", "np.r_[0 : g.start, g.stop : len(rows)]", "np.r_[0 : len(rows)]"),
        ("groups without weights", "weights=weights[keep])", "weights=None)"),
        ("overlap of all", "set(a[:n]) & set(b[:n])", "set(a) & set(b[:n])"),
    ),
    *edits("measure/importance.py", f"{SIMILARITY} {STAGES}",
           ("means over samples", "np.average(rows, axis=0, weights=self.weights)", "np.average(rows, axis=0)")),
]  # fmt: skip

# ---- rules ------------------------------------------------------------------------------------------------------------------

ENGINE_TESTS, RULE_TESTS = "tests/report/test_rules.py", "tests/studies/test_verdicts.py"
RULES = [
    *edits(
        "report/rules.py", ENGINE_TESTS,
        ("the value decides", "if self.lower <= low and high <= self.upper:", "if self.is_inside:"),
        ("no correction for many", "if p_values[i] > tail / (len(order) - rank):", "if p_values[i] > tail:"),
        ("holm goes on after a failure", "            break\n        rejected", "            continue\n        rejected"),
        ("inconclusive deviates", "(INCONCLUSIVE if open_ones else REPRODUCED), open_ones, n_strict",
         "(DEVIATES if open_ones else REPRODUCED), open_ones, n_strict"),
        ("the best of models", "in (DEVIATES, INCONCLUSIVE, REPRODUCED)", "in (REPRODUCED, INCONCLUSIVE, DEVIATES)"),
        ("tail of both sides", "tail: float = TAIL", "tail: float = 2 * TAIL"),
        ("threshold itself is above", "math.nextafter(self.above, math.inf)", "self.above"),
        ("size without a square", "return times * times", "return times"),
        ("a number without an interval deviates", "            return INCONCLUSIVE\n", "            return DEVIATES\n"),
    ),
    *edits("studies/similarity/verdicts.py", RULE_TESTS,
           ("depth at least", "r.low, r.high, at_most=correlation", "r.low, r.high, at_least=correlation")),
    *edits("studies/drop_curves/verdicts.py", RULE_TESTS,
           ("gaps on text", "kind == 'attention' and measure == 'tasks'", "kind == 'attention' and measure == 'text'"),
           ("half of the layers is a quarter", 'rows["n"] * 2 == n_layers', 'rows["n"] * 4 == n_layers')),
    *edits("studies/joint_drop/verdicts.py", RULE_TESTS,
           ("iterative no better by any amount", "at_least=-nats", "at_least=nats"),
           ("a run that is cut counts", 'if rows["is_cut"].astype(bool).any():', "if False:"),
           ("joint drop against itself", "if r.same_up_to <= max(r.joint, r.compared) else", "if True else")),
    *edits("studies/joint_drop/study.py", f"{JOINT} {RULE_TESTS}",
           ("nothing between the numbers tried", 'low - size * _untried(text, other, reached[0])', "low")),
    *edits("studies/speedup/verdicts.py", RULE_TESTS,
           ("noisy timings are judged", '~timings["noisy"].astype(bool) & (', "("),
           ("two repeats are judged", ' & (timings["level"] >= LEVEL)', "")),
    *edits("studies/speedup/trade.py", "tests/studies/test_trade.py",
           ("kinds that gain points", " and max(p_a, p_b) >= 0", ""),
           ("a slow-down has a price", "if percent > 0", "if percent")),
    *edits("studies/training_stages/verdicts.py", RULE_TESTS,
           ("stages before the first ninth", 'late = others[others["progress"] >= first]', "late = others"),
           ("a seed that lacks a stage", "yield Finding(model, text, [*compared, *_lacking(seen, seeds)])",
            "yield Finding(model, text, compared)")),
    *edits("base/stats.py", STATS,
           ("one draw has an interval", "    if n <= 1:\n        return (np.full", "    if n <= 0:\n        return (np.full"),
           ("correlations reach down only", "min(1.0, max(high, 2 * value - low))", "min(1.0, high)")),
    *edits("studies/curve_rows.py", "tests/studies/test_drop_curves.py",
           ("generated tasks are in the mean", "[task for task in tasks if task.chance > 0] or list(tasks)", "list(tasks)")),
    *edits("studies/kv_cache/verdicts.py", RULE_TESTS,
           ("the share of all layers", "(row.n_layers - row.n) / row.n_layers", "row.n_layers / row.n_layers")),
]  # fmt: skip

# ---- sizes and causes ------------------------------------------------------------------------------------------------------

SIZES, CAUSES = "tests/studies/test_sizes_and_causes.py", "tests/measure/test_causes.py"
LADDER = [
    *edits(
        "measure/causes.py", CAUSES,
        ("the first query counts", "later = weights[:, 1:].float()", "later = weights.float()"),
        ("sink on the last token", "later[..., 0].mean()", "later[..., -1].mean()"),
        ("rank of unscaled tokens", "nn.functional.normalize(vectors.double(), dim=-1)", "vectors.double()"),
        ("rank of eigenvalues", "clamp(min=0).sqrt()", "clamp(min=0)"),
        ("output without its scale", "tensor_of(output)[0], scale,", "tensor_of(output)[0], 2 * scale,"),
        ("output against itself", "(aa / xx)[xx > 0].sqrt()", "(aa / xx)[xx > 0]"),
        ("stream by its norm", "squares[squares > 0] / stream.shape[-1]", "squares[squares > 0]"),
        ("distance from the first layer", "np.arange(len(anatomy))[::-1]", "np.arange(len(anatomy))"),
        ("attention stays eager", "model.set_attn_implementation(before)", "pass"),
        ("rank of the dense model", "with skipping(model, plan):", "with skipping(model, DropPlan()):"),
    ),
    *edits(
        "studies/sizes_and_causes/rows.py", SIZES,
        ("damage of the first sample", '"kl": kl[:, layer].mean()', '"kl": kl[0, layer]'),
        ("attention minus itself", 'Cell("mlp", cell.n)', 'Cell("attention", cell.n)'),
        ("the interval of a correlation leaves layers as they are", "layers = stats.drawn_blocks(n_layers)",
         "layers = np.broadcast_to(np.arange(n_layers), (stats.REPEATS, n_layers))"),
        ("what is the same in all layers predicts", " and np.ptp(cause[0]) > 0", ""),
    ),
    *edits(
        "studies/sizes_and_causes/compare.py", SIZES,
        ("half is a quarter", 'if 2 * row["n"] == layers.get', 'if 4 * row["n"] == layers.get'),
        ("smaller minus larger", "tuple(rows.loc[large]), tuple(rows.loc[small])",
         "tuple(rows.loc[small]), tuple(rows.loc[large])"),
        ("slope over parameters", "np.log10(parameters[rows.index].to_numpy(dtype=float))",
         "parameters[rows.index].to_numpy(dtype=float)"),
        ("the left-out model tells its own sign", 'others = same[same["model"] != left_out]', "others = same"),
        ("the left-out model is fitted", "x[~here].to_numpy(), y[~here].to_numpy()", "x.to_numpy(), y.to_numpy()"),
        ("any sign is the same", "(correlations * mean > 0)", "(correlations * mean > -1)"),
        ("claims of all models together", "of_model(others[claim[\"notebook\"]], model)", 'others[claim["notebook"]]'),
    ),
    *edits(
        "studies/sizes_and_causes/exceptions.py", SIZES,
        ("layers that help least", "best = min(kept, key=lambda", "best = max(kept, key=lambda"),
        ("the corpus that fits best", "corpus = max(numbers, key=lambda", "corpus = min(numbers, key=lambda"),
        ("cheapest of the dropped", "alone.idxmax()", "alone.idxmin()"),
    ),
    *edits(
        "studies/sizes_and_causes/verdicts.py", RULE_TESTS,
        ("shares that can go are judged", "tables[\"sizes\"].query(\"what == 'retained without half'\")\n    for",
         'tables["sizes"]\n    for'),
        ("causes of damage", '(rows["target"] == IMPORTANCE) & rows["cause"]', 'rows["cause"]'),
        ("two models are enough", 'rows["models"].min() < 3', 'rows["models"].min() < 2'),
        ("MLPs may keep more apart", "r.low, r.high, above=0", "r.low, r.high, below=0"),
    ),
    *edits(
        "studies/curve_rows.py", ROWS,
        ("tasks below guessing count", "[0][0] > task.chance]", "[0][0] > -1]"),
        ("tasks like text", "cells, kind, KEEP_TASKS)", "cells, kind, KEEP)"),
    ),
    *edits("base/stats.py", STATS,
           ("ends of a combination unsorted", "np.sort([weights * lows, weights * highs], axis=0)",
            "np.array([weights * lows, weights * highs])"),
           ("slope of the sum", "centred / (centred**2).sum()", "centred")),
]  # fmt: skip


# ---- exports ----------------------------------------------------------------------------------------------------------------

EXPORTS = [
    *edits(
        "export/checkpoint.py", "tests/export/test_checkpoint.py",
        ("names of files as usual", 'VARIANT = "llmdrop"', "VARIANT = None"),
        ("weights of what is dropped are asked for", "        drop(self, self.llmdrop_plan)\n", ""),
        ("old names of rotary settings are missing", "with_both_rope_forms(json.loads(path.read_text(encoding=\"utf-8\")))",
         'json.loads(path.read_text(encoding="utf-8"))'),
        ("missing weights are made up", "        check_weights(str(path), Path(path), model, found)\n", ""),
    ),
    *edits("export/official.py", "tests/export/test_checkpoint.py",
           ("drop order is lost", "{name: list(getattr(plan, kind))", "{name: sorted(getattr(plan, kind))"),
           ("booleans are kept layers", "enumerate(given) if is_dropped)", "enumerate(given) if not is_dropped)")),
    *edits(
        "export/gguf.py", "tests/export/test_gguf.py",
        ("a layer without keys has heads", "heads.append(0 if no_attention and not is_linear", "heads.append(0 if False"),
        ("layer 0 without heads", "no_attention and (layer == 0 or plan", "no_attention and (False or plan"),
        ("the window is forgotten", "return min([config", "return max([config"),
        ("the file is kept unchecked", "check(\"A float32 version of the file\"", "print(\"A float32 version of the file\""),
    ),
    *edits(
        "export/gate.py", "tests/export/test_gguf.py",
        ("divergence the other way", "expected.exp() * (expected - theirs)", "theirs.exp() * (theirs - expected)"),
        ("the dense model is the reference", "if index in getattr(plan, kind):", "if False:"),
        ("nan passes", "if not found <= limit:", "if found > limit + 1e9:"),
    ),
    *edits(
        "export/deci.py", "tests/export/test_deci.py",
        ("width of the MLP", "multiple = 1.5 * config", "multiple = 1.4 * config"),
        ("heads in a group", "config.num_attention_heads // config.num_key_value_heads", "config.num_key_value_heads"),
        ("no bias at the output", "if _has_bias(model.config):", "if False:"),
    ),
    *edits(
        "export/take_away.py", "tests/export/test_take_away.py",
        ("the middle decides", "if text.retained[1] < keep:", "if text.retained[0] < keep:"),
        ("the gate of checkpoints", "check(\"The checkpoint\", parity", "print(\"The checkpoint\", parity"),
    ),
    *edits("export/measured.py", "tests/export/test_take_away.py",
           ("dense over dropped", "means[1] / means[0]", "means[0] / means[1]")),
    *edits(
        "studies/take_away/study.py", "tests/studies/test_take_away.py",
        ("saved of the whole file", 'dense["tensor_bytes"] - found["tensor_bytes"]', 'dense["file_bytes"] - 750'),
        ("a decode step reads the context", '(row["context"] if row["what"] == "prefill" else 1)', 'row["context"]'),
        ("predicted of the dropped alone", "np.array(seconds[load]), floor, np", "np.array(seconds[load]), dense_floor, np"),
    ),
    *edits(
        "studies/take_away/work.py", "tests/studies/test_take_away.py",
        ("all steps are one", "_timed(llama, following, 1) / steps", "_timed(llama, following, 1)"),
        ("decoding behind nothing", "following = tokens[context : context + steps]", "following = tokens[:steps]"),
        ("one round alone", "    for _ in range(repeats):\n        for llama", "    for _ in [0]:\n        for llama"),
        ("keys without kind", 'more = {"kind": self.kind, "tokens"', 'more = {"tokens"'),
    ),
    *edits("studies/take_away/verdicts.py", "tests/studies/test_take_away.py",
           ("torch is another runtime", ' & speed["runtime"].isin(OF_16_BITS)', ""),
           ("zeros are forgotten", "(r.saved_bytes + r.stand_in_bytes)", "r.saved_bytes")),
]  # fmt: skip

ABLATION_TESTS, CRITERIA_TESTS = "tests/studies/test_ablations.py", "tests/selection/test_criteria.py"
ABLATIONS = [
    *edits(
        "studies/ablations/rows.py", ABLATION_TESTS,
        ("the normal tail", "float(t.sf(abs(self.value) / error, self.freedom))", "float(t.sf(abs(self.value) / error, 1e9))"),
        ("one side", "return 2 * float(t.sf", "return float(t.sf"),
        ("seeds alone", "value - math.hypot(value - low, reach), value +", "value - reach, value +"),
        ("no correction", "row[\"p\"] <= ALPHA / (len(open_ones) - i)", "row[\"p\"] <= ALPHA"),
        ("stepwise against all samples", "SAME_SAMPLES if key[1] in few else COSINE", "COSINE"),
        ("worse is better", 'BETTER if row["difference"] > 0 else WORSE', 'BETTER if row["difference"] < 0 else WORSE'),
        ("positions for ranks", "np.argsort(order), np.argsort(theirs)", "np.array(order), np.array(theirs)"),
    ),
    *edits("studies/ablations/study.py", ABLATION_TESTS,
           ("fewer parameters will do", ">= wanted", ">= 0.9 * wanted")),
    *edits("studies/ablations/verdicts.py", RULE_TESTS,
           ("the same layers are compared", "for r in rows[~same]", "for r in rows")),
    *edits("measure/taylor.py", CRITERIA_TESTS,
           ("samples cancel", "np.abs(found).sum(-1)", "np.abs(found.sum(-1))"),
           ("blocks as sums of sizes", "np.abs(found.sum(0)).sum(-1)", "np.abs(found).sum(0).sum(-1)")),
    *edits("measure/weights.py", CRITERIA_TESTS,
           ("values without the norm's gain", "value.weight.double() * _gain(block, config, value)", "value.weight.double()"),
           ("heads share nothing", "shared.repeat_interleave(heads // len(shared), dim=0)",
            "shared.repeat(heads // len(shared), 1, 1)"),
           ("queries without the norm's gain", "queries = (query.weight.double() * gain)", "queries = (query.weight.double())"),
           ("no norm but Llama's", "if name != family.attention][:1]", 'if name == "input_layernorm"][:1]')),
    *edits("selection/criteria.py", CRITERIA_TESTS,
           ("greedy takes the worst", "int(divergence.argmin())", "int(divergence.argmax())")),
]  # fmt: skip

BREAKS_TESTS, PROBE_TESTS = "tests/studies/test_what_breaks.py", "tests/sources/test_probes.py"
BREAKS = [
    *edits(
        "studies/what_breaks/rows.py", BREAKS_TESTS,
        ("guessing is retained", "share_of_dense(values, ability.chance)", "share_of_dense(values)"),
        ("the number alone is above guessing", "bool(low > ability.chance)",
         "bool(ability.scores[:, 0].mean() > ability.chance)"),
        ("tokens that come back count", "(written == written[:1]).cumprod(-1)", "(written == written[:1])"),
        ("blocks are compared", 'other = Cell("mlp", cell.n)', 'other = Cell("attention", cell.n)'),
        ("the first number is the answer", "numbers[-1] if numbers", "numbers[0] if numbers"),
        ("runs of three", "GRAM = 4", "GRAM = 3"),
    ),
    *edits(
        "studies/what_breaks/change_rows.py", BREAKS_TESTS,
        ("pruned beside dropped", "DENSE_ARM if arm.method == WANDA else", "DENSE_ARM if arm.method == LORA else"),
        ("nothing lost, all regained", "nothing = 0.0 if low > 0 else np.nan", "nothing = 0.0"),
        ("slower is faster", "np.array(dense) / np.array(taken)", "np.array(taken) / np.array(dense)"),
        ("the dense model is not tuned", "left = dense - plain, tuned_dense - tuned", "left = dense - plain, dense - tuned"),
    ),
    *edits("studies/what_breaks/changes.py", BREAKS_TESTS,
           ("always four bits", "round_weights(model, int(self.change.split()[0]))", "round_weights(model, 8)")),
    *edits("derive/model.py", BREAKS_TESTS, ("a change stays", "layers.load_state_dict(kept)", "pass")),
    *edits("measure/confidence.py", "tests/measure/test_confidence.py",
           ("an edge belongs above", "np.ceil(confidence * BINS).astype(int) - 1", "np.floor(confidence * BINS).astype(int)"),
           ("the least likely choice", "logprobs.max(1, keepdims=True)", "logprobs.min(1, keepdims=True)")),
    *edits("sources/probes.py", PROBE_TESTS,
           ("the cue comes alone", "text[start : start + len(passage)] = passage",
            "text[start : start + CUE] = passage[:CUE]"),
           ("always the first name", "asked = i % len(NAMES)", "asked = 0"),
           ("one label after the other",
            "for i in range(shots):\n        for label in rng.permutation(sorted(by_label)).tolist():",
            "for label in sorted(by_label):\n        for i in range(shots):")),
]  # fmt: skip

# ---- other transformers ------------------------------------------------------------------------------------------------------

EMBEDDED, ENCODED = "tests/measure/test_embeddings.py", "tests/measure/test_encoding.py"
OTHERS = "tests/studies/test_other_transformers.py"
ENCODERS = [
    *edits(
        "measure/embeddings.py", EMBEDDED,
        ("lengths count", "np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)", "rows"),
        ("a sample ranks itself", "others = ~np.eye(n, dtype=bool)", "others = ~np.eye(n, k=1, dtype=bool)"),
        ("ties are found", "+ ((similar == own).sum(1) - 1) / 2", ""),
        ("a sample is its own neighbour", "np.fill_diagonal(similar, -np.inf)", "pass"),
        ("one of several nearest is enough", "/ nearest.sum(1)", "> 0"),
        ("guessing may hit oneself", "counts * (counts - 1)", "counts * counts"),
        ("rounding decides", "np.round(_unit(a) @ _unit(b).T, 12)", "_unit(a) @ _unit(b).T"),
    ),
    *edits(
        "measure/encoding.py", ENCODED,
        ("images are not normalised", ") / torch.tensor(settings.std).view(3, 1, 1)", ")"),
        ("images are stretched", "settings.shortest_edge is None", "True"),
        ("the corner instead of the middle", "(picture.width - settings.width) // 2", "0"),
        ("padding counts", 'given.get("attention_mask", torch', 'given.get("none", torch'),
        ("pooling as published is passed over", "return published or Pooling", "return Pooling"),
        ("images by the mean", "has_class_token = any", "has_class_token = not any"),
    ),
    *edits(
        "sources/images.py", "tests/sources/test_images.py",
        ("crops overlap", "side * at for", "side * at // 2 for"),
        ("all pictures in one order", "order[name][turn]", "turn"),
        ("groups are mixed", 'np.argsort(every.groups[chosen], kind="stable")', "slice(None)"),
        ("shades of sixteen", "(255 / 16)", "1"),
    ),
    *edits("sources/pairs.py", "tests/sources/test_pairs.py",
           ("halves overlap", "w[words : 2 * words]", "w[words - 1 : 2 * words]"),
           ("too short is long enough", "if len(w) >= 2 * words", "")),
    *edits(
        "studies/other_transformers/rows.py", OTHERS,
        ("samples are drawn alone", "np.unique(groups, return", "np.unique(np.arange(len(groups)), return"),
        ("groups weigh alike", "bootstrap_means(means, sizes, seed)", "bootstrap_means(means, np.ones(len(sizes)), seed)"),
        ("guessing is retained", "self.draws]) - self.chance", "self.draws])"),
        ("attention beside itself", "cells.index(Cell(other, cell.n))", "i"),
        ("half of the MLPs twice", 'Cell("attention", n), Cell("mlp", n)))', 'Cell("mlp", n), Cell("mlp", n)))'),
        ("the decoder everywhere", ' & (rows["corpus"] == rows["corpus"].iloc[0])]\n    return rows[["model", "kind", "layer"',
         ']\n    return rows[["model", "kind", "layer"'),
    ),
    *edits(
        "studies/other_transformers/work.py", OTHERS,
        ("the second half finds the first", "retrieval_ranks(other[:n], other[n:])", "retrieval_ranks(other[n:], other[:n])"),
        ("the dense model finds", "nearest_has_label(other, self.labels)", "nearest_has_label(dense, self.labels)"),
        ("labels are in no key", "*map(str, self.labels)", ""),
        ("nothing is dropped", "plan):\n                other", "DropPlan()):\n                other"),
        ("the first half is the target", "data.inputs[:n], data.inputs[n:])", "data.inputs[n:], data.inputs[:n])"),
    ),
    *edits("studies/other_transformers/pair_rows.py", OTHERS,
           ("passages weigh alike", "np.average(nats, axis=0, weights=tokens)", "nats.mean(0)"),
           ("targets weigh as sources", "s.weights[:, layer], seed)", "s.weights[:, 0], seed)")),
    *edits("measure/targets.py", "tests/measure/test_targets.py",
           ("padding of targets counts", "(sums / counts.sum(1))", "(sums / counts.shape[1])")),
    *edits("measure/importance.py", "tests/measure/test_encoder_decoder_importance.py",
           ("padding of targets is measured", "pairs.target, pairs.target_mask, first=n", "pairs.target, None, first=n")),
    *edits("dropping/units.py", "tests/dropping/test_encoder_decoders.py",
           ("positions go with the first attention", "maker=_part(now, name) if name else None", "maker=None")),
    *edits("dropping/caches.py", "tests/dropping/test_encoder_decoders.py",
           ("layers of an encoder have caches", "first = anatomy.n_source", "first = 0")),
    *edits("selection/ranking.py", "tests/measure/test_encoder_decoder_importance.py",
           ("a block keeps its cross-attention", 'kind in (CROSS, "block") and', "kind == CROSS and")),
    *edits("studies/other_transformers/verdicts.py", OTHERS,
           ("all models read text", 'models[models["reads"] == reads]', "models"),
           ("data sets alone", "data == '{MEAN}' and ", ""),
           ("all numbers of layers", " and share <= {layers}", "")),
    *edits("studies/run.py", OTHERS, ("every study takes every model", "or kind in self.kinds", "or kind")),
]  # fmt: skip

# ---- what makes up for dropped attention ---------------------------------------------------------------------------------

KEPT = [
    *edits("derive/folds.py", "tests/derive/test_rivals.py",
           ("magnitudes the other way", "(now / before).sum(0", "(before / now).sum(0")),
    *edits("derive/refitting.py", "tests/derive/test_repair.py",
           ("the scale of terms is forgotten", " / self.scales[index]", ""),
           ("the gain of a norm is forgotten", "1 / gain, 0.0)", "1.0 + 0 * gain, 0.0)"),
           ("outputs of the last sweep are known", "self.given.pop(module, None)", "module.training")),
    *edits("derive/repair.py", "tests/derive/test_repair.py",
           ("streams may end as anything", "if not all(bool(stream.isfinite().all()) for stream in dense)", "if False")),
    *edits("derive/moments.py", "tests/derive/test_repair.py",
           ("the last rows are forgotten", "upper = self._closed()[0].triu()", "upper = self._sums[0].triu()"),
           ("half of a symmetric sum is missing", "return upper + upper.triu(1).T", "return upper"),
           ("columns of a symmetric sum are missing", "start = end", "start = end + 1")),
    *edits("derive/spooled.py", "tests/derive/test_spooled.py",
           ("what is larger overwrites what follows", "old.start if is_alike else self._end", "old.start"),
           ("a full disk is any other error", "if error.errno not in FULL:", "if True:"),
           ("files stay open", "weakref.finalize(self, self._file.close)", "weakref.finalize(torch, self._file.close)")),
    *edits("derive/sites.py", "tests/derive/test_repair.py",
           ("what reads something else is refitted, too", "name in seen and seen[name] is seen[at.unit]", "name in seen")),
    *edits("derive/tuning.py", "tests/derive/test_tuning.py",
           ("text and a teacher are one training", '"teacher": taught_by}', '"teacher": None}'),
           ("a teacher tells what is read, not what follows", "predicted(teacher, input_ids)[:, :-1]",
            "predicted(teacher, input_ids)[:, 1:]")),
    *edits("derive/distillation.py", "tests/derive/test_tuning.py",
           ("a model is its own teacher under the plan, too", "if teacher is model:", "if False:")),
    *edits("derive/muon.py", "tests/derive/test_healing.py",
           ("Muon does not look ahead", "weight.grad.lerp(mean, MOMENTUM)", "mean"),
           ("a vector moves as far as its gradient is long", "x = x / x.norm()", "x = x / x[:1].numel()")),
    *edits("derive/training_loop.py", "tests/derive/test_healing.py",
           ("each process reads a whole batch", "share_of(settings.batch_size)", "settings.batch_size")),
    *edits("derive/healing.py", "tests/derive/test_healing.py",
           ("processes may heal different models", "if not agree(about):", "if False:")),
    *edits("derive/repair.py", "tests/derive/test_repair.py",
           ("layers that are read ahead lack what is dropped", "ahead[-1] + 1 in self.plan.attention", "False"),
           ("all layers without attention are read ahead", "if ahead[-1] not in self.plan.mlp:", "if False:")),
    *edits("derive/offloading.py", "tests/derive/test_repair.py",
           ("what was changed is not stored", "or not torch.equal(", "or torch.equal("),
           ("what is in a file stays in memory", "in_memory.pop(name, None)", "pass"),
           ("weights stay in memory", "hook.post_forward(module, None)", "pass"),
           ("hooks stay off", "hook.offload = True", "pass"),
           ("weights of other models change", "weight.data = weight.data.clone()", "pass"),
           ("what was not stored stays in memory",
            "if not hook.offload:\n                    _leave", "if False:\n                    _leave"),
           ("stored for a caller in the same mode", "torch.inference_mode(False), ", "")),
    *edits("derive/search.py", "tests/derive/test_repair.py",
           ("a beam of one", "[*found.values()][:n]", "[*found.values()][:1]"),
           ("orders of the same layers are kept apart", "frozenset(path.layers)", "path.layers"),
           ("weights of another path stay", "self._load(path, range(len(self.blocks)))", "self._load(path, path.weights)"),
           ("weights of another candidate stay", "self._load(path, window)", "pass"),
           ("what was refitted first is forgotten", "path.weights | refitted, ", "refitted, "),
           ("all layers are looked at", "[: candidates if step else None]", "")),
    *edits("derive/own_text.py", "tests/derive/test_own_text.py",
           ("text is what is likeliest", "torch.multinomial(wide(output.logits[:, -1]).softmax(-1), 1)",
            "output.logits[:, -1].argmax(-1, keepdim=True)")),
    *edits("dropping/windows.py", "tests/dropping/test_windows.py",
           ("a window has one token more", "distance >= window", "distance > window"),
           ("a sliding cache begins at zero", "past - held.keys.shape[-2], past", "0, held.keys.shape[-2]"),
           ("later tokens are seen", "hidden | (distance < 0)", "hidden | (distance < -9)")),
    *edits("studies/keep_more/rows.py", "tests/studies/test_keep_more.py",
           ("a window holds everything", "min(left, window or CONTEXT)", "(window or CONTEXT)")),
    *edits("studies/keep_more/ranking.py", "tests/studies/test_rankings.py",
           ("one order for both", "for order in (self.order, own)", "for order in (self.order, self.order)"),
           ("dropped layers go next", " if layer in self.order]", "]")),
    *edits("studies/keep_more/ranking_rows.py", "tests/studies/test_rankings.py",
           ("dropped layers rank, too", " if layer not in lacking]", "]"),
           ("the dense model's importance twice", "for scores in (dense, each.scores))\n            drawn_before",
            "for scores in (dense, dense))\n            drawn_before"),
           ("more is lost by its own order", 'row["by_dense_order"] - row["by_own_order"]',
            'row["by_own_order"] - row["by_dense_order"]')),
    *edits("studies/keep_more/verdicts.py", "tests/studies/test_rankings.py",
           ("either order where one is better", 'row["gained_low"] > 0 or', "False and")),
    *edits("studies/keep_more/work.py", "tests/studies/test_rankings.py",
           ("what is stored is measured again", "tuple(self.items[i] for i in missing)", "self.items")),
    *edits("studies/keep_more/study.py", "tests/studies/test_keep_more.py",
           ("healing reads what is measured", "seq_len)[skip:]", "seq_len)[:-skip]")),
]  # fmt: skip

EDITS = [*REVIEW, *TABLES, *DISTANCE, *KEY_EDITS, *RULES, *LADDER, *EXPORTS, *ABLATIONS, *BREAKS, *ENCODERS, *KEPT]
