"""Models that are made on this machine: from GGUF files, or from a recipe with random weights."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ..base import files
from ..base.errors import LLMDropError
from ..base.files import building
from ..sources.fetch import remembered_sha256

CONVERSION = 1  # raise when a change to the GGUF conversion changes what comes out

# What damaged or odd files raise.
UNREADABLE = (ValueError, KeyError, IndexError, OSError, ImportError, RuntimeError, SafetensorError, pickle.UnpicklingError)


def converted_gguf(parts: list[Path], name: str) -> Path:
    """Dequantise a GGUF file (or its consecutive parts) once into a folder of float32 safetensors; later loads take seconds.

    float32 holds every dequantised value exactly. Needs 4 bytes a parameter, in memory and on disk.
    """
    hashes = hashlib.sha256("".join(remembered_sha256(part) for part in parts).encode()).hexdigest()
    folder = files.CACHE / "models" / f"{name}-gguf{CONVERSION}-{hashes[:12]}"
    if folder.exists():
        return folder
    with building(folder) as temporary:
        print(f"Converting {name} from GGUF to safetensors (once)", flush=True)
        joined = temporary / "joined.gguf"
        if len(parts) == 1:
            joined.symlink_to(parts[0].resolve())
        else:
            with joined.open("wb") as out:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, out)
        try:
            model = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=joined.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=joined.name)
        except UNREADABLE as error:
            raise LLMDropError(f"{name} is not a GGUF file that transformers can read: {first_line(error)}") from error
        joined.unlink()
        # The values are plain float32 by now; transformers still marks the model as quantised and refuses to save it.
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
        model.config._name_or_path = name
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def generated(name: str, recipe: dict) -> Path:
    """A model with random weights and a byte tokenizer, made from a recipe: nothing is downloaded."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    folder = files.CACHE / "models" / f"{name}-{digest[:12]}"
    if folder.exists():
        return folder
    settings = dict(recipe["config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with building(folder) as temporary, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        AutoModelForCausalLM.from_config(config).save_pretrained(temporary)
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
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
