"""A walk through all encoders of text and of images that transformers knows: supported, refused with a reason, or unknown."""

import encoder_families
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from llmdrop_utils import LLMDropError
from llmdrop_utils.models.config import ENCODERS as KINDS
from llmdrop_utils.models.config import config_of
from llmdrop_utils.models.encoder_layouts import ENCODERS
from llmdrop_utils.models.families import family_of, find_anatomy

SETTINGS = {case.model_type: case.settings for case in encoder_families.CASES.values()}
NAMES = sorted(
    {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    | {*MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES, *ENCODERS} & {*CONFIG_MAPPING}
)


def outcome(name: str) -> str:
    """ "supported", or why not, as `load_encoder` says it of a configuration; told by a model on the device "meta"."""
    try:
        config = config_of(name, {"model_type": name} | SETTINGS.get(name, {}), KINDS)
        family_of(config)
    except LLMDropError as error:
        return str(error)
    with torch.device("meta"):
        find_anatomy(AutoModel.from_config(config))
    return "supported"


def test_every_encoder_is_supported_or_refused_with_a_reason():
    """Of the version that this was written with none is unknown; of others none ends in another error."""
    found = {name: outcome(name) for name in NAMES}
    assert {name for name, said in found.items() if said == "supported"} >= {*ENCODERS} & {*NAMES}
    unknown = {name for name, said in found.items() if "is unknown. " in said}
    if Version(transformers.__version__).release[:2] == (5, 23):
        assert not unknown, unknown
    for name, said in found.items():
        assert said == "supported" or "\n" not in said, name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("albert", "its layers share their weights"),
        ("convnext", "it has no attention"),
        ("resnet", "it has no attention"),
        ("swin", "its layers stand in stages of different widths"),
        ("vit_mae", "it reads a random part of the patches"),
        ("beit", "its layers multiply what they add by learned vectors"),
        ("siglip2", "SigLIP 2 of one size is a siglip model, which works"),
        ("modernvbert", "transformers has no encoder that can be measured"),
        ("imagegpt", "transformers has no encoder that can be measured"),
    ],
)
def test_reasons(name, reason):
    assert reason in outcome(name)


def test_deberta_with_a_convolution():
    with pytest.raises(LLMDropError, match="a convolution adds to the residual stream after its first layer"):
        family_of(AutoConfig.for_model("deberta-v2", conv_kernel_size=3))
