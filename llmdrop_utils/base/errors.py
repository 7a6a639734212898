"""The errors that a user sees, and the one way in which "one of several is unavailable" is handled."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class LLMDropError(Exception):
    """A mistake or a limit that the user can act on. The message says what was expected, what was found, what to do."""


class NotAvailable(LLMDropError):
    """Something this machine cannot get (no hub, a gated model). A run over many models reports it as *not run*."""


class NotApplicable(LLMDropError):
    """A study has nothing to say of these models, such as times without layers for a model of one layer. It is *not run*."""


class DiskFull(LLMDropError):
    """Nothing more can be written: a run stops, whatever else it could still do."""


def each_available(
    things: Iterable[T],
    get: Callable[[T], R],
    kind: str,
    reason: type[LLMDropError] = LLMDropError,
    several: bool | None = None,
) -> tuple[list[R], dict[T, str]]:
    """`get` of each thing that is available, and for each of the others why not.

    kind: what the things are, for the message ("models"). reason: the errors that make a thing unavailable; others are
    mistakes, and raised. several: whether the things stand among others, so that even a single one may be missing; None:
    they stand alone. A full disk stops everything. Raises the reason itself for a single thing that stands alone, and
    NotAvailable if none of several is available.
    """
    things = list(things)
    found: list[R] = []
    reasons: dict[T, str] = {}
    for thing in things:
        try:
            found.append(get(thing))
        except DiskFull:
            raise
        except reason as error:
            if len(things) == 1 and not several:
                raise
            reasons[thing] = str(error)
    if things and not found and not several:
        raise NotAvailable(f"None of these {kind} is available:\n" + "\n".join(reasons.values()))
    return found, reasons
