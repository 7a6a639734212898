"""GGUF files without layers, in stock llama.cpp: they predict what the model with zeroed terms does, or none is written."""

import contextlib
import copy
import subprocess
import sys

import families
import gguf
import pytest
import torch
from gguf_files import tiny
from tokenizers.normalizers import Lowercase

from llmdrop_utils import DropPlan, LinearMap, LLMDropError, NotAvailable, dropped, load_model, measure_importance, select
from llmdrop_utils.export import gate, llamacpp
from llmdrop_utils.export import gguf as export
from llmdrop_utils.export.gate import silenced
from llmdrop_utils.export.gguf import export_gguf
from llmdrop_utils.models.families import find_anatomy
from llmdrop_utils.sources.texts import load_tokens

pytest.importorskip("cyllama", reason="llama.cpp is an optional extra")

D, HEADS, KV_HEADS, HEAD = 32, 4, 2, 8
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
PLANS = {
    "dense": DropPlan(),
    "attention": DropPlan(attention=(1,)),
    "attention of the last layer": DropPlan(attention=(2,)),
    "attention of layer 0": DropPlan(attention=(0, 2)),
    "MLP": DropPlan(mlp=(1,)),
    "MLP of the ends": DropPlan(mlp=(0, 2)),
    "a block": DropPlan(attention=(1,), mlp=(1,)),
    "blocks at the ends": DropPlan(attention=(0, 2), mlp=(0, 2)),
    "both kinds": DropPlan(attention=(1, 2), mlp=(0,)),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_kind_of_layer(tmp_path, family, plan):
    """Biases of Qwen2 included. Keys and values of kept layers alone are cached."""
    model, tokenizer = tiny(family)
    parity = export_gguf(model, tokenizer, plan, tmp_path / "out.gguf", "F32")
    assert parity.log_probability < 0.001
    assert parity.equal_tokens == gate.N_TOKENS
    assert parity.cached_bytes == (3 - len(plan.attention)) * 2 * KV_HEADS * HEAD * 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3},
        {"head_dim": 16},
        {"num_key_value_heads": 4},
        {"attention_bias": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_shape(tmp_path, changes):
    model, tokenizer = tiny(**changes)
    assert export_gguf(model, tokenizer, DropPlan(attention=(1,)), tmp_path / "out.gguf", "F32").log_probability < 0.001


def test_mistral_sees_no_more_than_its_window(tmp_path):
    """llama.cpp would see the whole context: it is told to stop where the window ends."""
    model, tokenizer = tiny("mistral", sliding_window=200)
    assert export_gguf(model, tokenizer, DropPlan(attention=(1,)), tmp_path / "out.gguf", "F32").log_probability < 0.001
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["deci.context_length"].contents() == 200


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_linear_maps(tmp_path, layer):
    model, tokenizer = tiny()
    plan = DropPlan(attention=(layer,), maps={("attention", layer): LinearMap(torch.randn(D, D) / D**0.5)})
    parity = export_gguf(model, tokenizer, plan, tmp_path / "out.gguf", "F32")
    assert parity.log_probability < 0.001
    assert parity.cached_bytes == 2 * 2 * KV_HEADS * HEAD * 4


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q6_K"])
def test_kinds(tmp_path, kind, monkeypatch):
    """Each is opened and compared; narrow rows make few bits rough on a random model."""
    monkeypatch.setattr(export, "ROUGH", 5.0)
    monkeypatch.setattr(export, "LIMITS", {"F16": 0.001, "BF16": 0.05, "Q8_0": 0.5})
    model, tokenizer = tiny(hidden_size=256, head_dim=64, intermediate_size=512, initializer_range=0.05)
    plan = DropPlan(attention=(0,), mlp=(1,))
    parity = export_gguf(model, tokenizer, plan, tmp_path / "out.gguf", kind)
    assert parity.divergence > 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    of = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert of["blk.1.attn_norm.weight"] == "F32"
    assert of["blk.2.ffn_gate.weight"] == {"Q4_K_M": "Q4_K"}.get(kind, kind)
    assert reader.fields["deci.attention.head_count"].contents() == [HEADS] * 3
    assert reader.fields["deci.attention.head_count_kv"].contents() == [0, KV_HEADS, KV_HEADS]
    assert reader.fields["deci.feed_forward_length"].contents() == [512, 256, 512]


# ---- what the gate catches ----------------------------------------------------------------------------------------------


def caught(tmp_path, plan, message="does not predict what the model with these layers set to zero does"):
    model, tokenizer = tiny()
    with pytest.raises(LLMDropError, match=message):
        export_gguf(model, tokenizer, plan, tmp_path / "out.gguf", "F32")
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_an_mlp_of_length_0_is_caught(tmp_path, monkeypatch):
    """llama.cpp leaves out the attention of such a layer, too, and says nothing."""
    sizes = export.layer_sizes
    monkeypatch.setattr(export, "layer_sizes", lambda *a: (*sizes(*a)[:2], [0 if n == export.PAD else n for n in sizes(*a)[2]]))
    caught(tmp_path, DropPlan(mlp=(1,)))


def test_heads_in_another_order_are_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "interleaved", lambda values, heads: values)
    caught(tmp_path, DropPlan(attention=(1,)))


