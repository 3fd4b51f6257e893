"""`MemoryBank`: what it remembers, and that it comes back from a checkpoint."""

import pytest
import torch
from conftest import draw
from safetensors.torch import load_file, save_file

from idml_fast import MemoryBank, Metric, losses


def items(n, first=0):
    """Items that are numbered: sem, unc and labels."""
    number = torch.arange(first, first + n)
    return number[:, None] + torch.zeros(n, 2), -number[:, None] + torch.zeros(n, 3), number


def remembered(bank):
    """The numbers of the items in the bank, and that their parts belong together."""
    sem, unc, labels = bank.columns
    assert sem.shape == (len(bank), 2)
    assert unc.shape == (len(bank), 3)
    assert torch.equal(sem, labels[:, None] + torch.zeros_like(sem))
    assert torch.equal(unc, -labels[:, None] + torch.zeros_like(unc))
    return sorted(labels.tolist())


@pytest.mark.parametrize(
    "batches", [[3], [3, 4], [5, 5], [4, 4, 4], [7, 0, 2, 10, 1], [23, 1], [25]]
)
def test_the_last_items_are_remembered(batches):
    bank, added = MemoryBank(10, 2, 3), 0
    for n in batches:
        bank.add(*items(n, added))
        added += n
        assert remembered(bank) == list(range(max(0, added - 10), added))
        assert len(bank) == min(added, 10)


def test_an_empty_bank_gives_no_columns():
    sem, unc, labels = MemoryBank(10, 2, 3).columns
    assert (sem.shape, unc.shape, labels.shape) == ((0, 2), (0, 3), (0,))


def test_columns_are_views_without_a_gradient():
    bank = MemoryBank(10, 2, 3)
    sem, unc, labels = items(4)
    bank.add(sem.requires_grad_(), unc.requires_grad_(), labels)
    for column, buffer in zip(bank.columns, bank.buffers(), strict=True):
        assert not column.requires_grad
        assert column.data_ptr() == buffer.data_ptr()


def test_clear():
    bank = MemoryBank(10, 2, 3)
    bank.add(*items(12))
    bank.clear()
    assert len(bank) == 0
    bank.add(*items(3, 50))
    assert remembered(bank) == [50, 51, 52]


def test_without_uncertainties():
    bank = MemoryBank(10, 2)
    sem, unc, labels = items(4)
    bank.add(sem, None, labels)
    bank.add(sem, unc, labels)
    assert bank.columns[1] is None
    value = losses.ContrastiveLoss(metric=Metric.plain())(sem, None, labels, *bank.columns)
    assert value.isfinite()


def test_dtypes_are_those_of_the_bank():
    bank = MemoryBank(10, 2, 3, dtype=torch.float64)
    sem, unc, labels = items(4)
    bank.add(sem, unc.bfloat16(), labels.int())
    assert [x.dtype for x in bank.columns] == [torch.float64, torch.float64, torch.int64]


@pytest.mark.parametrize("added", [4, 10, 13])
@pytest.mark.parametrize("way", ["state_dict", "torch", "safetensors"])
def test_it_comes_back_from_a_checkpoint(added, way, tmp_path):
    bank = MemoryBank(10, 2, 3)
    bank.add(*items(added))
    state, path = bank.state_dict(), tmp_path / "bank"
    if way == "torch":
        torch.save(state, path)
        state = torch.load(path, weights_only=True)
    elif way == "safetensors":
        save_file(state, path)
        state = load_file(path)
    again = MemoryBank(10, 2, 3)
    again.load_state_dict(state)
    for numbers in (items(3, added), items(9, added + 3)):
        assert remembered(again) == remembered(bank)
        assert all(torch.equal(x, y) for x, y in zip(again.columns, bank.columns, strict=True))
        bank.add(*numbers)
        again.add(*numbers)
    assert remembered(again) == remembered(bank)


def test_a_bank_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        MemoryBank(9, 2, 3).load_state_dict(MemoryBank(10, 2, 3).state_dict())


def test_it_moves_with_its_module():
    bank = MemoryBank(10, 2, 3)
    bank.add(*items(4))
    bank.to(torch.float64)
    assert remembered(bank) == [0, 1, 2, 3]
    assert bank.to("meta").columns[0].device.type == "meta"


def test_adding_before_the_backward_is_an_error_not_a_wrong_gradient():
    """The columns are needed for the gradient; PyTorch says that they have changed."""
    bank, loss = MemoryBank(10, 8, 3), losses.MultiSimilarityLoss()
    drawn = draw(4, None, 8, 3, dtype=torch.float32)
    sem, unc = drawn["sem"].requires_grad_(), drawn["unc"]
    labels = torch.tensor([0, 1, 0, 1])
    bank.add(sem, unc, labels)
    value = loss(sem, unc, labels, *bank.columns)
    bank.add(sem, unc, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_print_shows_how_full_it_is():
    bank = MemoryBank(10, 2, 3)
    bank.add(*items(4))
    assert repr(bank) == "MemoryBank(10, 2, 3, filled=4)"
