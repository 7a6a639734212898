"""Notebook 04: which method chooses layers, on how much text; whole blocks at equal parameters."""

import dataclasses

import torch

from ...base.errors import LLMDropError, NotApplicable
from ...dropping.plan import DropPlan
from ...dropping.units import skipping
from ...models.load import load_tokenizer, model_of_shape
from ...models.locate import LocatedModel
from ...report.tables import Column, Key, Tables, table
from ...selection.criteria import obstacle_to
from ...selection.methods import as_plan
from ...selection.ranking import drop_sequence, select
from ...sources.texts import load_tokens
from .. import paper
from ..curve_rows import SCORE
from ..curves import Tasks, Text, rank_layers, sample_values, task_values, task_work, text_work
from ..profile import Calibration
from ..run import Run, fitting_length, study
from ..speedup.loads import n_layers_of
from ..work import ImportanceWork, TaskWork, TextWork, Work
from .rows import (
    CONTINUATION,
    COSINE,
    SAME_SAMPLES,
    TASKS,
    TEXT,
    Arm,
    agreement_rows,
    block_rows,
    calibration_rows,
    mean_of_tasks,
    method_rows,
    n_parameters,
    of_text,
    order_rows,
    quality_rows,
    task_rows,
)
from .work import Ablations, ContinuationWork, OrderWork, order_of

DROPPED = Key("n", "Dropped", "d")
DIFFERENCE = Column("difference", "Difference", "+.3f", "difference_low", "difference_high")
TABLES = {
    "models": table("model", Column("n_layers", "Layers", "d")),
    "methods": table(
        "model kind method", Column("reads", "Reads"), Column("tokens", "Tokens", ",.0f"), Column("passes", "Passes", ".1f"),
        Column("seconds", "Seconds", ".3g"),
    ),
    "orders": table("model kind method", Key("position", "Position", "d"), Column("layer", "Layer", "d")),
    "agreement": table(
        "model method other", Column("shared", "Shared of the first 8", "d"), Column("correlation", "Rank correlation", ".2f"),
    ),
    "quality": table(
        "model kind method", DROPPED, "measure", Column("value", "Value", ".3f", "low", "high"), "low high",
        Column("against", "Compared with"), DIFFERENCE, "difference_low difference_high", Column("p", "p", ".2g"),
        Column("outcome", "Beside it"),
    ),
    "tasks": table(
        "model task kind", DROPPED, "method metric", Column("num_fewshot", "Shots", "d"),
        Column("documents", "Documents", ",d"), SCORE, "low high", Column("chance", "By guessing", ".3f"),
    ),
    "calibration": table(
        "model varied setting", DROPPED, Column("shared", "Layers in common", "d"),
        Column("difference", "Nats per token more", "+.3f", "difference_low", "difference_high"),
        "difference_low difference_high",
    ),
    "blocks": table(
        "model", Key("n", "Blocks' worth", "d"), Key("arm", "What goes"), Column("sub_layers", "Sub-layers", "d"),
        Column("parameters", "Parameters", ",d"), Column("perplexity", "Perplexity", ".1f", "low", "high"), "low high",
        Column("difference", "Nats per token more", "+.3f", "difference_low", "difference_high"),
        "difference_low difference_high",
    ),
    "paper": table("model kind method", DROPPED, Column("paper", "In the paper", ".1f")),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Orders:
    """One model, and what finds the orders in which its layers are dropped."""

    item: ImportanceWork
    n_layers: int
    counts: list[int]  # of layers dropped: those of the profile that the model has
    parameters: dict[str, int]  # of one attention and of one MLP
    methods: dict[tuple[str, str, int], OrderWork]  # kind, method, seed
    varied: dict[tuple[str, str], OrderWork]  # what is varied, setting

    @property
    def model(self) -> LocatedModel:
        return self.item.model

    @property
    def blocks(self) -> list[int]:
        """Numbers of whole blocks in a row."""
        return [work.n_drop for (kind, _, _), work in self.methods.items() if kind == "block"]

    @property
    def work(self) -> list[OrderWork]:
        return [*self.methods.values(), *self.varied.values()]

    def has(self, arm: Arm) -> bool:
        """Is an arm one of the methods that are compared, and not another calibration or a block?"""
        return (arm.kind, arm.method, arm.seed) in self.methods


@dataclasses.dataclass(frozen=True)
class Tested:
    """The plan of each arm, and what is measured under the plans."""

    orders: Orders
    plans: dict[Arm, DropPlan]
    methods: list[Arm]  # those that are compared
    asked: list[Arm]  # and for tasks
    text: TextWork
    tasks: list[TaskWork]
    continuation: ContinuationWork

    @property
    def of_attention(self) -> list[Arm]:
        return [arm for arm in self.methods if arm.kind == "attention"]

    @property
    def work(self) -> list[Work]:
        return [self.text, *self.tasks, self.continuation]


@study("04_ablations", needs=[Calibration, Text, Tasks, Ablations], tables=TABLES)
def ablations(run: Run) -> Tables:
    """Notebook 04: methods that choose attention layers, their cost and agreement, and quality at equal numbers dropped."""
    prompt, seq_len = run.section(Ablations).prompt, run.section(Text).seq_len
    if prompt > seq_len:
        raise LLMDropError(f"The profile's prompts of {prompt} tokens are longer than its samples of text, {seq_len} tokens.")
    scoring, tasks = rank_layers(run)
    ordered: list[Orders] = []
    for item in scoring:
        with run.one_of(item.model):
            ordered.append(_orders(run, item))
    run.measure([work for orders in ordered for work in orders.work])
    tested: list[Tested] = []
    for orders in (orders for orders in ordered if orders.model.name not in run.not_run):
        with run.one_of(orders.model):
            tested.append(_tested(run, orders, _plans(run, orders), tasks))
    run.measure([work for each in tested for work in each.work])
    tested = [each for each in tested if each.orders.model.name not in run.not_run]
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}
    for each in tested:
        for name, rows in _rows(run, each).items():
            tables[name] += [{"model": each.orders.model.name} | row for row in rows]
    tables["paper"] = paper_rows()
    return run.write(tables, run.measured([*scoring, *(work for t in tested for work in (*t.orders.work, *t.work))]))


