"""Weights of the layers of decoders, encoders and encoder-decoders in 8 or 4 bits, rounded to nearest and stored by torchao.

The paper quantises to 4 bits by AWQ, on top of dropping (Table 11). AWQ scales weights by what it saw of activations; here no
data is used. Weights w of a group share a scale s and a zero point z:

    w -> s (q - z),  q = round(w / s) + z,  s = (max(w, 0) - min(w, 0)) / (2^bits - 1)

q and z are signed integers of so many bits. In 8 bits each row of a matrix is a group, in 4 bits each 32 numbers of a row.
Embeddings (also T5's, of positions), norms, biases, heads and the maps of a drop plan stay as they are, and what is computed
stays in the dtype of the model: a weight is dequantised for each use. So memory is saved, not time.
"""

import importlib
from typing import Any

import torch
from torch import nn

from ..base.checks import as_whole
from ..base.errors import LLMDropError, NotAvailable
from ..dropping.units import Mapped
from ..models.families import find_anatomy

GROUPS = {8: None, 4: 32}  # bits -> how many numbers of a row share a scale; None: all
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.inference_mode(False)  # what is made in inference mode could never be trained again
@torch.no_grad()
def quantise(model: nn.Module, bits: int) -> nn.Module:
    """Turn every linear map of the layers into a quantised tensor of torchao, in place; returns the model.

    It computes with the numbers of `round_weights`, and is dropped and measured like any other model; what reads the weights
    themselves (weight norms, exports) needs the model of `round_weights`. torchao holds 4 bits in a byte of their own, on CPUs
    and GPUs alike; `quantised_bytes` tells what they take when packed. Inside `dropped`, only what is there is quantised.
    `save_pretrained` stores it for transformers, which loads it in the dtype that it has (but cannot run Falcon then,
    nor load BART, mBART, Pegasus and Marian).

    Raises, before anything is changed, LLMDropError for other bits than 8 and 4, for a model with a matrix that cannot be
    quantised, and for weights that are not plain tensors in memory; NotAvailable without torchao.
    """
    bits, linears, torchao = _ready(model, bits)
    for linear in linears:
        linear.weight = nn.Parameter(_nearest(torchao, linear.weight, bits), requires_grad=False)
        linear.__class__ = nn.Linear  # Falcon and `load_model` have classes that multiply in ways of their own
    _declare(model, torchao, bits)
    return model


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> nn.Module:
    """Give every weight that `quantise` would quantise its dequantised value, in place; returns the model.

    It remains a plain model in its own dtype, as fast as before: for scores, and for exports and `save_derived` of decoders.
    Raises what `quantise` raises.
    """
    bits, linears, torchao = _ready(model, bits)
    for linear in linears:
        linear.weight.copy_(_nearest(torchao, linear.weight, bits).dequantize())
    return model


def quantised_bytes(model: nn.Module, bits: int) -> int:
    """Bytes that the parameters take when the linear maps of the layers are stored in so many bits.

    Such a map takes `bits` per number, packed, and per group a scale in the model's dtype and a byte for the zero point; in 8
    bits that is what torchao holds. Other parameters take what they take now, once if they are shared. What is dropped is not
    counted. The model may be quantised already, or on the device "meta". Raises LLMDropError for other bits than 8 and 4, and
    for a model with a matrix that cannot be quantised.
    """
    bits = _known(bits)
    weights = {id(linear.weight): linear.weight for linear in _linears(model, bits).values()}
    total = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in weights)
    for weight in weights.values():
        n_groups = weight.numel() // _group(weight, bits)
        total += weight.numel() * bits // 8 + n_groups * (weight.element_size() + 1)
    return total


