"""Which images a batch is made of, and in how many parts it goes through the network."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="the extra idml_fast[train] is not installed")

from idml_fast.train import Config, TwoHeaded
from idml_fast.train.config import DataConfig, ModelConfig
from idml_fast.train.data import BatchSampler

# Classes of 1, 2, 3, ... images, in no order.
LABELS = torch.arange(9).repeat_interleave(torch.arange(1, 10))[torch.randperm(45)]


def epochs(config: DataConfig, count: int = 2, seed: int = 0) -> list[list[list[int]]]:
    batches = BatchSampler(LABELS, config, torch.Generator().manual_seed(seed))
    return [list(batches) for _ in range(count)]


def test_shuffled_every_image_is_seen_once_an_epoch():
    first, second = epochs(DataConfig(batch_size=7))
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [7] * 6 + [3]
        assert sorted(chain(*epoch)) == list(range(45))
    assert first != second
    assert epochs(DataConfig(batch_size=7)) == [first, second]
    assert epochs(DataConfig(batch_size=7), seed=1) != [first, second]


@pytest.mark.parametrize("per_class", [2, 3, 4])
def test_groups_are_of_one_class(per_class):
    config = DataConfig(batch_size=2 * per_class, per_class=per_class)
    first, second = epochs(config)
    batches = BatchSampler(LABELS, config, torch.Generator())
    needed = {label: -(-(label + 1) // per_class) * per_class for label in range(9)}
    for epoch in (first, second):
        assert len(epoch) == len(batches)
        assert [len(batch) for batch in epoch] == [batches.size_of(k) for k in range(len(epoch))]
        order = torch.tensor(list(chain(*epoch)))
        assert Counter(LABELS[order].tolist()) == needed
        for group in order.split(per_class):
            assert len(LABELS[group].unique()) == 1
            # An image is there twice in a group only if the class has too few.
            assert len(group.unique()) == min(per_class, int(LABELS[group[0]]) + 1)
        counts = order.bincount(minlength=45)
        assert counts.min() == 1
        # What fills a class up is shared out among its images.
        assert (counts - counts.min())[per_class <= LABELS].max() <= 1
    assert first != second


def test_batches_that_are_done_are_left_out_once():
    batches = BatchSampler(LABELS, DataConfig(batch_size=7), torch.Generator().manual_seed(0))
    first, second = epochs(DataConfig(batch_size=7))
    batches.done = 5
    assert list(batches) == first[5:]
    assert list(batches) == second


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"per_class": -4}, "data.per_class must be >= 0, got -4"),
        (
            {"per_class": 7},
            "data.batch_size must be a multiple of data.per_class 7, got 120",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Config(data=DataConfig(**setting))


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_parts_have_the_gradient_of_the_batch(parts):
    torch.manual_seed(0)
    model = TwoHeaded(ModelConfig(width=4, sem_dim=6, unc_dim=3), 1, (8, 8)).double().train()
    images, wanted = torch.rand(11, 1, 8, 8).double(), torch.rand(11, 6).double()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        sem, unc = model(images)
        # Of all pairs: it is no sum over parts of the batch.
        ((sem @ sem.T).exp().sum().log() + F.mse_loss(sem, wanted) + unc.pow(2).sum()).backward()
        return [x.grad.clone() for x in model.parameters()]

    whole = gradients()
    seen = []
    model.trunk.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    model.parts = parts
    for x, y in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    # Each part once, and once more for the gradient.
    assert seen[: len(seen) // 2] == [len(part) for part in images.chunk(parts)]
    assert sum(seen) == 22
    with torch.no_grad():
        model(images)
    assert sum(seen) == 33
    assert seen[-1] == 11  # nothing is to be kept: there are no parts
