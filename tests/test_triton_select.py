"""Selection of the k largest in the Triton backend, under Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from idml_fast._triton import select
from torch import Tensor

NOTHING = -(2**31)
# From the least to the largest key; those of one line are one key.
ORDER = [
    (-math.inf,),
    (-3.4028234663852886e38,),
    (-1.0,),
    (-1e-45,),
    (-0.0, 0.0),
    (1e-45,),
    (1.1754943508222875e-38,),
    (1.0,),
    (1.0000001192092896,),
    (math.inf,),
    (math.nan, -math.nan),
]
# rows, keys and how many of them are wanted
SHAPES = [
    (3, 40, 7),  # ragged
    (4, 64, 16),  # powers of two
    (3, 70, 1),
    (3, 33, 33),  # all
    (3, 20, 50),  # more than there are
    (2, 1, 1),
    (2, 1, 9),
    (2, 3000, 1000),  # several warps
]

State = tuple[Tensor, Tensor, Tensor]  # best keys, columns and scores, [n, k] each


@triton.jit
def map_in_order(values, keys, count, BLOCK: tl.constexpr):
    """The keys of some values."""
    places = tl.arange(0, BLOCK)
    there = places < count
    tl.store(keys + places, select.ordered(tl.load(values + places, mask=there)), mask=there)


def keys_of(values: Tensor) -> Tensor:
    """The keys of float32 numbers, by the device function."""
    keys = torch.empty(values.shape, dtype=torch.int32)
    block = triton.next_power_of_2(values.numel())
    map_in_order[(1,)](values, keys, values.numel(), block)
    return keys


def draw_keys(kind: str, n: int, m: int, seed: int = 0) -> Tensor:  # [n, m]
    """Keys of a kind."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, m, generator=generator)
    rare = torch.rand(n, m, generator=generator)
    few = torch.randint(-2, 3, (n, m), generator=generator).float()
    edges = torch.tensor([-math.inf, math.inf, math.nan, -math.nan, 0.0, -0.0, 1e-45])
    some_edges = edges[torch.randint(len(edges), (n, m), generator=generator)]
    return {
        "normal": lambda: keys_of(normal),
        "ties": lambda: keys_of(few),
        "equal": lambda: keys_of(torch.full((n, m), 2.5)),
        "edges": lambda: keys_of(some_edges),
        "some edges": lambda: keys_of(torch.where(rare < 0.2, some_edges, normal)),
        "some looked at": lambda: keys_of(few).masked_fill(rare < 0.7, NOTHING),
        "none looked at": lambda: torch.full((n, m), NOTHING, dtype=torch.int32),
        "rising": lambda: keys_of(normal.sort(1).values),
        "falling": lambda: keys_of(normal.sort(1, descending=True).values),
    }[kind]()


KINDS = [
    "normal",
    "ties",
    "equal",
    "edges",
    "some edges",
    "some looked at",
    "none looked at",
    "rising",
    "falling",
]


def none_yet(n: int, k: int) -> State:
    """The best of no columns."""
    keys = torch.full((n, k), NOTHING, dtype=torch.int32)
    return keys, torch.full((n, k), -1), torch.full((n, k), math.inf)


def expected(keys: Tensor, scores: Tensor, k: int, first: int = 0) -> State:
    """The definition: row after row, a stable sort, the k best of it put back in order."""
    best = none_yet(len(keys), k)
    for row, of_row in enumerate(keys.tolist()):
        columns = [column for column, key in enumerate(of_row) if key != NOTHING]
        columns = sorted(sorted(columns, key=lambda column: -of_row[column])[:k])
        for found, x in zip(best, (keys, torch.arange(keys.shape[1]) + first, scores), strict=True):
            found[row, : len(columns)] = x.expand(keys.shape)[row, columns]
    return best


def merged(keys: Tensor, scores: Tensor, k: int, first: int = 0, step: int | None = None) -> State:
    """What `merge` finds, all keys at once or ``step`` at a time."""
    best_keys, best_columns, best_scores = best = none_yet(len(keys), k)
    for start in range(0, keys.shape[1], step or keys.shape[1]):
        # Rows of a chunk need not follow each other without a gap.
        part = slice(start, start + step if step else None)
        select.merge(
            keys[:, part], best_keys, best_columns, first + start, scores[:, part], best_scores
        )
    return best


def assert_same(ours: State, theirs: State) -> None:
    for what, x, y in zip(("keys", "columns", "scores"), ours, theirs, strict=True):
        assert torch.equal(x, y), f"{what}: got {x.tolist()}, wanted {y.tolist()}"