def _nearest(torchao: Any, weight: torch.Tensor, bits: int) -> Any:
    """The weight (rows, inputs) as a tensor of torchao, of the same shape and dtype.

    Zero points make the error (root mean square) of normal weights smaller by 15 % in 4 bits and by 7 % in 8 bits. Integers
    are formed in float32 from the scale as it is stored: in bfloat16, they would not be the nearest.
    """
    wide, group = weight.float().contiguous(), (1, _group(weight, bits))
    make, integers = torchao.IntxUnpackedToInt8Tensor.from_hp, getattr(torch, f"int{bits}")
    first = make(wide, group, integers, mapping_type=torchao.MappingType.ASYMMETRIC)
    stored = first.scale.to(weight.dtype)
    stored[stored == 0] = 1  # in float16, of a group of zeros: nothing is divided by zero
    given = {"custom_scale": stored.float(), "custom_zero_point": first.zero_point, "intx_choose_qparams_algorithm": None}
    return make(wide, group, integers, **given).to(weight.dtype)


def _declare(model: nn.Module, torchao: Any, bits: int) -> None:
    """Say what the weights are, as if transformers had quantised them: then its `save_pretrained` can store them."""
    from transformers import TorchAoConfig  # here, since these load torchao themselves, where it is installed
    from transformers.quantizers import AutoHfQuantizer

    groups = torchao.PerAxis(0) if GROUPS[bits] is None else torchao.PerGroup(GROUPS[bits])
    how = torchao.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), groups, torchao.MappingType.ASYMMETRIC)
    model.config.quantization_config = TorchAoConfig(how)
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)


def _group(weight: torch.Tensor, bits: int) -> int:
    """How many numbers share a scale."""
    return GROUPS[bits] or weight.shape[1]


# ---- what can be quantised ----------------------------------------------------------------------------------------------


def _known(bits: object) -> int:
    number = as_whole(bits)
    if number not in GROUPS:
        raise LLMDropError(f"Weights are quantised to 8 or to 4 bits, not to {bits!r}.")
    return number


def _ready(model: nn.Module, bits: object) -> tuple[int, list[nn.Linear], Any]:
    """Bits, linear maps and torchao's quantisation, of which nothing will be refused any more."""
    known = _known(bits)
    linears = _linears(model, known)
    if not linears:
        raise LLMDropError("Nothing is left to quantise: all attention and MLP is dropped. Quantise the model before.")
    for name, linear in linears.items():
        weight = linear.weight
        if type(weight) is not nn.Parameter:
            raise LLMDropError(f"{name} is a {type(weight).__name__}: it is quantised already. Load the model again.")
        if weight.is_meta:
            raise LLMDropError(f"{name} is offloaded. Load the model so that it is in memory as a whole: device='cpu'.")
        if weight.dtype not in DTYPES:
            raise LLMDropError(f"{name} is {weight.dtype}. Load the model in float32, bfloat16 or float16.")
    try:  # here, since it takes seconds to import
        return known, list(linears.values()), importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise NotAvailable(f"torchao is not installed ({error}): pip install 'torchao>=0.18'.") from error


def _linears(model: nn.Module, bits: int) -> dict[str, nn.Linear]:
    """The linear maps of the layers, by the names of their weights. Raises LLMDropError if there are other matrices.

    Maps of a drop plan are left out: so it does not matter whether a model is quantised first, or dropped.
    """
    anatomy = find_anatomy(model)
    names = {id(module): name for name, module in model.named_modules()}
    found, others = {}, []
    for module in (module for layer in anatomy.layers for module in layer.block.modules() if not isinstance(module, Mapped)):
        for name, parameter in module.named_parameters(recurse=False):
            where = f"{names[id(module)]}.{name}"
            if isinstance(module, nn.Linear) and name == "weight":
                found[where] = module
            elif parameter.ndim > 1 and not isinstance(module, nn.Embedding):
                others.append(f"{where} of a {type(module).__name__}")
    if others:
        raise LLMDropError(
            f"This {anatomy.family} model cannot be quantised as a whole: torchao takes weights of nn.Linear, but "
            f"{len(others)} matrices are others, such as {others[0]}. Mixtures of experts and GPT-2 are built so: take a model "
            "of another family."
        )
    for where, linear in found.items():
        n_inputs = linear.weight.shape[1]
        if n_inputs % _group(linear.weight, bits):
            raise LLMDropError(
                f"{where} has rows of {n_inputs} numbers, which groups of {GROUPS[bits]} do not divide. Use 8 bits."
            )
    return found
