"""Retrieval: at which ranks the relevant items of every query are found.

Everything follows from these ranks. The rank of a relevant item is one more than the number of
items that are closer: of relevant ones, whose scores are few and are listed (`idml_fast.paired`),
and of others, which are counted in one walk over all pairs (`idml_fast.rowstats`). Nothing of
queries x gallery is allocated, and no list of neighbours, however far down the last relevant item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import _blocks, _checks
from ..metric import Metric
from ..paired import paired
from ..pairwise import pairwise
from ..rowstats import rowstats
from ..stats import Count

# A query with more relevant items than this has its whole row of scores sorted: each one listed is
# a comparison more for every pair, and some hundred of these take longer than sorting.
LISTED = 128
# So many of them in one walk on a GPU, where the kernel has two counters in its code for each.
LISTED_A_WALK = 8
AT_ONCE = 2**29  # bytes of bounds and counts, for all items


@dataclass(frozen=True)
class Retrieval:
    """What the queries found.

    Args:
        per_query: by name, ``[Q]`` float64: `recall_at_k` as ``recall_at_<k>``, `precision_at_k` as
            ``precision_at_<k>``, `r_precision`, `map_at_r`, `mrr` and `average_precision` as
            ``map``, of each query that has a relevant item.
        queries: ``[Q]`` int64, the rows of these queries.
        unmatched: ``[U]`` int64, the rows of those that have none, and are in no average.
    """

    per_query: dict[str, Tensor]
    queries: Tensor
    unmatched: Tensor

    @property
    def values(self) -> dict[str, float]:
        """The mean of each measure over `queries`, in [0, 1]."""
        return {name: x.mean().item() for name, x in self.per_query.items()}


def recall_at_k(
    ranks: Tensor,  # [Q, R]
    k: int,
) -> Tensor:  # [Q]
    """Whether a relevant item is among the ``k`` nearest, 0 or 1; also known as CMC at rank ``k``.

    Args:
        ranks: ``[Q, R]`` float64, the ranks of each query's relevant items from 1 on, ascending;
            +inf where a query has fewer than ``R``.
        k: how many neighbours count.
    """
    return (ranks[:, 0] <= k).double()


def precision_at_k(
    ranks: Tensor,  # [Q, R]
    k: int,
) -> Tensor:  # [Q]
    """The share of relevant items among the ``k`` nearest; ``ranks`` as for `recall_at_k`."""
    return (ranks <= k).double().sum(dim=1) / k


def r_precision(
    ranks: Tensor,  # [Q, R]
) -> Tensor:  # [Q]
    """The share of relevant items among the ``R`` nearest, for a query with ``R`` of them.

    ``ranks`` as for `recall_at_k`. Source: Musgrave et al., *A Metric Learning Reality Check*,
    arXiv 2003.08505.
    """
    total = _total(ranks)
    return (ranks <= total[:, None]).sum(dim=1) / total


def map_at_r(
    ranks: Tensor,  # [Q, R]
) -> Tensor:  # [Q]
    """``1/R * sum_i precision(i) * relevant(i)`` over the ``R`` nearest; their mean is MAP@R.

    ``precision(i)`` is the share of relevant items among the ``i`` nearest. ``ranks`` as for
    `recall_at_k`. Source: as for `r_precision`.
    """
    total = _total(ranks)
    return (_precisions(ranks) * (ranks <= total[:, None])).sum(dim=1) / total


def average_precision(
    ranks: Tensor,  # [Q, R]
) -> Tensor:  # [Q]
    """The mean of the precisions at the relevant items, wherever they are; their mean is mAP.

    ``ranks`` as for `recall_at_k`.
    """
    return _precisions(ranks).sum(dim=1) / _total(ranks)


def mrr(
    ranks: Tensor,  # [Q, R]
) -> Tensor:  # [Q]
    """One divided by the rank of the first relevant item; ``ranks`` as for `recall_at_k`."""
    return 1 / ranks[:, 0]


def _total(ranks: Tensor) -> Tensor:
    return ranks.isfinite().sum(dim=1).double()


def _precisions(ranks: Tensor) -> Tensor:
    """The precision at each relevant item: as many as there are up to it, divided by its rank."""
    return torch.arange(1, ranks.shape[1] + 1, device=ranks.device) / ranks


def measures(
    ranks: Tensor,  # [Q, R]
    ks: Sequence[int],
) -> dict[str, Tensor]:  # [Q] each
    """All measures of each query, by the names of `Retrieval`."""
    return {
        **{f"recall_at_{k}": recall_at_k(ranks, k) for k in ks},
        **{f"precision_at_{k}": precision_at_k(ranks, k) for k in ks},
        "r_precision": r_precision(ranks),
        "map_at_r": map_at_r(ranks),
        "mrr": mrr(ranks),
        "map": average_precision(ranks),
    }


@torch.no_grad()
def retrieval(
    sem: Tensor | np.ndarray,  # [N, Ds]
    labels: Tensor | np.ndarray,  # [N]
    sem2: Tensor | np.ndarray | None = None,  # [M, Ds]
    labels2: Tensor | np.ndarray | None = None,  # [M]
    *,
    unc: Tensor | np.ndarray | None = None,  # [N, Du]
    unc2: Tensor | np.ndarray | None = None,  # [M, Du]
    metric: Metric = Metric.plain(),
    ks: Sequence[int] = (1, 2, 4, 8),
    progress: bool = False,
) -> Retrieval:
    """Recall@k (CMC), precision@k, R-precision, MAP@R, MRR and mAP, over the whole ranking.

    Without a gallery every item is a query among all the others: itself excluded by identity, so
    that its duplicates count. A tie goes to the smaller row of the gallery, as in
    `idml_fast.nearest`; scores that differ by rounding alone are in the order of their rounding.
    Queries for which the gallery has nothing relevant are in no average: `Retrieval.unmatched`. The
    definitions are those of pytorch-metric-learning's ``AccuracyCalculator``.

    The paper's protocol retrieves by the semantic distance alone, ``Metric.plain()``; any other
    metric can be given, with ``unc``.

    Memory: a batch of queries and a block of the gallery, of about 64 MiB each, where these are
    arrays such as ``numpy.load(path, mmap_mode="r")``.

    Args:
        sem: ``[N, Ds]`` float, of the queries. float16 and bfloat16 are compared as float32.
        labels: ``[N]`` integer.
        sem2: ``[M, Ds]``, of the gallery; absent: the queries among themselves.
        labels2: ``[M]`` integer; goes with ``sem2``.
        unc: ``[N, Du]``, for a metric that reads it.
        unc2: ``[M, Du]``, of the gallery.
        metric: by which items are near.
        ks: the ``k`` of Recall@k and of precision@k.
        progress: show a bar that counts pairs of items.

    Raises:
        TypeError, ValueError: one of ``sem2`` and ``labels2`` comes without the other, an argument
            does not fit another, an embedding is not finite, or there is nothing to retrieve: no
            item, or none relevant.

    >>> import torch
    >>> sem, labels = torch.tensor([[0.0], [1.0], [3.0], [3.5]]), torch.tensor([7, 9, 9, 9])
    >>> found = retrieval(sem, labels, ks=(1,))
    >>> found.per_query["recall_at_1"].tolist(), found.per_query["mrr"].tolist()
    ([0.0, 1.0, 1.0], [0.5, 1.0, 1.0])
    >>> found.unmatched
    tensor([0])
    """
    if (sem2 is None) != (labels2 is None):
        raise ValueError("sem2 and labels2 must be given together, got only one of them")
    itself = sem2 is None
    for k in ks:
        _checks.integer("ks", k, "integers >= 1", lambda k: k >= 1)
    given = {"sem": sem, "unc": unc, "sem2": sem2, "unc2": unc2}
    given = {name: _blocks.stand_in(name, x, sem) for name, x in given.items()}
    _checks.pairs(*given.values(), metric)
    for name, x, side in (("labels", labels, "sem"), ("labels2", labels2, "sem2")):
        if x is not None:
            _checks.labels(name, _blocks.stand_in(name, x, sem), given[side], side)
    unc, unc2 = (x if metric.reads_unc else None for x in (unc, unc2))
    queries = _Items(sem, unc, labels, given["sem"].device)
    gallery = queries if itself else _Items(sem2, unc2, labels2, given["sem"].device)
    if not len(gallery.labels):
        raise ValueError(f"{'sem' if itself else 'sem2'} must hold at least one item, got none")
    queries.check("sem", "unc")
    if not itself:
        gallery.check("sem2", "unc2")

    relevant = _Relevant(queries.labels, gallery.labels, itself)
    matched = relevant.total.nonzero()[:, 0]
    if not len(matched):
        raise ValueError("labels must give some query a relevant item, got none that has one")
    found: dict[str, Tensor] = {}

    def keep(rows: Tensor, ranks: Tensor) -> None:
        for name, values in measures(ranks, ks).items():
            found.setdefault(name, values.new_full((len(queries),), math.nan))[rows] = values

    is_listed = relevant.total[matched] <= LISTED
    with (
        torch.autocast(queries.device.type, enabled=False),
        _progress(len(matched) * len(gallery) if progress else None) as seen,
    ):
        search = _Search(queries, gallery, relevant, metric, seen)
        rest = [matched[~is_listed]]
        for rows in _batches(matched[is_listed], search.batch):
            ranks, certain = search.by_counting(rows)
            keep(rows[certain], ranks[certain])
            rest.append(rows[~certain])
        for rows in _batches(torch.cat(rest), search.sorted_batch):
            keep(rows, search.by_sorting(rows))
    values = {name: x[matched] for name, x in found.items()}
    return Retrieval(values, matched, (relevant.total == 0).nonzero()[:, 0])


class _Items:
    """One side's embeddings and labels; the embeddings in memory, or arrays that are read."""

    def __init__(self, sem: Any, unc: Any, labels: Any, device: torch.device) -> None:
        self.sem, self.unc, self.device = sem, unc, device
        if not isinstance(labels, Tensor):
            labels = torch.from_numpy(np.array(labels))  # of a file that is not to be written to
        self.labels = labels.to(device).long()
        self.in_memory = isinstance(sem, Tensor) and (unc is None or isinstance(unc, Tensor))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return _single(*(None if x is None else self._take(x, index) for x in (self.sem, self.unc)))

    def _take(self, x: Any, index: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            return x[index]
        return torch.from_numpy(x[index.cpu().numpy()]).to(self.device)

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The first row of each block, and its embeddings."""
        first = 0
        for block in _blocks.cut(self.sem, self.unc, None, self.device):
            yield first, *_single(block.sem2, block.unc2)
            first += len(block.sem2)

    def check(self, *names: str) -> None:
        """Every embedding is finite."""
        for first, *embeddings in self.blocks():
            for name, x in zip(names, embeddings, strict=True):
                if x is not None:
                    _checks.finite_rows(name, x, first)


def _single(*embeddings: Tensor | None) -> tuple[Tensor | None, ...]:
    """Half precision as float32: scores that are compared with each other are not rounded to it."""
    return tuple(
        x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x
        for x in embeddings
    )


class _Relevant:
    """Which items of the gallery are relevant: those with the label of the query."""

    def __init__(self, labels: Tensor, labels2: Tensor, itself: bool) -> None:
        self.order = labels2.argsort(stable=True)  # a class side by side
        classes, sizes = labels2.unique(return_counts=True)
        place = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
        self.first = (sizes.cumsum(0) - sizes)[place]
        self.size = torch.where(classes[place] == labels, sizes[place], 0)
        self.itself = itself
        self.total = self.size - int(itself)

    def columns(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[Q, C]`` columns of the own class, and which of these are relevant."""
        offset = torch.arange(int(self.size[rows].max()), device=rows.device)
        place = (self.first[rows, None] + offset).clamp(max=len(self.order) - 1)
        columns, there = self.order[place], offset < self.size[rows, None]
        return columns, there & (columns != rows[:, None]) if self.itself else there


class _Search:
    """Finds the ranks of some queries' relevant items: ``[Q, R]``, as the measures take them.

    Scores are turned into distances first, cosines by their sign.
    """

    def __init__(
        self,
        queries: _Items,
        gallery: _Items,
        relevant: _Relevant,
        metric: Metric,
        seen: Callable[[int], Any] | None,
    ) -> None:
        self.queries, self.gallery, self.relevant = queries, gallery, relevant
        self.metric, self.seen = metric, seen
        self.sign = -1 if metric.larger_is_closer else 1
        # A batch of queries takes as much as a block of the gallery: embeddings and bounds, or the
        # rows of scores, their order and what else sorting takes. Items among themselves are
        # compared in one walk over half the pairs where they are at hand, bounds and counts are not
        # too many, and nobody waits to see progress.
        width = int(relevant.total.clamp(max=LISTED).max())
        self.at_once = relevant.itself and queries.in_memory and seen is None
        self.at_once &= 64 * len(queries) * width <= AT_ONCE
        self.batch = len(queries)
        if not self.at_once:
            self.batch = max(1, _blocks.BYTES // (4 * (queries.sem.shape[1] + 8 * width)))
        self.sorted_batch = max(1, _blocks.BYTES // (32 * len(gallery)))

    def by_counting(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The ranks, and which rows' are certain: no other item has the score of a relevant one."""
        distances = self._listed(rows)
        closer, upto = self._count(rows, distances)
        nearer = torch.arange(distances.shape[1], device=rows.device)
        ranks = (1 + nearer + closer).double().masked_fill(~distances.isfinite(), math.inf)
        return ranks, (closer == upto).all(dim=1)

    def _listed(self, rows: Tensor) -> Tensor:
        """The distances of the relevant items, ascending; then +inf."""
        columns, there = self.relevant.columns(rows)
        query, column = rows[there.nonzero()[:, 0]], columns[there]
        size = max(1, _blocks.BYTES // (8 * self.queries.sem.shape[1]))
        parts = []
        for some, others in zip(query.split(size), column.split(size), strict=True):
            (sem, unc), (sem2, unc2) = self.queries[some], self.gallery[others]
            parts.append(self.sign * paired(sem, unc, sem2, unc2, metric=self.metric))
        distances = torch.cat(parts)
        listed = distances.new_full(there.shape, math.inf).masked_scatter(there, distances)
        return listed.sort(dim=1).values[:, : int(self.relevant.total[rows].max())]

    def _count(self, rows: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """``[Q, R]`` each: how many other items are closer than a distance; and not farther."""
        if self.at_once:
            bounds = distances.new_full((len(self.queries), distances.shape[1]), math.inf)
            bounds[rows] = distances
            sem, unc = _single(self.queries.sem, self.queries.unc)
            counts = self._walk(sem, unc, None, None, self.queries.labels, None, bounds)
            return counts[0, rows], counts[1, rows]
        (sem, unc), labels = self.queries[rows], self.queries.labels[rows]
        counts = distances.new_zeros((2, *distances.shape), dtype=torch.int64)
        for first, sem2, unc2 in self.gallery.blocks():
            labels2 = self.gallery.labels[first : first + len(sem2)]
            counts += self._walk(sem, unc, sem2, unc2, labels, labels2, distances)
            if self.seen is not None:
                self.seen(len(sem) * len(sem2))
        return counts[0], counts[1]

    def _walk(
        self,
        sem: Tensor,
        unc: Tensor | None,
        sem2: Tensor | None,
        unc2: Tensor | None,
        labels: Tensor,
        labels2: Tensor | None,
        distances: Tensor,
    ) -> Tensor:
        """``[2, Q, R]``: both counts, of the columns."""
        counts = []
        for some in distances.split(LISTED_A_WALK if sem.is_cuda else LISTED, dim=1):
            stats = [self._counter(bound) for x in some.unbind(1) for bound in (x, _next(x))]
            found = rowstats(
                sem,
                unc,
                sem2,
                unc2,
                labels=labels,
                labels2=labels2,
                metric=self.metric,
                stats={str(number): stat for number, stat in enumerate(stats)},
            )
            counts.append(torch.stack([*found.values()]).view(-1, 2, len(sem)))
        return torch.cat(counts).permute(1, 2, 0)

    def _counter(self, bound: Tensor) -> Count:
        """How many items of other labels are closer than ``bound``."""
        if self.sign > 0:
            return Count(where="different", below=bound)
        return Count(where="different", above=-bound)

    def by_sorting(self, rows: Tensor) -> Tensor:
        """The ranks, from whole rows of scores; a tie goes to the smaller column."""
        (sem, unc), labels = self.queries[rows], self.queries.labels[rows]
        parts = []
        for _, sem2, unc2 in self.gallery.blocks():
            parts.append(self.sign * pairwise(sem, unc, sem2, unc2, metric=self.metric))
            if self.seen is not None:
                self.seen(len(sem) * len(sem2))
        order = torch.cat(parts, dim=1).sort(dim=1, stable=True).indices
        if self.relevant.itself:
            order = order[order != rows[:, None]].view(len(rows), -1)
        hits = self.gallery.labels[order] == labels[:, None]
        query, place = hits.nonzero().unbind(1)
        nearer = hits.cumsum(dim=1)[query, place] - 1
        ranks = torch.full((len(rows), int(nearer.max()) + 1), math.inf, dtype=torch.float64)
        ranks = ranks.to(rows.device)
        ranks[query, nearer] = place.double() + 1
        return ranks


def _batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    return rows.split(size) if len(rows) else ()


def _next(distances: Tensor) -> Tensor:
    """The next number above each."""
    return torch.nextafter(distances, torch.full_like(distances, math.inf))


@contextmanager
def _progress(pairs: int | None) -> Iterator[Callable[[int], Any] | None]:
    """What is told of pairs that have been compared; None if nobody wants to know."""
    if pairs is None:
        yield None
        return
    with tqdm(total=pairs, desc="retrieval", unit=" pairs", unit_scale=True) as bar:
        yield bar.update
