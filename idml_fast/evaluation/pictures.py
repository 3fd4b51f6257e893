"""Pictures of what the numbers mean: drawings of plain arrays, as images that a page can hold."""

from __future__ import annotations

import math
from base64 import b64encode
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
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
DISTINCT = (
    *("#0f6e84", "#c2410c", "#6d4bb0", "#2c7a4b", "#d4a017"),
    *("#c2185b", "#3b6fd4", "#8a5a2b", "#5f6b7a", "#8fb339"),
)


def drawing(width: float = 5.0, height: float = 3.2) -> tuple[Figure, Axes]:
    """An empty drawing, its size in inches."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def colors(count: int) -> list[str]:
    """As many colours, as different as can be: by hue, and neighbours in the list by lightness."""
    if count <= len(DISTINCT):
        return list(DISTINCT[:count])
    turn = np.arange(count) / count
    lightness = np.array([0.85, 0.6, 0.72])[np.arange(count) % 3]
    saturation = np.array([0.85, 0.75, 0.5])[np.arange(count) % 3]
    return [to_hex(x) for x in hsv_to_rgb(np.stack([turn, saturation, lightness], axis=1))]


def in_percent(axes: Axes) -> None:
    """Shares from one whole tenth to another: a small wobble is to look small."""
    low, high = axes.get_ylim()
    axes.set_ylim(math.floor(10 * low) / 10, min(1.0, math.ceil(10 * high) / 10))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}".replace("%", " %"))


def svg(figure: Figure) -> str:
    """The drawing as the address of an image."""
    # As an image of its own: drawings in one page would share the names of their parts.
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """An image as an address that holds it whole, such as ``data:image/png;base64,...``."""
    return f"data:{kind};base64,{b64encode(content).decode()}"
