"""Which columns have a row's label: the pairs that a loss has to list."""

from __future__ import annotations

import torch
from torch import Tensor


def positive_columns(
    labels: Tensor,  # [N]
    labels2: Tensor | None,  # [M]; None: the rows against themselves
) -> Tensor:  # [N, K]
    """The columns with the label of each row, in their order, -1 behind the last.

    Equals the columns of the nonzero elements of ``labels[:, None] == labels2``, without that
    matrix: K is the largest number of columns that a row has, itself left out.
    """
    itself = labels2 is None
    columns, order = (labels if itself else labels2).long().sort(stable=True)
    first = torch.searchsorted(columns, labels.long())
    count = torch.searchsorted(columns, labels.long(), right=True) - first - int(itself)
    most = int(count.max()) if len(labels) and len(columns) else 0
    rank = torch.arange(most, device=labels.device)
    place = first[:, None] + rank
    if itself:  # step over the row's own place
        place = place + (place >= order.argsort()[:, None])
    found = order[place.clamp_max(len(columns) - 1)]
    return found.masked_fill(rank >= count[:, None], -1)


def listed(table: Tensor) -> tuple[Tensor, Tensor]:  # [N, K] -> [T], [T]
    """The pairs ``(rows, cols)`` of a table of columns, row by row."""
    there = table >= 0
    rows = torch.arange(len(table), device=table.device)[:, None].expand(table.shape)
    return rows[there], table[there]
