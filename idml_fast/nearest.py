"""`nearest`: the closest columns of each row, or columns drawn by their distance."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _blocks, _checks, reference
from . import backend as backends
from ._operands import OPERANDS, autocast, beyond_cuda, by_operand, define, operands, save, saved
from .metric import Metric
from .stats import CONDITIONS

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class DistanceWeighted:
    """Distance weighted sampling: `nearest` draws columns evenly over all distances.

    On the unit sphere of ``width`` dimensions most points lie at a distance near the square root of
    2. A column at distance ``d`` is drawn with a probability proportional to ``1 / q(d)``, where::

        q(d) = d ** (width - 2) * (1 - d**2 / 4) ** ((width - 3) / 2)

    is the density of the distances between points that are spread evenly over the sphere.

    Args:
        width: of the sphere, >= 2; None takes the width of ``sem``.
        cutoff: a smaller distance weighs as much as this one, > 0.
        upto: columns at this distance or farther are not drawn, > ``cutoff`` and at most 2, the
            sphere's diameter.

    Raises:
        TypeError, ValueError: an argument is of another type or out of its range.

    Source: Wu et al., *Sampling Matters in Deep Embedding Learning*, ICCV 2017; the bounds are
    those of pytorch-metric-learning's ``DistanceWeightedMiner``.

    >>> import torch, idml_fast
    >>> sem = torch.nn.functional.normalize(torch.randn(9, 4))
    >>> distances, columns = nearest(sem, "zero", k=2, sample=DistanceWeighted(), seed=0)
    >>> columns.shape
    torch.Size([9, 2])
    """

    width: int | None = None
    cutoff: float = 0.5
    upto: float = 1.4

    def __post_init__(self) -> None:
        if self.width is not None:
            _checks.integer("width", self.width, ">= 2", lambda width: width >= 2)
        _checks.number("cutoff", self.cutoff, "> 0", lambda cutoff: cutoff > 0)
        _checks.number(
            "upto",
            self.upto,
            f"> cutoff = {self.cutoff} and at most 2",
            lambda upto: self.cutoff < upto <= 2,
        )

    def weights(self, sem: Tensor) -> list[float]:
        """What the operation takes: width, cutoff and upto."""
        width = sem.shape[1] if self.width is None else self.width
        return [float(width), float(self.cutoff), float(self.upto)]


def nearest(
    sem: Tensor,  # [N, Ds]
    unc: Tensor | str | None,  # [N, Du] or "zero"
    sem2: Tensor | ndarray | Iterable[Any] | None = None,  # [M, Ds] or blocks of columns
    unc2: Tensor | ndarray | str | None = None,  # [M, Du] or "zero"
    *,
    k: int,
    metric: Metric = Metric(),
    labels: Tensor | None = None,  # [N]
    labels2: Tensor | ndarray | None = None,  # [M]
    where: str = "any",
    largest: bool | None = None,
    exclude_self: bool = False,
    above: Tensor | None = None,  # [N]
    sample: DistanceWeighted | None = None,
    seed: int | None = None,
    progress: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k]
    """The k best columns of each row, and their scores.

    Replaces::

        scores = idml_fast.pairwise(sem, unc, sem2, unc2, metric=metric)
        values, columns = scores.topk(k, largest=metric.larger_is_closer)

    Nothing of N x M is allocated, in the forward or in the backward, which looks at the k columns
    alone. The same input gives the same bits, for one number of threads or another.

    **Columns in blocks.** Besides a tensor, ``sem2`` may be

    * a NumPy array, such as ``numpy.load(path, mmap_mode="r")``, with ``unc2`` and ``labels2``
      arrays as well. It is read once, in blocks of about 64 MiB, so that it may be larger than the
      memory;
    * an iterable of blocks, each a tensor ``sem2``, or a tuple ``(sem2, unc2)`` or
      ``(sem2, unc2, labels2)``, on the device of ``sem`` and of its dtype. ``unc2`` and ``labels2``
      are then not given apart, except for ``unc2="zero"`` where blocks bring no uncertainties.

    Columns are counted through all blocks. The result is the one of a single call, up to rounding;
    the columns that are drawn are the same. Values have no gradient then, and embeddings that ask
    for one are an error: search under ``torch.no_grad()``, and give what was found to
    `idml_fast.paired`.

    Args:
        sem, unc, unc2, metric, backend: as for `idml_fast.pairwise`.
        sem2: likewise, or blocks, see above; None compares the rows with themselves.
        k: how many columns, at least 1 and at most as many as there are (besides the row's own,
            with ``exclude_self``).
        labels, labels2, where: look only at columns with the ``"same"`` or a ``"different"`` label,
            of any integer dtype; ``labels2`` goes with ``sem2``.
        largest: whether a larger score is better; None takes what the metric means (the smallest
            distances, the largest cosines).
        exclude_self: leave out column i of row i, for rows compared with themselves.
        above: look only at scores above this number of each row.
        sample: draw the columns by their distance instead, without replacement; in the order in
            which they were drawn. For a metric of form ``"distance"``, with ``largest`` left None.
        seed: of the draws, >= 0; None takes it from PyTorch's generator, so that
            ``torch.manual_seed`` fixes it. A pair's random number depends on the seed, the row and
            the column alone, and on nothing else.
        progress: show a bar that counts columns; they are then taken in blocks.

    Returns:
        ``(values, columns)``, the best first; a tie goes to the smaller column, and a NaN comes
        before any number, so that none is overlooked: neither ``above`` nor ``sample`` leaves it
        out. Where a row has fewer than k columns to look at, the rest are +inf (-inf if the largest
        are wanted) and -1. Values are in the dtype of the inputs, under autocast in the autocast
        dtype; they are put in order before they are rounded to it. They are differentiable once,
        in all that `idml_fast.pairwise` is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.
        RuntimeError: no backend serves these tensors, or a second derivative is asked for.
        ImportError: ``progress`` without tqdm.

    >>> import torch, idml_fast
    >>> sem = torch.tensor([[0.0], [1.0], [3.0]])
    >>> idml_fast.nearest(sem, None, k=1, metric=Metric.plain(), exclude_self=True)[1]
    tensor([[1],
            [0],
            [1]])
    """
    sem, unc = autocast(sem, unc)
    handed_over = _blocks.are_handed_over(sem2)
    count = None  # of the columns, as far as that is known
    if handed_over:
        _checks.embeddings(sem, unc, None, None, metric)
        _checks.apart_from_blocks(unc2, labels2)
    else:
        sem2, unc2 = autocast(sem2, unc2)
        # An array is checked like a tensor of its shape.
        columns = {"sem2": sem2, "unc2": unc2, "labels2": labels2}
        columns = {name: _blocks.stand_in(name, x, sem) for name, x in columns.items()}
        _checks.pairs(sem, unc, columns["sem2"], columns["unc2"], metric)
        count = len(sem if sem2 is None else sem2)
    _checks.one_of("where", where, CONDITIONS)
    if where == "any":
        labels = labels2 = None
    else:
        _checks.labels("labels", labels, sem, "sem")
        if not handed_over:
            _checks.column_labels(columns["labels2"], columns["sem2"])
    if exclude_self and sem2 is not None:
        raise ValueError("exclude_self must be False with sem2: its columns are other items")
    if above is not None:
        _checks.vector("above", above, sem, "sem")
    if sample is not None or seed is not None:
        _checks.instance("sample", sample, DistanceWeighted, "an idml_fast.DistanceWeighted")
        _checks.draws(seed, largest, metric)
    _checks.integer("k", k, ">= 1", lambda k: k >= 1)
    if count is not None and len(sem):
        _checks.columns_for(k, count, exclude_self)
    in_blocks = progress or handed_over or any(map(_blocks.is_array, (sem2, unc2, labels2)))
    if in_blocks:
        own = {"sem": sem, "unc": unc, "sem2": sem2, "unc2": unc2}
        of_metric = {"metric.tau": metric.tau, "metric.gamma": metric.gamma}
        _checks.without_gradient(**own, **of_metric)
    asked = beyond_cuda({"sem": sem, "unc": unc}, metric)
    if in_blocks:
        asked.append("columns in blocks")
    else:
        asked += beyond_cuda({"sem2": sem2, "unc2": unc2}, metric)
    if sample is not None:
        asked.append("draws")
    served = backends.choose("nearest", sem, backend, asked)

    if handed_over:
        blocks = _blocks.checked(sem2, sem, unc, unc2, metric, where)
    elif not in_blocks:
        blocks = iter([_blocks.Block(sem2, unc2, labels2)])
    elif sem2 is None:
        blocks = _blocks.cut(sem, unc, labels, sem.device)
    else:
        blocks = _blocks.cut(sem2, unc2, labels2, sem.device)
    if largest is None:
        largest = metric.larger_is_closer
    if sample is not None:
        seed = torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)
    if served == "reference":
        sem2, unc2, labels2 = _blocks.joined(blocks)
        return reference.nearest(
            sem,
            unc,
            sem2,
            unc2,
            k=k,
            metric=metric,
            labels=labels,
            labels2=labels2,
            where=where,
            largest=largest,
            exclude_self=exclude_self,
            above=above,
            sample=sample,
            seed=seed,
        )
    weights = [] if sample is None else sample.weights(sem)
    options = labels, where, largest, exclude_self, above, weights, seed, k
    first, best = 0, (None, None, None)
    with _blocks.progress_bar(count) if progress else nullcontext() as bar:
        for block in blocks:
            arguments = *operands(sem, unc, block.sem2, block.unc2, metric), block.labels2, *options
            best = torch.ops.idml_fast.nearest(*arguments, first, *best, served)
            new = len(sem if block.sem2 is None else block.sem2)
            first += new
            if bar is not None:
                bar.update(new)
    if handed_over:
        _checks.columns_for(k, first, exclude_self)
    values, found, _ = best
    return values.to(sem.dtype), found


def _forward_fake(sem: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    k = others[-6]
    scores = sem.new_empty(sem.shape[0], k, dtype=torch.promote_types(sem.dtype, torch.float32))
    return scores, scores.new_empty(scores.shape, dtype=torch.int64), torch.empty_like(scores)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, columns, keys = output
    save(ctx, inputs, columns)
    ctx.mark_non_differentiable(columns, keys)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    arguments, (columns,), wanted = saved(ctx)
    none = [None] * len(ctx.needs_input_grad)
    if upstream is None:
        return tuple(none)
    rows = torch.arange(len(columns), device=columns.device).repeat_interleave(columns.shape[1])
    gradients = torch.ops.idml_fast.paired_backward(
        upstream.flatten(), *arguments, rows, columns.flatten(), ctx.backend, wanted=wanted
    )
    return *by_operand(gradients, wanted), *none[8:]


# The operation takes a block of columns, after `first` others whose best it has returned (None for
# the first block): scores and keys in float32 (float64 for float64) and columns, [N, k] each.
# What decides is the key: the score, its negative, or that of a draw. `weights` are the width, the
# cutoff and the bound of the draws; none if nothing is drawn.
define(
    "nearest",
    f"({OPERANDS}, Tensor? labels2, Tensor? labels, str where, bool largest, bool exclude_self, "
    "Tensor? above, float[] weights, Tensor? seed, int k, "
    "int first, Tensor? best_scores, Tensor? best_columns, Tensor? best_keys, str backend)"
    " -> (Tensor scores, Tensor columns, Tensor keys)",
    fake=_forward_fake,
    save=_save,
    backward=_backward,
)
