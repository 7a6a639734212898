"""Quality against the number of dropped sub-layers: what notebooks 02 and 03 share."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd

from ..base import files, stats
from ..base.errors import NotAvailable
from ..base.store import Store
from ..drop.plan import DropPlan
from ..measure.importance import Importance
from ..models.load import load_tokenizer
from ..models.locate import LocatedModel, locate_available
from ..report.tables import Tables
from ..selection.ranking import drop_sequence, select
from ..sources.catalogue import catalogue
from ..sources.task_data import known_tasks, load_task
from ..sources.texts import load_tokens
from .profile import Profile
from .queue import distinct, measure_all, one_of_many
from .run import available_corpora, identity_of, importance_of, importance_work, task_work
from .work import DENSE, ImportanceWork, IterativeWork, TaskWork, TextWork, Work, plan_key

SINGLE = ("attention", "mlp", "block")

KEEP = 0.9  # "retained" means this share of the dense model's quality (paper, Sec. 7: 90 % of MMLU)

Cell = tuple[str, int]  # kind, how many are dropped; ("dense", 0) is the model as it is


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(profile: Profile, force: bool, kinds: tuple[str, ...]) -> tuple[list["Measured"], list[dict], dict[str, str]]:
    """Scores first, since they say which layers go; then text and tasks under all plans together."""
    store, not_run = Store(), {}
    corpus = available_corpora(profile, not_run)[0]
    members = _available_tasks(profile, not_run)
    located, missing = locate_available(profile.models)
    not_run |= missing
    scoring: list[ImportanceWork] = []
    for model in located:
        with one_of_many(model, profile.several, not_run):
            scoring += importance_work(model, [corpus], profile)
    measure_all(scoring, store, False, profile.several, not_run)  # notebook 01 has them already
    iterative: list[Work] = []
    if "joint" in kinds:
        for item in (item for item in scoring if item.model.name not in not_run):
            tokens = item.tokens[: profile.iterative.n_samples]
            shared = {"tokens": tokens, "batch_size": item.batch_size, "n_drop": max(profile.iterative.n_drop)}
            iterative.append(IterativeWork(**identity_of(item.model), **shared))
        measure_all(iterative, store, force, profile.several, not_run)
    measured, work = [], []
    for item in (item for item in scoring if item.model.name not in not_run):
        scores = importance_of(item, store)
        order = next((store.get(i.keys[0])["value"]["attention"] for i in iterative if i.model == item.model), [])
        plans = _plans(scores, profile, kinds, order)
        with one_of_many(item.model, profile.several, not_run):
            of_model = [_text_work(item, plans, profile)]
            of_model += task_work(item.model, members, _unique(plans, _task_cells(profile, kinds, plans)), profile)
            of_run = scores.first(profile.calibration.n_samples)
            measured.append(Measured(item.model, of_run, plans, of_model, store, profile))
            work += of_model
    measure_all(work, store, force, profile.several, not_run)
    measured = [m for m in measured if m.model.name not in not_run]
    if not measured:
        raise NotAvailable("Nothing could be measured:\n" + "\n".join(not_run.values()))
    done = [item for item in [*scoring, *iterative, *work] if item.model.name not in not_run]
    provenance = [store.get(key)["provenance"] for item in done for key in item.keys]
    return measured, distinct(provenance), not_run


def _available_tasks(profile: Profile, not_run: dict[str, str]) -> dict[str, list]:
    """Task -> what `load_task` gives; of several, those whose data cannot be had go into `not_run`."""
    members = {}
    for name in profile.tasks.names:
        try:
            members[name] = load_task(name, profile.tasks.num_fewshot, profile.tasks.data)
        except NotAvailable as reason:
            if len(profile.tasks.names) == 1:
                raise
            not_run[f"task {name}"] = str(reason)
    if not members:
        raise NotAvailable("None of the tasks can be had here:\n" + "\n".join(not_run.values()))
    return members


def _plans(scores: Importance, profile: Profile, kinds: tuple[str, ...], iterative: list[int]) -> dict[Cell, DropPlan]:
    """The plan of every cell of the curves. A count that a model does not have is left out: profiles serve several."""
    plans = {("dense", 0): DENSE}
    few, scores = scores.first(profile.iterative.n_samples), scores.first(profile.calibration.n_samples)
    for kind in kinds:
        for n in sorted({*profile.text.n_drop, *profile.tasks.n_drop.get(kind, [])}):
            if n < len(drop_sequence(scores, kind)):  # with all of a kind gone there is nothing left to compare
                plans[kind, n] = select(scores, kind, n)
    for n in profile.iterative.n_drop if iterative else []:
        plans["one-shot", n] = select(few, "attention", n)
        plans["iterative", n] = dataclasses.replace(plans["one-shot", n], attention=tuple(iterative[:n]))
    return plans


def _task_cells(profile: Profile, kinds: tuple[str, ...], plans: dict[Cell, DropPlan]) -> list[Cell]:
    return [("dense", 0)] + [(kind, n) for kind in kinds for n in profile.tasks.n_drop.get(kind, []) if (kind, n) in plans]


def _unique(plans: dict[Cell, DropPlan], cells: list[Cell]) -> tuple[DropPlan, ...]:
    """The plans of some cells, each once: a joint plan is an attention plan as long as no MLP goes."""
    return tuple({json.dumps(plan_key(plans[cell])): plans[cell] for cell in cells}.values())


def _text_work(item: ImportanceWork, plans: dict[Cell, DropPlan], profile: Profile) -> TextWork:
    """Blocks of the first corpus that no importance was measured on."""
    calibration, text = profile.calibration, profile.text
    used = max([calibration.n_samples, *calibration.sample_counts]) * calibration.seq_len
    skip = -(-used // text.seq_len)
    tokens = load_tokens(item.corpus, load_tokenizer(item.model), skip + text.n_samples, text.seq_len)[skip:]
    return TextWork(**identity_of(item.model), corpus=item.corpus, tokens=tokens, plans=_unique(plans, list(plans)))


def collect(measured: list["Measured"], rows_of) -> Tables:
    rows: dict[str, list[dict]] = {}
    for m in measured:
        for table, more in rows_of(m).items():
            rows.setdefault(table, []).extend({"model": m.model.name} | row for row in more)
    return {name: pd.DataFrame(r) if r else pd.DataFrame(columns=MAYBE_EMPTY[name]) for name, r in rows.items()}


MAYBE_EMPTY = {  # columns of the tables that can be without rows
    "paper": ["model", "kind", "n", "what", "paper"],
    "gaps": ["model", "n", "kind", "other", "measure", "difference", "low", "high"],
    "iterative": ["model", "n", "shared", "one_shot", "iterative", "difference", "low", "high", "one_shot_layers", "layers"],
}


# ---- from values to rows --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """One model's plans and values."""

    model: LocatedModel
    scores: Importance
    plans: dict[Cell, DropPlan]
    work: list
    store: Store
    profile: Profile

    def _values(self, item: TextWork | TaskWork) -> dict[Cell, dict]:
        """Cell -> value, for the cells that an item has measured."""
        by_plan = {json.dumps(key["plan"]): self.store.get(key)["value"] for key in item.keys}
        names = {cell: json.dumps(plan_key(plan)) for cell, plan in self.plans.items()}
        return {cell: by_plan[name] for cell, name in names.items() if name in by_plan and self._wanted(item, cell)}

    def _wanted(self, item: TextWork | TaskWork, cell: Cell) -> bool:
        kind, n = cell
        return isinstance(item, TextWork) or kind == "dense" or n in self.profile.tasks.n_drop.get(kind, [])

    def model_rows(self) -> dict[str, list[dict]]:
        """Number of layers, and which go in each plan."""
        listed = [
            {"kind": kind, "n": n, "attention": " ".join(map(str, plan.attention)), "mlp": " ".join(map(str, plan.mlp))}
            for (kind, n), plan in self.plans.items()
        ]
        return {"models": [{"n_layers": self.scores.importance["block"].size}], "plans": listed}

    def text_rows(self) -> dict[str, list[dict]]:
        """Perplexity, next-token accuracy and divergence on held-out text, with intervals over samples."""
        values = self._values(self.work[0])
        nll, hits, kl = (np.array([value[name] for value in values.values()]).T for name in ("nll", "hits", "kl"))
        draw = lambda rows: stats.bootstrap_means(rows, np.ones(len(rows)), 0)  # noqa: E731
        draws = {"perplexity": np.exp(draw(nll)), "accuracy": draw(hits), "kl": draw(kl)}
        draws["retained"] = _share(draws["accuracy"])
        points = {"perplexity": np.exp(nll.mean(0)), "accuracy": hits.mean(0), "kl": kl.mean(0)}
        points["retained"] = _share(points["accuracy"])
        intervals = {name: stats.interval(values) for name, values in draws.items()}
        rows = []
        for i, (kind, n) in enumerate(values):
            if kind in ("one-shot", "iterative"):
                continue
            row = {"corpus": self.work[0].corpus, "kind": kind, "n": n, "sub_layers": self.plans[kind, n].n_drop}
            for name in draws:
                low, high = intervals[name]
                row |= {name: points[name][i], f"{name}_low": low[i], f"{name}_high": high[i]}
            rows.append(row)
        self.text = list(values), nll, draw(nll), draws["retained"], points["retained"]
        return {"text": rows, "reach": self._reach_rows()}

    def _reach_rows(self) -> list[dict]:
        """How many of a kind can go before less than 90 % of the dense model's next-token accuracy is retained."""
        cells, _, _, draws, point = self.text
        rows = []
        for kind in dict.fromkeys(kind for kind, _ in cells if kind in (*SINGLE, "joint")):
            counts = sorted(n for k, n in cells if k == kind)
            columns = [cells.index((kind, n)) for n in counts]
            kept = np.vstack([point[columns], draws[:, columns]]) >= KEEP
            reach = np.where(kept.all(1), len(counts), kept.argmin(1))  # how many counts hold without a break
            n = np.array([0, *counts])[reach]
            low, high = stats.interval(n[1:])
            rows.append({"kind": kind, "n": int(n[0]), "low": low, "high": high, "tried_up_to": counts[-1]})
        return rows

    def task_rows(self) -> dict[str, list[dict]]:
        """Each task, their mean, what of it is retained, and gaps between kinds at equal n; intervals over documents."""
        rows, means, draws, chances = [], [], [], []
        cells: list[Cell] = []
        for seed, item in enumerate(self.work[1:]):
            values = self._values(item)
            cells = list(values)
            metric = _metric(item.task, next(iter(values.values()))["metrics"])
            documents = np.array([value["metrics"][metric] for value in values.values()]).T
            drawn = stats.bootstrap_means(documents, np.ones(len(documents)), seed)
            low, high = stats.interval(drawn)
            chance = next(iter(values.values()))["chance"]
            error = documents.std(0, ddof=1) / np.sqrt(len(documents)) if len(documents) > 1 else np.full(len(cells), np.nan)
            for i, (kind, n) in enumerate(cells):
                rows.append({"task": item.task, "kind": kind, "n": n, "metric": metric, "num_fewshot": item.num_fewshot,
                             "documents": len(documents), "value": documents[:, i].mean(), "stderr": error[i],
                             "low": low[i], "high": high[i], "chance": chance})  # fmt: skip
            means.append(documents.mean(0))
            draws.append(drawn)
            chances.append(chance)
        mean, drawn = np.mean(means, axis=0), np.mean(draws, axis=0)
        retained = _share(mean)
        (low, high), share = stats.interval(drawn), _share(drawn)
        share_low, share_high = stats.interval(share)
        lost_low, lost_high = stats.interval(100 * (drawn[:, :1] - drawn))
        average = [
            {"kind": kind, "n": n, "tasks": len(means), "value": mean[i], "low": low[i], "high": high[i],
             "chance": np.mean(chances), "retained": retained[i], "retained_low": share_low[i],
             "retained_high": share_high[i], "points_lost": 100 * (mean[0] - mean[i]), "points_lost_low": lost_low[i],
             "points_lost_high": lost_high[i]}
            for i, (kind, n) in enumerate(cells)
        ]  # fmt: skip
        return {"tasks": rows, "average": average, "gaps": self._gap_rows(cells, mean, drawn)}

    def _gap_rows(self, cells: list[Cell], mean: np.ndarray, drawn: np.ndarray) -> list[dict]:
        """Attention and joint against the other kinds at equal n, paired: mean task score, and nats per token of text."""
        text_cells, nll, text_draws, _, _ = self.text
        rows = []
        for measure, which, point, values in (
            ("tasks", cells, mean, drawn),
            ("text", text_cells, -nll.mean(0), -text_draws),
        ):
            for (kind, n), (other, m) in itertools.product(which, which):
                against = {"attention": ("mlp", "block"), "joint": SINGLE}.get(kind, ())
                if n != m or other not in against:
                    continue
                i, j = which.index((kind, n)), which.index((other, m))
                low, high = stats.interval(values[:, i] - values[:, j])
                same = plan_key(self.plans[kind, n]) == plan_key(self.plans[other, m])
                rows.append({"n": n, "kind": kind, "other": other, "measure": measure, "difference": point[i] - point[j],
                             "low": low, "high": high, "same_plan": same})  # fmt: skip
        return rows

    def joint_rows(self) -> dict[str, list[dict]]:
        """The joint order, and how many attention layers go before the first MLP, with an interval over samples."""
        sequence = drop_sequence(self.scores, "joint")
        order = [
            {"position": i + 1, "kind": kind, "layer": layer, "importance": self.scores.importance[kind][layer]}
            for i, (kind, layer) in enumerate(sequence)
        ]
        draws = {
            kind: stats.bootstrap_means(self.scores.per_sample[kind], self.scores.weights, 0) for kind in ("attention", "mlp")
        }
        ahead = (draws["attention"] <= draws["mlp"].min(1, keepdims=True)).sum(1)
        low, high = stats.interval(ahead)
        first = next(i for i, (kind, _) in enumerate(sequence) if kind == "mlp")
        n_layers = self.scores.importance["block"].size
        return {"order": order, "first_mlp": [{"attention_before": first, "low": low, "high": high, "n_layers": n_layers}]}

    def iterative_rows(self) -> dict[str, list[dict]]:
        """Iterative against one-shot: nats per token lost by dropping one by one (negative: iterative is better)."""
        cells, nll, draws, _, _ = self.text
        rows = []
        for n in (n for kind, n in cells if kind == "iterative"):
            i, j = cells.index(("iterative", n)), cells.index(("one-shot", n))
            low, high = stats.interval(draws[:, i] - draws[:, j])
            ours, theirs = self.plans["iterative", n].attention, self.plans["one-shot", n].attention
            rows.append({"n": n, "shared": len({*ours} & {*theirs}), "one_shot": np.exp(nll[:, j].mean()),
                         "iterative": np.exp(nll[:, i].mean()), "difference": (nll[:, i] - nll[:, j]).mean(),
                         "low": low, "high": high, "one_shot_layers": " ".join(map(str, theirs)),
                         "layers": " ".join(map(str, ours))})  # fmt: skip
        return {"iterative": rows}


