"""The Triton kernels under Triton's interpreter: the walk over tiles, and `pairwise` on it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import test_nearest
import torch
import triton
import triton.language as tl
from conftest import FORMS, NAMES, Inputs, draw, draw_upstream, evaluate, to_double
from idml_fast._triton import configs, tile
from test_pairwise import (
    BACKWARD_OP,
    IDENTICAL,
    METRICS,
    OP,
    assert_follows_the_rule_of_eight,
    assert_together_follow_the_rule,
    near_duplicates,
    strided,
)
from torch import Tensor

from idml_fast import Metric, backend, pairwise

pytestmark = pytest.mark.usefixtures("interpreter")

FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", [FLOAT, *HALVES], ids=str)
two_sets_and_self = pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])


class Way(NamedTuple):
    """How a problem is walked."""

    tiles: tuple[int, int] = (16, 16)  # rows and columns of each
    few: int = tile.FEW_TILES
    group: int = tile.GROUP
    workspace: int = backend.workspace


# Of 37 rows and 29 or 37 columns there are 3 x 2 and 3 x 3 tiles of 16 x 16.
WAYS = {
    "few tiles": Way(),
    "one tile": Way((64, 64)),
    "many tiles": Way(few=0, group=2),
    "tiles half as wide": Way((32, 16), few=0, group=1),
    "few tiles half as wide": Way((32, 16)),
    "a tile at a time": Way(few=0, workspace=0),
    "few tiles, one at a time": Way(workspace=0),
    "some tiles at a time": Way((32, 16), few=0, workspace=20_000),
}


@contextmanager
def walking(way: str | Way) -> Iterator[None]:
    """Problems are walked in this way."""
    way = WAYS[way] if isinstance(way, str) else way
    config = configs.Config(*way.tiles, 16, 4, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            configs, "TABLE", dict.fromkeys(configs.TABLE, configs.Configs(*[config] * 3))
        )
        patch.setattr(tile, "FEW_TILES", way.few)
        patch.setattr(tile, "GROUP", way.group)
        patch.setattr(backend, "workspace", way.workspace)
        # So that the programs which look for flagged tiles have several rounds to go.
        patch.setattr(tile, "LOOKING", 2)
        patch.setattr(tile, "LOOKED_AT", 2)
        yield


def learnable(form: str) -> Metric:
    """A metric whose tau and gamma are tensors."""
    return Metric(torch.tensor(1.5), torch.tensor(0.25), form)


def assert_accurate(inputs: Inputs, metric: Metric, upstream: Tensor | None = None) -> None:
    """The scores and all gradients keep the accuracy rule.

    A tile that is taken again adds up squares of differences: each term is rounded three times
    where that of a product is rounded once (twice on a GPU, which fuses two of them). Independent
    errors of three times as many roundings are the square root of that as large.
    """
    upstream = draw_upstream(inputs) if upstream is None else upstream
    allowance = 3**0.5 if tile.FEW_TILES == 0 else 1
    assert_follows_the_rule_of_eight(inputs, metric, upstream, "triton", allowance=allowance)


def with_near_pairs(inputs: Inputs) -> tuple[Inputs, Tensor]:
    """The same with near-duplicates, identical items and opposite uncertainties in some tiles; and
    an upstream gradient, none for the near-duplicates: theirs has a test of its own."""
    inputs = dict(inputs)
    cols = "" if inputs["sem2"] is None else "2"
    sem, unc = (inputs[name + cols].clone() for name in ("sem", "unc"))
    sem[20] = inputs["sem"][3] * (1 + 2.0**-6)
    sem[21] = inputs["sem"][4]
    unc[22] = -inputs["unc"][5]
    inputs |= {f"sem{cols}": sem, f"unc{cols}": unc}
    upstream = draw_upstream(inputs)
    upstream[3, 20] = 0
    if not cols:
        upstream[20, 3] = 0
    return inputs, upstream


# --------------------------------------------------------------------------- the order of the tiles


@triton.jit
def store_places(
    rows, cols, there, programs, row_tiles, col_tiles, TRIANGLE: tl.constexpr, GROUP: tl.constexpr,
    RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each program is sent."""
    program = tl.arange(0, BLOCK)
    row, col, is_tile = tile.place_of_tile(program, row_tiles, col_tiles, TRIANGLE, GROUP, RATIO)
    tl.store(rows + program, row, mask=program < programs)
    tl.store(cols + program, col, mask=program < programs)
    tl.store(there + program, is_tile.to(tl.int32), mask=program < programs)


