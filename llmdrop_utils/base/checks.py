"""What a caller gave, as what is needed; or one clear error."""

import math
import operator
import sys

from .errors import LLMDropError


def as_whole(value: object) -> int | None:
    """An int from an int, or from an integer of NumPy or torch; None from anything else, truth values included."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return None


def whole(value: object, what: str, at_least: int = 1) -> int:
    """The same, or LLMDropError: "The batch size must be a whole number, but is 2.5."."""
    number = as_whole(value)
    if number is None:
        raise LLMDropError(f"{what} must be a whole number, but is {value!r}.")
    if number < at_least:
        raise LLMDropError(f"{what} must be {at_least} or more, but is {number}.")
    if number > sys.maxsize:  # what nothing can be counted to, and which has thousands of digits maybe
        raise LLMDropError(f"{what} must be {sys.maxsize} or less, but is far more.")
    return number


def as_number(value: object) -> float:
    """A float from a real number, of NumPy or torch, too; nan from anything else: text, truth values, what is too large."""
    if isinstance(value, bool | str | bytes | bytearray) or str(getattr(value, "dtype", "")).endswith("bool"):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]  # that is the question
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last one for many numbers
        return math.nan


def seed_of(value: object) -> int:
    """A seed that NumPy takes too, from 0 to below 2**32; LLMDropError for anything else."""
    seed = whole(value, "The seed", at_least=0)
    if seed >= 1 << 32:
        raise LLMDropError(f"The seed must be below 2**32, but is {seed}.")
    return seed
