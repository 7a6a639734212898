"""Tables as a reader sees them: headings instead of column names, numbers in their format, intervals behind their value."""

import numbers
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .tables import Column


def as_markdown(rows: pd.DataFrame) -> str:
    """A Markdown table of the cells as they are."""
    text = rows.astype(str).replace({r"\|": r"\\|", "\n": " "}, regex=True)
    return text.to_markdown(index=False, disable_numparse=True)


def show(rows: pd.DataFrame, columns: Sequence[Column]) -> str:
    """Some columns of a table, in Markdown.

    A number that is missing is shown as "-". A column of which the table has several (`shared_*`) is shown once for each.
    """
    shown = pd.DataFrame(index=rows.index)
    for column in columns:
        if "*" in column.name:
            prefix = column.name.removesuffix("*")
            for name in (name for name in rows.columns if str(name).startswith(prefix)):
                shown[f"{column.heading} {str(name).removeprefix(prefix)}"] = [number(v, column.form) for v in rows[name]]
            continue
        cells = [number(value, column.form) for value in rows[column.name]]
        if column.low:
            ends = zip(rows[column.low], rows[column.high], strict=True)
            cells = [
                f"{cell} ({number(low, column.form)} to {number(high, column.form)})" if pd.notna(low) else cell
                for cell, (low, high) in zip(cells, ends, strict=True)
            ]
        shown[column.heading] = cells
    return as_markdown(shown)


def number(value: object, form: str) -> str:
    """One cell: 0.98234, ".1%" -> "98.2 %"; text and truth values as words."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, numbers.Real):
        return str(value)
    if form.endswith("d"):
        value = round(float(value))
    return format(value, form or ("d" if isinstance(value, numbers.Integral) else ".4g")).replace("%", " %")
