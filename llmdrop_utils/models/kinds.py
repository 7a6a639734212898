"""What kind of transformer a name stands for, from its configuration alone: no weights are brought here."""

from collections.abc import Callable

from transformers import AutoConfig

from ..base.errors import LLMDropError
from ..sources.catalogue import catalogue
from ..sources.fetch import fetch_hub
from .config import kind_of, read_settings
from .names import HUB_ID, holds_gguf, local_path, plain_name


def _fetched(repository: str, revision: str | None) -> dict | None:
    return read_settings(repository, fetch_hub(repository, revision, patterns=["config.json"]))


def kind_of_model(name: str, settings_on_hub: Callable[[str, str | None], dict | None] = _fetched) -> str | None:
    """What a model is (`config.kind_of`). name: whatever `locate_model` takes.

    settings_on_hub: repository and revision -> the content of its config.json. None for what cannot be told: loading the model
    then says what is wrong.
    """
    name = plain_name(name)
    source = catalogue()["models"].get(name) or catalogue()["encoders"].get(name)
    if source is not None:
        return source.get("kind", "decoder")
    if name.startswith("random:") or name in catalogue()["series"]:
        return "decoder"
    try:
        if (path := local_path(name)) is not None:
            if path.is_file() or holds_gguf(path):
                return "decoder"
            settings = read_settings(name, path)
        else:
            hub_id = HUB_ID.fullmatch(name)
            settings = settings_on_hub(hub_id["id"], hub_id["revision"]) if hub_id else None
        more = dict(settings or {})
        return kind_of(AutoConfig.for_model(more.pop("model_type"), **more))
    except (LLMDropError, KeyError, TypeError, ValueError):
        return None
