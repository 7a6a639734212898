"""Notebook 05: how much faster models get."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd

from ...base import files, stats
from ...base.errors import NotAvailable
from ...base.provenance import code_provenance
from ...base.store import Store
from ...drop.plan import DropPlan
from ...measure.speed import NOISY
from ...models.locate import LocatedModel
from ...report.tables import Tables, write_tables
from ..curves import paper_name, paper_rows
from ..drop_curves.study import drop_curves
from ..profile import Profile
from ..queue import distinct, measure_all, not_run_table
from ..work import SpeedWork, plan_key
from .loads import Cell, models_or_shapes, n_layers_of, plans_of, speed_work


def speedup(profile: Profile, force: bool = False) -> Tables:
    """Notebook 05: how much faster models get, beside what they lose (notebook 02), and beside what the device could do.

    Measures what is missing (everything if `force`), writes the tables to data/results/<run>/05_speedup and returns them.
    A model that cannot be had is measured with random weights if its shape is known, under the name "random:<model>":
    speed does not depend on values. Raises LLMDropError if no model can be used.
    """
    store, not_run = Store(), {}
    located = models_or_shapes(profile, not_run)
    quality = _quality(located, profile, not_run)
    work, plans = [], {}
    for model in located:
        plans[model.name] = plans_of(model, profile, store, not_run)
        work += speed_work(model, plans[model.name], profile)
    eager = [item for item in work if item.load.backend == "eager"]
    compiled = [item for item in work if item.load.backend == "compiled"]
    measure_all(eager, store, force, profile.several, not_run)
    without: dict[str, str] = {}
    try:
        measure_all(compiled, store, force, profile.several, without)
    except NotAvailable as reason:
        without[located[0].name] = str(reason)
    not_run |= {f"{name}, compiled back end": reason for name, reason in without.items()}
    work = [item for item in work if all(store.get(key) for key in item.keys)]
    timed = [t for item in work for t in _timed(item, plans[item.model.name], store)]
    timings = pd.DataFrame([t.as_row() for t in [*timed, *_put_together(timed, profile, not_run)]])
    tables = {
        "speed": timings,
        "trade": _trade(timings, profile, quality),
        "protocol": _protocol(timings, profile),
        "crossover": _crossover(timings, profile),
        "limits": _limits(work, store),
        "paper": _paper(located),
        "models": pd.DataFrame([{"model": m.name, "n_layers": n_layers_of(m), "device": _device_name()} for m in located]),
        "not_run": not_run_table(not_run),
    }
    provenance = distinct([store.get(key)["provenance"] for item in work for key in item.keys])
    return write_tables(tables, files.RESULTS / profile.run / "05_speedup", provenance)


def _quality(located: list[LocatedModel], profile: Profile, not_run: dict[str, str]) -> pd.DataFrame:
    """Mean task scores of notebook 02, which are measured if they are missing; none for random weights."""
    if all(model.is_random for model in located):
        return pd.DataFrame()
    try:
        return drop_curves(profile)["average"]
    except NotAvailable as reason:
        not_run["quality"] = str(reason)
        return pd.DataFrame()


# ---- from values to rows --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Timed:
    """One load under one plan, with the dense model's of the same rounds."""

    row: dict  # what was timed, and its place in the tables
    seconds: np.ndarray  # (repeats,)
    floor: float
    dense_seconds: np.ndarray
    dense_floor: float

    def as_row(self) -> dict:
        """With median, spread, speed-up over dense, and both beside what the device could do."""
        ratio = self.dense_seconds / self.seconds
        low, high = stats.interval(stats.bootstrap_medians(ratio))
        median = np.median(self.seconds)
        quarter, three = np.quantile(self.seconds, [0.25, 0.75])
        spread = (three - quarter) / median
        return self.row | {"seconds": median, "spread": spread, "noisy": bool(spread > NOISY), "speedup": np.median(ratio),
                           "speedup_low": low, "speedup_high": high, "predicted": self.dense_floor / self.floor,
                           "share_of_limit": self.floor / median}  # fmt: skip


def _timed(item: SpeedWork, plans: dict[Cell, DropPlan], store: Store) -> list[_Timed]:
    """What an item measured: the dense model, and each plan."""
    names = {json.dumps(plan_key(plan)): cell for cell, plan in plans.items()}
    timed, load = [], item.load
    for key in item.keys:
        value = store.get(key)["value"]
        dense, cells = value["dense"], {("dense", 0): value["dense"]} if not timed else {}
        for (kind, n), measured in (cells | {names[json.dumps(key["plan"])]: value["plan"]}).items():
            row = {"model": item.model.name, "backend": load.backend, "what": load.what, "batch_size": measured["batch_size"],
                   "context": load.context, "new_tokens": load.new_tokens, "room": load.room, "kind": kind, "n": n,
                   "kv_bytes": measured["kv_bytes"], "peak_bytes": measured["peak_bytes"], "fill": item.fill}  # fmt: skip
            times = np.array(measured["seconds"]), measured["floor_seconds"]
            timed.append(_Timed(row, *times, np.array(dense["seconds"]), dense["floor_seconds"]))
    return timed


