"""Makes `AutoModelForCausalLM.from_pretrained` give the dropped model, once `llmdrop_utils` was imported.

transformers finds the class of a configuration by its model type. The type of a dropped model is this package's name, which
transformers does not know by itself: without `import llmdrop_utils` it says so and loads nothing.
"""

import importlib.abc
import importlib.util
import sys
from types import ModuleType

from . import MODEL_TYPE

MAPPING = "transformers.models.auto.configuration_auto"


class DroppedConfig:
    """Stands in transformers' mapping of model types: what it reads becomes a configuration of the base model's family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        from .checkpoint import dropped_config

        return dropped_config(config_dict, **kwargs)


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers the type when transformers' mapping is imported: importing transformers here would take seconds."""

    def find_spec(self, name, path=None, target=None):
        if name != MAPPING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Let transformers know the model type of dropped models, now or when it is imported."""
    if MAPPING in sys.modules:
        _register(sys.modules[MAPPING])
    else:
        sys.meta_path.insert(0, _OnImport())


def _register(module: ModuleType) -> None:
    module.CONFIG_MAPPING.register(MODEL_TYPE, DroppedConfig, exist_ok=True)
