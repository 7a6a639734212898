"""Notebook 06: bytes of keys and values by formula, in live caches and in the paper, and what fits into a GPU."""

import itertools
import json

import numpy as np
import pandas as pd
import torch
from transformers.cache_utils import DynamicCache

from ...base import files
from ...base.provenance import code_provenance
from ...drop.plan import DropPlan
from ...drop.units import dropped
from ...measure.floors import cache_bytes, kv_bytes
from ...models.families import find_anatomy, is_full_attention
from ...models.load import default_dtype, load_config, model_of_shape
from ...models.locate import LocatedModel, locate_model
from ...report.tables import Tables, write_tables
from ...selection.methods import select_last
from ...sources.catalogue import catalogue
from ..profile import Profile
from ..queue import not_run_table
from ..speedup.loads import models_or_shapes, n_layers_of
from ..work import DENSE


def kv_cache(profile: Profile, force: bool = False) -> Tables:
    """Notebook 06: bytes of keys and values by formula, in live caches and in the paper, and what fits into a GPU.

    Counting takes seconds, so nothing is stored. The paper's models are run on torch's device "meta", where tensors have
    shapes and no memory, at the paper's full batch; the profile's models at a length that fits. As `speedup` otherwise.
    """
    not_run: dict[str, str] = {}
    located = models_or_shapes(profile, not_run)
    claims = json.loads((files.ROOT / "data" / "paper_claims.json").read_text(encoding="utf-8"))["claims"]
    shapes = {name: locate_model(f"random:{name}") for name in catalogue()["shapes"]}
    paper = [_paper_cache_row(c, shapes) for c in claims if c["id"].startswith("T4.")]
    caches = [row for model in located for row in _cache_rows(model, profile)]
    fits = [row for name, model in shapes.items() if _paper_has(name, claims) for row in _fit_rows(name, model)]
    tables = {"paper": paper, "caches": caches, "fits": fits}
    tables = {name: pd.DataFrame(rows) for name, rows in tables.items()} | {"not_run": not_run_table(not_run)}
    dtype = str(default_dtype()).removeprefix("torch.")
    about = [{"model": model.name, "model_identity": model.identity, "dtype": dtype} for model in located]
    return write_tables(tables, files.RESULTS / profile.run / "06_kv_cache", [code_provenance() | entry for entry in about])


# ---- the cache --------------------------------------------------------------------------------------------------------


def _counted(model: LocatedModel, plan: DropPlan, batch_size: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values after `length` tokens, counted in the cache of a model without weights."""
    shape = model_of_shape(model, dtype, "meta")
    cache = DynamicCache(config=shape.config)
    with torch.inference_mode(), dropped(shape, plan):
        find_anatomy(shape).decoder(torch.zeros(batch_size, length, dtype=torch.long, device="meta"), past_key_values=cache)
    return cache_bytes(cache)


def _paper_cache_row(claim: dict, shapes: dict[str, LocatedModel]) -> dict:
    """A row of Table 4: "KV cache, seq 2048, batch 64, 32 attention layers, 16-bit"."""
    model = shapes[{"mistral-7b": "mistral-7b-v0.1"}.get(claim["model"].lower(), claim["model"].lower())]
    length, batch_size = (int(claim["what"].split(f"{word} ")[1].split(",")[0]) for word in ("seq", "batch"))
    plan = select_last(n_layers_of(model), "attention", claim["n_drop"]) if claim["n_drop"] else DENSE
    config = load_config(model)
    counted = _counted(model, plan, batch_size, length, torch.bfloat16)
    formula = kv_bytes(config, plan, batch_size, length, 2)
    return {"model": claim["model"], "n_layers": n_layers_of(model), "n": claim["n_drop"], "batch_size": batch_size,
            "length": length, "paper_gib": claim["value"], "formula_bytes": formula, "counted_bytes": counted,
            "dense_bytes": kv_bytes(config, DENSE, batch_size, length, 2)}  # fmt: skip


def _cache_rows(model: LocatedModel, profile: Profile) -> list[dict]:
    """The profile's own models: formula and count at the lengths of the protocol, dense and dropped."""
    config, dtype, n_layers = load_config(model), default_dtype(), n_layers_of(model)
    rows = []
    for n in [0, *(n for n in profile.speed.n_drop.get("attention", []) if n < n_layers)]:
        plan = select_last(n_layers, "attention", n) if n else DENSE
        for length in profile.speed.contexts:
            rows.append(
                {
                    "model": model.name,
                    "n_layers": n_layers,
                    "n": n,
                    "length": length,
                    "full_attention": is_full_attention(config),
                    "dense_bytes": kv_bytes(config, DENSE, 1, length, dtype.itemsize),
                    "formula_bytes": kv_bytes(config, plan, 1, length, dtype.itemsize),
                    "counted_bytes": _counted(model, plan, 1, length, dtype),
                }
            )
    return rows


GPUS = {"48 GB": 48e9, "80 GB": 80e9, "141 GB": 141e9}  # RTX 6000 Ada (the paper's), A100 and H100, H200


def _fit_rows(name: str, model: LocatedModel) -> list[dict]:
    """Largest batch at 4,096 tokens and longest context of one sequence, in 16 bit, with a tenth of the memory kept free."""
    config, n_layers = load_config(model), n_layers_of(model)
    shape = model_of_shape(model, torch.bfloat16, "meta")
    rows = []
    for n in (0, n_layers // 4, n_layers // 2):
        plan = select_last(n_layers, "attention", n) if n else DENSE
        with dropped(shape, plan):
            weights = 2 * sum(p.numel() for p in shape.parameters())
        for (gpu, memory), count in itertools.product(GPUS.items(), (1, 4)):
            free = max(0.0, 0.9 * memory * count - weights)
            longest = free / kv_bytes(config, plan, 1, 1, 2) if is_full_attention(config) else np.nan  # a window ends growth
            rows.append(
                {
                    "model": name,
                    "n": n,
                    "gpu": gpu,
                    "gpus": count,
                    "weights_bytes": weights,
                    "batch_at_4096": int(free // kv_bytes(config, plan, 1, 4096, 2)),
                    "context_of_one": np.floor(longest),
                }
            )
    return rows


def _paper_has(name: str, claims: list[dict]) -> bool:
    return any(c["id"].startswith("T4.") and name.removesuffix("-v0.1") == c["model"].lower() for c in claims)