# ---- orders, and the plans that follow --------------------------------------------------------------------------------------


def _orders(run: Run, item: ImportanceWork) -> Orders:
    """What finds orders: each method on the same samples, and cosine on fewer, shorter and other ones."""
    settings, calibration, tokenizer = run.section(Ablations), run.section(Calibration), load_tokenizer(item.model)
    tokens, n_layers = item.tokens[: settings.n_samples], n_layers_of(item.model)
    counts = [n for n in settings.n_drop if n < n_layers]
    if not counts:
        raise NotApplicable(f"{item.model.name} has {n_layers} layers, and the profile drops {min(settings.n_drop)} or more.")

    def order(method: str, n: int = n_layers, kind: str = "attention", samples: torch.Tensor = tokens, seed: int = 0):
        return OrderWork(
            **item.identity, tokens=samples, batch_size=item.batch_size, kind=kind, method=method, n_drop=n, seed=seed
        )

    shape = model_of_shape(item.model, torch.float32, "meta")
    obstacles = {method: reason for method in settings.methods if (reason := obstacle_to(method, shape))}
    run.not_run |= {f"{item.model.name}, {method}": reason for method, reason in obstacles.items()}
    orders = {("attention", COSINE, 0): order("one-shot"), ("mlp", COSINE, 0): order("one-shot", kind="mlp")}
    chosen = [method for method in settings.methods if method not in obstacles]
    if "without residual" in chosen:
        orders["mlp", "without residual", 0] = order("without residual", kind="mlp")
    for method in chosen:
        for seed in range(settings.seeds if method == "random" else 1):
            orders["attention", method, seed] = order(method, seed=seed)
    few = tokens[: settings.stepwise_samples]
    orders["attention", SAME_SAMPLES, 0] = order("one-shot", samples=few)
    for method in settings.stepwise:
        orders["attention", method, 0] = order(method, max(counts), samples=few)
    for n in (n for n in settings.blocks if n < n_layers):
        orders["block", f"{n} in a row", 0] = order("consecutive blocks", n, "block")
    varied = {("samples", str(k)): order("one-shot", samples=tokens[:k]) for k in settings.samples}
    seq_len = tokens.shape[1]
    for length in settings.lengths:
        blocks = load_tokens(item.corpus, tokenizer, max(1, tokens.numel() // length), length)
        varied["length", str(length)] = order("one-shot", samples=blocks)
    for corpus in (name for name in run.corpora() if name != item.corpus):
        others = load_tokens(corpus, tokenizer, settings.n_samples, fitting_length(item.model, calibration.seq_len))
        varied["corpus", corpus] = order("one-shot", samples=others[:, :seq_len])
    return Orders(item, n_layers, counts, parameters_of(shape, n_layers), orders, varied)


def _plans(run: Run, orders: Orders) -> dict[Arm, DropPlan]:
    """The plan of every arm."""
    counts, parameters = orders.counts, orders.parameters
    found = {key: order_of(run.values(work)[0]) for key, work in orders.methods.items()}
    run.not_run |= {
        f"{orders.model.name}, {key[1]}": value["reason"]
        for key, work in orders.methods.items() if "reason" in (value := run.values(work)[0])
    }  # fmt: skip
    plans = {
        Arm(kind, method, n, seed): as_plan(kind, order[:n])
        for (kind, method, seed), order in found.items()
        for n in counts
        if kind != "block" and n <= len(order)
    }
    for (what, setting), work in orders.varied.items():
        order = order_of(run.values(work)[0])
        plans[Arm("attention", f"{what} {setting}", max(counts))] = as_plan("attention", order[: max(counts)])
    scores = run.importance(orders.item).first(run.section(Ablations).n_samples)
    for n in orders.blocks:
        plans[Arm("block", "blocks", n)] = select(scores, "block", n)
        plans[Arm("block", "blocks in a row", n)] = as_plan("block", found["block", f"{n} in a row", 0])
        for kind in ("joint", "attention"):
            if (plan := at_least(select(scores, "block", n), scores, kind, parameters)) is not None:
                plans[Arm("block", {"joint": "attention and MLP", "attention": "attention alone"}[kind], n)] = plan
    return plans


def parameters_of(model: torch.nn.Module, n_layers: int) -> dict[str, int]:
    """Parameters of one attention and of one MLP of a model, with their norms; of the middle layer."""
    count = lambda: sum(p.numel() for p in model.parameters())  # noqa: E731
    whole, found = count(), {}
    for kind in ("attention", "mlp"):
        with skipping(model, as_plan(kind, [n_layers // 2])):
            found[kind] = whole - count()
    return found


def at_least(budget: DropPlan, scores, kind: str, parameters: dict[str, int]) -> DropPlan | None:
    """The smallest plan of a kind with as many parameters as another; None if the kind has not that many."""
    wanted = n_parameters(budget, parameters)
    for n in range(1, len(drop_sequence(scores, kind))):
        plan = select(scores, kind, n)
        if n_parameters(plan, parameters) >= wanted:
            return plan
    return None


# ---- what is tested ---------------------------------------------------------------------------------------------------------


def _tested(run: Run, orders: Orders, plans: dict[Arm, DropPlan], tasks: dict[str, list]) -> Tested:
    """Text under all plans; tasks and continuations under those of methods alone."""
    settings, item = run.section(Ablations), orders.item
    methods = [arm for arm in plans if orders.has(arm)]
    asked = [arm for arm in methods if arm.n in settings.task_n]
    text = text_work(run, item, plans.values(), settings.text_samples)
    of_attention = {plans[arm].key: plans[arm] for arm in methods if arm.kind == "attention"}
    return Tested(
        orders, plans, methods, asked, text,
        tasks=task_work(run, item.model, tasks, [plans[arm] for arm in asked], settings.task_limit),
        continuation=ContinuationWork(**item.identity, corpus=item.corpus, tokens=text.tokens[:, : settings.prompt],
                                      plans=tuple(of_attention.values()), new_tokens=settings.new_tokens),
    )  # fmt: skip


def _rows(run: Run, tested: Tested) -> dict[str, list[dict]]:
    orders, plans, asked = tested.orders, tested.plans, tested.asked
    text = of_text(list(plans), -sample_values(run, tested.text, plans.values(), "nll"))
    of_attention = tested.of_attention
    continuation = of_text(of_attention, sample_values(run, tested.continuation, [plans[arm] for arm in of_attention], "same"))
    measures = {TEXT: text, CONTINUATION: continuation}
    tasks = task_values(run, tested.tasks, [plans[arm] for arm in asked]) if asked else []
    if tasks:
        measures[TASKS] = mean_of_tasks(tasks, asked)
    found = {key: (work, value) for key, work in orders.methods.items() if (value := run.values(work)[0])["layers"]}
    return {
        "models": [{"n_layers": orders.n_layers}],
        "methods": method_rows(found),
        "orders": order_rows(found),
        "agreement": agreement_rows(found),
        "quality": quality_rows(plans, tested.methods, measures, run.section(Ablations).stepwise),
        "tasks": task_rows(tasks, asked),
        "calibration": calibration_rows(plans, text, orders.varied),
        "blocks": block_rows(plans, text, orders.parameters),
    }


def paper_rows() -> list[dict]:
    """Tables 6 and 7: means of four tasks, in percent. Table 6 is captioned Mistral-7B, and has Llama-2-13B's numbers."""
    names = {"Random": "random", "Reverse": "reverse order", "Relative": "relative magnitude", "Cosine": COSINE,
             "wres": COSINE, "wores": "without residual"}  # fmt: skip
    rows = []
    for claim in [*paper.numbers("T6"), *paper.numbers("T7")]:
        method = next((label for part, label in names.items() if part in claim["id"].split(".")), None)
        if method is not None:
            model = "Llama-2-13B" if claim["id"].startswith("T6.") else claim["model"]
            kind = "mlp" if "MLP" in claim["method"] else "attention"
            rows.append({"model": model, "kind": kind, "method": method, "n": claim["n_drop"], "paper": claim["value"]})
    return rows
