"""The pictures: what is drawn, and that it is the same each time."""

from __future__ import annotations

from base64 import b64decode
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra idml_fast[train] is not installed")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from idml_fast.evaluation import pictures

COVERAGE = np.array([0.25, 0.5, 0.75, 1.0])
RISK = np.array([0.0, 0.5, 1 / 3, 0.5])


def clusters(classes: int, items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes that are far apart, and how uncertain each item is."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(items) % classes)
    sem = 5 * draw.normal(size=(classes, 8))[labels] + draw.normal(size=(items, 8))
    return sem, labels, draw.uniform(1, 2, size=items)


@pytest.fixture
def drawn(monkeypatch) -> None:
    """The functions return what they draw, instead of its file."""
    monkeypatch.setattr(pictures, "svg", lambda figure: figure)


def dots(figure: Figure) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Places, colours and sizes of a map's dots; its legend has one dot for each size."""
    collections = [x for x in figure.axes[0].collections if x.get_label().startswith("_")]
    places = np.concatenate([np.asarray(x.get_offsets()) for x in collections])
    colors = [to_hex(color) for x in collections for color in x.get_facecolors()]
    sizes = np.concatenate([np.repeat(x.get_sizes(), len(x.get_offsets())) for x in collections])
    return places, colors, sizes


def as_tensors(arguments):
    """The same with a tensor for each array."""
    if isinstance(arguments, dict):
        return {name: as_tensors(x) for name, x in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(map(as_tensors, arguments))
    return torch.from_numpy(arguments)


@pytest.mark.parametrize(
    ("draw", "arguments"),
    [
        (pictures.risk_coverage, (COVERAGE, {"‖u‖": RISK, "other": RISK[[1, 1, 2, 3]]})),
        (pictures.reliability, ({"‖u‖": (COVERAGE, RISK, np.array([1, 2, 3, 0]))},)),
        (pictures.embedding_map, clusters(3, 40)),
    ],
)
def test_a_picture_is_an_svg_and_the_same_each_time(draw, arguments):
    address = draw(*arguments)
    kind, content = address.split(",")
    assert kind == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(b64decode(content, validate=True)).tag.endswith("svg")
    assert draw(*as_tensors(arguments)) == address


def test_risk_and_coverage_beside_the_best_and_a_random_order(drawn):
    draw = np.random.default_rng(0)
    wrong = draw.permutation(np.arange(50) < 15)
    coverage = np.arange(1, 51) / 50
    risk = wrong.cumsum() / np.arange(1, 51)
    figure = pictures.risk_coverage(coverage, {"‖u‖": risk})
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert np.array_equal(lines["‖u‖"], risk)
    # The best puts off the wrong answers until there are no others.
    assert lines["best possible"] == pytest.approx(np.sort(wrong).cumsum() / np.arange(1, 51))
    assert set(lines["random"]) == {0.3}


def test_the_first_few_answers_do_not_set_the_scale(drawn):
    coverage = np.arange(1, 201) / 200
    risk = np.full(200, 0.25)
    risk[:9] = 1  # below a coverage of 5 %
    risk[9] = 0.5
    assert pictures.risk_coverage(coverage, {"a": risk}).axes[0].get_ylim() == (0, 1.1 * 0.5)
    assert pictures.risk_coverage(coverage, {"a": 0 * risk}).axes[0].get_ylim() == (0, 1)


def test_reliability_diagrams_leave_empty_bins_out(drawn):
    several = [0.1, np.nan, 0.9], [0.2, np.nan, 1.0], np.array([1, 0, 4])
    figure = pictures.reliability({"several": several, "one": ([0.5], [0.5], [3])})
    found = {dots.get_label(): dots for dots in figure.axes[0].collections}
    assert list(found) == ["several", "one"]
    assert found["several"].get_offsets().tolist() == [[0.1, 0.2], [0.9, 1.0]]
    small, large = found["several"].get_sizes()
    assert large == 4 * small
    assert found["one"].get_offsets().tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("classes", [5, 60])
def test_neighbours_stay_neighbours_on_the_map(drawn, classes):
    places, colors, _ = dots(pictures.embedding_map(*clusters(classes, 400)))
    assert len(places) == 400
    assert len(set(colors)) == classes
    distances = np.square(places[:, None] - places).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    right = [colors[row] == colors[column] for row, column in enumerate(distances.argmin(axis=1))]
    assert np.mean(right) > 0.9


def test_the_more_uncertain_the_larger(drawn):
    sem, labels, _ = clusters(2, 30)
    norms = np.linspace(1, 3, 30)
    figure = pictures.embedding_map(sem, labels, norms)
    _, _, sizes = dots(figure)
    # Six steps from 1 to 3, each of the middle ones twice as wide as the first and the last.
    assert sorted(np.unique(sizes, return_counts=True)[1]) == [3, 3, 6, 6, 6, 6]
    assert list(sizes) == sorted(sizes, reverse=True)  # small dots are not hidden
    (legend,) = figure.legends
    assert [x.get_text() for x in legend.get_texts()] == ["‖u‖ = 1", "‖u‖ = 1.8", "‖u‖ = 3"]


@pytest.mark.parametrize("norms", [None, np.ones(30)])
def test_without_uncertainty_all_dots_are_of_one_size(drawn, norms):
    sem, labels, _ = clusters(2, 30)
    figure = pictures.embedding_map(sem, labels, norms)
    assert len(set(dots(figure)[2])) == 1
    assert not figure.legends


def test_classes_are_named_as_they_are(drawn):
    sem, labels, _ = clusters(2, 30)
    names = np.array(["$x_1$", "a name that is too long to be shown"])
    figure = pictures.embedding_map(sem, names[labels])
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == ["$x_1$", "a name that…"]
    assert not any(text.get_parse_math() for text in texts)


def test_a_map_has_at_most_so_many_dots_drawn_by_the_seed(drawn, monkeypatch):
    monkeypatch.setattr(pictures, "MAPPED", 50)
    arguments = clusters(2, 60)
    maps = [dots(pictures.embedding_map(*arguments, seed=seed))[0] for seed in (0, 0, 1)]
    assert [len(places) for places in maps] == [50, 50, 50]
    assert np.array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[0], maps[2])


@pytest.mark.parametrize(
    "sem",
    [np.eye(3), np.ones((20, 4)), np.arange(20.0)[:, None], torch.ones(9, 4).bfloat16().float()],
    ids=["three items", "collapsed", "one wide", "a tensor"],
)
def test_a_map_of_little(drawn, sem):
    places, _, _ = dots(pictures.embedding_map(sem, np.arange(len(sem)) % 2))
    assert np.isfinite(places).all()
    assert len(places) == len(sem)


def test_shares_are_not_rounded():
    _, axes = pictures.drawing()
    axes.plot([0.41, 0.59])
    pictures.in_percent(axes)
    axes.set_yticks([0.4, 0.525, 0.55, 0.6])
    assert [x.get_text() for x in axes.get_yticklabels()] == ["40 %", "52.5 %", "55 %", "60 %"]
    assert axes.get_ylim() == pytest.approx((0.4, 0.6))


def test_powers_are_plain_numbers():
    for values, wanted in (([13, 22], {"14", "20"}), ([0.05, 900], {"0.1", "1", "10", "100"})):
        figure, axes = pictures.drawing()
        axes.plot(values)
        pictures.in_powers(axes)
        figure.draw_without_rendering()
        ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
        texts = {tick.label1.get_text() for tick in ticks}
        assert wanted <= texts
        assert not any("$" in text for text in texts)


@pytest.mark.parametrize("count", [1, 5, 10, 11, 100])
def test_colours_are_different(count):
    assert len(set(pictures.colors(count))) == count


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (
            pictures.risk_coverage,
            (COVERAGE, {"a": RISK, "b": RISK[:3]}),
            r"risks must have shape \[4\] like coverage, got \[3\] for b",
        ),
        (
            pictures.reliability,
            ({"a": (RISK, RISK, RISK[:2])},),
            r"of a must have one shape \[B\], got \[4\], \[4\], \[2\]",
        ),
        (
            pictures.reliability,
            ({"a": (RISK, RISK, RISK), "b": (RISK, RISK, 0 * RISK)},),
            "count of b must be above 0 in some bin",
        ),
        (pictures.embedding_map, (np.eye(2), [0, 1]), r"N >= 3, got \[2, 2\]"),
        (pictures.embedding_map, (np.ones(5), [0] * 5), r"N >= 3, got \[5\]"),
        (pictures.embedding_map, (np.eye(4), [0, 1]), r"labels must have shape \[4\] like sem"),
        (
            pictures.embedding_map,
            (np.eye(4), [0, 0, 1, 1], np.ones((4, 1))),
            r"norms must have shape \[4\] like sem, got \[4, 1\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)
