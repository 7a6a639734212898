"""Settings from YAML, checked by pydantic before any work starts, with one clear error for whatever does not fit."""

import difflib
import types
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from .errors import LLMDropError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
Counts = Annotated[list[Positive], Field(min_length=1)]
Names = Annotated[list[str], Field(min_length=1)]
NamesByName = Annotated[dict[str, Names], Field(min_length=1)]
CountsByName = Annotated[dict[str, Counts], Field(min_length=1)]
S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Keys of a section of a YAML file, and their types. Nothing is converted, and no key is ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def build(cls: type[S], values: dict[str, Any], where: str, also: list[str] | None = None) -> S:
    """Make settings from the keys of a mapping. Raises LLMDropError that names the key, what it must be, and what it is.

    where: what holds the keys, for the message ("cpu.yaml, under text"). also: further keys that would be known there.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        # An unknown key explains a missing one (it is misspelt), so it comes first.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise LLMDropError(_message(cls, details[0], values, where, also or [])) from None


def _message(cls: type[Settings], detail: ErrorDetails, values: dict[str, Any], where: str, also: list[str]) -> str:
    key, known = str(detail["loc"][0]), [*cls.model_fields, *also]
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"Unknown key {key!r} in {where}.{hint} Known keys: {', '.join(known)}."
    if detail["type"] == "missing":
        return f"The key {key!r} is missing in {where}."
    if detail["type"] == "value_error":  # raised by a check of our own
        return str(detail["ctx"]["error"]).format(where=where)
    words = _words(get_type_hints(cls, include_extras=True)[key])
    return f"The key {key!r} in {where} must be {words}, but is {values[key]!r}."


def _words(kind: Any) -> str:
    """A type in words: Counts -> "a list of positive integers"."""
    simple = {
        Positive: "a positive integer",
        NotNegative: "an integer",
        PositiveNumber: "a positive number",
        Counts: "a list of positive integers",
        Names: "a list of names",
        CountsByName: "lists of positive integers, by name",
        NamesByName: "lists of names, by name",
        bool: "true or false",
        str: "text",
    }
    if kind in simple:
        return simple[kind]
    if get_origin(kind) in (Union, types.UnionType):
        return ", or ".join("null" if part is type(None) else _words(part) for part in get_args(kind))
    if get_origin(kind) is Annotated:  # a known type with a check of our own
        metadata = get_args(kind)[1:-1]
        return _words(Annotated[(get_args(kind)[0], *metadata)] if metadata else get_args(kind)[0])
    return "a mapping" if kind is dict or get_origin(kind) is dict else "text"