def places_of(walk: tile.Walk, chunk: tile.Chunk, ratio: int) -> list[tuple[int, int]]:
    """The tiles that the programs of a chunk take."""
    programs = walk.programs(chunk)
    found = torch.full((3, programs), -1, dtype=torch.int32)
    store_places[(1,)](
        *found,
        programs,
        *walk.tiles(*chunk.shape),
        chunk.triangle,
        tile.GROUP,
        ratio,
        triton.next_power_of_2(programs),
    )
    return [(row, col) for row, col, there in found.T.tolist() if there]


@pytest.mark.parametrize("ratio", [1, 2])
def test_every_tile_of_a_triangle_is_taken_once(ratio):
    with walking(Way((2, 2 // ratio), few=10**9)):
        for n in range(1, 81):  # 1 to 40 row tiles, the last one whole or not
            sem = torch.empty(n, 1)
            walk = tile.Walk(sem, None, None, None, math.inf, 0.0, None, "distance")
            chunk = tile.Chunk(slice(0, n), slice(0, n), True)
            rows, cols = walk.tiles(n, n)
            above = [(r, c) for r in range(rows) for c in range(cols) if c // ratio >= r]
            assert sorted(places_of(walk, chunk, ratio)) == above


@pytest.mark.parametrize("ratio", [1, 2])
def test_every_tile_of_a_rectangle_is_taken_once(ratio):
    with walking(Way((2, 2 // ratio), few=10**9)):
        for n, m in itertools.product(range(1, 81, 2), (1, 2, 9, 40)):
            sem, sem2 = torch.empty(n, 1), torch.empty(m, 1)
            walk = tile.Walk(sem, None, sem2, None, math.inf, 0.0, None, "distance")
            chunk = tile.Chunk(slice(0, n), slice(0, m), False)
            every = list(itertools.product(*map(range, walk.tiles(n, m))))
            assert sorted(places_of(walk, chunk, ratio)) == every


@pytest.mark.parametrize("m", [70, None], ids=["two sets", "self"])
def test_chunks_are_all_pairs_once(m):
    """Rows against themselves: a pair or its mirror image, and both in a triangle."""
    inputs = draw(90, m, 3, 2, dtype=FLOAT)
    for way in WAYS:
        with walking(way):
            walk = tile.Walk(*inputs.values(), 1.0, 0.0, None, "distance")
            seen = torch.zeros(walk.shape, dtype=torch.int64)
            for chunk in walk.chunks(*walk.sides(8, backend.workspace)):
                seen[chunk.rows, chunk.cols] += 1
                if walk.symmetric and not chunk.triangle:
                    seen[chunk.cols, chunk.rows] += 1
            assert (seen == 1).all()


# ---------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize(
    ("way", "form"),
    [
        *itertools.product(["few tiles", "many tiles"], FORMS),
        # What they add to these two does not depend on the form.
        *zip(
            [way for way in WAYS if way not in ("few tiles", "many tiles")], FORMS * 2, strict=True
        ),
    ],
)
@two_sets_and_self
def test_every_way_to_walk(m, way, form):
    inputs, upstream = with_near_pairs(draw(37, m, 19, 11, dtype=FLOAT))
    with walking(way):
        assert_accurate(inputs, METRICS[form], upstream)


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("way", ["few tiles", "many tiles", "some tiles at a time"])
@two_sets_and_self
def test_every_way_to_walk_in_half(m, way, dtype):
    with walking(way):
        assert_accurate(draw(37, m, 19, 11, dtype=dtype), METRICS["distance"])


@each_dtype
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [120, None], ids=["two sets", "self"])
def test_accuracy(m, metric, dtype):
    with walking("one tile"):
        assert_accurate(draw(70, m, 67, 35, dtype=dtype), METRICS[metric])


@pytest.mark.parametrize("way", ["one tile", "some tiles at a time"])
@two_sets_and_self
@each_form
def test_tau_and_gamma_learn(form, m, way):
    with walking(way):
        assert_accurate(draw(37, m, 19, 11, dtype=FLOAT), learnable(form))


@each_form
@pytest.mark.parametrize("certain", [("unc",), ("unc2",), ("unc", "unc2")], ids="+".join)
@pytest.mark.parametrize("way", ["one tile", "some tiles at a time"])
def test_zero_is_an_uncertainty_of_zeros(way, certain, form):
    inputs = draw(37, 29, 19, 11, dtype=FLOAT)
    with walking(way):
        assert_accurate(inputs | dict.fromkeys(certain, "zero"), METRICS[form])


def test_rows_that_are_certain_against_themselves():
    inputs = draw(37, None, 19, 11, dtype=FLOAT) | {"unc": "zero"}
    with walking("many tiles"):
        assert_accurate(inputs, METRICS["cosine"])


# n, m (None: the rows against themselves), ds, du; a step takes 16 features
SHAPES = {
    "aligned": (32, 48, 32, 16),
    "a tile": (16, 16, 16, 16),
    "a tile, self": (16, None, 16, 16),
    "less than a tile and a step": (15, 15, 15, 15),
    "one more than a tile and a step": (17, 17, 17, 17),
    "one more than a tile and a step, self": (17, None, 17, 17),
    "two steps and one": (20, 15, 33, 7),
    "three wide and two": (17, 13, 3, 2),
    "one row": (1, 40, 19, 11),
    "one column": (40, 1, 19, 11),
    "one row, self": (1, None, 19, 11),
    "unc wider than sem": (17, 13, 5, 70),
    "wide": (20, 18, 300, 270),  # beyond the norms' own width
}


@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, way):
    metric = METRICS["distance" if shape[2] == 3 else "cosine"]  # many cosines would be near 1
    count = 8 if 1 in shape[:2] else 3  # the errors of one row's pairs share those of its norm
    problems = [draw(*shape, dtype=FLOAT, seed=seed) for seed in range(count)]
    with walking(way):
        assert_together_follow_the_rule(problems, metric, "triton")


@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
def test_width_1(way):
    """Eager's differences of two numbers are exact. Here a square has an error of three roundings
    of |x|^2 + |y|^2, of which it is 1/256 or more: 3 x 2^-16 of itself, and the root half of it.
    alpha exp(-r) and r = beta / alpha have errors of alpha and beta as they are and r times."""
    inputs, metric = draw(17, 13, 1, 1, dtype=FLOAT), Metric(1.0, 0.0)
    with walking(way):
        found = pairwise(**inputs, metric=metric, backend="triton")
    expected = pairwise(**to_double(inputs), metric=metric, backend="reference")
    alpha = pairwise(**to_double(inputs), metric=Metric.plain(), backend="reference")
    bound = 2.0**-15 * (1 + 2 * (alpha / expected).log()) * expected
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "every other row and column"])
@two_sets_and_self
def test_non_contiguous_inputs(m, layout, dtype):
    inputs = draw(37, m, 19, 11, dtype=dtype)
    with walking("some tiles at a time"):
        assert_accurate(
            {k: None if x is None else strided(x, layout) for k, x in inputs.items()}, Metric()
        )


@two_sets_and_self
def test_non_contiguous_upstream(m):
    inputs = draw(20, m, 9, 5, dtype=FLOAT)
    upstream = draw_upstream(inputs)
    one = torch.tensor(0.5).expand(upstream.shape)
    with walking("tiles half as wide"):
        found = evaluate(inputs, Metric(), upstream, "triton")
        for layout in ("transposed", "every other row and column"):
            again = evaluate(inputs, Metric(), strided(upstream, layout), "triton")
            assert all(torch.equal(again[what], x) for what, x in found.items())
        expanded = evaluate(inputs, Metric(), one, "triton")
        for what, x in evaluate(inputs, Metric(), one.contiguous(), "triton").items():
            assert torch.equal(expanded[what], x), what


@pytest.mark.parametrize("m", [13, None], ids=["two sets", "self"])
@pytest.mark.parametrize("way", ["one tile", "a tile at a time"])
def test_some_inputs_that_require_a_gradient(way, m):
    inputs = draw(17, m, 5, 3, dtype=FLOAT)
    upstream = draw_upstream(inputs)
    metric = learnable("cosine")
    given = {k: x for k, x in inputs.items() if x is not None}
    given |= {"tau": metric.tau, "gamma": metric.gamma}
    with walking(way):
        everything = evaluate(inputs, metric, upstream, "triton")
        names = list(given)  # each alone, and beside every other one
        for chosen in [{k} for k in names] + [set(names[::2]), set(names[1::2])]:
            leaves = {k: x.clone().requires_grad_(k in chosen) for k, x in given.items()}
            learned = dataclasses.replace(metric, **{k: leaves.pop(k) for k in ("tau", "gamma")})
            pairwise(**leaves, metric=learned, backend="triton").backward(upstream)
            for name, x in (leaves | {"tau": learned.tau, "gamma": learned.gamma}).items():
                if name in chosen:
                    assert torch.equal(x.grad, everything[f"grad_{name}"]), (name, chosen)
                else:
                    assert x.grad is None


# -------------------------------------------------------------------------------------------- edges


@each_dtype
@each_form
@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
def test_identical_items(way, gamma, form, dtype):
    """alpha = 0: exactly the score of identical items, no gradient; even with beta = gamma = 0."""
    inputs = draw(2, None, 33, 17, dtype=dtype, seed=2)
    unc2 = inputs["unc"] * torch.tensor([[1], [-1]], dtype=dtype)
    inputs |= {"sem2": inputs["sem"].clone(), "unc2": unc2}
    with walking(way):
        found = evaluate(inputs, Metric(1.0, gamma, form), torch.eye(2), "triton")
    assert (found.pop("scores").diagonal() == IDENTICAL[form]).all()
    for what, gradient in found.items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), what


@each_dtype
@each_form
@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
def test_opposite_uncertainties(way, form, dtype):
    """beta = 0: the pair is certain, and gives no gradient to unc."""
    inputs = draw(1, 1, 33, 17, dtype=dtype)
    inputs["unc2"] = -inputs["unc"]
    others = inputs | {k: 3 * inputs[k] for k in ("unc", "unc2")}
    with walking(way):
        found, same = (
            evaluate(x, Metric(1.0, 0.0, form), torch.ones(1, 1), "triton")
            for x in (inputs, others)
        )
        plain = Metric.plain("distance" if form == "distance" else "cosine")
        certain = evaluate(inputs, plain, backend="triton")["scores"]
    assert torch.equal(found["scores"], same["scores"])
    # A tile that is taken again has its sem from differences, too: another rounding.
    torch.testing.assert_close(found["scores"], certain)
    for name in ("unc", "unc2"):
        assert torch.equal(found[f"grad_{name}"], torch.zeros_like(inputs[name]))


@each_form
@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
def test_zero_vectors(way, form):
    inputs = draw(20, 18, 19, 11, dtype=FLOAT)
    for x in inputs.values():
        x[[2, 17]] = 0
    inputs["unc"][5] = 0  # not with sem
    with walking(way):
        assert_accurate(inputs, Metric(1.0, 0.5, form))


@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
@each_dtype
def test_distances_of_near_duplicates(dtype, way):
    """alpha is right to a relative error of 128 units roundoff of float32 times 4, and the rounding
    of the result: see `test_pairwise.test_distances_of_near_duplicates`. Products of a half dtype
    are exact, so that they may cancel further: see `configs.near_of`."""
    sem, sem2 = near_duplicates(dtype)
    alpha = (sem.double() - sem2.double()).norm(dim=1)
    with walking(way):
        found = pairwise(sem, None, sem2, metric=Metric.plain(), backend="triton")
    error = (found.diagonal().double() - alpha).abs()
    near = configs.near_of(dtype, "ieee")
    bound = 4 * 2.0**-24 / near / 2 + (torch.finfo(dtype).eps if dtype in HALVES else 0)
    assert (error <= bound * alpha).all()
    assert (found.diagonal()[alpha == 0] == 0).all()


def test_distances_of_wide_near_duplicates():
    """512 squares added one after the other would have 3 to 4 times the error of eager's sum."""
    centre, sem, sem2 = (draw(16, None, 512, 1, seed=seed)["sem"] for seed in range(3))
    sem, sem2 = ((centre[0] + 1e-2 * x).float() for x in (sem, sem2))
    metric = Metric.plain()
    truth = pairwise(sem.double(), None, sem2.double(), metric=metric, backend="reference")
    with walking("many tiles"):
        ours, eager = (
            (pairwise(sem, None, sem2, metric=metric, backend=name) - truth).abs().max()
            for name in ("triton", "reference")
        )
    assert ours <= 2 * eager


@each_dtype
@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
def test_gradients_of_near_duplicates(way, dtype):
    """The gradient of a distance is a unit vector however near the pair is. In weight * s - weight
    * t both products are rounded to float32, by eps / 2 each: as if the embeddings had been, once
    more, and over alpha. A half dtype rounds the weight as well, and the result; the square and
    its root make up the rest. A weight beyond float16 is infinite, and comes out."""
    sem, sem2 = near_duplicates(dtype)
    inputs: Inputs = {"sem": sem, "unc": None, "sem2": sem2, "unc2": None}
    with walking(way):
        found = evaluate(inputs, Metric.plain(), torch.eye(24), "triton")
    s, t = sem.double(), sem2.double()
    alpha = (s - t).norm(dim=1, keepdim=True)
    length = s.norm(dim=1, keepdim=True).maximum(t.norm(dim=1, keepdim=True))
    truth = torch.where(alpha > 0, (s - t) / alpha, 0)
    eps = torch.finfo(FLOAT).eps
    rest = (torch.finfo(dtype).eps if dtype in HALVES else 0) + 8 * eps
    bound = torch.where(alpha > 0, eps * length / alpha + rest, 0)
    fits = (alpha == 0) | (1 / alpha < torch.finfo(dtype).max)
    assert fits.sum() >= 20
    for name, sign in (("sem", 1), ("sem2", -1)):
        error = (found[f"grad_{name}"].double() - sign * truth).norm(dim=1, keepdim=True)
        assert (error <= bound)[fits].all()
        assert not found[f"grad_{name}"][~fits[:, 0]].isfinite().all(1).any()


@each_form
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
def test_nan_and_inf_come_out_where_they_went_in(way, name, form):
    inputs = draw(19, 18, 6, 5, dtype=FLOAT)
    inputs[name][3, 2], inputs[name][4, 0] = math.nan, math.inf
    with walking(way):
        found = evaluate(inputs, Metric(form=form), draw_upstream(inputs), "triton")
    touched = torch.zeros(19, 18, dtype=torch.bool)
    if name.endswith("2"):
        touched[:, 3:5] = True
    else:
        touched[3:5] = True
    assert torch.equal(~found["scores"].isfinite(), touched)
    side = ("sem2", "unc2") if name.endswith("2") else ("sem", "unc")
    for other in side:  # the other items of this side have nothing to do with it
        gradient = found[f"grad_{other}"]
        assert torch.cat([gradient[:3], gradient[5:]]).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["sem", "unc"])
