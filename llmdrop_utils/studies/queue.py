"""The loop that measures what no record holds, one model in memory at a time.

Values are stored as soon as they are there, so a killed run goes on where it stopped.
"""

import contextlib
import gc
import itertools
import json
import resource
import sys
import time

import pandas as pd
import torch
from tqdm import tqdm

from ..base.errors import DiskFull, LLMDropError
from ..base.provenance import code_provenance
from ..base.store import Store
from ..models.load import load_located
from ..models.locate import LocatedModel
from ..models.series import weights_at_hand
from ..report.tables import without_paths
from .work import Work


def distinct(provenance: list[dict]) -> list[dict]:
    """Values that were measured together share one entry."""
    return list({json.dumps(entry, sort_keys=True): entry for entry in provenance}.values())


# ---- measuring ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_of_many(model: LocatedModel, several: bool, not_run: dict[str, str]):
    """What keeps one of several models from being measured goes into `not_run`; the others are still measured."""
    try:
        yield
    except DiskFull:
        raise
    except LLMDropError as reason:
        if not several:
            raise
        not_run[model.name] = str(reason)


def not_run_table(not_run: dict[str, str]) -> pd.DataFrame:
    """What could not be run, and why, without paths of this machine."""
    rows = [{"what": what, "reason": without_paths(reason)} for what, reason in not_run.items()]
    return pd.DataFrame(rows, columns=["what", "reason"])


def measure_all(work: list[Work], store: Store, force: bool, several: bool, not_run: dict[str, str]) -> None:
    """Measure what the store lacks (everything if `force`), one model in memory at a time, with a bar for the whole."""
    missing, queued = [], set()
    for item in work:
        paths = [store.path(key) for key in item.keys]
        lacking = [i for i, key in enumerate(item.keys) if paths[i] not in queued and (force or store.get(key) is None)]
        queued.update(paths)  # two items may want the same value
        if lacking:
            missing.append(item.only(lacking))
    if not missing:
        return
    total = sum(item.tokens_to_pass for item in missing)
    with tqdm(total=total, unit=" tokens", unit_scale=True, mininterval=2, desc="measuring", file=sys.stderr) as bar:
        for model, items in itertools.groupby(missing, key=lambda item: item.model):
            with one_of_many(model, several, not_run):
                _measure_model(list(items), store, bar)


def _measure_model(items: list[Work], store: Store, bar: tqdm) -> None:
    """Load the model that all items share, measure them, and let go of its memory, errors included."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    model = None
    try:
        with weights_at_hand(items[0].model):
            model, tokenizer = load_located(items[0].model, items[0].dtype)
            for item in items:
                bar.set_postfix_str(f"{item.model.name}, {next(iter(item.about.values()))}")
                started = time.monotonic()
                values = item.measure(model, tokenizer, bar.update)
                provenance = _provenance(item, model, time.monotonic() - started)
                for key, value in zip(item.keys, values, strict=True):
                    store.put(key, value, provenance)
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _provenance(item: Work, model: torch.nn.Module, seconds: float) -> dict:
    """Where values come from; `seconds` is the time of all that were measured together."""
    devices = sorted({str(p.device) for p in model.parameters()})
    # On a CPU, the peak of the whole process so far; on GPUs, of this model.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return code_provenance() | item.about | {
        "model": item.model.name,
        "model_identity": item.model.identity,
        "dtype": str(item.dtype).removeprefix("torch."),
        "devices": devices,
        "values_together": len(item.keys),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
