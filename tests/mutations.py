"""Wrong changes that the tests must notice: `.venv/bin/python tests/mutations.py [--list] [--only WORD ...]`.

Each edit gives tables, keys, statistics or verdicts another meaning and still runs. It is applied to a copy of the repository,
where the fast tests that should notice it are run. An edit that no test notices has survived: write the test. An edit whose old
text is not found exactly once is stale: make it anew. The exit status is 1 if an edit of `REVIEW` or more than two others
survive, if one is stale or does not run, or if the tests fail without any edit.

The copy's tests run in forks of one process that has imported what takes long, but nothing of the package (Linux and macOS).
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW_TO_IMPORT = (
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "matplotlib.pyplot",
    "nbformat",
    "pandas",
    "scipy.stats",
    "seaborn",
    "torch",
)
SLOW_TO_IMPORT += ("transformers", "transformers.models.llama.modeling_llama", "_pytest.assertion.rewrite")
BROKEN = 3  # pytest's exit status for an internal error
TIMEOUT = 120  # seconds: an edit that hangs is noticed
SURVIVORS = 2  # that are no reason to fail

STUDIES = "llmdrop_utils/studies"
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
        ("unpaired gaps", "draws[:, i] - draws[:, j])", "draws[:, i] - draws[::-1, j])"),
        ("denominator of shares", "dense = values[..., :1]", "dense = values[..., -1:]"),
        ("sign of points lost", "100 * (mean[0] - mean)", "100 * (mean - mean[0])"),
        ("reach off by one", "reach = np.array([0, *counts])[without_break]", "reach = np.array([*counts, 0])[without_break]"),
    ),
    *edits(
        "studies/curves.py", CURVES,
        ("sign of text gaps", "-text.nll.mean(0), -text.draws", "text.nll.mean(0), text.draws"),
        ("held-out text is calibration text", "skip + text.n_samples, text.seq_len)[skip:]",
         "skip + text.n_samples, text.seq_len)[: text.n_samples]"),
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
    *edits("studies/speedup/study.py", SPEED,
           ("denominator of SDR", "percent = 100 * (speedup - 1)", "percent = 100 * speedup")),
    *edits(
        "studies/work.py", KEYS,
        ("text keys without tokens", 'TEXT_VERSION, tokens=tokens, plan', "TEXT_VERSION, plan"),
        ("keys without dtype", '"dtype": dtype, "attention": self.attention}', '"attention": self.attention}'),
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
        ("more than 90 %", "for n in counts]] >= KEEP", "for n in counts]] > KEEP"),
        ("points lost unpaired", "100 * (draws[:, :1] - draws)", "100 * (mean[0] - draws)"),
        ("gaps of other methods", "or not (cell.on_curve and other.on_curve)", ""),
        ("blocks count once", "plans[cell].n_drop}", "cell.n}"),
        ("gaps at any n", "if cell.n != other.n or other.kind", "if other.kind"),
        ("joint is not compared with block", '"joint": ("attention", "mlp", "block")', '"joint": ("attention", "mlp")'),
    ),
    *edits(
        "studies/curves.py", ROWS,
        ("plans of all samples", ".first(run.section(Calibration).n_samples)", ""),
        ("sample counts forgotten", "max([calibration.n_samples, *calibration.sample_counts])", "calibration.n_samples"),
        ("half a block of calibration", "skip = -(-used // text.seq_len)", "skip = used // text.seq_len"),
        ("counts of text alone", "{*text.n_drop, *tasks.n_drop.get(kind, [])}", "{*text.n_drop}"),
        ("metric that lm-eval lists first", 'known_tasks().get(task, {}).get("metric") or next', "next"),
    ),
    *edits(
        "studies/joint_drop/study.py", JOINT,
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
        ("change unpaired", "stats.interval(last_draws - draws)", "stats.interval(last_draws - draws[::-1])"),
        ("settled one stage late", "len(differs) - differs[::-1]", "len(differs) + 1 - differs[::-1]"),
        ("settled where the set was first seen", "np.where(differs.any(0), len(differs) - differs[::-1].argmax(0), 0)",
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

# ---- keys and statistics ----------------------------------------------------------------------------------------------------

KEY_EDITS = [
    *edits(
        "studies/work.py", KEYS,
        ("keys without model", '{"model": self.model.identity, ', "{"),
        ("keys by name of the model", "self.model.identity", "self.model.name"),
        ("keys without attention implementation", ', "attention": self.attention}', "}"),
        ("text keys without plan", 'tokens=tokens, plan=plan.key.to_json()) for', "tokens=tokens) for"),
        ("importance keys without tokens", "IMPORTANCE_VERSION, tokens=fingerprint(self.tokens))", "IMPORTANCE_VERSION)"),
        ("iterative keys without tokens", 'more = {"tokens": fingerprint(self.tokens), "n_drop"', 'more = {"n_drop"'),
        ("iterative keys without n", ', "n_drop": self.n_drop}\n        return [self', '}\n        return [self'),
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
        ("weights ignored", "size=REPEATS) * weights", "size=REPEATS)"),
        ("90 % intervals", "(0.025, 0.975)", "(0.05, 0.95)"),
        ("ranks without ties", "rankdata(a, axis=-1), rankdata(b, axis=-1)", "a.argsort().argsort(), b.argsort().argsort()"),
        ("groups against all", "np.r_[0 : g.start, g.stop : len(rows)]", "np.r_[0 : len(rows)]"),
        ("groups without weights", "weights=weights[keep])", "weights=None)"),
        ("overlap of all", "set(a[:n]) & set(b[:n])", "set(a) & set(b[:n])"),
    ),
    *edits("measure/importance.py", f"{SIMILARITY} {STAGES}",
           ("means over samples", "np.average(rows, axis=0, weights=self.weights)", "np.average(rows, axis=0)")),
]  # fmt: skip

# ---- rules ------------------------------------------------------------------------------------------------------------------

RULES: list[Edit] = []  # of studies/*/verdicts.py and report/verdicts.py

EDITS = [*REVIEW, *TABLES, *KEY_EDITS, *RULES]


# ---- running ----------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the edits and stop")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="edits whose name or file holds one of these")
    arguments = parser.parse_args()
    chosen = [
        edit for edit in EDITS if not arguments.only or any(word in f"{edit.name} {edit.where}" for word in arguments.only)
    ]
    if stale := [edit for edit in chosen if (ROOT / edit.file).read_text(encoding="utf-8").count(edit.old) != 1]:
        print("\n".join(f"stale     {edit.where}: {edit.name}" for edit in stale))
        return 1
    if arguments.list:
        print("\n".join(f"{edit.where}: {edit.name}" for edit in chosen))
        return 0

    prepare()
    with tempfile.TemporaryDirectory(prefix="llmdrop-mutations-") as temporary:
        copy = Path(temporary) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "cache", "results", "__pycache__"))
        # 1. Without an edit all pass.
        tests = sorted({test for edit in chosen for test in edit.tests.split()})
        if run(copy, tests) != 0:
            print(f"Without any edit some tests fail: {' '.join(tests)}")
            return 1
        # 2. One edit at a time.
        outcomes = {}
        for edit in chosen:
            started = time.monotonic()
            with edited(copy / edit.file, edit):
                status = run(copy, edit.tests.split())
            outcomes[edit] = {0: "survived", 1: "killed"}.get(status, "broken")
            print(f"{outcomes[edit]:8}  {time.monotonic() - started:5.1f} s  {edit.where}: {edit.name}", flush=True)

    # 3. What is left to do.
    count = lambda outcome: sum(found == outcome for found in outcomes.values())  # noqa: E731
    print(f"\n{count('killed')} of {len(chosen)} edits killed.")
    for outcome in ("survived", "broken"):
        print("".join(f"{outcome}: {edit.where}: {edit.name}\n" for edit in chosen if outcomes[edit] == outcome), end="")
    of_review = any(outcomes[edit] == "survived" for edit in chosen if edit in REVIEW)
    return int(of_review or count("survived") > SURVIVORS or count("broken") > 0)


def prepare() -> None:
    """Import what every test needs, but nothing of the package, so that forks need not."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"  # tests/conftest.py names a stand-in, but the hub's library has then read its settings
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="llmdrop-hub-cache-")
    sys.dont_write_bytecode = True  # an edit within the second would be taken for the text before it
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
    for name in SLOW_TO_IMPORT:
        __import__(name)
    assert "llmdrop_utils" not in sys.modules


@contextlib.contextmanager
def edited(path: Path, edit: Edit):
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(edit.old, edit.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def run(copy: Path, tests: list[str]) -> int:
    """pytest's exit status for fast tests of the copy, in a fork: 0 all passed, 1 one failed or hangs, others do not run."""
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT)
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        import llmdrop_utils

        if not Path(llmdrop_utils.__file__).is_relative_to(copy):
            os._exit(BROKEN)
        os._exit(pytest.main(["-x", "-m", "not slow and not real", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    _, status = os.waitpid(child, 0)
    return 1 if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