def _share(values: np.ndarray) -> np.ndarray:
    """Of the dense model's value, the first along the last axis; NaN where that is zero (a random model may know nothing)."""
    dense = values[..., :1]
    return np.divide(values, dense, out=np.full(values.shape, np.nan), where=dense != 0)


def _metric(task: str, metrics: dict) -> str:
    """The paper's metric; for a task that it does not have, what lm-eval gives first."""
    return known_tasks().get(task, {}).get("metric") or next(iter(metrics))


def paper_rows(name: str | None) -> list[dict]:
    """The numbers of the paper's Tables 1 to 3 for one of its models."""
    claims = json.loads((files.ROOT / "data" / "paper_claims.json").read_text(encoding="utf-8"))["claims"]
    kinds = {"Baseline": "dense", "Attn Drop": "attention", "MLP Drop": "mlp", "Block Drop": "block"}
    return [
        {"kind": kinds[c["method"]], "n": c["n_drop"], "what": c["what"], "paper": c["value"]}
        for c in claims
        if c["id"].split(".")[0] in ("T1", "T2", "T3") and c["model"].lower() == name and c["method"] in kinds
    ]


def paper_name(model: LocatedModel) -> str | None:
    """The model's name in the paper's tables, in small letters, if it is one of the paper's, or has the shape of one."""
    for name, source in catalogue()["models"].items():
        is_this = "hub" in source and model.identity.startswith(f"hub:{source['hub']}@")
        if is_this or model.name == f"random:{name}":
            return name.removesuffix("-v0.1")
    return None
