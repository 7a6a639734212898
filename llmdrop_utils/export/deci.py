"""A dropped model in the schema of NVIDIA's NAS models (`DeciLMForCausalLM`, `nemotron-nas`), which servers read.

vLLM and SGLang read `block_configs` as attributes: a `configuration_decilm.py` comes with the folder, which they load with
trust_remote_code. MLX-LM and ExLlamaV3 read the same `block_configs` as plain JSON.
"""

import functools
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..base.errors import LLMDropError, NotAvailable
from ..base.files import building
from ..dropping.plan import DropPlan
from ..dropping.units import skipping
from ..models.cache_shape import head_size, is_full_attention
from .checkpoint import with_both_rope_forms
from .deci_reader import DeciReader
from .gate import EXACT, Parity, check, compare_logits
from .shape import check_llama_shaped, refuse

SERVERS = ("vllm", "mlx")  # SGLang has the limits of vLLM, ExLlamaV3 those of MLX-LM
KEPT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("vocab_size", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)
ROUNDED_TO = 256  # readers compute the width of an MLP from a multiple of the stream's, and round it up to this


def export_deci(model: nn.Module, tokenizer, plan: DropPlan, folder: Path | str, server: str) -> Parity:
    """Write a model without the sub-layers of a plan to a new folder, once it was read back as the server reads it.

    Parameters
    ----------
    model: the dense model, in float32, which is what the folder is compared with. Weights are written in this dtype.
    folder: must not exist yet.
    server: "vllm" (and SGLang) or "mlx" (and ExLlamaV3).

    vLLM does not run on every machine: a reader that follows its schema, `DeciReader`, stands for it. MLX-LM runs itself where
    it is installed (pip install mlx-lm). Returns how far the folder is from the model whose terms are set to zero. Raises
    LLMDropError for what the server cannot hold, for a folder that exists and if the gate fails, and DiskFull. Nothing is left
    then.
    """
    folder = Path(folder)
    check_supported(model, plan, server)
    if folder.exists():
        raise LLMDropError(f"{folder} exists already. Give the export a folder of its own.")
    with building(folder) as temporary:
        _write(model, tokenizer, plan, temporary)
        parity = compare_logits(lambda prompts: DeciReader(temporary).logits(prompts), model, tokenizer, plan)
        check("The folder", parity.log_probability, EXACT)
        if server == "mlx" and importlib.util.find_spec("mlx_lm"):
            parity = compare_logits(lambda prompts: mlx_logits(temporary, prompts), model, tokenizer, plan)
            check("The folder in MLX-LM", parity.log_probability, EXACT)
    return parity


def mlx_logits(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """After each prompt, as MLX-LM computes them, all but the last token in its cache. Raises NotAvailable without it."""
    try:
        mx, utils = importlib.import_module("mlx.core"), importlib.import_module("mlx_lm.utils")
        cache = importlib.import_module("mlx_lm.models.cache")
    except ImportError as error:
        raise NotAvailable(f"MLX-LM is not installed ({error}): pip install mlx-lm.") from error
    model, _ = utils.load_model(folder)
    logits = []
    for prompt in prompts:
        cached = cache.make_prompt_cache(model)
        model(mx.array([prompt[:-1]]), cache=cached)
        logits.append(torch.tensor(model(mx.array([prompt[-1:]]), cache=cached)[0, -1].tolist()))
    return logits


def check_supported(model: nn.Module, plan: DropPlan, server: str) -> None:
    """Raise LLMDropError unless the schema can hold this model without what the plan drops, saying what stands against it."""
    if server not in SERVERS:
        raise LLMDropError(f"There is no server {server!r}. There are: {', '.join(SERVERS)}.")
    config = check_llama_shaped(model, plan, server)
    no = functools.partial(refuse, config, server)
    if not is_full_attention(config):
        no(f"it has a sliding window of {config.sliding_window} tokens, which the schema does not know")
    if config.rope_parameters["rope_type"] not in ("default", "llama3", "linear"):
        no(f"its rotary positions are scaled in another way ({config.rope_parameters['rope_type']})")
    if head_size(config) * config.num_attention_heads != config.hidden_size:
        no("its heads together are not as wide as the stream")
    if config.intermediate_size % ROUNDED_TO:
        no(f"the width of its MLP, {config.intermediate_size}, is no multiple of {ROUNDED_TO}, to which readers round")
    if server == "vllm" and 0 in plan.attention:
        no("it needs the attention of layer 0, where its residual stream begins")
    if server == "vllm" and plan.maps:
        no("it has no linear maps in dropped places")
    for kind, layer, linear in plan.maps:
        if kind == "mlp":
            no(f"the map for the MLP of layer {layer} was not tried")
        if layer < min(set(range(config.num_hidden_layers)) - set(plan.attention)):
            no(f"the map in layer {layer} comes before the first attention, from whose cache masks are made")
        if linear.bias is not None and not _has_bias(config):
            no(f"the linear map in layer {layer} has a bias, and the model's attention has none")


def _has_bias(config) -> bool:
    return config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))


def _write(model: nn.Module, tokenizer, plan: DropPlan, folder: Path) -> None:
    with skipping(model, plan):
        state = {_renamed(name, plan): tensor for name, tensor in model.state_dict().items()}
        if _has_bias(model.config):  # one setting stands for the biases of all projections, and of maps
            for name, weight in list(state.items()):
                if name.endswith(("o_proj.weight", "self_attn.linear.weight")):
                    state.setdefault(name.replace(".weight", ".bias"), torch.zeros(len(weight), dtype=weight.dtype))
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        PreTrainedModel.save_pretrained(model, folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings_of(model.config, plan), indent=2) + "\n", encoding="utf-8")
    (folder / "configuration_decilm.py").write_text(CONFIGURATION, encoding="utf-8")


def _renamed(name: str, plan: DropPlan) -> str:
    """Maps are called `self_attn.linear`."""
    for kind, layer, _ in plan.maps:
        if kind == "attention":
            name = name.replace(f"layers.{layer}.self_attn.", f"layers.{layer}.self_attn.linear.")
    return name


def settings_of(config, plan: DropPlan) -> dict:
    """The content of config.json."""
    known = config.to_dict()
    settings = with_both_rope_forms({name: known[name] for name in KEPT if known.get(name) is not None})
    return settings | {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "attention_bias": _has_bias(config),
        "mlp_bias": False,
        "block_configs": [_block(config, plan, layer) for layer in range(config.num_hidden_layers)],
    }


def _block(config, plan: DropPlan, layer: int) -> dict:
    is_linear = plan.map_of("attention", layer) is not None
    if layer in plan.attention:
        attention = {"no_op": not is_linear, "replace_with_linear": is_linear}
    else:
        group = config.num_attention_heads // config.num_key_value_heads
        attention = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": group}
    if layer in plan.mlp:
        return {"attention": attention, "ffn": {"no_op": True}}
    multiple = 1.5 * config.intermediate_size / config.hidden_size
    return {"attention": attention, "ffn": {"no_op": False, "ffn_mult": multiple}}


CONFIGURATION = '''"""The configuration of a model whose layers may lack attention or MLP. Its parts are read by attribute."""

from transformers import LlamaConfig


class Part(dict):
    """A mapping whose entries are attributes, too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **settings):
        super().__init__(**settings)
        self.block_configs = [Part({kind: Part(part) for kind, part in block.items()}) for block in block_configs]
'''