def test_nan_and_inf_of_rows_against_themselves(name, value):
    inputs = draw(19, None, 6, 5, dtype=FLOAT)
    inputs[name][3, 2] = value
    touched = torch.zeros(19, 19, dtype=torch.bool)
    touched[3] = touched[:, 3] = True
    scores = pairwise(**inputs, backend="triton")
    touched[3, 3] = not scores[3, 3].isfinite()  # the diagonal may say either
    assert torch.equal(~scores.isfinite(), touched)


@pytest.mark.parametrize("way", ["few tiles", "many tiles"])
@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0), (0, None)])
def test_empty(n, m, way):
    inputs = draw(n, m, 5, 3, dtype=FLOAT)
    metric = learnable("cosine")
    with walking(way):
        found = evaluate(inputs, metric, draw_upstream(inputs), "triton")
    assert found.pop("scores").shape == (n, n if m is None else m)
    for what, gradient in found.items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), what


# ----------------------------------------------------------------------------------------- promises


@each_form
@pytest.mark.parametrize("way", ["few tiles", "many tiles", "few tiles half as wide"])
def test_rows_against_themselves_are_symmetric_to_the_bit(way, form):
    with walking(way):
        scores = pairwise(
            **draw(37, None, 19, 11, dtype=FLOAT), metric=Metric(form=form), backend="triton"
        )
    assert torch.equal(scores, scores.T)
    assert (scores.diagonal() == IDENTICAL[form]).all()


