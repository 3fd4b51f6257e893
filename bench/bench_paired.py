"""idml_fast.paired beside the eager formula on gathered embeddings and torch.compile of it."""

from dataclasses import replace
from functools import partial

import pytest
import race
import rivals
import torch

import idml_fast

D = 512  # width of both embeddings
ITEMS, PAIRS = 16384, 100_000
METRIC = idml_fast.Metric.paper()
BARS = {"forward + backward": {"compile": 1.0}}  # ours to it, on two cores


@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
def test_paired(race_case, passes):
    race_case(
        race.Case(
            title=f"paired, {passes}, fp32, {PAIRS} pairs of {ITEMS} items, D = {D}",
            build=partial(contestants, passes=passes),
            shape=(ITEMS, PAIRS),
            peers=("eager", "compile"),
            flop=operations(passes, D) * PAIRS,
            bytes=4.0 * numbers(passes, D) * PAIRS,
            pairs=2 * D * PAIRS,  # numbers that eager gathers
            # Memory is what takes time, not operations.
            costs={who: replace(x, time=70 * x.time) for who, x in rivals.COSTS.items()},
            truth=(ITEMS // 8, PAIRS // 8),
            bars=BARS.get(passes, {}),
        )
    )


def numbers(passes, width):
    """What a pair has to be read or written: 4 embeddings, and its score. A backward reads them
    and the gradient again, and adds to the gradients of all four: it reads and writes those."""
    return 4.0 * width + 1 if passes == "forward" else 4.0 * width * 4 + 2


def operations(passes, width):
    """Three on each of 2 D numbers give the squares of a pair; a backward measures the pair again
    for each of its two items, and adds 3 operations on 2 D to the gradients of each."""
    return 6.0 * width * (1 if passes == "forward" else 5)


def formula(sem, unc, rows, cols):
    """What a user writes: the formula on the embeddings of the pairs."""
    alpha = (sem[rows] - sem[cols]).square().sum(1).clamp(min=1e-12).sqrt()
    beta = (unc[rows] + unc[cols]).square().sum(1).clamp(min=1e-12).sqrt()
    return rivals.distance_form(alpha, beta, METRIC)


def contestants(items, pairs, peers, *, passes, width=D) -> race.Contestants:
    torch.manual_seed(0)
    backward = passes == "forward + backward"
    drawn = torch.randn(2, items, width) / width**0.5
    leaves = [x.requires_grad_(backward) for x in drawn]
    index = torch.randint(items, (pairs,)), torch.randint(items, (pairs,))
    upstream = torch.randn(pairs)

    def step(scores_of, gradient, *leaves):
        scores = scores_of(*leaves)
        return (scores, *(torch.autograd.grad(scores, leaves, gradient) if backward else ()))

    def call(scores_of):
        return partial(step, scores_of, upstream, *leaves)

    def dense(sem, unc):
        return formula(sem, unc, *index)

    build = {
        "truth": lambda: rivals.truth(partial(step, ours), [upstream, *leaves]),
        "eager": lambda: call(dense),
        "compile": lambda: call(rivals.compiled(dense)),
    }
    ours = partial(idml_fast.paired, index=index, metric=METRIC)
    return {"ours": call(ours)} | {peer: build[peer]() for peer in peers}
