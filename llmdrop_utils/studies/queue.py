"""The loop that measures what no record holds, one model in memory at a time.

Values are stored as soon as they are there, so a killed run goes on where it stopped.
"""

import gc
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from ..base.errors import each_available
from ..base.provenance import code_provenance, peak_memory
from ..base.store import Store
from ..models.families import position_limit
from ..models.series import weights_at_hand
from ..sources.texts import text_beginning
from .work import Work


def measure_missing(work: Sequence[Work], store: Store, force: bool, several: bool) -> dict[str, str]:
    """Measure what the store lacks (everything if `force`), with a bar for the whole.

    Returns why a model could not be measured (name -> reason), if it is one of `several`; the others go on.
    """
    missing, queued = [], set()
    for item in work:
        paths = [store.path(key) for key in item.keys]
        lacking = [i for i, key in enumerate(item.keys) if paths[i] not in queued and (force or store.get(key) is None)]
        queued.update(paths)  # two items may want the same value
        if lacking:
            missing.append(item.only(lacking))
    if not missing:
        return {}
    total = sum(item.tokens_to_pass for item in missing)
    with tqdm(total=total, unit=" tokens", unit_scale=True, mininterval=2, desc="measuring", file=sys.stderr) as bar:
        by_model: dict[str, list[Work]] = {}
        for item in missing:
            by_model.setdefault(item.model.name, []).append(item)

        def measure(name: str) -> None:
            _measure_model(by_model[name], store, bar)

        _, reasons = each_available(by_model, measure, "models", several=several)
    return reasons


def _measure_model(items: list[Work], store: Store, bar: tqdm) -> None:
    """Load the model that all items share, measure them, and let go of its memory, errors included."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    model = None
    try:
        with weights_at_hand(items[0].model), peak_memory() as peak:
            model, tokenizer = items[0].loaded()
            for item in items:
                bar.set_postfix_str(f"{item.model.name}, {next(iter(item.about.values()))}")
                started = time.monotonic()
                values = item.measure(model, tokenizer, bar.update)
                provenance = _provenance(item, model, tokenizer, time.monotonic() - started, peak())
                for key, value in zip(item.keys, values, strict=True):
                    store.put(key, value, provenance)
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _provenance(item: Work, model: torch.nn.Module, tokenizer, seconds: float, peak: int) -> dict:
    """Where values come from; `seconds` is the time of all that were measured together."""
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return code_provenance() | item.about | {
        "model": item.model.name,
        "model_identity": item.model.identity,
        "dtype": str(item.dtype).removeprefix("torch."),
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "texts_begin_with": text_beginning(tokenizer) if callable(tokenizer) else [],  # begin-of-text token; []: none
        "positions": position_limit(model.config),  # that the model knows; samples are no longer
        "values_together": len(item.keys),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,  # since the model was loaded: of this process, or of all GPUs
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