@each_form
def test_no_gradient_through_the_diagonal(form):
    inputs = draw(37, None, 19, 11, dtype=FLOAT)
    with walking("some tiles at a time"):
        found = evaluate(inputs, Metric(form=form), 1e3 * torch.eye(37), "triton")
    for name in ("sem", "unc"):
        assert torch.equal(found[f"grad_{name}"], torch.zeros_like(inputs[name]))


@each_form
@pytest.mark.parametrize("m", [29, None], ids=["two sets", "self"])
def test_a_permutation_of_the_items_permutes_the_scores(m, form):
    """Small integers, whose products no order of summation rounds: to the bit."""
    inputs = test_nearest.on_a_grid(37, m, dtype=FLOAT)
    rows = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    cols = rows if m is None else torch.randperm(m, generator=torch.Generator().manual_seed(2))
    order = {"sem": rows, "unc": rows, "sem2": cols, "unc2": cols}
    permuted = {k: None if x is None else x[order[k]] for k, x in inputs.items()}
    with walking("few tiles"):
        found, expected = (
            pairwise(**x, metric=METRICS[form], backend="triton") for x in (permuted, inputs)
        )
    assert torch.equal(found, expected[rows][:, cols])


@two_sets_and_self
@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=str)
def test_repeats_give_the_same_bits(dtype, m):
    inputs = draw(37, m, 19, 11, dtype=dtype)
    upstream, metric = draw_upstream(inputs), learnable("distance")
    with walking("a tile at a time"):
        first = evaluate(inputs, metric, upstream, "triton")
        for _ in range(2):
            for what, x in evaluate(inputs, metric, upstream, "triton").items():
                assert torch.equal(x, first[what]), what


