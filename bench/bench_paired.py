"""idml_fast.paired beside the eager formula on gathered embeddings and torch.compile of it."""

from functools import partial

import pytest
import race
import torch

import idml_fast

D = 512  # width of both embeddings
ITEMS, PAIRS = 16384, 100_000
METRIC = idml_fast.Metric.paper()
BARS = {"forward + backward": {"compile": 1.0}}  # ours to it, on two cores


@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
def test_paired(race_case, passes):
    # A pair has 4 D numbers to read: its semantic and uncertainty embeddings. Three operations on
    # each of 2 D give the squares; a backward measures the pair again for each of its two items,
    # and adds 3 operations on 2 D to the gradients of each.
    operations = 6.0 * D * (1 if passes == "forward" else 5)
    race_case(
        race.Case(
            title=f"paired, {passes}, fp32, {PAIRS} pairs of {ITEMS} items, D = {D}",
            build=partial(contestants, passes=passes),
            shape=(ITEMS, PAIRS),
            peers=("eager", "compile"),
            flop=operations * PAIRS,
            bars=BARS.get(passes, {}),
        )
    )


def formula(sem, unc, rows, cols):
    """What a user writes: the formula on the embeddings of the pairs."""
    alpha = (sem[rows] - sem[cols]).square().sum(1).clamp(min=1e-12).sqrt()
    beta = (unc[rows] + unc[cols]).square().sum(1).clamp(min=1e-12).sqrt()
    return alpha * torch.exp(-(beta + METRIC.gamma) / (METRIC.tau * alpha))


def contestants(items, pairs, peers, *, passes) -> race.Contestants:
    torch.manual_seed(0)
    backward = passes == "forward + backward"
    leaves = [(torch.randn(items, D) / D**0.5).requires_grad_(backward) for _ in ("sem", "unc")]
    index = torch.randint(items, (pairs,)), torch.randint(items, (pairs,))
    upstream = torch.randn(pairs)

    def call(scores_of):
        def forward():
            return (scores_of(*leaves),)

        def forward_and_backward():
            scores = scores_of(*leaves)
            return (scores, *torch.autograd.grad(scores, leaves, upstream))

        return forward_and_backward if backward else forward

    def dense(sem, unc):
        return formula(sem, unc, *index)

    def compiled():
        torch.compiler.reset()  # or the limit on recompilations makes the later cases eager ones
        return call(torch.compile(dense, dynamic=False))

    build = {"eager": lambda: call(dense), "compile": compiled}
    ours = partial(idml_fast.paired, index=index, metric=METRIC)
    return {"ours": call(ours)} | {peer: build[peer]() for peer in peers}
