"""Style, the registry of figures, and files that are the same to the byte from run to run.

`draw("fig02_block_importance", tables, folder)` draws a figure and writes it as SVG, PDF and PNG beside the CSV it is
drawn from. Names carry the paper's figure numbers; `figS...` are additions that the paper does not have.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from ..base.files import replacing
from .tables import Tables, with_exact_names

WIDTH = 6.9  # inches: the text width of a two-column page

KIND_NAMES = {"attention": "Attention", "mlp": "MLP", "block": "Block"}

NAMES = KIND_NAMES | {"joint": "Joint", "dense": "Dense"}

# Okabe-Ito colours, with markers and line styles that also tell the kinds apart in grey print.
COLORS = {"attention": "#0072B2", "mlp": "#D55E00", "block": "#009E73", "joint": "#CC79A7", "dense": "#000000"}

MARKERS = {"attention": "o", "mlp": "s", "block": "^", "joint": "D", "dense": "x"}

LINES = {"attention": "-", "mlp": "--", "block": "-.", "joint": ":", "dense": "-"}
# The same line styles for seaborn.
DASHES = {
    "attention": "",
    "mlp": (3.7, 1.6),
    "block": (6.4, 1.6, 1, 1.6),
    "joint": (1, 1.65),
    "dense": "",
}

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 144,
    "figure.dpi": 144,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "llmdrop",
}


class Drawing(NamedTuple):
    """What a figure function returns."""

    figure: Figure
    data: pd.DataFrame  # what it shows, for the CSV beside it
    takeaway: str  # one or two sentences from the run's own numbers: what a reader should see


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """How a figure comes about: from which notebook's tables, and by which function."""

    notebook: str
    draw: Callable[[Tables], Drawing]

    @property
    def caption(self) -> str:
        """What the figure shows: the first paragraph of the function's docstring."""
        return " ".join((self.draw.__doc__ or "").split("\n\n")[0].split())


FIGURES: dict[str, FigureSpec] = {}


def figure(notebook: str) -> Callable[[Callable[[Tables], Drawing]], Callable[[Tables], Drawing]]:
    """Register a function tables -> `Drawing` under its name; its docstring is the caption."""

    def register(function: Callable[[Tables], Drawing]) -> Callable[[Tables], Drawing]:
        FIGURES[function.__name__] = FigureSpec(notebook, function)
        return function

    return register


def draw(name: str, tables: Tables, folder: Path) -> Drawing:
    """Draw one figure and save it under `folder`. Returns it, for display."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(STYLE)
        drawing = FIGURES[name].draw({table: with_exact_names(rows) for table, rows in tables.items()})
        save_figure(drawing.figure, folder / name, drawing.data)
    plt.close(drawing.figure)
    return drawing


def for_each_model(data: pd.DataFrame, sentence: Callable[[pd.DataFrame], str]) -> str:
    """A takeaway made of one sentence for each model, which is named if there are several."""
    groups = data.groupby("model", sort=False)
    return " ".join((f"{model}: " if len(groups) > 1 else "") + sentence(rows) for model, rows in groups)


def nothing_to_show(reason: str, data: pd.DataFrame, width: float = WIDTH) -> Drawing:
    """A figure that says why it is empty."""
    fig, ax = plt.subplots(figsize=(width, 0.6))
    ax.text(0.5, 0.5, reason, ha="center", va="center")
    ax.axis("off")
    return Drawing(fig, data, "")


def save_figure(fig: Figure, path: Path, data: pd.DataFrame) -> None:
    """Write path.svg, .pdf, .png without dates or random ids, and the data they show as path.csv."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # the layout stands; finding it again for each format would take most of the time
    for suffix, metadata in ((".svg", {"Date": None}), (".pdf", {"CreationDate": None})):
        with replacing(path.with_name(path.name + suffix)) as temporary:
            fig.savefig(temporary, format=suffix[1:], metadata=metadata)
    with replacing(path.with_name(path.name + ".png")) as temporary:
        drawn = io.BytesIO()
        fig.savefig(drawn, format="png", metadata={"Software": None})
        # 256 colours are a third of the size, and no eye sees the difference.
        few = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(temporary, "PNG", optimize=True)
    with replacing(path.with_name(path.name + ".csv")) as temporary:
        data.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