def test_inputs_are_left_as_they_were():
    inputs = draw(20, 15, 8, 5, dtype=FLOAT)
    upstream = draw_upstream(inputs)
    before = [x.clone() for x in (*inputs.values(), upstream)]
    evaluate(inputs, Metric(), upstream, "triton")
    for x, y in zip((*inputs.values(), upstream), before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("m", [5, None], ids=["two sets", "self"])
@pytest.mark.parametrize("learned", [None, torch.tensor([5.0, 0.5])], ids=["numbers", "learned"])
def test_opcheck(learned, m):
    inputs = [
        None if x is None else x.requires_grad_() for x in draw(6, m, 4, 3, dtype=FLOAT).values()
    ]
    tensors = (*inputs, learned if learned is None else learned.clone().requires_grad_())
    metric = (5.0, 0.5, tensors[-1], "distance", "triton")
    torch.library.opcheck(OP, (*inputs, *metric))
    operands = [x if x is None else x.detach() for x in inputs]
    scores = OP(*operands, 5.0, 0.5, learned, "distance", "triton")
    upstream = torch.ones_like(scores)
    arguments = upstream, scores, *operands, 5.0, 0.5, learned, "distance", "triton"
    wanted = [x is not None for x in tensors]
    torch.library.opcheck(BACKWARD_OP, arguments, {"wanted": wanted})


def test_a_step_compiles_whole():
    """Forward and backward, with nothing that PyTorch's compiler has to leave its graph for."""
    inputs, metric = draw(20, 15, 8, 5, dtype=FLOAT), Metric()
    weight = torch.linspace(0, 1, 8, requires_grad=True)

    def loss(sem, unc, sem2, unc2):
        scores = pairwise(sem * weight, unc, sem2, unc2, metric=metric, backend="triton")
        return scores.exp().mean()

    eager = torch.autograd.grad(loss(**inputs), weight)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(**inputs), weight), eager)


def test_autocast():
    inputs: dict[str, Any] = draw(20, 15, 8, 5, dtype=FLOAT)
    halves = {k: x.bfloat16() for k, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(inputs, Metric(), draw_upstream(inputs), "triton")
    expected = evaluate(halves, Metric(), draw_upstream(inputs), "triton")
    assert found["scores"].dtype == torch.bfloat16
    for what, x in found.items():
        assert torch.equal(x.bfloat16(), expected[what]), what
