"""`MemoryBank`: the embeddings of earlier batches, as columns for any loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks


class MemoryBank(nn.Module):
    """The last ``size`` items of earlier batches (a cross-batch memory), on the device.

    A loss takes them as columns, so that each row is compared with many more items than a batch
    holds; they have no gradient. In a training loop::

        value = loss(sem, unc, labels) + loss(sem, unc, labels, *bank.columns)
        value.backward()
        bank.add(sem, unc, labels)

    Memory is ``size`` rows of each embedding from the start; adding overwrites the oldest rows in
    place, so add after the backward. Buffers and the number of rows that are filled are part of
    ``state_dict()``.

    Args:
        size: how many items to remember, at least 1.
        sem_dim: Ds, the width of the semantic embedding.
        unc_dim: Du, the width of the uncertainty embedding; None: the bank keeps none, for metrics
            that do not read it.
        dtype, device: of the embeddings; as for any module, ``bank.to(...)`` moves it.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what would.

    Source: Wang et al., *Cross-Batch Memory for Embedding Learning*, CVPR 2020.

    >>> import torch, idml_fast
    >>> bank, loss = MemoryBank(100, 8, 2), idml_fast.losses.ContrastiveLoss()
    >>> sem, unc, labels = torch.randn(4, 8), torch.randn(4, 2), torch.tensor([0, 2, 2, 0])
    >>> bank.add(sem, unc, labels)
    >>> len(bank), loss(sem, unc, labels, *bank.columns).shape
    (4, torch.Size([]))
    """

    def __init__(
        self,
        size: int,
        sem_dim: int,
        unc_dim: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"size": size, "sem_dim": sem_dim, "unc_dim": 1 if unc_dim is None else unc_dim}
        for name, value in sizes.items():
            _checks.integer(name, value, ">= 1", lambda value: value >= 1)
        kind = {"dtype": dtype, "device": device}
        self.register_buffer("sem", torch.zeros(size, sem_dim, **kind))
        self.register_buffer("unc", None if unc_dim is None else torch.zeros(size, unc_dim, **kind))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64, device=device))
        self._added = 0  # on the host: to read it from the device would be a synchronisation

    @property
    def columns(self) -> tuple[Tensor, Tensor | None, Tensor]:  # [M, Ds], [M, Du], [M]
        """``(sem2, unc2, labels2)`` of the items in the bank: views, none of them a copy."""
        filled = len(self)
        return (
            self.sem[:filled],
            None if self.unc is None else self.unc[:filled],
            self.labels[:filled],
        )

    @torch.no_grad()
    def add(
        self,
        sem: Tensor,  # [N, Ds]
        unc: Tensor | None,  # [N, Du]
        labels: Tensor,  # [N]
    ) -> None:
        """Remember these items, in the place of the oldest; of more than ``size`` the last ones.

        They are kept in the bank's own dtypes, whatever autocast has made of them.

        Raises:
            TypeError, ValueError: shapes, dtypes of the labels, or devices do not fit the bank.
        """
        _checks.remembered(sem, unc, labels, self.sem, self.unc)
        size = len(self.sem)
        added = min(len(sem), size)
        self._added += len(sem) - added
        place = torch.arange(self._added, self._added + added, device=self.sem.device) % size
        self.sem[place] = sem[len(sem) - added :].to(self.sem.dtype)
        self.labels[place] = labels[len(sem) - added :].to(torch.int64)
        if self.unc is not None:
            self.unc[place] = unc[len(sem) - added :].to(self.unc.dtype)
        self._added += added

    def clear(self) -> None:
        """Forget all items."""
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, len(self.sem))

    def get_extra_state(self) -> Tensor:
        """How many items were ever added; a tensor, as safetensors wants it."""
        return torch.tensor(self._added)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes back what `get_extra_state` gave."""
        self._added = int(state)

    def extra_repr(self) -> str:
        """The sizes that `print` shows."""
        unc_dim = None if self.unc is None else self.unc.shape[1]
        return f"{len(self.sem)}, {self.sem.shape[1]}, {unc_dim}, filled={len(self)}"
