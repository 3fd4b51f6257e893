"""`rowstats` as PyTorch sees it: operations, compiled graphs, autocast, memory, errors."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import draw

from idml_fast import Metric, rowstats
from idml_fast import backend as backends
from idml_fast.rowstats import describe
from idml_fast.stats import Count, HingeSum, Histogram, LogSumExp, Max, Min, Sum

OP = torch.ops.idml_fast.rowstats
BACKWARD_OP = torch.ops.idml_fast.rowstats_backward
FLOAT = torch.float32

two_sets_and_self = pytest.mark.parametrize("m", [5, None], ids=["two sets", "self"])
kept_or_not = pytest.mark.parametrize("workspace", [2**28, 0], ids=["kept", "taken again"])


def statistics(n):
    return {
        "log-sum-exp": LogSumExp(where="different", scale=2.0, above=-1.0),
        "sum": Sum(where="any", power=2.0),
        "count": Count(where="same"),
        "hinge": HingeSum(where="any", threshold=torch.linspace(0, 1, n)),
        "histogram": Histogram(where="any", low=0.0, high=4.0, bins=5),
        "min": Min(where="different"),
        "max": Max(where="same"),
    }


def labels_of(m):
    return torch.tensor([0, 0, 1, 2, 1, 0]), None if m is None else torch.tensor([0, 1, 1, 3, 2])


def arguments(m, workspace, learned=None):
    inputs = draw(6, m, 4, 3, dtype=FLOAT)
    operands = (*inputs.values(), 5.0, 0.5, learned, "distance")
    described, _ = describe(list(statistics(6).values()), inputs["sem"])
    return (*operands, *labels_of(m), *described, workspace)


@two_sets_and_self
@kept_or_not
def test_opcheck(workspace, m):
    found = [
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in arguments(m, workspace, torch.tensor([5.0, 0.5]))
    ]
    # What is kept is memory, of which only the part that some tile needs is ever written.
    without_values = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OP, (*found, "cpu"), test_utils=without_values)
    torch.library.opcheck(OP, (*found[:-1], 0, "cpu"))


@two_sets_and_self
@kept_or_not
@pytest.mark.parametrize("wanted", [[True] * 5, [True, False, False, True, False], [False] * 5])
def test_opcheck_of_the_backward(wanted, workspace, m):
    found = arguments(m, workspace, torch.tensor([5.0, 0.5]))
    values, _, state, kept = OP(*found, "cpu")
    leaves = (*found[:4], found[6])
    wanted = [w and x is not None for w, x in zip(wanted, leaves, strict=True)]
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(
        BACKWARD_OP, (upstream, state, kept, *found[:-1], "cpu"), {"wanted": wanted}
    )


@two_sets_and_self
def test_compiled_without_graph_breaks(m):
    inputs = {
        k: None if x is None else x.requires_grad_()
        for k, x in draw(6, m, 4, 3, dtype=FLOAT).items()
    }
    labels, labels2 = labels_of(m)
    margin = torch.linspace(0.1, 0.5, 6).requires_grad_()
    leaves = [*(x for x in inputs.values() if x is not None), margin]

    def loss(margin, **inputs):
        stats = statistics(6) | {"triplet": HingeSum(where="different", threshold=margin)}
        found = rowstats(**inputs, labels=labels, labels2=labels2, stats=stats)
        terms = (found[k] for k in ("log-sum-exp", "sum", "hinge", "histogram", "triplet"))
        return sum(x.sum() for x in terms) + found["min"].values.sum() + found["count"].sum()

    expected = torch.autograd.grad(loss(margin, **inputs), leaves)
    compiled = torch.compile(loss, fullgraph=True)(margin, **inputs)
    torch.testing.assert_close(compiled, loss(margin, **inputs))
    for x, y in zip(torch.autograd.grad(compiled, leaves), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_takes_the_products_in_its_dtype():
    inputs, (labels, labels2) = draw(6, 5, 4, 3, dtype=FLOAT), labels_of(5)
    stats = {"sum": Sum(where="any")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rowstats(**inputs, labels=labels, labels2=labels2, stats=stats)
    rounded = {k: x.bfloat16() for k, x in inputs.items()}
    expected = rowstats(**rounded, labels=labels, labels2=labels2, stats=stats)
    assert found["sum"].dtype == FLOAT
    assert torch.equal(found["sum"], expected["sum"])


def test_no_second_derivative():
    inputs, (labels, _) = draw(6, None, 4, 3), labels_of(None)
    sem = inputs["sem"].requires_grad_()
    found = rowstats(sem, inputs["unc"], labels=labels, stats={"sum": Sum(where="any", power=2.0)})
    (gradient,) = torch.autograd.grad(found["sum"].sum(), sem, create_graph=True)
    with pytest.raises(RuntimeError, match="rowstats has no second derivative"):
        gradient.sum().backward()


def test_nothing_is_kept_without_a_backward():
    inputs = draw(6, 5, 4, 3, dtype=FLOAT)
    kept = OP(*arguments(5, 0), "cpu")[3]
    assert kept.numel() == 0
    kept = OP(*arguments(5, 2**28), "cpu")[3]
    assert kept.shape == (2, 6 * 5 * 4)
    assert OP(*arguments(5, kept.numel() - 1), "cpu")[3].numel() == 0
    assert not inputs["sem"].requires_grad


MEMORY = """
import sys, torch, idml_fast
from race import peak_memory
from idml_fast import backend, stats
backend.workspace = 0
n, m = (int(x) for x in sys.argv[1:])
torch.manual_seed(0)
sem, unc = torch.randn(n, 8), torch.randn(n, 4)
sem2, unc2 = (torch.randn(m, 8), torch.randn(m, 4)) if m else (None, None)
labels, labels2 = torch.arange(n) // 4, torch.arange(m) // 4 if m else None
leaves = [x.requires_grad_() for x in (sem, unc, sem2, unc2) if x is not None]
chosen = {"lse": stats.LogSumExp(where="different"), "max": stats.Max(where="any")}

