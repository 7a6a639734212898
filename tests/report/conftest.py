"""The studies register their figures, rules and advice when they are imported."""

import llmdrop_utils.studies  # noqa: F401
