"""Settings from mappings: nothing is converted, nothing is ignored, and each mistake is one clear sentence."""

import pytest
from pydantic import Field

from llmdrop_utils import LLMDropError
from llmdrop_utils.base.settings import Counts, CountsByName, Names, NotNegative, Positive, PositiveNumber, Settings, build


class Demo(Settings):
    models: Names
    n: Positive
    limit: NotNegative | None
    rate: PositiveNumber = 0.5
    counts: Counts = Field([1])
    by_name: CountsByName | None = None
    config: dict = Field({})


GOOD = {"models": ["a"], "n": 3, "limit": None}


def test_good():
    demo = build(Demo, GOOD | {"rate": 1, "by_name": {"x": [1, 2]}}, "demo.yaml")
    assert (demo.models, demo.n, demo.limit, demo.rate, demo.by_name) == (["a"], 3, None, 1, {"x": [1, 2]})
    with pytest.raises(Exception, match="frozen"):
        demo.n = 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ["a"]}, r"Unknown key 'model' in demo.yaml. Did you mean 'models'\? Known keys: models, n, limit, rate,"),
        ({"n": 0}, "The key 'n' in demo.yaml must be a positive integer, but is 0."),
        ({"n": True}, "must be a positive integer, but is True"),
        ({"n": "3"}, "must be a positive integer, but is '3'"),
        ({"n": 3.0}, r"must be a positive integer, but is 3\.0"),
        ({"limit": -1}, "must be an integer, or null, but is -1"),
        ({"models": []}, r"must be a list of names, but is \[\]"),
        ({"models": "a"}, "must be a list of names, but is 'a'"),
        ({"counts": [1, 0]}, r"must be a list of positive integers, but is \[1, 0\]"),
        ({"rate": 0}, "must be a positive number, but is 0"),
        ({"by_name": {"x": 2}}, r"must be lists of positive integers, by name, or null, but is \{'x': 2\}"),
        ({"config": 2}, "must be a mapping, but is 2"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(LLMDropError, match=message):
        build(Demo, GOOD | changes, "demo.yaml")


def test_missing_key():
    with pytest.raises(LLMDropError, match="The key 'n' is missing in demo.yaml, under part."):
        build(Demo, {"models": ["a"], "limit": 1}, "demo.yaml, under part")


def test_a_misspelt_key_is_named_rather_than_the_missing_one():
    with pytest.raises(LLMDropError, match=r"Unknown key 'modells' in demo.yaml. Did you mean 'models'\?"):
        build(Demo, {"modells": ["a"], "n": 1, "limit": 1}, "demo.yaml")
