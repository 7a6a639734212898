"""Models that are made on this machine: from GGUF files, or from a recipe with random weights."""

import glob
import hashlib
import json
import pickle
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import building, disk_error, short_name, write_text
from ..sources.fetch import remembered_sha256
from .gguf_weights import write_weights

CONVERSION = 2  # raise when a change to the GGUF conversion changes what comes out, or what is refused

# What damaged or odd files raise.
UNREADABLE = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
              SafetensorError, StrictDataclassError, pickle.UnpicklingError, struct.error)  # fmt: skip

ROPE_FACTORS = "rope_freqs.weight"  # a GGUF's way of saying how a Llama 3.1 scales its rotary frequencies
LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def converted_folder(parts: list[Path], name: str) -> Path:
    """Where the conversion of these files is kept."""
    hashes = hashlib.sha256("".join(remembered_sha256(part) for part in parts).encode()).hexdigest()
    return files.CACHE / "models" / f"{short_name(name)}-gguf{CONVERSION}-{hashes[:12]}"


def converted_folders(name: str) -> list[Path]:
    """All conversions that are kept of a model, whatever its files were."""
    return sorted((files.CACHE / "models").glob(f"{glob.escape(short_name(name))}-gguf*-????????????"))


def converted_gguf(parts: list[Path], name: str) -> Path:
    """Dequantise a GGUF model once into a folder of float32 safetensors; later loads take seconds.

    parts: one file, its shards, or the consecutive pieces of one file. float32 holds every dequantised value exactly. Needs 4
    bytes for each parameter on disk, and memory for the largest tensor. Raises LLMDropError for files that are damaged or no
    whole model; nothing is kept of them.
    """
    folder = converted_folder(parts, name)
    if folder.exists():
        return folder
    with building(folder) as temporary:
        print(f"Converting {name} from GGUF to safetensors (once)", flush=True)
        joined = temporary / "joined.gguf"
        try:
            reader = _join(parts, joined, name)
            config = AutoConfig.from_pretrained(temporary, gguf_file=joined.name, dtype=torch.float32)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=joined.name)
            found = write_weights(reader, model, temporary / "model.safetensors", joined)
        except MemoryError as error:
            largest = max(int(tensor.n_elements) for tensor in reader.tensors)
            raise LLMDropError(
                f"Memory is too small to convert {name}: its largest tensor takes {4 * largest / 2**30:.1f} GiB in float32, a "
                "few times over. Free some memory and run the same command again."
            ) from error
        except UNREADABLE as error:
            if isinstance(error, OSError) and disk_error(error, folder) is not error:
                raise
            raise LLMDropError(
                f"{name} is not a GGUF file that transformers can read, or it is damaged: {first_line(error)}. "
                "Download it again, or take the model as safetensors."
            ) from error
        _check_tensors(name, reader, model, found)
        del reader
        joined.unlink()
        model.config.__dict__.pop("quantization_config", None)  # the values are plain float32 by now
        model.config._name_or_path, model.config.architectures = name, [type(model).__name__]
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


# ---- one file out of several --------------------------------------------------------------------------------------------


