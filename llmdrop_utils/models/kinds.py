"""What kind of transformer a name stands for, from its configuration alone: no weights are brought here."""

from typing import Any

from transformers import AutoConfig

from ..sources.catalogue import catalogue
from ..sources.sizes import Hub
from .config import full_config, is_multimodal, kind_of
from .names import HUB_ID, holds_gguf, local_path, plain_name


def kind_of_model(name: str, hub: Hub | None = None) -> str | None:
    """What a model is (`config.kind_of`). name: whatever `locate_model` takes.

    None for what cannot be told, such as a model on a hub that is away: loading the model says what is wrong with it.
    """
    name = plain_name(name)
    source = catalogue()["models"].get(name) or catalogue()["encoders"].get(name)
    if source is not None:
        return source.get("kind", "decoder")
    if name.startswith("random:") or name in catalogue()["series"]:
        return "decoder"
    path = local_path(name)
    if path is not None and (path.is_file() or holds_gguf(path)):
        return "decoder"
    config = _config_of(name, hub)
    return None if config is None else kind_of(config)


def multimodal_kind(name: str, hub: Hub | None = None) -> str | None:
    """The `model_type` of a multimodal model, of which only the text part is measured; None for all others, and for what cannot
    be told. name: as in `kind_of_model`."""
    config = None if kind_of_model(name, hub) != "decoder" else _config_of(plain_name(name), hub)
    return config.model_type if config is not None and is_multimodal(config) else None


def _config_of(name: str, hub: Hub | None) -> Any:
    """The configuration in a folder, or of a model on the hub; None for another name, and for one that cannot be read."""
    try:
        if (path := local_path(name)) is not None:
            return full_config(name, path)
        hub_id = HUB_ID.fullmatch(name)
        more = dict(((hub or Hub()).config(hub_id["id"], hub_id["revision"]) if hub_id else None) or {})
        return AutoConfig.for_model(more.pop("model_type"), **more)
    except Exception:  # a family checks its settings as it likes
        return None
