"""A dropped model as a GGUF file that stock llama.cpp runs: architecture `deci`, whose layers may lack attention or MLP.

What stands in a layer, and how the file says it (found by trial against the model with its output projections zeroed):

    attention dropped                  0 heads, no tensors: no cache either
    attention dropped in layer 0       a linear attention of zeros: llama.cpp derives the size of heads from layer 0
    a linear map for the attention     a linear attention: heads, but none for keys and values; the map as `attn_output`
    MLP dropped                        a feed-forward of zeros, 256 wide. With length 0, llama.cpp would leave out the attention
                                       of this layer too, and say nothing
    both dropped                       0 heads and feed-forward length 0, except in the first and the last layer
"""

import contextlib
import errno
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..base.errors import LLMDropError
from ..base.files import replacing
from ..dropping.plan import DropPlan
from ..models.cache_shape import cache_geometry, head_size
from ..models.families import find_anatomy
from . import llamacpp
from .gate import EXACT, Parity, check, compare
from .gguf_vocabulary import add_vocabulary, find_split
from .shape import check_llama_shaped, refuse

KINDS = {  # what llmdrop writes itself; llama.cpp's quantiser makes the others from F32
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}
PAD = 256  # width of an MLP of zeros: rows of K-quants are multiples of it
ROW = 32  # numbers that share a scale in Q4_0 and Q4_1; for other kinds llama.cpp's quantiser has something to fall back to
LIMITS = {"F16": 0.001, "BF16": 0.005, "Q8_0": 0.05}  # nats of divergence
ROUGH = 0.5  # nats, with fewer bits


def export_gguf(model: nn.Module, tokenizer, plan: DropPlan, path: Path | str, kind: str = "F16") -> Parity:
    """Write a model without the sub-layers of a plan as a GGUF file, once llama.cpp was seen to predict what it should.

    Parameters
    ----------
    model: the dense model, in float32, which is what the file is compared with.
    path: must not exist yet.
    kind: one of `KINDS` ("F16", "Q8_0", ...), or of those that llama.cpp's own quantiser makes, `FTYPES` ("Q4_K_M", ...).

    The gate has two steps. The same layers and weights in float32 must agree with the dense model whose terms are set to zero
    to `EXACT` nats, in log-probabilities. Then the file itself must diverge from it by no more than rounding explains,
    `LIMITS`. Returns how far the file is from it.

    Raises LLMDropError for a model that the architecture cannot hold, for a path that exists and if a step fails, NotAvailable
    without llama.cpp, DiskFull. Nothing is left then.
    """
    path = Path(path)
    check_supported(model, plan, kind)
    if path.exists():
        raise LLMDropError(f"{path} exists already. Give the file another name.")
    llamacpp.library()
    config = find_anatomy(model).decoder.config
    room = context_length(config)
    split = find_split(tokenizer, config.vocab_size)
    with replacing(path) as file, tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        twin = Path(folder) / "float32.gguf"
        _write(model, tokenizer, split, plan, twin, "F32")
        parity = compare(twin, model, tokenizer, plan, room, exact=True)
        check("A float32 version of the file", max(parity.log_probability, parity.followed), EXACT)
        if kind == "F32":
            os.replace(twin, file)
            return parity
        if kind in KINDS:
            _write(model, tokenizer, split, plan, file, kind)
        else:
            llamacpp.quantise(twin, file, kind)
        parity = compare(file, model, tokenizer, plan, room, exact=False)
        check(f"The {kind} file", parity.divergence, LIMITS.get(kind, ROUGH))
        return parity


def check_supported(model: nn.Module, plan: DropPlan, kind: str) -> None:
    """Raise LLMDropError unless `deci` can hold this model without what the plan drops, saying what stands against it."""
    if kind not in (*KINDS, *llamacpp.FTYPES):
        raise LLMDropError(f"There is no GGUF kind {kind!r}. There are: {', '.join((*KINDS, *llamacpp.FTYPES))}.")
    config = check_llama_shaped(model, plan, "llama.cpp")
    no = functools.partial(refuse, config, "llama.cpp")
    if config.rope_parameters["rope_type"] not in ("default", "llama3"):
        no(f"its rotary positions are scaled ({config.rope_parameters['rope_type']}), which was not tried")
    if config.model_type != "qwen2" and getattr(config, "attention_bias", False):
        no("the output projection of its attention has a bias")
    rows = {config.hidden_size, config.intermediate_size, config.num_attention_heads * head_size(config)}
    if kind in ("Q4_0", "Q4_1") and (odd := sorted(n for n in rows if n % ROW)):
        no(f"its rows of {odd[0]} numbers are no multiple of {ROW}, which {kind} wants")
    for place, layer, linear in plan.maps:
        if place == "mlp":
            no(f"a linear map stands for the MLP of layer {layer}, for which there is no place")
        if linear.bias is not None:
            no(f"the linear map in layer {layer} has a bias, for which there is no place")