def _join(parts: list[Path], joined: Path, name: str) -> gguf.GGUFReader:
    """Make one GGUF file of several, and open it; its tensors stay on disk."""
    begins = [part.open("rb").read(4) for part in parts]
    if len(parts) == 1:
        joined.symlink_to(parts[0].resolve())
    elif begins == [b"GGUF"] * len(parts):
        _merge_shards(parts, joined, name)
    else:  # consecutive pieces
        with joined.open("wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out)
    reader = gguf.GGUFReader(joined)
    if (count := _number(reader, "split.count", 1)) > 1:
        raise LLMDropError(
            f"{name} is shard {_number(reader, 'split.no', 0) + 1} of {count} of a model. Put all shards into one folder, "
            f"under their names ...-00001-of-{count:05}.gguf and so on, and give one of them."
        )
    return reader


def _merge_shards(parts: list[Path], joined: Path, name: str) -> None:
    """Write the tensors of all shards, one at a time, behind the metadata of the first."""
    shards = [gguf.GGUFReader(part) for part in parts]
    for i, (part, shard) in enumerate(zip(parts, shards, strict=True)):
        number, count = _number(shard, "split.no", i), _number(shard, "split.count", len(parts))
        if (number, count) != (i, len(parts)):
            raise LLMDropError(
                f"{part.name} says that it is shard {number + 1} of {count} of a model, but stands as shard {i + 1} of "
                f"{len(parts)} of {name}. Download the shards again, and keep their names."
            )
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    expected = _number(shards[0], "split.tensors.count", len(tensors))
    if len({tensor.name for tensor in tensors}) != len(tensors) or len(tensors) != expected:
        raise LLMDropError(
            f"The shards of {name} do not belong together: they hold {len(tensors)} tensors, of which "
            f"{len({tensor.name for tensor in tensors})} differ in name, and the model has {expected}. Download them again."
        )
    writer = gguf.GGUFWriter(joined, str(shards[0].fields["general.architecture"].contents()))
    for field in shards[0].fields.values():
        if field.name.startswith(("GGUF.", "split.")) or field.name == "general.architecture":
            continue
        if not (field.types[0] == gguf.GGUFValueType.ARRAY and len(field.types) == 1):  # an empty list says nothing
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def _number(reader: gguf.GGUFReader, field: str, otherwise: int) -> int:
    return int(reader.fields[field].contents()) if field in reader.fields else otherwise


# ---- is the model whole? ------------------------------------------------------------------------------------------------


def _check_tensors(name: str, reader: gguf.GGUFReader, model: torch.nn.Module, found: dict) -> None:
    """Raise LLMDropError unless the file's tensors and the model's weights are the same.

    transformers fills what is missing with random numbers, and passes over what it has no place for.
    """
    kind, tensors = model.config.model_type, {tensor.name: tensor for tensor in reader.tensors}
    if missing := sorted(found["missing_keys"]):
        raise LLMDropError(
            f"{name} is no whole model: the GGUF file lacks {len(missing)} of the weights that a {kind} model has, such as "
            f"{missing[0]}. Download it again, or make it again from the original model."
        )
    if mismatched := sorted(found["mismatched_keys"]):
        key, in_file, in_model = mismatched[0]
        raise LLMDropError(
            f"{name} is damaged: {key} is {tuple(in_file)} in the GGUF file, but its metadata ask for {tuple(in_model)}. "
            "Download it again, or make it again from the original model."
        )
    _read_rope_scaling(name, reader, tensors.pop(ROPE_FACTORS, None), model.config)
    in_file = sum(int(tensor.n_elements) for tensor in tensors.values())
    in_model = sum({id(weight): weight.numel() for weight in model.state_dict(keep_vars=True).values()}.values())
    if found["unexpected_keys"] or in_file > in_model:
        unused = sorted(found["unexpected_keys"]) or _without_a_place(tensors, model)
        raise LLMDropError(
            f"The GGUF file of {name} holds tensors that transformers does not use in a {kind} model, such as {unused[0]}. "
            "Without them the model would give wrong numbers. Take the model as safetensors."
        )


def _without_a_place(tensors: Iterable[str], model: torch.nn.Module) -> list[str]:
    """The tensors whose names stand for no weight of a model, as far as names tell."""
    arch = next(
        (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == model.config.model_type), gguf.MODEL_ARCH.LLAMA
    )
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    known = {names.get_name(key, (".weight", ".bias")) for key in model.state_dict()}
    return sorted(set(tensors) - known) or sorted(tensors)


def _read_rope_scaling(name: str, reader: gguf.GGUFReader, factors, config) -> None:
    """Take over how a GGUF file scales rotary frequencies, which transformers does not read.

    factors: the tensor that states them, one for each frequency, or None. Factors of one scale nothing. Those of Llama 3.1
    to 3.3 follow from the largest of them. Raises LLMDropError for other factors and kinds.
    """
    plain: dict = getattr(config, "rope_parameters", None) or {}
    if plain.get("rope_type", "default") != "default":
        return  # transformers has read it
    kinds = [field.contents() for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")]
    values = np.ones(1) if factors is None else np.asarray(factors.data, dtype=np.float64)
    if all(kind == "none" for kind in kinds) and np.allclose(values, 1):
        return
    width, theta = 2 * len(values), plain.get("rope_theta")
    if factors is not None and theta is not None and all(kind in ("none", "llama3") for kind in kinds):
        config.rope_parameters = {**plain, **LLAMA3_ROPE, "factor": float(values.max())}
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
        if len(scaled) == len(values) and np.allclose(values, theta ** -(np.arange(0, width, 2) / width) / scaled, rtol=1e-3):
            return
    raise LLMDropError(
        f"The GGUF file of {name} scales rotary frequencies in a way that transformers does not read from GGUF "
        f"({', '.join(map(str, kinds)) or ROPE_FACTORS}). Without it the model would give wrong numbers. Take the model as "
        "safetensors."
    )


# ---- models with random weights -----------------------------------------------------------------------------------------


def generated_folder(name: str, recipe: dict) -> Path:
    """Where a model that is made from a recipe, or a shape, is kept."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return files.CACHE / "models" / f"{name.replace(':', '-')}-{digest[:12]}"


def generated(name: str, recipe: dict, kind: str = "decoder") -> Path:
    """A model with random weights, made from a recipe: nothing is downloaded. It reads bytes, or images as the recipe says."""
    folder = generated_folder(name, recipe)
    if folder.exists():
        return folder
    settings = dict(recipe["config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with building(folder) as temporary, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        made_by = {"decoder": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM}.get(kind, AutoModel)
        made_by.from_config(config).save_pretrained(temporary)
        if "images" in recipe:
            write_text(temporary / "preprocessor_config.json", json.dumps(recipe["images"]))
        else:
            byte_tokenizer().save_pretrained(temporary)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte (0-255), and an end-of-text token (256)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def first_line(error: Exception) -> str:
    """An error in one line; where its first line only leads to the next, both."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or ["no message"]
    return f"{type(error).__name__}: {' '.join(lines[:2]) if lines[0].endswith(':') else lines[0]}"
