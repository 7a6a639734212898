"""Notebook 06: bytes of keys and values by formula, in live caches and in the paper, and what fits into a GPU."""

import itertools

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ...base.provenance import code_provenance
from ...dropping.plan import DropPlan
from ...dropping.units import dropped
from ...measure.floors import cache_bytes, kv_bytes
from ...models.cache_shape import is_full_attention
from ...models.families import find_anatomy
from ...models.load import load_config, model_of_shape
from ...models.locate import LocatedModel, locate_model
from ...report.tables import Column, Key, Tables, table
from ...selection.methods import select_last
from ...sources.catalogue import catalogue
from .. import paper
from ..run import Run, study
from ..speedup.loads import Speed, models_or_shapes, n_layers_of
from ..work import DENSE

GPUS = {"48 GB": 48e9, "80 GB": 80e9, "141 GB": 141e9}  # RTX 6000 Ada (the paper's), A100 and H100, H200
KEPT_FREE = 0.1  # of the memory, for activations and everything else

LAYERS = (Column("n_layers", "Layers", "d"), Key("n", "Attention dropped", "d"))
FORMULA, COUNTED = Column("formula_bytes", "By the formula, bytes", ",d"), Column("counted_bytes", "Counted, bytes", ",d")
DENSE_BYTES = Column("dense_bytes", "Dense, bytes", ",d")
TABLES = {
    "paper": table(
        "model", *LAYERS, Column("batch_size", "Batch", "d"), Key("length", "Tokens", ",d"),
        Column("paper_gib", "In the paper, GB", "g"), FORMULA, COUNTED, DENSE_BYTES,
    ),
    "caches": table(
        "model", *LAYERS, Key("length", "Tokens", ",d"), Column("full_attention", "Every layer keeps every token"),
        DENSE_BYTES, FORMULA, COUNTED,
    ),
    "fits": table(
        "model", Key("n", "Attention dropped", "d"), Key("gpu", "GPU"), Key("gpus", "GPUs", "d"),
        Column("weights_bytes", "Weights, bytes", ",d"), Column("batch_at_4096", "Sequences of 4,096 tokens", ",d"),
        Column("context_of_one", "Longest context of one sequence", ",.0f"),
    ),
}  # fmt: skip


@study("06_kv_cache", needs=[Speed], tables=TABLES, models=models_or_shapes)
def kv_cache(run: Run) -> Tables:
    """Notebook 06: bytes of keys and values by formula, in live caches and in the paper, and what fits into a GPU.

    Counting takes seconds, so nothing is stored. Caches are filled on torch's device "meta", where tensors have shapes and no
    memory: the paper's at its full batch and length.
    """
    settings, dtype = run.section(Speed), run.profile.dtype
    located, unavailable = models_or_shapes(run.profile)
    run.not_run |= unavailable
    caches: list[dict] = []
    for model in located:
        with run.one_of(model):
            caches += cache_rows(model, settings.n_drop.get("attention", []), settings.contexts, dtype)
    shapes = {name: locate_model(f"random:{name}") for name in catalogue()["shapes"]}
    claims, names = paper.numbers("T4"), {paper.name_in_tables(model): model for model in shapes.values()}
    in_paper = {claim["model"].lower() for claim in claims}
    tables = {
        "paper": [paper_row(claim, names[claim["model"].lower()]) for claim in claims],
        "caches": caches,
        "fits": [
            row for name, model in shapes.items() if paper.name_in_tables(model) in in_paper for row in fit_rows(name, model)
        ],
    }
    about = {"dtype": str(dtype).removeprefix("torch.")}
    more = [code_provenance() | about | {"model": model.name, "model_identity": model.identity} for model in located]
    return run.write(tables, [], more)


# ---- the cache --------------------------------------------------------------------------------------------------------


def counted_bytes(model: nn.Module, plan: DropPlan, batch_size: int, length: int) -> int:
    """Bytes of keys and values after `length` tokens of each sequence, counted in the cache of a model on "meta"."""
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    with torch.inference_mode(), dropped(model, plan):
        find_anatomy(model).decoder(tokens, past_key_values=cache, use_cache=True)
    return cache_bytes(cache)


def paper_row(claim: dict, model: LocatedModel) -> dict:
    """A row of Table 4: "KV cache, seq 2048, batch 64, 32 attention layers, 16-bit".

    The paper prints 52 and 26 GB for Llama-2-13B, where its own formula gives 50 and 25 GiB: a slip. The other rows equal the
    formula in GiB.
    """
    config, n_layers, n = load_config(model), n_layers_of(model), claim["n_drop"]
    length, batch_size = (int(claim["what"].split(f"{word} ")[1].split(",")[0]) for word in ("seq", "batch"))
    plan = _last(n_layers, n)
    formula, dense = (kv_bytes(config, p, batch_size, length, 2) for p in (plan, DENSE))
    counted = counted_bytes(model_of_shape(model, torch.bfloat16, "meta"), plan, batch_size, length)
    return {"model": claim["model"], "n_layers": n_layers, "n": n, "batch_size": batch_size, "length": length,
            "paper_gib": claim["value"], "formula_bytes": formula, "counted_bytes": counted,
            "dense_bytes": dense}  # fmt: skip


def cache_rows(model: LocatedModel, n_drop: list[int], lengths: list[int], dtype: torch.dtype) -> list[dict]:
    """A model of the run: formula and count for one sequence at each length, dense and with the last n layers dropped."""
    config, n_layers = load_config(model), n_layers_of(model)
    shape = model_of_shape(model, dtype, "meta")
    rows = []
    for n in [0, *(n for n in n_drop if n < n_layers)]:
        plan = _last(n_layers, n)
        for length in lengths:
            formula, dense = (kv_bytes(config, p, 1, length, dtype.itemsize) for p in (plan, DENSE))
            rows.append({"model": model.name, "n_layers": n_layers, "n": n, "length": length,
                         "full_attention": is_full_attention(config), "dense_bytes": dense, "formula_bytes": formula,
                         "counted_bytes": counted_bytes(shape, plan, 1, length)})  # fmt: skip
    return rows


def fit_rows(name: str, model: LocatedModel) -> list[dict]:
    """Largest batch at 4,096 tokens and longest context of one sequence, in 16 bit, with a tenth of the memory kept free.

    NaN for the longest context where windows slide: beyond them the cache does not grow.
    """
    config, n_layers = load_config(model), n_layers_of(model)
    shape = model_of_shape(model, torch.bfloat16, "meta")
    rows = []
    for n in (0, n_layers // 4, n_layers // 2):
        plan = _last(n_layers, n)
        with dropped(shape, plan):
            weights = 2 * sum(p.numel() for p in shape.parameters())
        for (gpu, memory), count in itertools.product(GPUS.items(), (1, 4)):
            free = max(0.0, (1 - KEPT_FREE) * memory * count - weights)
            longest = free / kv_bytes(config, plan, 1, 1, 2) if is_full_attention(config) else np.nan
            rows.append({"model": name, "n": n, "gpu": gpu, "gpus": count, "weights_bytes": weights,
                         "batch_at_4096": int(free // kv_bytes(config, plan, 1, 4096, 2)),
                         "context_of_one": np.floor(longest)})  # fmt: skip
    return rows


def _last(n_layers: int, n: int) -> DropPlan:
    return select_last(n_layers, "attention", n) if n else DENSE
