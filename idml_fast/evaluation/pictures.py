"""Pictures of what the numbers mean: drawings of plain arrays, as images that a page can hold."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import ArrayLike
from sklearn.manifold import TSNE
from torch import Tensor

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
FAINT = "#98a1b0"
SCALED = 0.05  # the coverage from which on risks are in the picture
MAPPED = (
    500  # items of a map: more of them hide each other, and take longer than all other pictures
)
NAMED = 40  # classes of a map whose names are readable
DISTINCT = (
    *("#0f6e84", "#c2410c", "#6d4bb0", "#d4a017", "#d6589f"),
    *("#3f9a5f", "#3b6fd4", "#8a5a2b", "#5f6b7a", "#8fb339"),
)


@rc_context(STYLE)
def risk_coverage(
    coverage: ArrayLike,  # [N]
    risks: Mapping[str, ArrayLike],  # [N] each
) -> str:
    """Risk over coverage: how many answers are wrong among those that are the most certain.

    Beside the candidates, the best that any could do, which leaves out the wrong answers first, and
    one that knows nothing, whose risk is the same at every coverage. Of the first few answers one
    wrong one is a large share: the scale is that of coverages from 5 % on.

    Args:
        coverage: ``[N]`` ascending in (0, 1], the share of the queries that are answered.
        risks: by candidate, ``[N]``, the share of these answers that are wrong. At a coverage of 1
            it is the same for all.

    Returns:
        The address of an image, as `svg` gives it.

    Raises:
        ValueError: a candidate has another number of risks than there are coverages.
    """
    coverage = _array(coverage)
    risks = {name: _array(risk) for name, risk in risks.items()}
    for name, risk in risks.items():
        if risk.shape != coverage.shape:
            raise ValueError(
                f"risks must have shape {list(coverage.shape)} like coverage, "
                f"got {list(risk.shape)} for {name}"
            )
    wrong = next(iter(risks.values()))[-1]
    best = np.maximum(0, 1 - (1 - wrong) / coverage)  # the right answers first
    figure, axes = drawing(height=3.6)
    axes.axhline(wrong, color=FAINT, linewidth=1.2, linestyle="dashed", label="random")
    axes.plot(coverage, best, color=FAINT, linewidth=1.2, label="best possible")
    for (name, risk), color in zip(risks.items(), colors(len(risks)), strict=True):
        axes.plot(coverage, risk, color=color, linewidth=1.5, label=name)
    axes.set(xlabel="coverage", title="Wrong among those answered", xlim=(0, 1))
    axes.set_ylim(0, 1.1 * max(risk[coverage >= SCALED].max() for risk in risks.values()) or 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_percent)
    axes.grid(axis="y")
    axes.legend(fontsize=9)
    return svg(figure)


@rc_context(STYLE)
def reliability(
    diagrams: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],  # [B] each
) -> str:
    """Reliability diagrams: how often what is forecast comes true; on the diagonal, just as often.

    Args:
        diagrams: by forecaster, as `idml_fast.evaluation.reliability` gives it: the mean forecast
            of each bin, the share of the bin that came true, both ``[B]`` in [0, 1], and ``[B]``
            how many there are in it. A dot's area goes with the number; a bin of none has no dot.

    Returns:
        The address of an image, as `svg` gives it.

    Raises:
        ValueError: the three are not of one shape, or all bins are empty.
    """
    figure, axes = drawing(height=3.6)
    axes.plot((0, 1), (0, 1), color=FAINT, linewidth=1.2, linestyle="dashed")
    for (name, diagram), color in zip(diagrams.items(), colors(len(diagrams)), strict=True):
        forecast, observed, count = (_array(x) for x in diagram)
        if not forecast.shape == observed.shape == count.shape or forecast.ndim != 1:
            shapes = ", ".join(str(list(x.shape)) for x in (forecast, observed, count))
            raise ValueError(f"the parts of {name} must have one shape [B], got {shapes}")
        there = count > 0
        if not there.any():
            raise ValueError(f"the count of {name} must be above 0 in some bin, got none")
        forecast, observed, count = (x[there] for x in (forecast, observed, count))
        axes.plot(forecast, observed, color=color, linewidth=1, alpha=0.5)
        area = 36 * count / count.max()
        axes.scatter(forecast, observed, area, color=color, alpha=0.8, linewidths=0, label=name)
    axes.set(xlabel="forecast", title="What comes true of what is forecast")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_percent)
    axes.grid()
    axes.legend()
    return svg(figure)


@rc_context(STYLE)
def embedding_map(
    sem: ArrayLike,  # [N, Ds]
    labels: ArrayLike,  # [N]
    norms: ArrayLike | None = None,  # [N]
    seed: int = 0,
) -> str:
    """The embedding in the plane: t-SNE, a colour for each class, larger where it is uncertain.

    Neighbours stay neighbours; distances between groups, and their sizes, mean nothing. Of up to 40
    classes the names are written beside them.

    Args:
        sem: ``[N, Ds]`` float, at least 3 items. Of more than 500 so many are drawn at random.
        labels: ``[N]``, of any kind that can be put in order.
        norms: ``[N]``, the uncertainty of each item; None: all dots have one size.
        seed: of t-SNE and of the items that are drawn.

    Returns:
        The address of an image, as `svg` gives it.

    Raises:
        ValueError: there are fewer than 3 items, or the arguments are not of one length.

    Source: van der Maaten and Hinton, *Visualizing Data using t-SNE*, JMLR 2008.
    """
    sem, labels = _array(sem), _array(labels)
    norms = np.ones(len(sem)) if norms is None else _array(norms)
    if sem.ndim != 2 or len(sem) < 3:
        raise ValueError(f"sem must have shape [N, Ds] with N >= 3, got {list(sem.shape)}")
    for name, x in {"labels": labels, "norms": norms}.items():
        if x.shape != (len(sem),):
            raise ValueError(f"{name} must have shape [{len(sem)}] like sem, got {list(x.shape)}")
    shown = np.random.default_rng(seed).permutation(len(sem))[:MAPPED]
    sem, labels, norms = sem[shown].astype(np.float32), labels[shown], norms[shown]
    perplexity = min(30, (len(sem) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="random", max_iter=500, random_state=seed, n_jobs=1)
    x, y = tsne.fit_transform(sem).T
    classes, label = np.unique(labels, return_inverse=True)
    color = np.array(colors(len(classes)))[label]
    figure, axes = drawing(height=4.6)
    # In steps, since dots of one size are one shape in the file; small ones on top of large ones.
    steps = np.linspace(norms.min(), norms.max(), 6)
    step = np.abs(norms[:, None] - steps).argmin(axis=1)
    sizes = 6 + 3 * np.arange(len(steps)) ** 2
    for number in range(len(steps))[::-1]:
        dots = step == number
        axes.scatter(x[dots], y[dots], sizes[number], c=color[dots], alpha=0.65, linewidths=0)
    for number, name in enumerate(classes if len(classes) <= NAMED else ()):
        _name_class(axes, str(name), x[label == number], y[label == number], len(classes))
    axes.set(xticks=[], yticks=[], title="The embedding in the plane")
    axes.spines[["left", "bottom"]].set_visible(False)
    if steps[0] < steps[-1]:
        for number in (0, 2, 5):
            said = f"‖u‖ = {steps[number]:.2g}"
            axes.scatter([], [], sizes[number], color=FAINT, linewidths=0, label=said)
        figure.legend(loc="outside lower left", ncols=3, fontsize=9)
    return svg(figure)


def drawing(width: float = 4.4, height: float = 3.0) -> tuple[Figure, Axes]:
    """An empty drawing, its size in inches: letters of 10 points are readable where it is as wide
    as a phone."""
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
    axes.yaxis.set_major_formatter(_percent)


def in_powers(axes: Axes) -> None:
    """A logarithmic scale whose numbers are written as such: 20, where ``2 x 10^1`` is usual."""
    axes.set_yscale("log")
    axes.yaxis.set(major_formatter=_Number(), minor_formatter=_Number())


class _Number(LogFormatter):
    """Where `LogFormatter` has something to say, the number itself."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _array(values: ArrayLike) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _percent(share: float, _: int) -> str:
    return f"{100 * share:g} %"


def _name_class(
    axes: Axes,
    name: str,
    x: np.ndarray,  # [n]
    y: np.ndarray,  # [n]
    count: int,
) -> None:
    """The name of a class above its items, without those that are far from most."""
    axes.text(
        *(np.median(x), np.quantile(y, 0.9), name if len(name) <= 12 else f"{name[:11]}…"),
        fontsize=11 if count <= 10 else 8,
        fontweight="bold",
        color="#1b2330",
        ha="center",
        va="bottom",
        parse_math=False,  # a name is a name, whatever signs are in it
        bbox={"facecolor": "white", "alpha": 0.6, "pad": 0.3, "linewidth": 0},
    )


def svg(figure: Figure) -> str:
    """The drawing as the address of an image."""
    # As an image of its own: drawings in one page would share the names of their parts.
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """An image as an address that holds it whole, such as ``data:image/png;base64,...``."""
    return f"data:{kind};base64,{b64encode(content).decode()}"
