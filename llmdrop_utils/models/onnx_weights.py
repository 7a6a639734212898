"""A vision encoder in an ONNX file -> a folder that transformers reads.

An ONNX graph exported from PyTorch keeps the names of most weights. Weights of linear maps are the exception: they are
transposed and anonymous, and the node that multiplies by one is called by the module that it was. So

    /backbone/encoder/layer.0/mlp/fc1/MatMul multiplies by onnx::MatMul_1981 (384, 1536)

says that "encoder.layer.0.mlp.fc1.weight" is that matrix, transposed to (1536, 384). Positions are stored in two parts, of
the class token and of the patches. What is not in the backbone (a head, a decoder) is left out.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ..base import files
from ..base.errors import LLMDropError, NotAvailable
from ..base.files import building, short_name, write_text
from ..sources.fetch import remembered_sha256
from .convert import first_line

CONVERSION = 1  # raise when a change alters what comes out
PREFIX = "backbone."  # of the names of the encoder's weights


def onnx_folder(path: Path, name: str) -> Path:
    """Where the conversion of an ONNX file is kept."""
    return files.CACHE / "models" / f"{short_name(name)}-onnx{CONVERSION}-{remembered_sha256(path)[:12]}"


def converted_onnx(path: Path, name: str, config: dict, images: dict) -> Path:
    """The folder of a vision encoder that is converted from an ONNX file, once; later loads take a second.

    config, images: the content of config.json and preprocessor_config.json, for which ONNX has no place. Raises NotAvailable
    without the package onnx, LLMDropError for a file that is damaged or holds no such encoder; nothing is kept of it.
    """
    folder = onnx_folder(path, name)
    if folder.exists():
        return folder
    onnx = _onnx(name)
    with building(folder) as temporary:
        print(f"Converting {name} from ONNX to safetensors (once)", flush=True)
        try:
            weights = read_weights(onnx, onnx.load(path, load_external_data=False).graph)
        except Exception as error:  # whatever protobuf and onnx raise
            if isinstance(error, OSError):
                raise
            raise LLMDropError(
                f"{name} is no ONNX file of a vision encoder, or it is damaged: {first_line(error)}. Delete its folder in "
                f"{files.CACHE / 'packages'} and run the same command again, which downloads it."
            ) from error
        save_file(weights, temporary / "model.safetensors", {"format": "pt"})
        write_text(temporary / "config.json", json.dumps(config, indent=1) + "\n")
        write_text(temporary / "preprocessor_config.json", json.dumps(images, indent=1) + "\n")
    return folder


def _onnx(name: str) -> Any:
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise NotAvailable(
            f"{name} comes as ONNX, and the package onnx cannot be used ({error}). Install it beside this package: "
            "pip install 'llmdrop-utils[vision]'."
        ) from error


def read_weights(onnx: Any, graph: Any) -> dict[str, torch.Tensor]:
    """The weights of the encoder in an ONNX graph, by the names that its PyTorch model has. Raises ValueError for none."""
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    positions: dict[str, np.ndarray] = {}
    for node in graph.node:
        module = node.output[0].strip("/").split("/")[:-1]  # the output is called by its module and its operation
        anonymous = [arrays[name] for name in node.input if name in arrays and name.startswith("onnx::")]
        if not anonymous or module[:1] != [PREFIX.strip(".")]:
            continue
        if node.op_type == "MatMul":
            weights[".".join([*module[1:], "weight"])] = anonymous[0].T
        elif module[1:] == ["embeddings"]:
            positions[node.op_type] = anonymous[0]
    if not weights or set(positions) != {"Concat", "Reshape"}:
        raise ValueError(f"it has {len(weights)} weights of a backbone, and positions in {len(positions)} parts")
    weights["embeddings.position_embeddings"] = np.concatenate([positions["Concat"], positions["Reshape"]], axis=1)
    return {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in sorted(weights.items())}
