"""Pictures of what the numbers mean: drawings of plain arrays, as images that a page can hold."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"conventional": "#98a1b0", "introspective": "#0f6e84"}
STYLE = {
    "font.size": 11,
    "axes.edgecolor": "#c6cbd4",
    "axes.labelcolor": "#414a59",
    "axes.titlecolor": "#1b2330",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": "#6b7484",
    "ytick.color": "#6b7484",
    "grid.color": "#eceef2",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.hashsalt": "idml_fast",  # or the names inside the drawing would differ from run to run
}


def drawing(width: float = 5.0, height: float = 3.2) -> tuple[Figure, Axes]:
    """An empty drawing, its size in inches."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def svg(figure: Figure) -> str:
    """The drawing as the address of an image."""
    # As an image of its own: drawings in one page would share the names of their parts.
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """An image as an address that holds it whole, such as ``data:image/png;base64,...``."""
    return f"data:{kind};base64,{b64encode(content).decode()}"
