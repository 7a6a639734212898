"""GGUF files: shards, and files whose tensors are not those of the model."""

import errno
import shutil
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from gguf_files import make_llama, rewrite_gguf, split_gguf, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from llmdrop_utils import LLMDropError, load_model, locate_model
from llmdrop_utils.models import convert, gguf_weights, locate
from llmdrop_utils.sources.catalogue import catalogue


@pytest.fixture
def llama():
    """Four layers, so 39 tensors."""
    model, tokenizer = make_llama()
    settings = model.config.to_dict() | {"num_hidden_layers": 4}
    return LlamaForCausalLM(type(model.config)(**settings)).eval(), tokenizer


@pytest.fixture
def whole(tmp_path, cache, llama):
    """The file of that model."""
    write_gguf(tmp_path / "whole.gguf", *llama)
    return tmp_path / "whole.gguf"


def nothing_is_kept(cache):
    return not [path for path in (cache / "models").glob("*") if path.suffix != ".lock"]


def same_logits(path, model):
    again, _ = load_model(str(path), dtype=torch.float32, device="cpu")
    tokens = torch.randint(0, 257, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    return again


def test_any_shard_stands_for_all(whole, tmp_path, llama, cache):
    folder = tmp_path / "model"
    folder.mkdir()
    shards = split_gguf(whole, folder, "tiny", (19, 20))
    expected = locate_model(str(whole)).identity
    for given in (*shards, folder):
        located = locate_model(str(given))
        assert located.identity == expected, "the same content as the file in one piece"
        same_logits(given, llama[0])
    assert locate_model(str(shards[0])).name == locate_model(str(shards[1])).name
    shards[0].unlink()
    with pytest.raises(LLMDropError, match=r"tiny-00002-of-00002.gguf is one of 2 shards .* lacks tiny-00001-of-00002"):
        locate_model(str(shards[1]))


def test_shards_without_tensors_and_in_capitals(whole, tmp_path, llama):
    """llama.cpp can write metadata alone into the first shard."""
    shards = split_gguf(whole, tmp_path, "tiny", (0, 38, 1))
    for shard in shards:
        shard.rename(shard.with_suffix(".GGUF"))
    same_logits(tmp_path / "tiny-00003-of-00003.GGUF", llama[0])


def test_a_shard_under_another_name(whole, tmp_path, cache):
    first, _ = split_gguf(whole, tmp_path, "tiny", (19, 20))
    first.rename(tmp_path / "mine.gguf")
    with pytest.raises(LLMDropError, match=r"mine-\w{8} is shard 1 of 2 of a model. Put all shards into one folder"):
        locate_model(str(tmp_path / "mine.gguf"))
    assert nothing_is_kept(cache)


def test_shards_that_are_not_one_model(whole, tmp_path, cache):
    first, second = split_gguf(whole, tmp_path, "tiny", (19, 20))
    names = [tensor.name for tensor in gguf.GGUFReader(first).tensors]
    shutil.copy(first, second)
    with pytest.raises(LLMDropError, match=r"00002.gguf says that it is shard 1 of 2 of a model, but stands as shard 2 of 2"):
        locate_model(str(first))
    second.unlink()
    rewrite_gguf(whole, second, names.__contains__, {"split.no": 1, "split.count": 2, "split.tensors.count": 39})
    with pytest.raises(LLMDropError, match="do not belong together: they hold 38 tensors, of which 19 differ in name"):
        locate_model(str(first))
    assert nothing_is_kept(cache)


def test_shards_and_pieces_of_a_named_model(whole, tmp_path, cache, llama, monkeypatch):
    """An entry of data/sources.yaml may name shards, or the consecutive pieces of one file."""
    shards, content = split_gguf(whole, tmp_path, "tiny", (19, 20)), whole.read_bytes()
    pieces = [tmp_path / "whole.part0", tmp_path / "whole.part1"]
    for piece, part in zip(pieces, (content[:5000], content[5000:]), strict=True):
        piece.write_bytes(part)
    monkeypatch.setitem(catalogue()["models"], "named", {"packages": [{"name": "x"}]})
    for parts in (shards, pieces):
        monkeypatch.setattr(locate, "fetch_package_files", lambda packages, parts=parts: parts)
        same_logits("named", llama[0])
    monkeypatch.setattr(locate, "fetch_package_files", lambda packages: shards[:1])
    with pytest.raises(LLMDropError, match="named is shard 1 of 2 of a model"):
        locate_model("named")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"keep": lambda name: name != "blk.2.ffn_down.weight"},
            r"lacks 1 of the weights .* model.layers.2.mlp.down_proj",
        ),
        ({"keep": lambda name: not name.startswith("blk.3")}, r"lacks 9 of the weights"),
        (
            {"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}},
            r"not use in a llama model, such as blk.0.attn_q.bias",
        ),
        ({"tensors": {"blk.4.attn_norm.weight": np.ones(32, np.float32)}}, r"does not use .* such as blk.4.attn_norm.weight"),
        ({"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}}, r"scales rotary frequencies .*rope_freqs"),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, r"scales rotary frequencies .*\(linear\)"),
    ],
)
def test_not_the_tensors_of_the_model(whole, tmp_path, cache, change, message):
    rewrite_gguf(whole, tmp_path / "bad.gguf", **change)
    for _ in range(2):  # a bad conversion is not kept for the next time
        with pytest.raises(LLMDropError, match=message):
            locate_model(str(tmp_path / "bad.gguf"))
        assert nothing_is_kept(cache)


def test_another_shape(whole, tmp_path, cache):
    narrow = {"blk.1.ffn_down.weight": np.ones((32, 47), np.float32)}
    rewrite_gguf(whole, tmp_path / "bad.gguf", lambda name: name not in narrow, tensors=narrow)
    with pytest.raises(LLMDropError, match=r"down_proj.weight is \(32, 47\) in the GGUF file, but .* ask for \(32, 48\)"):
        locate_model(str(tmp_path / "bad.gguf"))
    assert nothing_is_kept(cache)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_transformers_to_the_byte(whole, tmp_path, cache, tied):
    """One tensor at a time, and yet the file that transformers' own loader and `save_pretrained` make."""
    path = tmp_path / "one.gguf"
    rewrite_gguf(whole, path, lambda name: not tied or name != "output.weight")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    theirs.hf_quantizer, theirs.is_quantized = None, False
    theirs.config.__dict__.pop("quantization_config", None)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = locate_model(str(path)).folder
    assert (ours / "model.safetensors").read_bytes() == (tmp_path / "theirs" / "model.safetensors").read_bytes()
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (ours, tmp_path / "theirs")]
    for config in configs:
        del config["_name_or_path"]
    assert configs[0] == configs[1]
    assert configs[0]["tie_word_embeddings"] == tied


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_by_the_system(whole, llama):
    """Written to a real full device: the error names its reason, from which the clear one is made."""
    with torch.device("meta"):
        model = LlamaForCausalLM(llama[0].config)
    with (
        mock.patch.object(gguf_weights, "_write_header", lambda path, weights: dict.fromkeys(weights, 0)),
        pytest.raises(OSError, match="No space left") as error,
    ):
        gguf_weights.write_weights(gguf.GGUFReader(whole), model, Path("/dev/full"), whole)
    assert error.value.errno == errno.ENOSPC


