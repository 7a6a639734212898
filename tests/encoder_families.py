"""A tiny random encoder of every family, and where its output projections are.

The reference finds a sub-layer's term by setting its output projection to zero, so it knows nothing of hooks or norms.
"""

import dataclasses
from collections.abc import Iterable

import torch
from transformers import AutoConfig, AutoModel

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
    "roberta": Case("roberta", TEXT | {"pad_token_id": 1}, "attention.output.dense", "output.dense"),
    "xlm-roberta": Case("xlm-roberta", TEXT | {"pad_token_id": 1}, "attention.output.dense", "output.dense"),
    "mpnet": Case("mpnet", TEXT | {"pad_token_id": 1}, "attention.attn.o", "output.dense"),
    "distilbert": Case("distilbert", DISTILBERT | {"initializer_range": 0.2}, "attention.out_lin", "ffn.lin2"),
    "modernbert": Case("modernbert", TEXT | MODERNBERT, "attn.Wo", "mlp.Wo"),
    "vit": Case("vit", VISION, "attention.o_proj", "mlp.fc2", True),
    "dinov2": Case("dinov2", VISION | {"mlp_ratio": 2, "layerscale_value": 0.6}, "layer_scale1", "layer_scale2", True),
    "dinov2-swiglu": Case("dinov2", VISION | {"use_swiglu_ffn": True}, "layer_scale1", "layer_scale2", True),
    "clip": Case("clip_vision_model", VISION, "self_attn.out_proj", "mlp.fc2", True),
    "siglip": Case("siglip_vision_model", VISION, "self_attn.out_proj", "mlp.fc2", True),
}


def tiny(name: str, **changes) -> torch.nn.Module:
    """A random encoder of the family in float32, with norm gains and biases that are not all the same, without a pooler."""
    case = CASES[name]
    model = AutoModel.from_config(AutoConfig.for_model(case.model_type, **case.settings | changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
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
