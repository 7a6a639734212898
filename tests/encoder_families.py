"""A tiny random encoder of every family, and where its output projections are.

The reference finds a sub-layer's term by setting its output projection to zero, so it knows nothing of hooks or norms.
"""

import dataclasses
from collections.abc import Iterable

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "initializer_range": 0.2,
}
MODERNBERT = {"global_attn_every_n_layers": 2, "local_attention": 4, "bos_token_id": 1, "eos_token_id": 2}
MODERNBERT |= {"cls_token_id": 1, "sep_token_id": 2}
ROBERTA = TEXT | {"pad_token_id": 1}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 97, "max_position_embeddings": 64}


@dataclasses.dataclass(frozen=True)
class Case:
    model_type: str
    settings: dict
    attention: str  # parameters of a layer whose names begin with this make attention's output; zero turns it off
    mlp: str
    is_vision: bool = False


CASES = {
    "bert": Case("bert", TEXT, "attention.output.dense", "output.dense"),
    "electra": Case("electra", TEXT | {"embedding_size": 16}, "attention.output.dense", "output.dense"),
    "ernie": Case("ernie", TEXT, "attention.output.dense", "output.dense"),
    "rembert": Case("rembert", TEXT | {"input_embedding_size": 16}, "attention.output.dense", "output.dense"),
    **{
        name: Case(name, ROBERTA, "attention.output.dense", "output.dense")
        for name in ("roberta", "xlm-roberta", "camembert", "data2vec-text", "xlm-roberta-xl")
    },
    "roberta-prelayernorm": Case("roberta-prelayernorm", ROBERTA, "attention.output.dense", "output.dense"),
    "megatron-bert": Case("megatron-bert", TEXT, "attention.output.dense", "output.dense"),
    "esm": Case("esm", ROBERTA | {"mask_token_id": 2}, "attention.output.dense", "output.dense"),
    "deberta": Case("deberta", TEXT | DEBERTA, "attention.output.dense", "output.dense"),
    "deberta-v2": Case(
        "deberta-v2",
        TEXT | DEBERTA | {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        "attention.output.dense",
        "output.dense",
    ),
    "mpnet": Case("mpnet", ROBERTA, "attention.attn.o", "output.dense"),
    "nomic_bert": Case("nomic_bert", TEXT, "self_attn.o_proj", "mlp.down_proj"),
    "gte": Case("gte", TEXT, "self_attn.o_proj", "mlp.down_proj"),
    "jina_embeddings_v3": Case("jina_embeddings_v3", TEXT, "self_attn.o_proj", "mlp.fc2"),
    **{
        name: Case(name, TEXT | {"bos_token_id": 1, "eos_token_id": 2}, "self_attn.o_proj", "mlp.down_proj")
        for name in ("eurobert", "ultrabert")
    },
    "distilbert": Case("distilbert", DISTILBERT | {"initializer_range": 0.2}, "attention.out_lin", "ffn.lin2"),
    "modernbert": Case("modernbert", TEXT | MODERNBERT, "attn.Wo", "mlp.Wo"),
    **{name: Case(name, VISION, "attention.o_proj", "mlp.fc2", True) for name in ("vit", "deit", "vit_msn", "ijepa")},
    "dinov2": Case("dinov2", VISION | {"mlp_ratio": 2, "layerscale_value": 0.6}, "layer_scale1", "layer_scale2", True),
    "dinov2-swiglu": Case("dinov2", VISION | {"use_swiglu_ffn": True}, "layer_scale1", "layer_scale2", True),
    "dinov2-registers": Case(
        "dinov2_with_registers",
        VISION | {"mlp_ratio": 2, "layerscale_value": 0.6, "num_register_tokens": 2},
        "layer_scale1",
        "layer_scale2",
        True,
    ),
    "dinov3": Case(
        "dinov3_vit", VISION | {"layerscale_value": 0.6, "num_register_tokens": 2}, "layer_scale1", "layer_scale2", True
    ),
    "chinese-clip": Case("chinese_clip_vision_model", VISION, "self_attn.out_proj", "mlp.fc2", True),
    "clip": Case("clip_vision_model", VISION, "self_attn.out_proj", "mlp.fc2", True),
    "siglip": Case("siglip_vision_model", VISION, "self_attn.out_proj", "mlp.fc2", True),
}
CASES = {name: case for name, case in CASES.items() if case.model_type in CONFIG_MAPPING}  # older transformers lack some


def tiny(name: str, **changes) -> torch.nn.Module:
    """A random encoder of the family in float32, with norm gains and biases that are not all the same, and tokens and positions
    that are not zero, without a pooler."""
    case = CASES[name]
    model = AutoModel.from_config(AutoConfig.for_model(case.model_type, **case.settings | changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.eval()


def inputs(name: str, n: int = 3, seed: int = 0) -> torch.Tensor:
    """Tokens (n, 9), none of them padding, or pixels (n, 3, 24, 24), which are 9 patches."""
    generator = torch.Generator().manual_seed(seed)
    if CASES[name].is_vision:
        return torch.randn(n, 3, 24, 24, generator=generator)
    return torch.randint(3, 97, (n, 9), generator=generator)


def read(model: torch.nn.Module, given: torch.Tensor, **more) -> torch.Tensor:
    """The last hidden state of tokens or pixels."""
    name = "pixel_values" if given.is_floating_point() else "input_ids"
    with torch.no_grad():
        return model(**{name: given}, **more).last_hidden_state


@torch.no_grad()
def silence(name: str, blocks, attention: Iterable[int], mlp: Iterable[int]) -> None:
    """Set the output projections of these layers to zero, in place."""
    for indices, projection in ((attention, CASES[name].attention), (mlp, CASES[name].mlp)):
        for index in indices:
            found = [p for n, p in blocks[index].named_parameters() if n.startswith(f"{projection}.")]
            assert found
            for parameter in found:
                parameter.zero_()