def _write(model: nn.Module, tokenizer, split: str, plan: DropPlan, path: Path, kind: str) -> None:
    config = find_anatomy(model).decoder.config
    heads, kv_heads, widths = layer_sizes(config, plan)
    rope = config.rope_parameters
    writer = gguf.GGUFWriter(path, "deci")
    writer.add_name(f"dropped {config.model_type}")
    writer.add_block_count(len(heads))
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(widths)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(FILE_TYPES[kind])
    add_vocabulary(writer, tokenizer, config.vocab_size, split)
    # First what is in the file, then the numbers, one tensor at a time: memory for one is enough.
    for name, tensor in tensors(model, plan, widths):
        chosen = _type_of(tensor, kind)
        block, size = gguf.GGML_QUANT_SIZES[chosen]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, chosen)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in tensors(model, plan, widths):
            values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            writer.write_tensor_data(gguf.quantize(values, _type_of(tensor, kind)))
    except OSError as error:
        with contextlib.suppress(OSError):
            writer.close()
        raise error if error.errno else OSError(errno.ENOSPC, str(error)) from error  # numpy does not say which error it was
    writer.close()


def _type_of(tensor: torch.Tensor, kind: str) -> gguf.GGMLQuantizationType:
    """Matrices are of the file's kind, and vectors in float32."""
    if tensor.ndim < 2:
        return KINDS["F32"]
    return KINDS["F16"] if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[KINDS[kind]][0] else KINDS[kind]


FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


# ---- layers -------------------------------------------------------------------------------------------------------------


def layer_sizes(config, plan: DropPlan) -> tuple[list[int], list[int], list[int]]:
    """For each layer: heads, heads of keys and values, and the width of the MLP."""
    heads, kv_heads, widths = [], [], []
    last = config.num_hidden_layers - 1
    for layer in range(last + 1):
        no_attention, no_mlp = layer in plan.attention, layer in plan.mlp
        is_linear = no_attention and (layer == 0 or plan.map_of("attention", layer) is not None)
        heads.append(0 if no_attention and not is_linear else config.num_attention_heads)
        kv_heads.append(0 if no_attention else config.num_key_value_heads)
        is_empty = no_mlp and heads[-1] == 0 and layer < last
        widths.append(0 if is_empty else PAD if no_mlp else config.intermediate_size)
    return heads, kv_heads, widths


def tensors(model: nn.Module, plan: DropPlan, widths: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the file and values of all weights."""
    anatomy = find_anatomy(model)
    decoder, config = anatomy.decoder, anatomy.decoder.config
    yield "token_embd.weight", decoder.embed_tokens.weight
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", rope_factors(config)
    for index, layer in enumerate(anatomy.layers):
        yield from _attention(f"blk.{index}.", layer.block, config, plan, index)
        yield from _mlp(f"blk.{index}.", layer.block, config, index in plan.mlp, widths[index])
    yield "output_norm.weight", decoder.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", model.get_output_embeddings().weight


def _attention(prefix: str, block: nn.Module, config, plan: DropPlan, index: int) -> Iterator[tuple[str, torch.Tensor]]:
    d = config.hidden_size
    linear = plan.map_of("attention", index)
    if index not in plan.attention:
        attention = block.self_attn
        yield f"{prefix}attn_norm.weight", block.input_layernorm.weight
        for name, part, heads in (
            ("attn_q", attention.q_proj, config.num_attention_heads),
            ("attn_k", attention.k_proj, config.num_key_value_heads),
            ("attn_v", attention.v_proj, None),
        ):
            for kind, values in part.named_parameters():
                yield f"{prefix}{name}.{kind}", values if heads is None else interleaved(values, heads)
        yield f"{prefix}attn_output.weight", attention.o_proj.weight
    elif index == 0 or linear is not None:
        yield f"{prefix}attn_norm.weight", block.input_layernorm.weight
        yield f"{prefix}attn_output.weight", torch.zeros(d, d) if linear is None else linear.weight


def _mlp(prefix: str, block: nn.Module, config, is_dropped: bool, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    if not width:
        return
    yield f"{prefix}ffn_norm.weight", block.post_attention_layernorm.weight
    for part in ("gate", "up", "down"):
        shape = (config.hidden_size, width) if part == "down" else (width, config.hidden_size)
        yield f"{prefix}ffn_{part}.weight", torch.zeros(shape) if is_dropped else getattr(block.mlp, f"{part}_proj").weight


def interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection in the order in which llama.cpp rotates them: 0, n/2, 1, n/2 + 1, ... of the n rows of each head."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def context_length(config) -> int:
    """How many tokens the model sees as its own code would: no more than a sliding window holds, which `deci` does not know."""
    return min([config.max_position_embeddings, *(window for _, window in cache_geometry(config) if window)])


def rope_factors(config) -> torch.Tensor:
    """By how much Llama 3.1 slows each frequency: float32 (head size / 2,)."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    n = head_size(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
    return plain / scaled