def test_a_layer_that_was_kept_is_caught(tmp_path, monkeypatch):
    write = export._write
    monkeypatch.setattr(export, "_write", lambda m, t, split, plan, *rest: write(m, t, split, DropPlan(attention=(1,)), *rest))
    caught(tmp_path, DropPlan(attention=(2,)))


def test_a_file_that_ends_llama_cpp_is_caught(tmp_path, monkeypatch):
    """The last layer without a feed-forward ends the process: not this one."""
    sizes = export.layer_sizes
    monkeypatch.setattr(export, "layer_sizes", lambda *a: ([4, 4, 0], [2, 2, 0], [*sizes(*a)[2][:2], 0]))
    caught(tmp_path, DropPlan(attention=(2,), mlp=(2,)), r"llama\.cpp cannot run float32\.gguf \(.*ASSERT")


def test_a_truncated_file(tmp_path):
    model, tokenizer = tiny()
    path = tmp_path / "out.gguf"
    export_gguf(model, tokenizer, DropPlan(), path, "F32")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LLMDropError, match=r"llama\.cpp cannot run out\.gguf"):
        llamacpp.answers(path, [[1, 2, 3]], 2)


def test_the_reference_is_the_model_with_projections_of_zero():
    """Silencing by hooks gives what zero output projections do, in every family of these."""
    for name in ("llama", "qwen2", "gemma2", "olmo2", "gpt2"):
        model = families.tiny(name)
        twin = copy.deepcopy(model)
        families.silence(name, twin, [0, 2], [1])
        tokens = torch.arange(12)[None]
        with torch.no_grad(), silenced(model, DropPlan(attention=(2, 0), mlp=(1,))):
            torch.testing.assert_close(model(tokens).logits, twin(tokens).logits, rtol=1e-5, atol=1e-5)


def test_distances_by_hand(tmp_path, monkeypatch):
    """Logits that are 0.5 higher for one of two equally likely tokens."""
    model, tokenizer = tiny()
    real = llamacpp.answers

    def altered(*args, **more):
        found = real(*args, **more)
        found.logits[0] = found.logits[0] * 0 - 1000
        found.logits[0, :2] = 0.5, 0
        return found

    class TwoTokens(torch.nn.Module):
        def forward(self, ids):
            logits = torch.full((1, ids.shape[1], 259), -1000.0)
            logits[..., :2] = 0
            return type("Output", (), {"logits": logits})

    path = tmp_path / "out.gguf"
    export._write(model, tokenizer, "gpt-2", DropPlan(), path, "F32")
    monkeypatch.setattr(llamacpp, "answers", altered)
    monkeypatch.setattr(gate, "silenced", lambda model, plan: contextlib.nullcontext())
    monkeypatch.setattr(gate, "PROMPTS", gate.PROMPTS[:1])
    fake = TwoTokens()
    fake.get_input_embeddings = model.get_input_embeddings
    parity = gate.compare(path, fake, tokenizer, DropPlan(), 256, exact=True)
    # softmax of (0.5, 0) is 0.62246 and 0.37754: |log 0.5 - log 0.37754| = 0.2809,
    # and the divergence is log 0.5 - (log 0.62246 + log 0.37754) / 2 = 0.0309.
    assert parity.log_probability == pytest.approx(0.2809, abs=1e-4)
    assert parity.divergence == pytest.approx(0.0309, abs=1e-4)


# ---- shapes ---------------------------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    config = tiny()[0].config
    plan = DropPlan(attention=(0, 1), mlp=(1, 2))
    assert export.layer_sizes(config, plan) == ([4, 0, 4], [0, 0, 2], [48, 0, 256])
    plan = DropPlan(attention=(1, 2), mlp=(2,), maps={("attention", 1): LinearMap(torch.eye(D))})
    assert export.layer_sizes(config, plan) == ([4, 4, 0], [2, 0, 0], [48, 48, 256])


