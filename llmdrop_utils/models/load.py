"""Files of a model -> the model and its tokenizer.

Weights come from safetensors, and no code that comes with a model is run. Pickles are read for sources that are known
to have nothing else (`pickled` in data/sources.yaml), by torch's restricted unpickler.
"""

import contextlib
import ctypes
import logging
import os
import re
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer

from ..base import files
from ..base.errors import LLMDropError
from .config import TEXT_WEIGHTS, full_config, is_multimodal, kind_of, read_config
from .convert import UNREADABLE, first_line
from .locate import LocatedModel, locate_model

# Buffers that older versions of transformers stored, and this one does not name: causal masks and rotary frequencies.
HARMLESS = re.compile(r"(^|\.)((attn|attention)\.masked_bias|rotary_emb\.inv_freq)$")

logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # `check_weights` says what its table says
logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)  # a single device shares no layers
transformers.utils.logging.disable_progress_bar()  # a bar for each of many small steps; studies show one for the whole


def load_model(name: str, dtype: torch.dtype | None = None, device: str | None = None):
    """Load a causal language model for inference.

    Parameters
    ----------
    name: whatever `locate_model` takes.
    dtype: None takes `default_dtype()`.
    device: None takes all GPUs, spilling over to CPU memory and disk, or the CPU where there is no GPU.

    Returns (model in eval mode, tokenizer; None for random weights). Raises what `locate_model` raises.
    """
    return load_located(locate_model(name), dtype, device)


def load_located(located: LocatedModel, dtype: torch.dtype | None = None, device: str | None = None):
    """`load_model` for files that are on this machine already."""
    if not torch.cuda.is_available():
        _keep_freed_memory()
    try:
        if located.is_random:
            model = model_of_shape(
                located, dtype or default_dtype(), device or ("cuda" if torch.cuda.is_available() else "cpu")
            )
            _mark(model, located)
            return model, None
        tokenizer, config = load_tokenizer(located), load_config(located)  # what is wrong with them costs nothing to find
        return load_weights(located, config, dtype, device), tokenizer
    except torch.OutOfMemoryError as error:
        raise LLMDropError(
            f"{located.name} does not fit into the memory of {torch.cuda.get_device_name()}. "
            "Use a smaller model, more GPUs, or device='cpu'."
        ) from error
    except UNREADABLE as error:
        raise LLMDropError(f"{located.name} could not be loaded: {first_line(error)}") from error


