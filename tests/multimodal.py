"""Tiny random models of text and images, whose text parts are language models by themselves."""

import families
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
          "patch_size": 8}  # fmt: skip
CLIP, SIGLIP, PIXTRAL = (VISION | {"model_type": kind} for kind in ("clip_vision_model", "siglip_vision_model", "pixtral"))
QWEN = {"depth": 1, "embed_dim": 32, "num_heads": 4}
QWEN_3 = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
LLAMA_4 = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
PLACES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}  # time, height, width

# Kind of model -> the text model that is taken, its settings beside `families.SMALL`, those of the vision tower.
MULTIMODAL = {
    "llava": ("llama", {}, CLIP),
    "llava_next": ("mistral", {}, CLIP),
    "mistral3": ("mistral", {}, PIXTRAL),
    "idefics3": ("llama", {}, VISION),
    "smolvlm": ("llama", {}, VISION),
    "paligemma": ("gemma", {}, SIGLIP | {"projection_dim": 32}),
    "internvl": ("qwen2", {}, VISION | {"image_size": [16, 16], "patch_size": [8, 8]}),
    "llama4": ("llama4_text", families.MORE["llama4_text"].settings, VISION | LLAMA_4),
    "lfm2_vl": ("lfm2", families.CONVOLUTION, VISION | {"model_type": "siglip2_vision_model"}),
    "qwen2_vl": ("qwen2", PLACES, QWEN | {"hidden_size": 32}),
    "qwen2_5_vl": ("qwen2", PLACES, QWEN | {"hidden_size": 32, "out_hidden_size": 32}),
    "qwen3_vl": ("qwen3", PLACES, QWEN_3),
    "qwen3_vl_moe": ("qwen3_moe", families.MOE | PLACES, QWEN_3),
    "qwen3_5": ("qwen3_5_text", families.DELTA, QWEN_3),
}


def whole(kind, text, vision, **more):
    """A model of these parts."""
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **more)
    return AutoModelForImageTextToText.from_config(config).eval()


def multimodal(kind, **changes):
    """One of `MULTIMODAL`. changes: of its text part."""
    text, settings, vision = MULTIMODAL[kind]
    own = CONFIG_MAPPING[kind].sub_configs["text_config"]
    name = {} if hasattr(own, "model_type") and kind.startswith(("qwen", "llama4")) else {"model_type": text}
    return whole(kind, families.SMALL | settings | name | changes, vision)


def gemma3(**changes):
    """Its causal language model in transformers has the vision tower. changes: of its text part."""
    text = families.SMALL | families.SLIDING | {"query_pre_attn_scalar": 8, "vocab_size": 300, "model_type": "gemma3_text"}
    return whole("gemma3", text | changes, SIGLIP, mm_tokens_per_image=4, image_token_index=290)
