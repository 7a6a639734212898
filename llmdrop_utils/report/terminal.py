"""Numbers and tables as plain text, for a terminal."""

import math
import textwrap
from collections.abc import Sequence


def size(n: float | None) -> str:
    """Bytes: 92871040 -> "92.9 MB"; 138e9 -> "138 GB"; None -> "unknown"."""
    if not n:
        return "unknown" if n is None else "0"
    power = min(3, max(0, int(math.log10(n) // 3)))
    value, unit = n / 1000**power, ["bytes", "kB", "MB", "GB"][power]
    return f"{value:.1f} {unit}" if power and value < 99.95 else f"{value:,.0f} {unit}"


def count(n: float) -> str:
    """A number of parameters: 134515008 -> "135 M"; 13015864320 -> "13.0 B"."""
    value, unit = (n / 1e9, "B") if n >= 1e9 else (n / 1e6, "M")
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    """0 -> "0"; 20 -> "< 1 min"; 94 -> "2 min"; 5000 -> "83 min"; 9000 -> "2.5 h"."""
    if seconds < 30:
        return "< 1 min" if seconds else "0"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36000 else f"{seconds / 3600:,.0f} h"


def wrapped(text: str, width: int = 120) -> list[str]:
    """Lines of a sentence, indented like a table."""
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a table with aligned columns; those in `right` are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(row))
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
