"""config.json of a model -> its configuration, and what kind of transformer it describes; one clear error for another kind
than the one that is wanted.

Of a multimodal model whose text part is a language model by itself, this is the configuration of the text part; of a pair of
encoders, one for text and one for images, that of the vision encoder.
"""

import json
import re
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
)

from ..base.errors import LLMDropError
from .convert import first_line
from .refused import REFUSED

# Where checkpoints of multimodal models keep the weights of their text part -> where the text model has them.
TEXT_WEIGHTS = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?!lm_head\.)": "model.",
}
# Text parts of transformers' own, and the model that each is on text alone, where images move no positions.
SAME_ON_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
DROP_LISTS = {"attention": "drop_attn_list", "mlp": "drop_mlp_list"}  # names of the paper's own code
DECODERS = ("decoder",)  # causal language models
ENCODERS = ("text encoder", "vision encoder")
ENCODER_DECODERS = ("encoder-decoder",)
OTHERS = ENCODERS + ENCODER_DECODERS  # that are no decoders
OTHER_HEADS = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)|Reward")


def read_config(name: str, folder: Path, kinds: tuple[str, ...] = DECODERS):
    """The configuration of the model in a folder, which must be of one of these kinds (see `kind_of`).

    name: of the model, for messages. Raises LLMDropError for a config.json that is damaged, that contradicts itself, or that
    describes another kind of model.
    """
    return _part(name, full_config(name, folder), kinds)


def kind_of(config) -> str | None:
    """What kind of transformer a configuration describes: "decoder" (a causal language model, or one is its text part),
    "text encoder", "vision encoder" (of a pair of encoders for text and images it is the one that counts) or
    "encoder-decoder"; None for something else."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    is_one = config.get_text_config() is config  # ModernVBERT reads images beside text
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and is_one and not getattr(config, "is_decoder", False):
        return "text encoder"
    if type(text_part(config)) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "decoder"
    return "vision encoder" if getattr(vision_part(config), "patch_size", None) is not None else None


def full_config(name: str, folder: Path):
    """What config.json says, of a multimodal model the other parts too. Raises LLMDropError if it cannot be used."""
    check_settings(name, read_settings(name, folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a family checks its settings as it likes
        raise _unusable(name, error) from error


def read_settings(name: str, folder: Path) -> Any:
    """The content of config.json."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LLMDropError(f"The config.json of {name} cannot be read: {first_line(error)}. Download it again.") from error


def says_dropped(settings: Any) -> bool:
    """Does a config.json say that layers are dropped? Loaded as if it did not, the model is dense or has random weights."""
    return isinstance(settings, dict) and any(settings.get(key) for key in ("llmdrop", *DROP_LISTS.values()))


def config_of(name: str, settings: Any, kinds: tuple[str, ...] = DECODERS):
    """The configuration that the content of a config.json describes. Raises what `read_config` raises."""
    check_settings(name, settings)
    more = dict(settings)
    try:
        config = AutoConfig.for_model(more.pop("model_type"), **more)
    except Exception as error:
        raise _unusable(name, error) from error
    return _part(name, config, kinds)


def check_settings(name: str, settings: Any) -> None:
    """Raise LLMDropError unless the content of a config.json is a mapping that names a kind of model, not one that is code."""
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        found = "it has no text under 'model_type'" if isinstance(settings, dict) else f"it holds {type(settings).__name__}"
        raise LLMDropError(
            f"The config.json of {name} is not that of a transformers model: {found}. Expected is a mapping such as "
            '{"model_type": "llama", ...}. Download it again, or save the model with save_pretrained.'
        )

    if "auto_map" in settings and settings["model_type"] not in CONFIG_MAPPING:
        raise LLMDropError(
            f"{name} ({settings['model_type']}) comes with code of its own, which is not run, and this version of transformers "
            "does not know the family. Install a later one, or give a model of a family that it knows."
        )


def _unusable(name: str, error: Exception) -> LLMDropError:
    return LLMDropError(
        f"The configuration of {name} could not be read: {first_line(error)}. Correct its config.json, or download it again."
    )


