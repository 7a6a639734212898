"""Linear maps that stand in the place of dropped sub-layers: y = W x + b."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from ..base.errors import LLMDropError
from ..base.files import replacing


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LinearMap:
    """y = W x + b, where x is what the replaced module reads: the normed stream in a family whose norms come first.

    weight: (d, d); bias: (d,) or None. Both are copied, as float32 in the CPU's memory. Maps are equal if their fingerprints
    are. Raises LLMDropError for tensors that are no such map.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __post_init__(self):
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if not isinstance(tensor, torch.Tensor) and (name, tensor) != ("bias", None):
                raise LLMDropError(f"The {name} of a linear map must be a torch tensor, but is a {type(tensor).__name__}.")
        shape = tuple(self.weight.shape)
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
            raise LLMDropError(f"The weight of a linear map must be a square matrix (d, d), but its shape is {shape}.")
        if self.bias is not None and tuple(self.bias.shape) != shape[:1]:
            found = tuple(self.bias.shape)
            raise LLMDropError(f"The bias of a linear map {shape} must have the shape {shape[:1]}, but its shape is {found}.")
        for name in ("weight", "bias"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            copied = _copied(tensor)
            if not tensor.is_floating_point() or not bool(copied.isfinite().all()):
                raise LLMDropError(f"The {name} of a linear map must hold numbers that are finite in float32 ({tensor.dtype}).")
            object.__setattr__(self, name, copied)

    def __repr__(self) -> str:
        return f"LinearMap({self.width}{'' if self.bias is None else ' with bias'}, {self.fingerprint[:12]})"

    def __eq__(self, other) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, LinearMap) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self):
        return LinearMap, (self.weight, self.bias)  # pickled without what is kept for a device

    @property
    def width(self) -> int:
        return len(self.weight)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 in hex, over width and float32 bytes of weight and bias."""
        content = hashlib.sha256(f"{self.width} ".encode())
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                content.update(tensor.numpy())
        return content.hexdigest()

    @torch.inference_mode(False)  # what is made in inference mode could never be trained again
    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias on a device, in a dtype. The last pair is kept, so that applying a map again copies nothing."""
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != (device, dtype):
            pair = self.weight.to(device, dtype), None if self.bias is None else self.bias.to(device, dtype)
            kept = self.__dict__["_kept"] = (device, dtype), pair
        return kept[1]


@torch.inference_mode(False)
def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


# ---- files --------------------------------------------------------------------------------------------------------------


def weights_path(path: Path) -> Path:
    """Where the maps of a plan are stored: "plan.json" -> "plan.safetensors" beside it."""
    return path.with_suffix(".safetensors") if path.suffix == ".json" else path.with_name(f"{path.name}.safetensors")


def save_maps(path: Path, maps: Mapping[tuple[str, int], LinearMap]) -> None:
    """Write maps to a safetensors file, in one step: "attention.3.weight", "attention.3.bias"."""
    tensors = {}
    for (kind, layer), linear in maps.items():
        tensors[f"{kind}.{layer}.weight"] = linear.weight
        if linear.bias is not None:
            tensors[f"{kind}.{layer}.bias"] = linear.bias
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors))


def load_maps(path: Path, fingerprints: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], LinearMap]:
    """The maps of these fingerprints. Raises LLMDropError if the file is missing, damaged, or holds other maps."""
    if not path.exists():
        raise LLMDropError(f"its maps are missing: there is no {path.name} beside it")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise LLMDropError(f"its maps in {path.name} cannot be read: {error}") from error
    maps = {}
    for (kind, layer), fingerprint in fingerprints.items():
        weight, bias = (tensors.get(f"{kind}.{layer}.{name}") for name in ("weight", "bias"))
        if weight is None or (linear := LinearMap(weight, bias)).fingerprint != fingerprint:
            raise LLMDropError(f"{path.name} does not hold the map that it names for the {kind} of layer {layer}")
        maps[kind, layer] = linear
    return maps