def test_too_little_memory(whole, cache, monkeypatch):
    """Simulated: what numpy raises."""
    whole_tensors = convert.write_weights

    def refuse(*given):
        monkeypatch.setattr(gguf, "dequantize", lambda *_: np.empty(2**50))
        return whole_tensors(*given)

    monkeypatch.setattr(convert, "write_weights", refuse)
    with pytest.raises(LLMDropError, match=r"Memory is too small to convert whole.*: its largest tensor takes 0.0 GiB"):
        locate_model(str(whole))
    assert nothing_is_kept(cache)


@pytest.mark.parametrize("length", [-5000, -10, 3000, 100, 4])
def test_truncated(whole, cache, length):
    whole.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(LLMDropError, match="not a GGUF file that transformers can read, or it is damaged: .*Download it again"):
        locate_model(str(whole))
    assert nothing_is_kept(cache)


def test_conversions_of_an_older_version_are_not_used(whole, cache, monkeypatch):
    monkeypatch.setattr(convert, "CONVERSION", 1)
    old = locate_model(str(whole)).folder
    monkeypatch.undo()
    monkeypatch.setattr(convert.files, "CACHE", cache)
    new = locate_model(str(whole))
    assert new.folder != old
    assert (new.folder / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes(), "the same identity"


def test_harmless_factors_and_a_tied_head(whole, tmp_path, llama):
    """Factors of one, and a file without output.weight: its head is tied."""
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    rewrite_gguf(whole, tmp_path / "ones.gguf", tensors=ones)
    assert same_logits(tmp_path / "ones.gguf", llama[0]).config.rope_parameters["rope_type"] == "default"
    rewrite_gguf(whole, tmp_path / "tied.gguf", lambda name: name != "output.weight")
    llama[0].lm_head.weight = llama[0].model.embed_tokens.weight
    same_logits(tmp_path / "tied.gguf", llama[0])


def test_rotary_frequencies_of_llama_3_1(tmp_path, cache):
    """GGUF states them as a tensor of factors, which transformers passes over."""
    model, tokenizer = make_llama()
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # fmt: skip
    wide = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "rope_parameters": scaled}
    model = LlamaForCausalLM(AutoConfig.for_model(**model.config.to_dict() | wide)).eval()
    write_gguf(tmp_path / "plain.gguf", model, tokenizer)
    plain = 1 / 10000 ** (np.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    rewrite_gguf(tmp_path / "plain.gguf", tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": factors})
    tokens = torch.randint(0, 257, (1, 60))
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(load_model(str(tmp_path / "scaled.gguf"), torch.float32, "cpu")[0](tokens).logits, expected,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_folders_that_hold_gguf(whole, tmp_path, llama):
    folder = tmp_path / "download"
    folder.mkdir()
    whole.rename(folder / "Model.GGUF")
    same_logits(folder, llama[0])
    same_logits(folder / "Model.GGUF", llama[0])
    shutil.copy(folder / "Model.GGUF", folder / "other.gguf")
    with pytest.raises(LLMDropError, match=r"holds several models as GGUF \(Model.GGUF, other.gguf\). Give the path of one"):
        locate_model(str(folder))
