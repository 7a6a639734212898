"""Where attention, cross-attention, MLP and residual stream sit in encoder-decoders (see `layouts`).

A layer of the decoder adds three terms to its stream x, where s is what the encoder gives:

    x = x + attention(norm(x));  x = x + cross_attention(norm(x), s);  x = x + mlp(norm(x))
"""

import dataclasses

from .layouts import OPT, Family

SOURCE = ("input_ids", "attention_mask")
TARGET = ("input_ids", "encoder_hidden_states", "encoder_attention_mask", "use_cache")


@dataclasses.dataclass(frozen=True)
class Halves:
    """What is stated about the layers of the encoder, and about those of the decoder."""

    encoder: Family
    decoder: Family


# As OPT: the layers have no module for the whole MLP.
ENCODER = dataclasses.replace(OPT, takes=SOURCE)
DECODER = dataclasses.replace(
    OPT,
    cross_attention="encoder_attn",
    cross_input="encoder_attn_layer_norm",
    cross_unit=("encoder_attn", "encoder_attn_layer_norm"),
    takes=TARGET,
)
MBART = Halves(ENCODER, DECODER)

# h = norm(x + attention(x)); h = norm(h + cross_attention(h, s)); output = norm(h + mlp(h))
BART = Halves(
    dataclasses.replace(
        ENCODER,
        mlp_input="fc1",
        attention_unit=("self_attn",),
        mlp_unit=("fc1", "fc2"),
        stream_norms=("self_attn_layer_norm", "final_layer_norm"),
    ),
    dataclasses.replace(
        DECODER,
        mlp_input="fc1",
        cross_input="encoder_attn",
        attention_unit=("self_attn",),
        cross_unit=("encoder_attn",),
        mlp_unit=("fc1", "fc2"),
        stream_norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    ),
)


def _t5(returns: int, position_bias: str | None) -> Halves:
    """Modules hold norm, sub-layer and sum. The first attention makes the positions of all layers."""

    def half(mlp: str, **more) -> Family:
        return Family(
            layers="block",
            attention="layer.0.SelfAttention",
            mlp=f"{mlp}.DenseReluDense",
            mlp_input=f"{mlp}.layer_norm",
            attention_unit=("layer.0.SelfAttention", "layer.0.layer_norm"),
            mlp_unit=(f"{mlp}.DenseReluDense", f"{mlp}.layer_norm"),
            attention_returns=returns,
            position_bias=position_bias,
            **more,
        )

    cross = {
        "cross_attention": "layer.1.EncDecAttention",
        "cross_input": "layer.1.layer_norm",
        "cross_unit": ("layer.1.EncDecAttention", "layer.1.layer_norm"),
    }
    return Halves(half("layer.1", takes=SOURCE), half("layer.2", takes=TARGET, **cross))


ENCODER_DECODERS: dict[str, Halves] = {
    **dict.fromkeys(["t5", "mt5"], _t5(3, "relative_attention_bias")),
    "umt5": _t5(2, None),  # each layer has positions of its own
    **dict.fromkeys(["bart", "blenderbot-small", "marian", "mvp", "plbart"], BART),
    **dict.fromkeys(["blenderbot", "m2m_100", "mbart", "pegasus"], MBART),
}
