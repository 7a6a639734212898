"""Dropped models on the hub, on a local stand-in for the network."""

import families
import pytest
import torch

from llmdrop_utils import DropPlan, LLMDropError, load_dropped, load_model, save_dropped
from llmdrop_utils.models.convert import byte_tokenizer


def test_from_the_hub(network, tmp_path):
    """A dropped model is loaded by its hub id, and not as a dense one."""
    plan = DropPlan(attention=(2, 0), mlp=(1,))
    saved = save_dropped(families.tiny("llama"), byte_tokenizer(), plan, tmp_path / "out")
    files = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    network.repositories["org/dropped"] = {"a" * 40: files}
    model, tokenizer = load_dropped("org/dropped", dtype=torch.float32)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load_dropped(saved, dtype=torch.float32)[0](tokens).logits)
    assert tokenizer is not None
    with pytest.raises(LLMDropError, match="org/dropped is a dropped model, and what is asked for is a dense one"):
        load_model("org/dropped")
