"""Settings from YAML: checked before any work starts, with one clear error for whatever does not fit."""

import dataclasses
import difflib

from .errors import LLMDropError


def build(cls, values: dict, where: str):
    """Make the dataclass `cls` from `values`, with one clear error for whatever does not fit."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise LLMDropError(f"Unknown key {key!r} in {where}.{hint} Known keys: {', '.join(fields)}.")
    for key, field in fields.items():
        if key not in values:
            if field.default is dataclasses.MISSING:
                raise LLMDropError(f"The key {key!r} is missing in {where}.")
        elif not _fits(values[key], field.type):
            raise LLMDropError(f"The key {key!r} in {where} must be {_words(field.type)}, but is {values[key]!r}.")
    return cls(**values)


def _fits(value, kind) -> bool:
    if kind in (list[str], list[int]):
        item = kind.__args__[0]
        return isinstance(value, list) and bool(value) and all(_fits(v, item) for v in value)
    if kind == dict[str, list[int]]:
        return isinstance(value, dict) and bool(value) and all(_fits(v, list[int]) for v in value.values())
    if kind == dict[str, list[int]] | None:
        return value is None or _fits(value, dict[str, list[int]])
    if kind == int | None:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool) and value > 0
    return isinstance(value, kind)


def _words(kind) -> str:
    words = {
        int: "a positive integer",
        float: "a positive number",
        dict: "a mapping",
        int | None: "an integer, or null",
        list[int]: "a list of positive integers",
        list[str]: "a list of names",
        dict[str, list[int]]: "lists of positive integers, by name",
        dict[str, list[int]] | None: "lists of positive integers, by name, or null",
    }
    return words.get(kind, "text")