def _put_together(timed: list[_Timed], profile: Profile, not_run: dict[str, str]) -> list[_Timed]:
    """Whole generations from samples: prefill, and decoding integrated over the contexts it goes through.

    For the paper's protocol, and for the generation that is also timed whole.
    """
    part, out = profile.speed, []
    for backend, is_protocol in (("eager", True), ("eager", False), ("compiled", True)):
        prompt, new_tokens = (part.prompt, part.new_tokens) if is_protocol else part.whole
        fill, batch = (part.batch_size is None, part.batch_size) if is_protocol else (False, 1)
        prefill: dict[tuple, _Timed] = {}
        decode: dict[tuple, dict[int, _Timed]] = {}
        for t in timed:
            row, cell = t.row, (t.row["model"], t.row["kind"], t.row["n"])
            if row["fill"] != fill or not (fill or row["batch_size"] == batch):
                continue
            if row["what"] == "prefill" and row["context"] == prompt:
                prefill[cell] = t
            if row["what"] == "decode" and row["backend"] == backend and prompt <= row["context"] <= prompt + new_tokens:
                decode.setdefault(cell, {})[row["context"]] = t
        # What a static cache attends over does not depend on how full it is: one sample stands for all of its steps.
        ends = {prompt, prompt + new_tokens} if backend == "eager" else {prompt}
        for cell, samples in decode.items():
            if cell not in prefill or not ends <= set(samples):
                continue
            if len({t.row["batch_size"] for t in (prefill[cell], *samples.values())}) > 1:
                not_run[f"{cell[0]}, generation from samples, {backend}"] = (
                    "Memory ran out at some of its contexts, so they were timed with different batches. "
                    "Set the profile's speed.batch_size to a number."
                )
                continue
            out.append(_integrated(prefill[cell], samples, prompt, new_tokens))
    return out


def _integrated(prefill: _Timed, decode: dict[int, _Timed], prompt: int, new_tokens: int) -> _Timed:
    """Prefill and all decode steps but the first token's, which the prefill gives; times between samples by a line."""
    contexts = sorted(decode)
    at = prompt + np.arange(new_tokens - 1) + 0.5  # a step reads the prompt and the tokens before it, samples span several
    over = lambda values: np.interp(at, contexts, values).sum()  # noqa: E731
    samples = [decode[context] for context in contexts]
    seconds, dense = (
        getattr(prefill, name) + np.array([over(repeat) for repeat in np.array([getattr(t, name) for t in samples]).T])
        for name in ("seconds", "dense_seconds")
    )
    floor, dense_floor = (
        getattr(prefill, name) + over([getattr(t, name) for t in samples]) for name in ("floor", "dense_floor")
    )
    load = {"what": "generation from samples", "context": prompt, "new_tokens": new_tokens}
    return _Timed(samples[-1].row | load, seconds, floor, dense, dense_floor)


def _trade(timings: pd.DataFrame, profile: Profile, quality: pd.DataFrame) -> pd.DataFrame:
    """Points lost for each percent of speed-up (paper, eq. 7: SDR), with the widest interval that both intervals allow."""
    columns = ["model", "backend", "kind", "n", "speedup", "speedup_low", "speedup_high", "noisy", "points_lost",
               "points_lost_low", "points_lost_high", "retained", "sdr", "sdr_low", "sdr_high"]  # fmt: skip
    part, table = profile.speed, []
    rows = timings[(timings["what"] == "generation from samples") & (timings["kind"] != "dense")]
    for row in rows[(rows["context"] == part.prompt) & (rows["new_tokens"] == part.new_tokens)].itertuples():
        lost = (
            quality[(quality["model"] == row.model) & (quality["kind"] == row.kind) & (quality["n"] == row.n)]
            if len(quality)
            else quality
        )
        entry = {name: getattr(row, name) for name in columns[:8]}
        if len(lost):
            lost = lost.iloc[0]
            entry |= {name: lost[name] for name in columns[8:12]}
            entry["sdr"] = lost["points_lost"] / (100 * (row.speedup - 1))
            if row.speedup_low > 1:  # a division by what may be zero has no interval
                corners = [
                    lost[f"points_lost_{a}"] / (100 * (getattr(row, f"speedup_{b}") - 1))
                    for a, b in itertools.product(("low", "high"), repeat=2)
                ]
                entry |= {"sdr_low": min(corners), "sdr_high": max(corners)}
        table.append(entry)
    return pd.DataFrame(table, columns=columns)


