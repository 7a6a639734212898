"""Which dtype models are measured in, and what bfloat16 computes where a processor has no instructions for it."""

import pytest
import torch
from torch import nn

from llmdrop_utils.base.errors import LLMDropError
from llmdrop_utils.models import load
from llmdrop_utils.studies.profile import load_profile


def test_products_in_float32_are_rounded_once(monkeypatch):
    """1 + 2^-8 - 1 is lost if the sum is rounded to bfloat16 on the way: 1 + 2^-8 becomes 1."""
    monkeypatch.setattr(load, "_multiplies_bfloat16", lambda: False)
    layer = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    layer.weight.data[:] = torch.tensor([1.0, 2.0**-8, -1.0])
    model = nn.Sequential(layer)
    load._speed_up_bfloat16(model)
    with torch.inference_mode():
        assert model(torch.ones(1, 3, dtype=torch.bfloat16)).item() == 2.0**-8
    assert isinstance(layer, nn.Linear)


def test_with_a_bias_and_many_numbers(monkeypatch):
    monkeypatch.setattr(load, "_multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).to(torch.bfloat16)
    x = torch.randn(5, 7, 64).to(torch.bfloat16)
    exact = (x.double() @ layer.weight.double().T + layer.bias.double()).to(torch.bfloat16)
    load._speed_up_bfloat16(nn.Sequential(layer))
    with torch.inference_mode():
        found = layer(x)
    assert found.dtype == torch.bfloat16
    # Sums in float32 round to the same number as exact ones, but for a rare tie.
    assert (found == exact).float().mean() > 0.995
    assert torch.allclose(found.float(), exact.float(), rtol=2**-7)


def test_other_layers_and_other_processors_are_left_alone(monkeypatch):
    monkeypatch.setattr(load, "_multiplies_bfloat16", lambda: False)
    in_float32 = nn.Sequential(nn.Linear(2, 2))
    load._speed_up_bfloat16(in_float32)
    assert type(in_float32[0]) is nn.Linear
    monkeypatch.setattr(load, "_multiplies_bfloat16", lambda: True)
    in_bfloat16 = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16))
    load._speed_up_bfloat16(in_bfloat16)
    assert type(in_bfloat16[0]) is nn.Linear


@pytest.mark.parametrize("fast", [True, False])
def test_the_environment_chooses(monkeypatch, fast):
    monkeypatch.setattr(load, "_multiplies_bfloat16", lambda: fast)
    monkeypatch.delenv("LLMDROP_DTYPE", raising=False)
    if not torch.cuda.is_available():
        assert load.default_dtype() == (torch.bfloat16 if fast else torch.float32)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("LLMDROP_DTYPE", name)
        assert load.default_dtype() == dtype
    monkeypatch.setenv("LLMDROP_DTYPE", "fp16")
    with pytest.raises(LLMDropError, match="LLMDROP_DTYPE is 'fp16', but must be one of: float32, bfloat16"):
        load.default_dtype()


def test_a_profile_chooses_over_the_environment(monkeypatch):
    monkeypatch.setenv("LLMDROP_DTYPE", "bfloat16")
    assert load_profile("cpu").dtype == torch.bfloat16
    assert load_profile("cpu-float32").dtype == torch.float32
    monkeypatch.setenv("LLMDROP_DTYPE", "float32")
    assert load_profile("cpu-bfloat16").dtype == torch.bfloat16
    assert load_profile("cpu").to_json() != load_profile("cpu-bfloat16").to_json()
