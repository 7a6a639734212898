"""The weights of a GGUF file, dequantised one tensor at a time into a safetensors file: memory for one tensor is enough."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm import tqdm
from transformers import modeling_gguf_pytorch_utils as transformers_gguf

BYTES = 4  # of a number: float32 holds every dequantised value exactly


def write_weights(reader: gguf.GGUFReader, model: torch.nn.Module, path: Path, file: Path) -> dict[str, list]:
    """Write the weights of `model` (on the device "meta": names and shapes are enough), read from a GGUF file, to `path`.

    Names, order of axes and the permutation of heads are those of transformers' own GGUF loader, whose tables are used. The
    file is what `save_pretrained` writes, to the byte. file: the GGUF file that `reader` reads.

    Returns what does not fit, as `from_pretrained` reports it: missing_keys, unexpected_keys, and mismatched_keys as (name,
    shape in the file, shape of the model). What is missing is left zero.
    """
    every = model.state_dict(keep_vars=True)
    weights = _saved(every)
    offsets = _write_header(path, weights)
    found: set[str] = set()
    unexpected: list[str] = []
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    with path.open("r+b") as out:
        for name, values in _tensors(reader, model, file):
            if name not in offsets:
                if name not in every:  # a tied weight that the file holds twice has a place
                    unexpected.append(name)
                continue
            found.add(name)
            if values.shape != tuple(weights[name].shape):
                mismatched.append((name, values.shape, tuple(weights[name].shape)))
                continue
            out.seek(offsets[name])
            out.write(np.ascontiguousarray(values, dtype="<f4").data)  # `tofile` would not say that the disk is full
    return {"missing_keys": sorted(set(weights) - found), "unexpected_keys": unexpected, "mismatched_keys": mismatched}


def _saved(every: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that are saved, by name, sorted: of those that share one tensor, the first."""
    first: dict[int, str] = {}
    for name, weight in every.items():
        first.setdefault(id(weight), name)
    return {name: every[name] for name in sorted(first.values())}


def _write_header(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Write a safetensors file whose tensors are all zero; returns where each begins."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + BYTES * weight.numel()
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(start + end)
    return {name: start + header[name]["data_offsets"][0] for name in weights}


def _tensors(reader: gguf.GGUFReader, model: torch.nn.Module, file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name in the model and float32 values of each tensor. Those without a place are left out."""
    known = transformers_gguf.load_gguf_checkpoint(str(file), return_tensors=False)
    known["tensors"] = {}  # what is made of several tensors: the experts of a mixture
    architecture = str(reader.fields["general.architecture"].contents())
    kind = transformers_gguf.TENSOR_PROCESSORS.get(architecture, transformers_gguf.TensorProcessor)
    processor = kind(config=known["config"])
    names = transformers_gguf.get_gguf_hf_weights_map(model, processor)
    size = sum(tensor.n_elements for tensor in reader.tensors)
    with tqdm(total=size, unit=" weights", unit_scale=True, desc="converting", mininterval=2, disable=None) as bar:
        for tensor in reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            result = processor.process(weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=known)
            if result.name in names:
                yield names[result.name], result.weights
            bar.update(int(tensor.n_elements))
    for name, stacked in known["tensors"].items():
        yield name, stacked.numpy()