def read_weights(auto, located: LocatedModel, config, dtype: torch.dtype | None, attention: str, **more) -> tuple:
    """A model, by one of transformers' auto classes, from the files of a folder alone; and what was found there, which
    `check_weights` judges. attention: how it is computed."""
    return auto.from_pretrained(
        located.folder,
        config=config,
        dtype=dtype or default_dtype(),
        attn_implementation=attention,
        use_safetensors=not located.pickled,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_weights` refuses them, and names them
        **more,
    )


def load_weights(located: LocatedModel, config, dtype: torch.dtype | None, device: str | None) -> nn.Module:
    """The model of this configuration, with the weights of a folder; dtype and device as in `load_model`."""
    is_part = config.model_type != full_config(located.name, located.folder).model_type
    model, found = read_weights(
        AutoModelForCausalLM,
        located,
        config,
        dtype,
        attention_implementation(located),
        key_mapping=TEXT_WEIGHTS if is_part else None,
        device_map=device or ("auto" if torch.cuda.is_available() else "cpu"),
        offload_folder=str(files.CACHE / "offload"),
    )
    check_weights(located.name, located.folder, model, found, is_part)
    if is_part:  # transformers would save it under the names that it was loaded from
        model._weight_conversions = None
    return ready(model, located)


def check_weights(name: str, folder: Path, model: nn.Module, found: dict, is_part: bool = False) -> None:
    """Raise LLMDropError unless the weights on disk are those that config.json describes: every one of them, and no other.

    transformers fills what is missing with random numbers and passes over what it has no place for, with a warning. What it
    knows to be a harmless remainder (buffers, a tied LM head) it does not name.
    found: its loading info. is_part: the model is the text part of a multimodal one, so weights of other parts stay unused.
    """
    kind = model.config.model_type
    missing = sorted(found["missing_keys"])
    unused = sorted(key for key in found["unexpected_keys"] if not HARMLESS.search(key))
    if is_part:
        own = {_top(key) for key in model.state_dict()}
        unused = [key for key in unused if _top(key) in own]
    heads = [key for key in missing if key.split(".")[0] in ("lm_head", "embed_out", "output")]
    if missing and heads == missing:
        other = f"; it has another head instead ({unused[0]})" if unused else ""
        raise LLMDropError(
            f"{name} has no LM head{other}: it lacks {missing[0]}, so it does not predict tokens. Give the checkpoint of the "
            "causal language model, which AutoModelForCausalLM saves; AutoModel saves the bare decoder."
        )
    if missing and unused:
        raise LLMDropError(
            f"The weights of {name} have other names than its config.json promises ({kind}): it lacks {len(missing)}, such "
            f"as {missing[0]}, and has no place for {len(unused)}, such as {unused[0]}. Either config.json belongs to another "
            "model, or a wrapper added to the names when they were saved: save the inner model with save_pretrained."
        )
    if missing:
        raise LLMDropError(
            f"{name} lacks {len(missing)} of the weights that its config.json promises, such as {missing[0]}. If files are "
            "missing, download them. A dropped model is kept by save_dropped, and loaded by load_dropped."
        )
    if unused:
        raise LLMDropError(
            f"{name} holds {len(unused)} weights that a {kind} model of its config.json has no place for, such as {unused[0]}. "
            "Without them it would give wrong numbers: config.json belongs to another model (as when a Qwen2 is called llama), "
            "or its sizes were changed. Correct it, or download it again."
        )
    if mismatched := sorted(found["mismatched_keys"]):
        key, stored, expected = mismatched[0]
        raise LLMDropError(
            f"{len(mismatched)} weights of {name} have another shape than its config.json promises: {key} is {tuple(stored)}, "
            f"expected {tuple(expected)}. Correct config.json, or download it again."
        )
    if twice := _stored_twice(folder, model.base_model_prefix):
        raise LLMDropError(
            f"{name} holds some weights twice, such as {twice[0]} and {model.base_model_prefix}.{twice[0]}, and only one can "
            "be used. Save the model again with save_pretrained."
        )


def _top(key: str) -> str:
    """ "model.layers.0.mlp" -> "model.layers"."""
    return ".".join(key.split(".")[:2])


def _stored_twice(folder: Path, prefix: str) -> list[str]:
    """Weights that are stored with and without the prefix that transformers adds or takes away by itself."""
    keys: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            keys.update(weights.keys())
    return sorted(key for key in keys if f"{prefix}.{key}" in keys)


def ready(model: nn.Module, located: LocatedModel) -> nn.Module:
    """The model in eval mode, which knows its identity."""
    _mark(model, located)
    _speed_up_bfloat16(model)
    return model.eval()


def _mark(model: nn.Module, located: LocatedModel) -> None:
    """Drop plans remember which model they were made for, and serve what is derived from it."""
    model.llmdrop_identity, model.llmdrop_bases = located.identity, located.bases


def model_of_shape(located: LocatedModel, dtype: torch.dtype, device: str) -> nn.Module:
    """A model of this shape with random weights. On the device "meta" it has no weights at all, and takes no memory."""
    config, attention = load_config(located), attention_implementation(located)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(located.seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise LLMDropError(
                f"No model can be built as the config.json of {located.name} says: {first_line(error)}. Correct it."
            ) from error


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, instead of handing it back and having new pages zeroed: every
    operation of a forward pass on a CPU makes a tensor, and passes take about a sixth less time."""
    keep = 1 << 30  # bytes
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, keep)


def load_tokenizer(located: LocatedModel):
    """The tokenizer alone: enough to make token blocks without loading weights."""
    if located.is_random:
        raise LLMDropError(f"{located.name} has no tokenizer: random weights are for notebooks 05 and 06 alone.")
    try:
        kind = AutoTokenizer if located.tokenizer is None else getattr(transformers, located.tokenizer)
        return kind.from_pretrained(located.folder, trust_remote_code=False, local_files_only=True)
    except UNREADABLE as error:
        raise LLMDropError(f"The tokenizer of {located.name} could not be loaded: {first_line(error)}") from error


def load_config(located: LocatedModel):
    """The configuration alone, to know a model's family without loading weights; of a multimodal model its text part's."""
    return read_config(located.name, located.folder)


def said_of_parts(located: LocatedModel) -> str | None:
    """What a page says of a multimodal model: that its text part is measured. None for all others."""
    whole = full_config(located.name, located.folder)
    if kind_of(whole) != "decoder" or not is_multimodal(whole):
        return None
    name, _, _ = located.name.partition(",")  # of a stage of a series the series
    return (
        f"{name} is multimodal ({whole.model_type}). What is measured is its text part, on text alone: a "
        f"{load_config(located).get_text_config().model_type} decoder."
    )


def attention_implementation(located: LocatedModel) -> str:
    """How attention is computed: "sdpa" where the family allows it, otherwise "eager" (Gemma 2); part of a result's key."""
    config = load_config(located)
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_dtype() -> torch.dtype:
    """What the environment variable LLMDROP_DTYPE says ("float32" or "bfloat16"); without it, what is fast on this machine.

    That is bfloat16 on a GPU, and on a processor that multiplies in it (AMX or AVX512_BF16: 2 to 4 x faster), otherwise
    float32. Raises LLMDropError for another name.
    """
    if name := os.environ.get("LLMDROP_DTYPE"):
        if name not in DTYPES:
            raise LLMDropError(f"LLMDROP_DTYPE is {name!r}, but must be one of: {', '.join(DTYPES)}.")
        return DTYPES[name]
    return torch.bfloat16 if torch.cuda.is_available() or _multiplies_bfloat16() else torch.float32


def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class _Float32Products(nn.Linear):
    """A bfloat16 layer whose products are formed in float32, and rounded to bfloat16 at the end.

    That is what processors with bfloat16 instructions do. torch's own products on other processors take six times as long.
    Large weights are converted in pieces that stay in the processor's cache, which changes no bit of the result.
    """

    LARGE = 1 << 23  # numbers
    PIECE = 1 << 20  # numbers, but 512 rows at least: narrower ones keep no processor busy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_large = self.weight.numel() > self.LARGE
        wide, rows = x.float(), max(512, self.PIECE // self.in_features) if is_large else self.out_features
        bias = None if self.bias is None else self.bias.float()
        pieces = []
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            piece = nn.functional.linear(wide, self.weight[part].float(), None if bias is None else bias[part])
            pieces.append(piece.to(x.dtype))
        return torch.cat(pieces, -1)


def _speed_up_bfloat16(model: nn.Module) -> None:
    """Let plain linear layers form products in float32, where the processor has no instructions for bfloat16."""
    if _multiplies_bfloat16():
        return
    for module in model.modules():
        is_plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter  # quantised weights multiply by themselves
        if is_plain and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu":
            module.__class__ = _Float32Products
