"""One function per figure: tables in, figure out. Importing this package registers them all in `FIGURES`."""

from . import efficiency, quality, redundancy, stages  # noqa: F401
from .style import FIGURES, STYLE, draw, save_figure

__all__ = ["FIGURES", "STYLE", "draw", "save_figure"]