@pytest.fixture(params=["by counting", "by sorting"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the kernel, and with the sort that takes its place for a large k."""
    if request.param == "by sorting":
        monkeypatch.setattr(select, "MOST_BEST", 0)


def test_keys_have_the_order_of_their_values() -> None:
    keys = [set(keys_of(torch.tensor(values)).tolist()) for values in ORDER]
    assert [len(alike) for alike in keys] == [1] * len(ORDER)
    in_order = [alike.pop() for alike in keys]
    assert all(a < b for a, b in zip([NOTHING, *in_order], in_order, strict=False))


def test_keys_of_any_bits_have_the_order_of_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[~values.isnan()]
    keys = keys_of(values)
    assert torch.equal(keys[values.argsort()], keys.sort().values)
    assert torch.equal(select.values_of(keys), values)


@pytest.mark.parametrize("values", ORDER, ids=str)
def test_values_come_back(values: tuple[float, ...]) -> None:
    values = torch.tensor(values)
    assert torch.equal(select.values_of(keys_of(values)).nan_to_num(7), values.nan_to_num(7))


def test_the_value_of_nothing_is_minus_infinity() -> None:
    keys = torch.tensor([[NOTHING]], dtype=torch.int32)
    assert select.values_of(keys).tolist() == [[-math.inf]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "k"), SHAPES)
@pytest.mark.usefixtures("way")
def test_the_best_of_a_chunk(kind: str, n: int, m: int, k: int) -> None:
    keys, scores = draw_keys(kind, n, m), torch.randn(n, m)
    assert_same(merged(keys, scores, k), expected(keys, scores, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "step"), [(1, 37), (5, 16), (16, 16), (100, 37)])
@pytest.mark.usefixtures("way")
def test_chunks_in_a_row_equal_one(kind: str, k: int, step: int) -> None:
    keys, scores = draw_keys(kind, 3, 75), torch.randn(3, 75)
    assert_same(merged(keys, scores, k, step=step), expected(keys, scores, k))


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_that_no_program_holds_is_taken_in_parts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "MOST_KEYS", 32)
    keys, scores = draw_keys(kind, 3, 75), torch.randn(3, 75)
    assert_same(merged(keys, scores, 6), expected(keys, scores, 6))


def test_more_than_a_program_holds_are_found_too() -> None:
    k = select.MOST_BEST + 3
    keys, scores = draw_keys("some looked at", 2, 3 * k), torch.randn(2, 3 * k)
    assert_same(merged(keys, scores, k, step=k + 1), expected(keys, scores, k))


@pytest.mark.parametrize("kind", ["some looked at", "ties"])
def test_the_most_that_a_program_holds(kind: str) -> None:
    k, m = select.MOST_BEST, 2 * select.MOST_KEYS
    keys, scores = draw_keys(kind, 1, m), torch.randn(1, m)
    assert_same(merged(keys, scores, k), expected(keys, scores, k))


@pytest.mark.usefixtures("way")
def test_without_scores_and_with_a_far_first_column() -> None:
    keys, first = draw_keys("ties", 3, 40), 2**33 + 5
    best_keys, best_columns, _ = none_yet(3, 8)
    select.merge(keys, best_keys, best_columns, first)
    wanted = expected(keys, torch.zeros(keys.shape), 8, first)
    assert torch.equal(best_keys, wanted[0])
    assert torch.equal(best_columns, wanted[1])


@pytest.mark.usefixtures("way")
def test_an_equal_key_that_comes_later_changes_nothing() -> None:
    keys, scores = draw_keys("equal", 2, 5), torch.randn(2, 5)
    best = merged(keys, scores, 5)
    before = tuple(x.clone() for x in best)
    select.merge(keys, best[0], best[1], 5, torch.randn(2, 5), best[2])
    assert_same(best, before)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (3, 0)])
@pytest.mark.usefixtures("way")
def test_nothing_to_merge(n: int, m: int) -> None:
    best = none_yet(n, 4)
    keys, scores = torch.empty(n, m, dtype=torch.int32), torch.empty(n, m)
    select.merge(keys, best[0], best[1], 0, scores, best[2])
    assert_same(best, none_yet(n, 4))


def test_repeats_are_equal_bit_for_bit() -> None:
    keys, scores = draw_keys("ties", 1, 50), torch.randn(1, 50)
    once = merged(keys, scores, 9)
    for _ in range(100):
        assert_same(merged(keys, scores, 9), once)
