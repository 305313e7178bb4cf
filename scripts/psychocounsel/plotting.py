"""The look of all figures, and how they are saved: SVG for print and PNG for the screen, the same bytes for the same data."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision, without its yellow, which is too light for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D"]
GREY = "#4D4D4D"  # what is not of this run
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]  # so that colour is not alone in telling series apart
WIDTH = 5.5  # inches: the text width of a page; read at half of it in a column

matplotlib.rcParams.update(
    {
        "backend": "agg",  # no display
        "figure.constrained_layout.use": True,
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same on every machine
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#E6E6E6",
        "grid.linewidth": 0.6,
        "xtick.color": "#333333",
        "ytick.color": "#333333",
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "legend.title_fontsize": 7.5,
        "lines.linewidth": 1.5,
        "lines.markersize": 4.5,
        "svg.hashsalt": "psychocounsel",  # element ids without a random part
        "svg.fonttype": "path",  # no font is needed where the figure is shown
    }
)


def canvas(rows: int = 1, columns: int = 1, width: float = WIDTH, height: float = 3.0, **kwargs) -> tuple[Figure, list[Axes]]:
    """Return a figure in the project's style and its axes, in reading order."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **kwargs)
    return figure, list(axes.flat)


def show_counts(axis: Axis) -> None:
    """Mark an axis that counts at whole numbers alone, with commas between thousands."""
    axis.get_major_locator().set_params(integer=True)
    axis.set_major_formatter("{x:,.0f}")


def say_empty(axes: Axes, reason: str) -> None:
    """Write into a panel without data why it has none, in place of a scale that means nothing."""
    axes.set_xticks([])
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color="#555555")


def save(figure: Figure, svg: Path, png: Path) -> None:
    """Save a figure twice, without the date, and close it."""
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    plt.close(figure)


def note_below(figure: Figure, note: str | None) -> None:
    """Print a note under a figure, small, e.g. that its numbers are a demonstration's."""
    if note:
        figure.supxlabel(note, fontsize=7, color="#555555", x=0.01, ha="left", wrap=True)
