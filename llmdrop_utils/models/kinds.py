"""What kind of transformer a name stands for, from its configuration alone: no weights are brought here."""

from transformers import AutoConfig

from ..base.errors import LLMDropError
from ..sources.catalogue import catalogue
from ..sources.sizes import Hub
from .config import kind_of, read_settings
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
    try:
        if (path := local_path(name)) is not None:
            if path.is_file() or holds_gguf(path):
                return "decoder"
            settings = read_settings(name, path)
        else:
            hub_id = HUB_ID.fullmatch(name)
            settings = (hub or Hub()).config(hub_id["id"], hub_id["revision"]) if hub_id else None
    except LLMDropError:
        return None
    try:
        more = dict(settings or {})
        return kind_of(AutoConfig.for_model(more.pop("model_type"), **more))
    except Exception:  # a family checks its settings as it likes
        return None
