"""A tiny random encoder-decoder of every family, and where its output projections are.

Encoders have 3 layers, decoders 2, so that neither can be taken for the other: layers 0 to 2 and 3 to 4.
"""

import dataclasses
import inspect
from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.models.umt5.modeling_umt5 import UMT5LayerSelfAttention

SHARED = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1, "bos_token_id": 1}
T5 = SHARED | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2}
T5 |= {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 8}
BART = SHARED | {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "forced_eos_token_id": None,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@dataclasses.dataclass(frozen=True)
class Case:
    model_type: str
    settings: dict
    attention: str = "self_attn.out_proj"  # parameters of a layer whose names begin with this make the term; zero turns it off
    cross_attention: str = "encoder_attn.out_proj"
    mlp: str = "fc2"
    norms: bool = False  # post-norm


OF_T5 = {"attention": "layer.0.SelfAttention.o", "cross_attention": "layer.1.EncDecAttention.o", "mlp": "DenseReluDense.wo"}

CASES = {
    "t5": Case("t5", T5, **OF_T5),
    "t5-v1.1": Case("t5", T5 | GATED, **OF_T5),
    "mt5": Case("mt5", T5 | GATED, **OF_T5),
    "umt5": Case("umt5", T5 | GATED, **OF_T5),
    "bart": Case("bart", BART | {"scale_embedding": True}, norms=True),
    "mbart": Case("mbart", BART),
    "pegasus": Case("pegasus", BART),
    "marian": Case("marian", BART, norms=True),
    "blenderbot": Case("blenderbot", BART),
    "blenderbot-small": Case("blenderbot-small", BART, norms=True),
    "m2m_100": Case("m2m_100", BART),
    "mvp": Case("mvp", BART, norms=True),
    "plbart": Case("plbart", BART, norms=True),
}
N_SOURCE, N_LAYERS = 3, 5
if "is_causal" not in inspect.getsource(UMT5LayerSelfAttention):  # older transformers, which is refused
    del CASES["umt5"]


def tiny(name: str, **changes) -> torch.nn.Module:
    """A random encoder-decoder of the family in float32, with norm gains and biases that are not all the same."""
    case = CASES[name]
    config = AutoConfig.for_model(case.model_type, **case.settings | changes)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 or "relative_attention_bias" in key:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pairs(n: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sources of 9, 9 and 6 tokens and targets of 7, 5 and 7, padded at their ends."""
    generator = torch.Generator().manual_seed(seed)
    source, labels = (torch.randint(3, 97, (n, length), generator=generator) for length in (9, 7))
    mask = torch.ones_like(source)
    mask[2:, 6:], source[2:, 6:], labels[1:2, 5:] = 0, 0, -100
    return {"input_ids": source, "attention_mask": mask, "labels": labels}


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers of the encoder, then of the decoder, found without the package."""
    stacks = model.get_encoder(), model.get_decoder()
    return [block for stack in stacks for block in (stack.block if hasattr(stack, "block") else stack.layers)]


def projections(name: str, block: torch.nn.Module, kind: str) -> list[torch.nn.Parameter]:
    """The parameters of a layer that make the term of a kind, if it has one."""
    start = getattr(CASES[name], kind)
    return [p for n, p in block.named_parameters() if n.startswith(f"{start}.") or f".{start}." in n]


@torch.no_grad()
def silence(name: str, model: torch.nn.Module, plan: Mapping[str, tuple[int, ...]]) -> None:
    """Set the output projections of these layers (by kind) to zero, in place."""
    blocks = blocks_of(model)
    for kind, layers in plan.items():
        for index in layers:
            found = projections(name, blocks[index], kind)
            assert found
            for parameter in found:
                parameter.zero_()