def text_part(config):
    """The configuration of the text part of a multimodal model, if that is a language model by itself; otherwise the same."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return config if model.config_class is type(config) else config.get_text_config()  # Llama 4: a model of its text alone
    text = config.get_text_config()
    if text.model_type in SAME_ON_TEXT:
        text = _same_on_text(text)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(text, "logit_scale", None):
        return config  # (Aya Vision scales no logits, unlike the Cohere2 that is its text part)
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)  # the whole model says it
    return text


def is_multimodal(config) -> bool:
    """Does it describe a model of text and of something else, of which the text part is a language model by itself?"""
    return text_part(config) is not config or config.get_text_config() is not config


def _same_on_text(text):
    """The language model that a text part with positions in time, height and width is where all three are the same."""
    settings = text.to_dict()
    rope = {key: value for key, value in settings["rope_parameters"].items() if not key.startswith("mrope_") and key != "type"}
    settings |= {"rope_parameters": rope, "norm_topk_prob": True}  # of experts: Qwen3-VL always normalises their weights
    return AutoConfig.for_model(SAME_ON_TEXT[settings.pop("model_type")], **settings)


def vision_part(config):
    """The configuration of the vision encoder of a pair of encoders (CLIP, SigLIP); otherwise the same."""
    return config.vision_config if type(config) in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING else config


def _part(name: str, config, kinds: tuple[str, ...]):
    """The part of a configuration that is of one of these kinds. Raises LLMDropError if none is, saying what the model is."""
    kind = kind_of(config)
    heads = [head for head in config.architectures or [] if isinstance(head, str)]
    if kinds == DECODERS and (other := next((head for head in heads if OTHER_HEADS.search(head)), None)):
        raise LLMDropError(
            f"{name} is a sequence classifier or reward model ({other}): its head gives scores, not next tokens. Give the "
            "causal language model that it was made from."
        )
    if kind not in kinds:
        raise other_kind(name, kind, kinds, config)
    if kind == "encoder-decoder" and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise LLMDropError(
            f"{name} is an encoder-decoder ({config.model_type}) that does not read text and write text. Give one that does, "
            "such as google-t5/t5-small."
        )
    return {"decoder": text_part, "vision encoder": vision_part}.get(kind, lambda config: config)(config)


def other_kind(name: str, kind: str | None, kinds: tuple[str, ...], config=None) -> LLMDropError:
    """The error to raise for a model that is not of one of the kinds that are wanted. config: its configuration, if known."""
    what = "" if config is None else f" ({config.model_type})"
    found, loader = {
        "decoder": ("a causal language model", "load_model"),
        "text encoder": ("an encoder", "load_encoder"),
        "vision encoder": ("a vision encoder", "load_encoder"),
        "encoder-decoder": ("an encoder-decoder", "load_encoder_decoder"),
    }.get(kind or "", ("", ""))
    if kinds == DECODERS and found:
        return LLMDropError(
            f"{name} is {found}{what}, no causal language model. {loader} loads it, and notebook 12 measures such models. "
            "Where next tokens are predicted, give a model such as Qwen/Qwen3-8B."
        )
    if found:
        wanted = "encoder-decoder" if kinds == ENCODER_DECODERS else "encoder"
        return LLMDropError(f"{name} is {found}{what}, no {wanted}. {loader} loads it.")
    model_type, wanted, example = config.model_type, "causal language model", "Qwen/Qwen3-8B"
    if kinds != DECODERS:
        wanted, example = "encoder that can be measured", "answerdotai/ModernBERT-base or facebook/dinov2-small"
        if reason := REFUSED.get(model_type):
            return LLMDropError(f"{name} is a {model_type} model, which cannot be taken apart: {reason}. Give {example}.")
    elif (text := config.get_text_config()) is not config:
        return LLMDropError(
            f"{name} is multimodal ({model_type}), and its text part ({text.model_type}) cannot be taken by itself. Give a "
            f"text model of the same family, such as {example}."
        )
    return LLMDropError(f"{name} is a {model_type} model, for which transformers has no {wanted}. Give one, such as {example}.")
