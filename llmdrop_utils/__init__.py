"""Find, drop and study redundant attention and MLP layers of pretrained transformers."""

import importlib

# Imported on first use, so that `import llmdrop_utils` costs nothing.
_HOME = {
    "LLMDropError": "workspace",
    "NotAvailable": "workspace",
    "load_profile": "profiles",
    "load_model": "models",
    "load_located": "models",
    "locate_model": "models",
    "locate_available": "models",
    "locate_series": "series",
    "train_series": "training",
    "load_tokens": "calibration",
    "load_documents": "calibration",
    "fingerprint": "calibration",
    "find_anatomy": "anatomy",
    "Importance": "importance",
    "measure_importance": "importance",
    "DropPlan": "dropping",
    "dropped": "dropping",
    "drop": "dropping",
    "select": "selection",
    "select_iteratively": "selection",
    "select_consecutive_blocks": "selection",
    "select_last": "selection",
    "select_at_random": "selection",
    "Load": "speed",
    "Speed": "speed",
    "measure_speed": "speed",
    "greedy": "speed",
    "device_limits": "speed",
    "kv_bytes": "cost",
    "cache_bytes": "cost",
    "FastLM": "evaluation",
    "perplexity": "evaluation",
    "run_tasks": "evaluation",
    "score_text": "evaluation",
    "load_task": "evaluation",
    "score_task": "evaluation",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
