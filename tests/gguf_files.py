"""A tiny Llama, and the GGUF file that holds it."""

import families
import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_llama():
    """A Llama whose tokenizer knows bytes and two merges: GGUF wants some, and older readers trip over a single one."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet | {"ab": 256, "cd": 257}, merges=[("a", "b"), ("c", "d")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = families.SMALL | {"vocab_size": 259, "eos_token_id": 258, "pad_token_id": None, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    return model.eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def tiny(family="llama", **changes):
    """A random model of a family, and the tokenizer of `make_llama`."""
    torch.manual_seed(5)
    _, tokenizer = make_llama()
    settings = families.SMALL | {"vocab_size": 259, "max_position_embeddings": 256, "initializer_range": 0.3}
    settings |= {"bos_token_id": None, "eos_token_id": 258, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings | changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model, tokenizer


def write_gguf(path, model, tokenizer):
    """A Llama as GGUF in float32, with the permuted query and key rows of that format."""
    config = model.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * 258 + [3])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(258)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        for short in "qk":
            if f"{short}_proj" in name:
                array = array.reshape(heads[short], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm").replace("lm_head", "output")
        for long, short in names.items():
            name = name.replace(long, short)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewrite_gguf(source, target, keep=lambda name: True, metadata=None, tensors=None):
    """A copy of a GGUF file with some of its tensors, and further metadata (16-bit numbers, or text) and tensors."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for name, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(name, value)
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_gguf(source, folder, stem, counts):
    """Shards with so many tensors each, as the tools of llama.cpp name them; returns their paths."""
    names = [tensor.name for tensor in gguf.GGUFReader(source).tensors]
    paths = []
    for i, count in enumerate(counts):
        mine, names = names[:count], names[count:]
        paths.append(folder / f"{stem}-{i + 1:05}-of-{len(counts):05}.gguf")
        split = {"split.no": i, "split.count": len(counts), "split.tensors.count": sum(counts)}
        rewrite_gguf(source, paths[-1], keep=set(mine).__contains__, metadata=split)
    assert not names
    return paths
