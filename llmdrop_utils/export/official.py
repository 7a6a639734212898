"""Configurations of the paper's own code: `drop_attn_list` and `drop_mlp_list` in config.json.

The lists hold indices of layers, or a boolean for each layer, or null. Its checkpoints keep the weights of what is dropped.
"""

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan
from ..models.config import DROP_LISTS

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2"}  # those that transformers knows as well


def plan_from_config(settings: dict) -> DropPlan:
    """The drop plan in the content of a config.json. Raises LLMDropError for lists that do not fit its layers."""
    n_layers = settings.get("num_hidden_layers")
    attention, mlp = (_indices(name, settings.get(name), n_layers) for name in DROP_LISTS.values())
    return DropPlan(attention, mlp, n_layers)


def official_config(settings: dict, plan: DropPlan) -> dict:
    """A config.json by which the paper's own code drops the plan's layers from the base model that lies beside it.

    settings: content of the base model's config.json. The code itself has to be copied there: configuration_dropped_*.py and
    modeling_dropped_*.py. Raises LLMDropError for a family that it does not know, and for maps, which it cannot hold.
    """
    family = settings.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise LLMDropError(f"The paper's own code drops layers of {known}, and not of {family}. Save it with save_dropped.")
    if plan.maps:
        raise LLMDropError("The paper's own code has no linear maps in dropped places. Save the model with save_dropped.")
    names = FAMILIES[family]
    auto_map = {
        "AutoConfig": f"configuration_dropped_{family}.{names}Config",
        "AutoModelForCausalLM": f"modeling_dropped_{family}.{names}ForCausalLM",
    }
    return settings | {"auto_map": auto_map} | drop_lists(plan)


def drop_lists(plan: DropPlan) -> dict[str, list[int]]:
    """The plan under the names of the paper's own code, in drop order."""
    return {name: list(getattr(plan, kind)) for kind, name in DROP_LISTS.items()}


def _indices(name: str, given, n_layers: int | None) -> tuple:
    """Layers in a list of indices, of booleans, or null."""
    if given is None:
        return ()
    if not isinstance(given, list):
        raise LLMDropError(f"{name} in config.json must be a list or null, but is {given!r}.")
    if not any(isinstance(entry, bool) for entry in given):
        return tuple(given)
    if not all(isinstance(entry, bool) for entry in given) or len(given) != n_layers:
        raise LLMDropError(
            f"{name} in config.json holds {len(given)} entries, some of them booleans. Expected is one boolean for each of the "
            f"{n_layers} layers, or a list of indices."
        )
    return tuple(layer for layer, is_dropped in enumerate(given) if is_dropped)