def call():
    found = idml_fast.rowstats(sem, unc, sem2, unc2, labels=labels, labels2=labels2, stats=chosen)
    return torch.autograd.grad(found["lse"].sum() + found["max"].values.sum(), leaves)

print(peak_memory(call) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("m", [8192, 0], ids=["two sets", "self"])
def test_memory_does_not_grow_with_the_pairs(m):
    # 8192 x 8192 scores are 256 MiB; the tiles' own memory is a few MiB.
    bench = str(backends.__file__).replace("idml_fast/backend.py", "bench")
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, "8192", str(m)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": bench, "PATH": ""},
    )
    assert float(ran.stdout) < 64


SEM, UNC, LABELS = torch.ones(4, 8), torch.ones(4, 2), torch.arange(4)
MISTAKES = {
    "threshold of another length": (
        {"it": HingeSum(where="any", threshold=torch.ones(3))},
        ValueError,
        "stats['it'].threshold must have shape [4] like sem [4, 8], got [3]",
    ),
    "above of another length": (
        {"it": Sum(where="any", above=torch.ones(4, 1))},
        ValueError,
        "stats['it'].above must have shape [4] like sem [4, 8], got [4, 1]",
    ),
    "below on another device": (
        {"it": Sum(where="any", below=torch.ones(4, device="meta"))},
        ValueError,
        "stats['it'].below must be on cpu like sem, got meta",
    ),
    "not a statistic": (
        {"it": "sum"},
        TypeError,
        "stats['it'] must be one of idml_fast.stats, got str",
    ),
}


@pytest.mark.parametrize(("stats", "error", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_by_one_clear_sentence(stats, error, words):
    with pytest.raises(error) as raised:
        rowstats(SEM, UNC, labels=LABELS, stats=stats)
    assert str(raised.value) == words


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: Sum(where="any", above="1"),
            TypeError,
            "above must be a number, a tensor or None, got str",
        ),
        (lambda: Sum(where="any", below=math.nan), ValueError, "below must be a number, got nan"),
    ],
)
def test_a_window_is_a_number_or_a_tensor(make, error, words):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == words


def test_a_plain_metric_does_not_look_at_unc():
    found = rowstats(
        SEM, None, labels=LABELS, metric=Metric.plain(), stats={"sum": Sum(where="any")}
    )
    assert torch.equal(found["sum"], torch.zeros(4))
