"""Where attention, MLP and residual stream sit in encoders of text and of images (see `layouts`)."""

import dataclasses
import importlib
from collections.abc import Callable

from .layouts import Family

TEXT = ("input_ids", "attention_mask", "position_ids")
COUNTS_POSITIONS = ("input_ids", "attention_mask")  # from the tokens that are no padding
IMAGES = ("pixel_values",)

# h = LayerNorm(x + dense(self(x))); output = LayerNorm(h + dense(intermediate(h))). The modules that hold the dense maps add
# the stream and apply the norm too, so they stay, and zero from the first module of a unit goes through them.
BERT = Family(
    layers="encoder.layer",
    attention="attention.output.dense",
    mlp="output.dense",
    mlp_input="intermediate",
    attention_unit=("attention.self", "attention.output.dense"),
    mlp_unit=("intermediate", "output.dense"),
    stream_norms=("attention.output.LayerNorm", "output.LayerNorm"),
    attention_is_one_module=False,
    mlp_is_one_module=False,
    takes=TEXT,
)

# As in BERT, but with a norm before each sub-layer, and none on the stream: h = x + dense(self(norm(x))).
PRE_NORM_BERT = dataclasses.replace(
    BERT,
    mlp_input="LayerNorm",
    attention_unit=("attention.self", "attention.output.dense", "attention.LayerNorm"),
    mlp_unit=("intermediate", "output.dense", "LayerNorm"),
    stream_norms=None,
    takes=COUNTS_POSITIONS,
)

MPNET = dataclasses.replace(
    BERT,
    attention="attention.attn",
    attention_unit=("attention.attn",),
    stream_norms=("attention.LayerNorm", "output.LayerNorm"),
    attention_is_one_module=True,
    takes=COUNTS_POSITIONS,
)

DISTILBERT = Family(
    layers="transformer.layer",
    attention="attention",
    mlp="ffn",
    mlp_input="ffn",
    attention_unit=("attention",),
    mlp_unit=("ffn",),
    stream_norms=("sa_layer_norm", "output_layer_norm"),
    takes=TEXT,
)

MODERNBERT = Family(
    attention="attn", mlp_input="mlp_norm", attention_unit=("attn", "attn_norm"), mlp_unit=("mlp", "mlp_norm"), takes=TEXT
)

NOMIC_BERT = Family(
    mlp_input="mlp",
    attention_unit=("self_attn",),
    mlp_unit=("mlp",),
    stream_norms=("post_attention_layernorm", "post_mlp_layernorm"),
    takes=TEXT,
)

VIT = Family(
    attention="attention",
    mlp_input="layernorm_after",
    attention_unit=("attention", "layernorm_before"),
    mlp_unit=("mlp", "layernorm_after"),
    takes=IMAGES,
)

CLIP = Family(
    layers="encoder.layers",
    mlp_input="layer_norm2",
    attention_unit=("self_attn", "layer_norm1"),
    mlp_unit=("mlp", "layer_norm2"),
    takes=IMAGES,
)


def _dinov2(config) -> Family:
    """x + scale(attention(norm(x))), where the scale is a vector that was learned."""
    older = hasattr(importlib.import_module("transformers.models.dinov2.modeling_dinov2"), "Dinov2SelfAttention")
    return Family(
        layers="encoder.layer",
        attention="layer_scale1",
        mlp="layer_scale2",
        mlp_input="norm2",
        attention_unit=("attention", "norm1", "layer_scale1"),
        mlp_unit=("mlp", "norm2", "layer_scale2"),
        attention_returns=1 if older else 2,  # before transformers had one layout for attention in vision encoders
        takes=IMAGES,
        interpolates=True,
    )


def _dinov3(config) -> Family:
    return dataclasses.replace(_dinov2(config), layers="model.layer", attention_returns=2)


def _unless_decoder(layout: Family, **changes) -> Callable[[object], Family]:
    """Families whose configuration can also make a decoder of them."""

    def family(config) -> Family:
        problem = "it is a decoder of a family that is known as encoders" if config.is_decoder else None
        return dataclasses.replace(layout, unsupported=problem, **changes)

    return family


def _deberta(config) -> Family:
    if getattr(config, "conv_kernel_size", 0):
        return Family(unsupported="a convolution adds to the residual stream after its first layer")
    return BERT


ENCODERS: dict[str, Family | Callable[[object], Family]] = {
    **dict.fromkeys(["bert", "electra", "ernie", "rembert"], _unless_decoder(BERT)),
    **dict.fromkeys(["roberta", "xlm-roberta", "camembert", "data2vec-text"], _unless_decoder(BERT, takes=COUNTS_POSITIONS)),
    **dict.fromkeys(["deberta", "deberta-v2"], _deberta),
    "esm": _unless_decoder(PRE_NORM_BERT),
    "xlm-roberta-xl": _unless_decoder(
        PRE_NORM_BERT, attention_unit=("attention.self", "attention.output.dense", "attention.self_attn_layer_norm")
    ),
    "megatron-bert": _unless_decoder(
        PRE_NORM_BERT,
        mlp_input="ln",
        attention_unit=("attention.self", "attention.output.dense", "attention.ln"),
        mlp_unit=("intermediate", "output.dense", "ln"),
        takes=TEXT,
    ),
    "roberta-prelayernorm": _unless_decoder(PRE_NORM_BERT, mlp_input="intermediate", mlp_unit=("intermediate", "output.dense")),
    "mpnet": MPNET,
    "distilbert": DISTILBERT,
    **dict.fromkeys(["nomic_bert", "gte", "jina_embeddings_v3"], NOMIC_BERT),
    "modernbert": MODERNBERT,
    **dict.fromkeys(["eurobert", "ultrabert"], Family(takes=TEXT)),
    **dict.fromkeys(["vit", "deit", "vit_msn", "ijepa"], VIT),
    **dict.fromkeys(["dinov2", "dinov2_with_registers"], _dinov2),
    "dinov3_vit": _dinov3,
    **dict.fromkeys(["clip_vision_model", "siglip_vision_model", "chinese_clip_vision_model"], CLIP),
}
