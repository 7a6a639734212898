"""The vocabulary of a tokenizer as a GGUF file holds it, checked by llama.cpp on texts that tell tokenizers apart."""

import json
import tempfile
from pathlib import Path

import gguf
import numpy as np

from ..base.errors import LLMDropError
from . import llamacpp

# How text is split before pairs are merged; llama.cpp knows some ways by name. The first that gives the tokenizer's own
# tokens for all probes is taken.
SPLITS = ("smollm", "llama-bpe", "qwen2", "gpt-2", "default", "tekken", "deepseek-llm", "stablelm2", "olmo", "llama3")
PROBES = (
    "The 3 quick brown foxes aren't 1,234.56 years old; they'll jump in 2024!",
    "def f(x):\n    return x ** 2  # square\n\n\n\tif x != 10000:\n\t\tprint('ok')\r\n",
    "Über naïve façades — “quoted”… 東京は大きい。 Привет, мир! مرحبا 🙂🙂",
    "  leading, trailing  \n \n  \t mixed   \n\n",
    "https://example.org/a_b?c=d&e=%20 $1,000 50% [x] {y} <z> ~~~ --- ...",
    "I'VE we'd SHE'S CamelCase snake_case HTTPServer x86_64 v2.0.1",
)
CONTROL, USER, NORMAL, UNUSED, BYTE = 3, 4, 1, 5, 6  # llama_token_type


def find_split(tokenizer, size: int) -> str:
    """llama.cpp's name for the way in which a tokenizer splits text. size: rows of the model's embedding.

    Raises LLMDropError for a tokenizer that llama.cpp does not reproduce, NotAvailable without llama.cpp.
    """
    model = _model_of(tokenizer)
    if model.get("type") != "BPE":
        kind = model.get("type", type(tokenizer).__name__)
        raise LLMDropError(f"A tokenizer of the kind {kind} cannot be written to GGUF: byte-pair encoding is expected.")
    splits = ("default",) if model.get("byte_fallback") else SPLITS
    for split in splits:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            trial = _tiny_model(path, size)
            add_vocabulary(trial, tokenizer, size, split)
            trial.write_header_to_file()
            trial.write_kv_data_to_file()
            trial.write_tensors_to_file()
            trial.close()
            if _agrees(path, tokenizer):
                return split
    raise LLMDropError(
        f"llama.cpp does not split text as this tokenizer does: none of {', '.join(splits)} gives the same tokens on "
        f"{len(PROBES)} probes. The model cannot be exported to GGUF."
    )


def _model_of(tokenizer) -> dict:
    """What tokenizer.json says of the model: its type, merges and so on. Empty for a tokenizer without that file."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"] if tokenizer.is_fast else {}


def _tiny_model(path: Path, size: int) -> gguf.GGUFWriter:
    """A model of one layer, all zero, so that llama.cpp opens the file."""
    d = 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(d)
    writer.add_head_count(1)
    writer.add_feed_forward_length(d)
    writer.add_layer_norm_rms_eps(1e-5)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(d, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((d, d), np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((size, d), np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(d, np.float32))
    return writer


def _agrees(path: Path, tokenizer) -> bool:
    found = llamacpp.answers(path, texts=PROBES).tokens
    return found == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer, size: int, split: str) -> None:
    """Add the vocabulary to a file. Rows of the embedding without a token are unused. split: found by `find_split`."""
    model = _model_of(tokenizer)
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    for token, index in tokenizer.get_vocab().items():
        added = tokenizer.added_tokens_decoder.get(index)
        tokens[index] = token
        types[index] = NORMAL if added is None else CONTROL if added.special else USER
    if model.get("byte_fallback"):  # SentencePiece: pairs are merged in the order of their scores, which is that of the tokens
        for index, token in enumerate(tokens):
            if token.startswith("<0x") and len(token) == 6:
                types[index] = BYTE
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(size)])
        writer.add_add_space_prefix(tokenizer.tokenize("a") == ["▁a"])
    else:
        writer.add_tokenizer_model("gpt2")
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        writer.add_token_merges(pairs or ["[PAD] [PAD]"])  # readers want one; no text holds this pair
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