def test_order_of_rows():
    """Two heads of four rows: halves are interleaved within each head."""
    rows = torch.arange(8)[:, None]
    assert export.interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert export.interleaved(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# ---- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "plan", "message"),
    [
        ("gemma", {}, DropPlan(attention=(1,)), "Llama-shaped models only"),
        ("qwen3", {}, DropPlan(attention=(1,)), "Llama-shaped models only"),
        ("llama", {"hidden_act": "gelu"}, DropPlan(attention=(1,)), "its MLP uses gelu, not silu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, DropPlan(mlp=(1,)), "scaled"),
        ("llama", {"attention_bias": True}, DropPlan(attention=(1,)), "the output projection of its attention has a bias"),
        ("llama", {"mlp_bias": True}, DropPlan(attention=(1,)), "its MLP has biases"),
        ("llama", {}, DropPlan(attention=(0, 1, 2)), "no attention is left"),
        ("llama", {}, DropPlan(attention=(7,)), "holds layer 7, but this model has 3 layers"),
        ("llama", {}, DropPlan(mlp=(1,), maps={("mlp", 1): LinearMap(torch.eye(D))}), "stands for the MLP of layer 1"),
        (
            "llama",
            {},
            DropPlan(attention=(1,), maps={("attention", 1): LinearMap(torch.eye(D), torch.ones(D))}),
            "the linear map in layer 1 has a bias",
        ),
    ],
)
def test_what_deci_cannot_hold(tmp_path, family, changes, plan, message):
    model, tokenizer = tiny(family, **changes)
    with pytest.raises(LLMDropError, match=message):
        export_gguf(model, tokenizer, plan, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_compared(tmp_path):
    model, tokenizer = tiny()
    with pytest.raises(LLMDropError, match=r"in float32, but it is in torch\.bfloat16"):
        export_gguf(model.bfloat16(), tokenizer, DropPlan(), tmp_path / "out.gguf")
    model = model.float()
    with dropped(model, DropPlan(mlp=(1,))), pytest.raises(LLMDropError, match="lacks sub-layers already"):
        export_gguf(model, tokenizer, DropPlan(mlp=(1,)), tmp_path / "out.gguf")
    with pytest.raises(LLMDropError, match="its rows of 48 numbers are no multiple of 32, which Q4_1 wants"):
        export_gguf(model, tokenizer, DropPlan(mlp=(1,)), tmp_path / "out.gguf", "Q4_1")
    with pytest.raises(LLMDropError, match=r"no GGUF kind 'Q3'. There are: F32, F16, BF16, Q8_0, Q4_0"):
        export_gguf(model, tokenizer, DropPlan(), tmp_path / "out.gguf", "Q3")


def test_a_file_that_exists_stays(tmp_path):
    model, tokenizer = tiny()
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(LLMDropError, match="exists already"):
        export_gguf(model, tokenizer, DropPlan(), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_without_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyllama", None)
    monkeypatch.setitem(sys.modules, "cyllama.llama.llama_cpp", None)
    model, tokenizer = tiny()
    with pytest.raises(NotAvailable, match=r"pip install 'llmdrop-utils\[llamacpp\]'"):
        export_gguf(model, tokenizer, DropPlan(), tmp_path / "out.gguf")


def test_a_full_disk(tmp_path):
    """A small file system, mounted for this test; without the right to do that, the test says so."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        model, tokenizer = tiny()
        with pytest.raises(LLMDropError, match="The disk is full"):
            export_gguf(model, tokenizer, DropPlan(), small / "out.gguf", "F32")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_write_that_stops_short(tmp_path, monkeypatch):
    """numpy says how many numbers it wrote, and not why."""

    def short(self, values):
        raise OSError("1536 requested and 296 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", short)
    model, tokenizer = tiny()
    with pytest.raises(LLMDropError, match="The disk is full"):
        export_gguf(model, tokenizer, DropPlan(), tmp_path / "out.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    model, tokenizer = tiny()
    with pytest.raises(LLMDropError, match="cannot be written"):
        export_gguf(model, tokenizer, DropPlan(), tmp_path / "file" / "out.gguf")


def test_a_tokenizer_that_llama_cpp_does_not_know(tmp_path):
    """It makes text lower-case first."""
    model, tokenizer = tiny()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(LLMDropError, match="does not split text as this tokenizer does: none of smollm, "):
        export_gguf(model, tokenizer, DropPlan(), tmp_path / "out.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


# ---- the real model -------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("case", ["attention", "mlp", "joint", "layer 0"])
def test_smollm2(tmp_path, case):
    """Greedy tokens are torch's own, up to ties; the five likeliest within 0.01 nats; kept layers alone are cached."""
    model, tokenizer = load_model("smollm2-135m", torch.float32)
    scores = measure_importance(model, load_tokens("web", tokenizer, n_samples=4, seq_len=256))
    plan = {
        "attention": select(scores, "attention", n_drop=8),
        "mlp": select(scores, "mlp", n_drop=2),
        "joint": select(scores, "joint", n_drop=12),
        "layer 0": DropPlan(attention=(0, *select(scores, "attention", n_drop=4).attention)),
    }[case]
    parity = export_gguf(model, tokenizer, plan, tmp_path / "out.gguf", "F16")
    assert parity.followed < 0.01
    if case != "joint":  # there torch finds two tokens equally likely, to 0.004
        assert parity.equal_tokens == 64
    assert parity.log_probability < 0.02, "with keys and values in float16"
    n_context = model.config.max_position_embeddings
    assert gate.compare(tmp_path / "out.gguf", model, tokenizer, plan, n_context, exact=True).log_probability < 0.01
    assert parity.cached_bytes == (len(find_anatomy(model)) - len(plan.attention)) * 2 * 3 * 64 * 2