def _protocol(timings: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """The generation that was timed whole, against the one put together from samples."""
    prompt, new_tokens = profile.speed.whole
    same = timings[(timings["context"] == prompt) & (timings["new_tokens"] == new_tokens)]
    keys = ["model", "backend", "kind", "n"]
    whole = same[same["what"] == "generation"].set_index(keys)
    sampled = same[same["what"] == "generation from samples"].set_index(keys)
    rows = []
    for key in whole.index.intersection(sampled.index):
        w, s = whole.loc[key], sampled.loc[key]
        rows.append(dict(zip(keys, key, strict=True)) | {
            "prompt": prompt, "new_tokens": new_tokens, "whole": w["seconds"], "whole_spread": w["spread"],
            "from_samples": s["seconds"], "from_samples_spread": s["spread"], "ratio": s["seconds"] / w["seconds"],
            "steps_whole": new_tokens - 1, "steps_sampled": 2 * profile.speed.steps,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=[*keys, "prompt", "new_tokens", "whole", "whole_spread", "from_samples",
                                       "from_samples_spread", "ratio", "steps_whole", "steps_sampled"])  # fmt: skip


def _crossover(timings: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """The context from which n attention layers less save more time than n MLP layers less, measured and predicted."""
    rows = []
    n = profile.speed.sweep_n
    swept = timings[(timings["n"] == n) & timings["what"].isin(["prefill", "decode"]) & timings["room"].isna()]
    swept = swept[~swept["fill"]]
    for (model, backend, what, size), group in swept.groupby(["model", "backend", "what", "batch_size"], sort=False):
        group = group[group["kind"].isin(["attention", "mlp"])].drop_duplicates(["kind", "context"])
        table = group.pivot(index="context", columns="kind").dropna(subset=[("speedup", "attention"), ("speedup", "mlp")])
        if len(table) < 2:
            continue
        gain = {c: _crossing(table.index, table[c, "attention"] - table[c, "mlp"]) for c in ("speedup", "predicted")}
        apart = (table["speedup_low", "attention"] > table["speedup_high", "mlp"]) | (
            table["speedup_low", "mlp"] > table["speedup_high", "attention"]
        )
        rows.append({"model": model, "backend": backend, "what": what, "batch_size": size, "n": n,
                     "tried_from": table.index[0], "tried_to": table.index[-1], "measured": gain["speedup"],
                     "predicted": gain["predicted"], "apart_somewhere": bool(apart.any())})  # fmt: skip
    columns = ["model", "backend", "what", "batch_size", "n", "tried_from", "tried_to", "measured", "predicted",
               "apart_somewhere"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _crossing(x, y) -> float:
    """Where y turns positive, between neighbours on a logarithmic x; 0 if it always is, infinity if it never is."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if y[0] > 0:
        return 0.0
    above = np.flatnonzero(y > 0)
    if not len(above):
        return float("inf")
    i = above[0]
    share = -y[i - 1] / (y[i] - y[i - 1])
    return float(np.exp(np.log(x[i - 1]) + share * (np.log(x[i]) - np.log(x[i - 1]))))


def in_words(crossing: float, tried_from: int, tried_to: int) -> str:
    """Where a cross-over lies, or that there is none between the contexts that were tried."""
    if crossing == 0:
        return f"below {tried_from:,} tokens"
    return f"beyond {tried_to:,} tokens" if np.isinf(crossing) else f"at about {crossing:,.0f} tokens"


def _limits(work: list[SpeedWork], store: Store) -> pd.DataFrame:
    """What the device could do, as measured beside each timing: the best of them."""
    rows = []
    for model, items in itertools.groupby(work, key=lambda item: item.model.name):
        found = [store.get(key)["value"]["limits"] for item in items for key in item.keys]
        rows.append({"model": model} | {name: max(f[name] for f in found) for name in ("bandwidth", "rate")})
    return pd.DataFrame(rows, columns=["model", "bandwidth", "rate"])


def _paper(located: list[LocatedModel]) -> pd.DataFrame:
    rows = [{"model": model.name} | row for model in located for row in paper_rows(paper_name(model))]
    table = pd.DataFrame(rows, columns=["model", "kind", "n", "what", "paper"])
    return table[table["what"].str.contains("speedup", case=False)] if len(table) else table


def _device_name() -> str:
    code = code_provenance()
    return code["gpus"][0] if code["gpus"] else f"{code['processor']}, {code['cpu_threads']} threads"
