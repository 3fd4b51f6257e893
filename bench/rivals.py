"""Peers that several benchmarks share, what each costs, and whether it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import idml_fast
from idml_fast import Metric

if TYPE_CHECKING:
    from race import Case

TINY = 1e-12  # a squared distance whose square root still has a derivative


@dataclass(frozen=True)
class Cost:
    """What a call takes, roughly: enough to tell seconds from minutes."""

    time: float  # times that of the matrix products that the case counts
    matrices: float = 0  # as many numbers as there are pairs, at its peak
    compiles: bool = False  # its first call


COSTS = {
    "ours": Cost(1.2),
    "ours fp32": Cost(2.4),  # beside bf16
    "floor": Cost(1, 1),
    "products": Cost(1),
    "eager": Cost(4, 10),
    "compile": Cost(1.6, 5, compiles=True),
    "chunked": Cost(1.8, compiles=True),
    "tiled": Cost(2, compiles=True),
    "in forward": Cost(1.5, compiles=True),
    "cdist": Cost(3.5, 10),
    "released": Cost(12, 10),
    "pml": Cost(4, 12),
    "faiss": Cost(1),
    "faiss + numpy": Cost(1.3),
    "keops": Cost(400),  # on a CPU it has neither BLAS nor vector instructions
}
# What has to be installed for a peer.
PACKAGES = {
    "faiss": "faiss",
    "faiss + numpy": "faiss",
    "keops": "pykeops",
    "pml": "pytorch_metric_learning",
    "released": "sklearn",
}


def cost(case: Case, who: str) -> Cost:
    return case.costs.get(who) or COSTS.get(who, COSTS["ours"])


def missing(peer: str) -> str | None:
    """Why a peer cannot run here; None if it can."""
    package = PACKAGES.get(peer)
    if package is None or find_spec(package) is not None:
        return None
    return f"{package} is not installed"


@contextmanager
def by_the_reference() -> Iterator[None]:
    """`idml_fast.reference` serves every operation, also those that a loss calls."""
    chosen = idml_fast.backend.choose
    idml_fast.backend.choose = lambda *_: "reference"
    try:
        yield
    finally:
        idml_fast.backend.choose = chosen


def truth(step: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> Callable:
    """A call of ``step`` in float64, by the reference, on the numbers that the tensors hold."""

    def call() -> tuple[Tensor, ...]:
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
        with by_the_reference():
            return step(*wide)

    return call


def compiled(function: Callable) -> Callable:
    torch.compiler.reset()  # or the limit on recompilations makes the later cases eager ones
    return torch.compile(function, dynamic=False)


# --------------------------------------------------------------------------- scores, as users write


def distances(x: Tensor, y: Tensor, sign: int) -> Tensor:  # [N, M]
    """``||x_i + sign y_j||``: squared distances from a Gram product, clamped."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) + 2 * sign * x @ y.T
    return squares.clamp(min=TINY).sqrt()


def distance_form(alpha: Tensor, beta: Tensor, metric: Metric) -> Tensor:
    return alpha * torch.exp(-(beta + metric.gamma) / (metric.tau * alpha))


def cosine_form(sem: Tensor, sem2: Tensor, beta: Tensor, metric: Metric) -> Tensor:  # [N, M]
    squares, squares2 = sem.square().sum(1), sem2.square().sum(1)
    dots = sem @ sem2.T
    alpha = (squares[:, None] + squares2 - 2 * dots).clamp(min=TINY).sqrt()
    cosine = dots * squares.rsqrt()[:, None] * squares2.rsqrt()
    return 1 - (1 - cosine) * torch.exp(-(beta + metric.gamma) / (metric.tau * alpha))


def by_cdist(sem: Tensor, unc: Tensor, sem2: Tensor, unc2: Tensor, metric: Metric) -> Tensor:
    """The distances by `torch.cdist`; ``||u + v||`` is that of ``u`` and ``-v``."""
    return distance_form(torch.cdist(sem, sem2), torch.cdist(unc, -unc2), metric)


def released(sem: Tensor, unc: Tensor, labels: Tensor, proxies: Tensor) -> Tensor:
    """Proxy-Anchor as its authors released it (but for what they print): dense scores, labels made
    binary by scikit-learn on the CPU. Where items and proxies nearly coincide it is not finite."""
    from sklearn.preprocessing import label_binarize

    alpha, margin, classes = 32, 0.1, len(proxies)
    positive = torch.FloatTensor(label_binarize(labels.numpy(), classes=range(classes)))
    cosine = F.linear(F.normalize(sem), F.normalize(proxies))
    squared = sem.square().sum(1)[:, None] + proxies.square().sum(1) - 2 * sem @ proxies.T
    scores = 1 - (1 - cosine) * torch.exp(-(unc.square().sum(1)[:, None] + 4) / (5 * squared))
    pull, push = torch.exp(-alpha * (scores - margin)), torch.exp(alpha * (scores + margin))
    pull = torch.where(positive == 1, pull, torch.zeros_like(pull)).sum(dim=0)
    push = torch.where(positive == 0, push, torch.zeros_like(push)).sum(dim=0)
    present = len(torch.nonzero(positive.sum(dim=0) != 0))
    return torch.log(1 + pull).sum() / present + torch.log(1 + push).sum() / classes


