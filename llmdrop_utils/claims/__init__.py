"""The paper's claims, and a verdict for each. Importing this package registers all rules in `CHECKS`."""

from . import efficiency, quality, redundancy, stages  # noqa: F401
from .verdicts import CHECKS, DEVIATES, NOT_RUN, REPRODUCED, Verdict, as_markdown, judge, load_claims, write_scorecard

__all__ = [
    "CHECKS",
    "DEVIATES",
    "NOT_RUN",
    "REPRODUCED",
    "Verdict",
    "as_markdown",
    "judge",
    "load_claims",
    "write_scorecard",
]
