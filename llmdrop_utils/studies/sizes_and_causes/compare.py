"""Models beside each other: what follows from the tables of other notebooks and from what notebook 11 measured.

Everything here is made from tables, so the models may have been measured in different runs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ...base import stats
from ...measure.causes import OF_LAYER
from ...report.rules import NOT_RUN
from ...report.tables import Column, Key, Tables, table
from ...report.verdicts import load_claims, verdict_of
from ..ablations.rows import BETTER, CONTINUATION, TASKS, TEXT, WORSE
from ..curve_rows import RETAINED
from ..gather import of_model
from ..keep_more.rows import CHOICES, ERROR, MEAN
from .exceptions import EXCEPTIONS, exception_rows
from .rows import DAMAGE, IMPORTANCE, TARGETS

SERIES = (  # a smaller and a larger model that were trained alike
    ("llama-2-13b", "llama-2-70b"),
    ("llama-3-8b", "llama-3-70b"),
    ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"),
)
ALL = "all models"
TOGETHER = {  # several causes at once: a linear model of their ranks
    "all causes": None,
    "without a forward pass": OF_LAYER,
}
KEPT = {  # measures of notebook 10 -> column, title and format
    MEAN: ("perplexity", "Perplexity over dense", ".2f"),
    CHOICES: ("choices", "Right choices", ".0%"),
    ERROR: ("error", "Calibration error", ".0%"),
    "copy": ("copied", "Copied", ".0%"),
    "continuation": ("continued", "Of dense continuations", ".0%"),
}
VERSION = ["model", "layers", "way", "n"]
SHARE = Column("share", "Share of the layers", ".0%", "share_low", "share_high")
CORRELATION = Column("correlation", "Rank correlation", "+.2f", "low", "high")
TABLES = {
    "depth": table("model kind layer", Column("importance", "Importance", ".4f", "low", "high"), "low high"),
    "reach": table(
        "model measure kind", Column("n", "Can be dropped", "d", "low", "high"), "low high",
        Column("tried_up_to", "Tried up to", "d"), Column("is_cut", "All that were tried"), SHARE, "share_low share_high",
    ),
    "half": table("model measure", Column("n", "Dropped", "d"), RETAINED, "retained_low retained_high"),
    "sizes": table(
        "what measure kind", Key("models", "Models"), Column("n_models", "Number of models", "d"),
        Column("change", "Change", "+.1%", "low", "high"), "low high",
    ),
    "overall": table(
        "cause target", Column("correlation", "Mean over models of the rank correlation", "+.2f", "low", "high"), "low high",
        Column("pooled", "Over all layers of all models", "+.2f"), Column("models", "Models", "d"),
        Column("same_sign", "With this sign", "d"),
    ),
    "left_out": table("model predictor target", CORRELATION, "low high"),
    "methods": table(
        "model method", Key("n", "Dropped", "d"), Column("against", "Compared with"),
        Column("text", "Text, nats a token", "+.3f", "text_low", "text_high"), "text_low text_high",
        Column("tasks", "Tasks", "+.1%", "tasks_low", "tasks_high"), "tasks_low tasks_high",
        Column("continuation", "Dense continuations", "+.1%", "continuation_low", "continuation_high"),
        "continuation_low continuation_high", Column("better", "Better in"), Column("worse", "Worse in"),
    ),
    "kept": table(
        "model", Key("layers", "Layers by"), Key("way", "Made up for by"), Key("n", "Dropped", "d"),
        *(Column(name, title, form, f"{name}_low", f"{name}_high") for name, title, form in KEPT.values()),
        " ".join(f"{name}_{end}" for name, *_ in KEPT.values() for end in ("low", "high")),
        Column("regained", "Of the nats lost regained", ".0%", "regained_low", "regained_high"), "regained_low regained_high",
        Column("parameters", "Parameters more", ",d"), Column("cache", "Cache, of the dense", ".0%"),
        Column("tokens", "Tokens read", ",d"), Column("seconds", "Seconds, layers chosen", ".0f"),
    ),
    "claims": table("model claim", Column("verdict", "Verdict"), Column("evidence", "Evidence")),
    "exceptions": EXCEPTIONS,
}  # fmt: skip


def compared(own: Tables, others: Mapping[str, Tables]) -> dict[str, list[dict]]:
    """Rows of all `TABLES`. `others`: notebook -> its tables, of the same models; empty if it was not run."""
    reach = list(_reach_rows(own, others["02_drop_curves"]))
    half = list(_half_rows(own, others["02_drop_curves"]))
    return {
        "depth": _depth_rows(others["01_similarity"]),
        "reach": reach,
        "half": half,
        "sizes": _size_rows(own, pd.DataFrame(reach), pd.DataFrame(half)),
        "overall": list(_overall_rows(own)),
        "left_out": list(_left_out_rows(own)),
        "methods": list(_method_rows(others["04_ablations"])),
        "kept": list(_kept_rows(others["10_keep_more"])),
        "claims": list(_claim_rows(own, others)),
        "exceptions": list(exception_rows(own, others)),
    }


# ---- sizes ------------------------------------------------------------------------------------------------------------------


def _depth_rows(tables: Tables) -> list[dict]:
    """Importance on the first corpus."""
    if not tables:
        return []
    rows = tables["importance"]
    first = rows[rows["corpus"] == rows.groupby("model")["corpus"].transform("first")]
    return first[["model", "kind", "layer", "importance", "low", "high"]].to_dict("records")


def _reach_rows(own: Tables, tables: Tables) -> Iterator[dict]:
    """How many of a kind can go, and which share of the layers that is."""
    layers = own["models"].set_index("model")["n_layers"]
    for measure, name in (("text", "reach"), ("tasks", "task_reach")):
        for row in tables[name].to_dict("records") if name in tables else []:  # tables of an older version lack one
            if row["model"] in layers.index:
                n = {"n": row["n"], "low": row["low"], "high": row["high"]}
                share = {
                    f"share{end}": n[key] / layers[row["model"]] for end, key in (("", "n"), ("_low", "low"), ("_high", "high"))
                }
                kept = {key: row[key] for key in ("model", "kind", "tried_up_to")}
                yield kept | {"measure": measure, "is_cut": row["n"] == row["tried_up_to"]} | n | share


def _half_rows(own: Tables, tables: Tables) -> Iterator[dict]:
    """What is retained without half of the attention layers, where just so many were dropped."""
    layers = own["models"].set_index("model")["n_layers"]
    for measure, name in (("text", "text"), ("tasks", "average")):
        rows = tables[name] if tables else pd.DataFrame(columns=["kind"])
        for row in rows[rows["kind"] == "attention"].to_dict("records"):
            if 2 * row["n"] == layers.get(row["model"]):
                kept = {key: row[key] for key in ("model", "n", "retained", "retained_low", "retained_high")}
                yield kept | {"measure": measure}


def _size_rows(own: Tables, reach: pd.DataFrame, half: pd.DataFrame) -> list[dict]:
    """Does more go, and is more retained, in larger models?

    Larger minus smaller of a series, with an interval from those of the two; and over all models the slope per tenfold number
    of parameters, with the wider of two intervals: from those of the models, and from their spread around the line.
    """
    parameters = own["models"].set_index("model")["parameters"]
    parts = []
    reach = reach[~reach["is_cut"].astype(bool)] if len(reach) else reach  # more of these may go than were tried
    if len(reach):
        ends = {"share": "value", "share_low": "value_low", "share_high": "value_high"}
        parts.append(
            reach.drop(columns=["n", "low", "high"]).rename(columns=ends).assign(what="share of the layers that can go")
        )
    if len(half):
        ends = {"retained": "value", "retained_low": "value_low", "retained_high": "value_high"}
        parts.append(half.rename(columns=ends).assign(kind="attention", what="retained without half"))
    found: list[dict] = []
    for (what, measure, kind), rows in pd.concat(parts).groupby(["what", "measure", "kind"], sort=False) if parts else []:
        rows = rows[["model", "value", "value_low", "value_high"]].dropna().set_index("model")
        about: dict[str, Any] = {"what": what, "measure": measure, "kind": kind}
        for small, large in SERIES:
            if {small, large} <= {*rows.index}:
                change, low, high = stats.difference_interval(tuple(rows.loc[large]), tuple(rows.loc[small]))
                between = {"models": f"{large} minus {small}", "n_models": 2}
                found.append(about | between | {"change": change, "low": low, "high": high})
        sizes = np.log10(parameters[rows.index].to_numpy(dtype=float))
        if len(set(sizes)) > 2:
            values, lows, highs = rows.to_numpy(dtype=float).T
            change, low, high = stats.slope_interval(sizes, values, lows, highs)
            spread = stats.slope_spread(sizes, values)  # of models around the line: the next one may lie as far off
            wider = {"change": change, "low": min(low, change - spread), "high": max(high, change + spread)}
            found.append(about | {"models": ALL, "n_models": len(rows)} | wider)
    return found


# ---- causes -----------------------------------------------------------------------------------------------------------------


def _overall_rows(own: Tables) -> Iterator[dict]:
    """Each cause over all models: the mean of their rank correlations (`stats.mean_correlation`), and the rank correlation over
    all layers of the models that have it, raw values beside each other."""
    for (cause, target), rows in own["predictors"].groupby(["cause", "target"], sort=False):
        correlations = rows["correlation"].to_numpy()
        mean, low, high = stats.mean_correlation(correlations)
        pairs = _values(own, cause).to_frame("x").join(_values(own, target).rename("y"), how="inner").dropna()
        yield {"cause": cause, "target": target, "correlation": mean, "low": low, "high": high,
               "pooled": float(stats.rank_correlation(pairs["x"].to_numpy(), pairs["y"].to_numpy())),
               "models": len(rows), "same_sign": int((correlations * mean > 0).sum())}  # fmt: skip


def _left_out_rows(own: Tables) -> Iterator[dict]:
    """How well the other models tell the order of one model's layers.

    Of a single cause they tell the sign: its correlation here, times the sign of the mean correlation there. Of several at
    once they tell the weights of a linear model of ranks; its interval comes from drawing layers of the model anew.
    """
    models, predictors = list(own["models"]["model"]), own["predictors"]
    for left_out in models if len(models) > 1 and len(predictors) else []:
        for row in predictors[predictors["model"] == left_out].to_dict("records"):
            same = predictors[(predictors["cause"] == row["cause"]) & (predictors["target"] == row["target"])]
            others = same[same["model"] != left_out]["correlation"]
            if len(others):
                sign = 1 if others.mean() >= 0 else -1
                ends = sorted([sign * row["low"], sign * row["high"]])
                yield {"model": left_out, "predictor": row["cause"], "target": row["target"],
                       "correlation": sign * row["correlation"], "low": ends[0], "high": ends[1]}  # fmt: skip
        for target in TARGETS:
            for name, causes in TOGETHER.items():
                yield {"model": left_out, "predictor": name, "target": target} | _predicted(own, left_out, target, causes)


def _predicted(own: Tables, left_out: str, target: str, causes: tuple[str, ...] | None) -> dict:
    chosen = [cause for cause in own["causes"]["cause"].unique() if causes is None or cause in causes]
    columns = [_centred_ranks(_values(own, cause)) for cause in chosen]
    x, y = pd.concat(columns, axis=1).fillna(0.0), _centred_ranks(_values(own, target))
    x, y = x.loc[y.index], y
    here = y.index.get_level_values("model") == left_out
    weights, *_ = np.linalg.lstsq(x[~here].to_numpy(), y[~here].to_numpy(), rcond=None)
    predicted, true = x[here].to_numpy() @ weights, y[here].to_numpy()
    layers = stats.drawn_blocks(len(true))
    low, high = stats.text_interval(stats.rank_correlation(predicted[layers], true[layers]), len(true))
    return {"correlation": float(stats.rank_correlation(predicted, true)), "low": low, "high": high}


def _values(own: Tables, name: str) -> pd.Series:
    """Values of a cause or target, by model and layer."""
    if name in TARGETS:
        return own["layers"].set_index(["model", "layer"])[{IMPORTANCE: "importance", DAMAGE: "kl"}[name]]
    rows = own["causes"]
    return rows[rows["cause"] == name].set_index(["model", "layer"])["value"]


def _centred_ranks(values: pd.Series) -> pd.Series:
    """Ranks within each model, from -0.5 to 0.5: models are compared by the order of their layers, not by scale."""
    groups = values.groupby(level="model")
    return (groups.rank() - 1) / (groups.transform("count") - 1) - 0.5


# ---- methods -----------------------------------------------------------------------------------------------------------------


def _method_rows(tables: Tables) -> Iterator[dict]:
    """Each other way to choose attention layers beside cosine, at the largest number for which all measures are there."""
    if not tables:
        return
    quality = tables["quality"][tables["quality"]["kind"] == "attention"]
    for model, rows in quality.groupby("model", sort=False):
        of_all = [n for n, at_n in rows.groupby("n") if {TEXT, TASKS, CONTINUATION} <= {*at_n["measure"]}]
        for method, found in rows[rows["n"] == max(of_all, default=None)].groupby("method", sort=False):
            if method == (against := found["against"].iloc[0]):
                continue
            row = {"model": model, "method": method, "n": of_all[-1], "against": against}
            for one in found.itertuples():
                ends = {f"{one.measure}_low": one.difference_low, f"{one.measure}_high": one.difference_high}
                row |= {one.measure: one.difference} | ends
            told = {word: ", ".join(found[found["outcome"] == word]["measure"]) for word in (BETTER, WORSE)}
            yield row | told


# ---- ways to make up for what is dropped ------------------------------------------------------------------------------------


def _kept_rows(tables: Tables) -> Iterator[dict]:
    """Each version of a model that notebook 10 compares, the dense one first: what it keeps, costs, and took to make."""
    if not tables:
        return
    nothing = {"parameters": 0, "cache": 1.0, "tokens": 0, "seconds": 0.0}
    made = {
        tuple(row[key] for key in VERSION): {name: row[name] for name in nothing} for row in tables["made"].to_dict("records")
    }
    regained = tables["regained"].query("against == 'plain'").set_index(VERSION)[["regained", "low", "high"]]
    for version, rows in tables["quality"].groupby(VERSION, sort=False):
        found = rows.set_index("measure")[["value", "low", "high"]].reindex(list(KEPT))
        row = dict(zip(VERSION, version, strict=True)) | made.get(version, nothing)
        of_columns = {name: found.loc[measure] for measure, (name, *_) in KEPT.items()}
        for name, values in (of_columns | {"regained": regained.reindex([version]).iloc[0]}).items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        yield row


# ---- claims -----------------------------------------------------------------------------------------------------------------


def _claim_rows(own: Tables, others: Mapping[str, Tables]) -> Iterator[dict]:
    """The verdict on each claim of other notebooks from the tables of each model alone."""
    for model in own["models"]["model"]:
        for claim in load_claims():
            if claim["notebook"] in others and "check" in claim:
                verdict, evidence = verdict_of(claim, of_model(others[claim["notebook"]], model))
                if verdict != NOT_RUN:
                    yield {"model": model, "claim": claim["id"], "verdict": verdict, "evidence": evidence}