# ------------------------------------------------------------------ in bounded memory, as others do


def chunked(part: Callable, of_rows: Sequence[Tensor], of_all: Sequence[Tensor], rows: int):
    """`part` of some rows at a time, and again in the backward: the library's matrix products and,
    if `part` is compiled, one fused epilogue."""
    pieces = zip(*(x.split(rows) for x in of_rows), strict=True)
    return torch.cat([checkpoint(part, *piece, *of_all, use_reentrant=False) for piece in pieces])


def tiled(part: Callable, of_rows: Sequence[Tensor], of_cols: Sequence[Tensor], size: int):
    """Inf-CL's way: log-sum-exps of tiles, which `part` gives, put together row by row, so that not
    even some rows of scores are there at once; every tile again in the backward."""
    found = []
    for rows in zip(*(x.split(size) for x in of_rows), strict=True):
        columns = zip(*(x.split(size) for x in of_cols), strict=True)
        tiles = [checkpoint(part, *rows, *cols, use_reentrant=False) for cols in columns]
        found.append(torch.stack(tiles).logsumexp(0))
    return torch.cat(found)


class InForward(torch.autograd.Function):
    """Liger's way: the forward takes the gradients of the sum of `part` along, some rows at a time.
    So nothing is computed twice, and the backward only scales them."""

    @staticmethod
    def forward(ctx, part: Callable, rows: int, by_rows: int, *tensors: Tensor) -> Tensor:
        """The first ``by_rows`` tensors are given to `part` in pieces, the others whole."""
        learning = [k for k, learns in enumerate(ctx.needs_input_grad[3:]) if learns]
        sums = {k: torch.promote_types(tensors[k].dtype, torch.float32) for k in learning}
        gradients = {k: torch.zeros_like(tensors[k], dtype=sums[k]) for k in learning}
        total = 0
        for first in range(0, len(tensors[0]), rows):
            piece = slice(first, first + rows)
            parts = [x.detach()[piece if k < by_rows else ...] for k, x in enumerate(tensors)]
            with torch.enable_grad():
                leaves = [parts[k].requires_grad_() for k in learning]
                value = part(*parts).sum()
                found = torch.autograd.grad(value, leaves)
            for k, gradient in zip(learning, found, strict=True):
                gradients[k][piece if k < by_rows else ...] += gradient
            total = total + value.detach()
        ctx.gradients = {k: gradient.to(tensors[k].dtype) for k, gradient in gradients.items()}
        ctx.count = len(tensors)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        scaled = {k: gradient * upstream for k, gradient in ctx.gradients.items()}
        return None, None, None, *(scaled.get(k) for k in range(ctx.count))


# -------------------------------------------------------------------------------------------- KeOps


def lazy(*sides: tuple[Tensor, Tensor]):
    """Rows and columns as KeOps' symbols: ``[N, 1, D]`` and ``[1, M, D]``."""
    from pykeops.torch import LazyTensor

    for x, y in sides:
        yield LazyTensor(x[:, None].contiguous()), LazyTensor(y[None].contiguous())


def lazy_distance(x, y, sign: int):
    return ((x + sign * y) ** 2).sum(-1).clamp(TINY, 1e30).sqrt()


def keops_nearest(sem, unc, sem2, unc2, k: int, metric: Metric) -> tuple[Tensor, Tensor]:
    (s, s2), (u, u2) = lazy((sem, sem2), (unc, unc2))
    scores = lazy_distance(s, s2, -1)
    if metric.reads_unc:
        beta = lazy_distance(u, u2, 1)
        scores = scores * (-(beta + metric.gamma) / (metric.tau * scores)).exp()
    return scores.Kmin_argKmin(k, dim=1)


def keops_multi_similarity(sem, unc, labels: Tensor, metric: Metric) -> Tensor:
    """Of a batch with itself; labels and places are compared as numbers."""
    directions = F.normalize(sem)
    own, place = (x.to(sem)[:, None] for x in (labels, torch.arange(len(sem), device=sem.device)))
    sides = lazy(*((x, x) for x in (sem, unc, directions, own, place)))
    (s, s2), (u, u2), (d, d2), (label, label2), (row, col) = sides
    alpha, beta = lazy_distance(s, s2, -1), lazy_distance(u, u2, 1)
    cosine = (d * d2).sum(-1)
    scores = 1 - (1 - cosine) * (-(beta + metric.gamma) / (metric.tau * alpha)).exp()
    different = ((label - label2) ** 2 - 0.5).step()
    positive = (1 - different) * ((row - col) ** 2 - 0.5).step()
    terms = positive * (-2 * (scores - 0.5)).exp(), different * (50 * (scores - 0.5)).exp()
    pull, push = terms[0].concat(terms[1]).sum(1).unbind(1)
    return (torch.log1p(pull) / 2 + torch.log1p(push) / 50).mean()
