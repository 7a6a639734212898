"""Find, drop and study redundant attention and MLP layers of pretrained transformers."""

import importlib
import logging

from .export.auto import register

# transformers imports torchao where it is installed, kernels or no kernels: what it says of them concerns no user.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())

register()  # transformers' AutoModelForCausalLM reads dropped models from now on

# Imported on first use, so that `import llmdrop_utils` costs nothing.
_HOME = {
    "LLMDropError": "base.errors",
    "NotAvailable": "base.errors",
    "load_profile": "studies.profile",
    "Page": "studies.page",
    "load_model": "models.load",
    "load_encoder": "models.encoders",
    "load_located_encoder": "models.encoders",
    "load_encoder_decoder": "models.encoder_decoders",
    "load_located": "models.load",
    "locate_model": "models.locate",
    "locate_available": "models.locate",
    "locate_series": "models.series",
    "train_series": "models.training",
    "load_tokens": "sources.texts",
    "load_documents": "sources.texts",
    "fingerprint": "sources.texts",
    "find_anatomy": "models.families",
    "Importance": "measure.importance",
    "measure_importance": "measure.importance",
    "measure_causes": "measure.causes",
    "prepare": "measure.encoding",
    "embed": "measure.encoding",
    "prepare_pairs": "measure.targets",
    "score_targets": "measure.targets",
    "DropPlan": "dropping.plan",
    "PlanKey": "dropping.plan",
    "LinearMap": "dropping.maps",
    "dropped": "dropping.units",
    "drop": "dropping.units",
    "select": "selection.ranking",
    "select_iteratively": "selection.methods",
    "select_consecutive_blocks": "selection.methods",
    "select_last": "selection.methods",
    "select_at_random": "selection.methods",
    "select_by": "selection.methods",
    "save_derived": "derive.model",
    "prune_by_wanda": "derive.wanda",
    "sparsity_for": "derive.wanda",
    "quantise": "derive.quantise",
    "round_weights": "derive.quantise",
    "quantised_bytes": "derive.quantise",
    "repair": "derive.repair",
    "Repair": "derive.repair",
    "select_with_repair": "derive.search",
    "heal": "derive.healing",
    "Healing": "derive.healing",
    "write_samples": "derive.own_text",
    "fit_maps": "derive.nbl",
    "tune": "derive.tuning",
    "Tuning": "derive.tuning",
    "save_dropped": "export.checkpoint",
    "load_dropped": "export.checkpoint",
    "export_gguf": "export.gguf",
    "export_deci": "export.deci",
    "official_config": "export.official",
    "plan_from_config": "export.official",
    "Load": "measure.speed",
    "Speed": "measure.speed",
    "measure_speed": "measure.speed",
    "greedy": "measure.decoding",
    "device_limits": "measure.speed",
    "kv_bytes": "measure.floors",
    "cache_bytes": "measure.floors",
    "FastLM": "measure.tasks",
    "perplexity": "measure.text",
    "run_tasks": "measure.tasks",
    "score_text": "measure.text",
    "load_task": "sources.task_data",
    "score_task": "measure.tasks",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
