"""The images of a run: those of a data set on disk, or the digits, and the damage done to these."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, TensorDataset

from ..evaluation import CORRUPTIONS
from .config import DataConfig
from .datasets import DataError, Listing, read
from .images import Images
from .processes import Processes

HELD_OUT = 0.25  # of the images of each class, if all classes are learned
SAMPLED = 1000  # test images that are damaged to see what becomes of them: two dozen times each


@dataclass(frozen=True, eq=False)
class Data:
    """Images and their labels: to learn from, and to be judged by.

    An item of ``train``, ``test`` and ``gallery`` begins with an image, ``[channels, height,
    width]`` float32 in [0, 1], in ``train`` perhaps as bytes (see `to_float`), and its label.

    Args:
        train: what is learned; its labels are 0 .. ``num_classes`` - 1.
        train_labels: ``[N]`` int64.
        num_classes: how many classes are learned.
        test: what is retrieved, or classified.
        test_labels: ``[M]`` int64, as the data set counts them.
        gallery: where ``test`` is looked for; None: among the other images of ``test``.
        gallery_labels: ``[G]`` int64, counted like ``test_labels``.
        sampled: ``[K]`` int64, in order: the places of those images of ``test`` that are also
            judged when damaged: all, or `SAMPLED` that are drawn by the seed.
        classes: names of the classes of ``test_labels``; None: their numbers.
        unseen: whether none of the classes of ``test`` is learned.
        remarks: sentences about the data set that whoever reads the results should know.
    """

    train: Dataset
    train_labels: Tensor
    num_classes: int
    test: Dataset
    test_labels: Tensor
    gallery: Dataset | None
    gallery_labels: Tensor | None
    sampled: Tensor
    classes: tuple[str, ...] | None = None
    unseen: bool = True
    remarks: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.test[0][0].shape)

    def names(self, labels: Tensor) -> list[str]:
        """What the classes of these labels of ``test`` or ``gallery`` are called."""
        numbers = labels.tolist()
        return [str(x) if self.classes is None else self.classes[x] for x in numbers]


def load_data(config: DataConfig, seed: int = 0) -> Data:
    """The data set of that name.

    Args:
        config: which one, and where it is.
        seed: draws what is left to chance: of the digits which are held out and which are damaged,
            of image files which are looked at when damaged.

    Raises:
        DataError: the image files are not as they should be.
    """
    return digits(config, seed) if config.name == "digits" else files(config, seed)


def digits(config: DataConfig, seed: int) -> Data:
    """scikit-learn's handwritten digits; they come with it, so nothing is downloaded.

    For retrieval they are split zero-shot: no class is on both sides. For classification all
    classes are, and the seed chooses which of their images are held out. It also chooses which
    training images are damaged, if the configuration says that some are.
    """
    found = load_digits()
    images = torch.from_numpy(found.images).float().div(16)[:, None]  # sixteen grey levels
    labels = torch.from_numpy(found.target).long()
    retrieving = config.task == "retrieval"
    if retrieving:
        classes = torch.tensor(sorted(set(config.train_classes)))
        train = torch.isin(labels, classes)
        test = torch.isin(labels, torch.tensor(config.test_classes))
    else:
        train, test = train_test_split(
            torch.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed
        )
        classes = labels.unique()
    learned = torch.searchsorted(classes, labels[train])
    learned_from = TensorDataset(*damaged(images[train], learned, config, seed))
    return Data(
        learned_from,
        learned_from.tensors[1],
        len(classes),
        TensorDataset(images[test], labels[test]),
        labels[test],
        gallery=None,
        gallery_labels=None,
        sampled=sample(len(labels[test]), seed),
        unseen=retrieving,
    )


def files(config: DataConfig, seed: int) -> Data:
    """A data set of image files, which are read when they are needed."""
    from .vision import transforms  # torchvision, which the digits do not need

    try:
        splits = read(config.name, config.root, source=config.source, target=config.target)
    except DataError:
        raise
    except ValueError as error:  # it says which argument, as its own setting is called
        raise DataError(f"data.{error}") from None
    varied, plain = transforms(config.resize, config.image_size)

    def judged(listing: Listing) -> tuple[Images, Tensor]:
        return Images(splits.root, listing, plain), torch.from_numpy(listing.labels)

    return Data(
        Images(splits.root, splits.train, varied),
        torch.from_numpy(splits.train.labels),
        splits.train.count.classes,
        *judged(splits.test),
        *((None, None) if splits.gallery is None else judged(splits.gallery)),
        sampled=sample(len(splits.test), seed),
        classes=splits.test.classes,
        unseen=not set(splits.train.classes) & set(splits.test.classes),
        remarks=splits.remarks,
    )


def sample(count: int, seed: int) -> Tensor:  # [K]
    """The places of all, or of `SAMPLED` of them, in order."""
    if count <= SAMPLED:
        return torch.arange(count)
    drawn = np.random.default_rng(seed).choice(count, SAMPLED, replace=False)
    return torch.from_numpy(np.sort(drawn))


class BatchSampler(Sampler[list[int]]):
    """Which images each batch of an epoch is made of: all of them, in an order that is drawn anew.

    Of several processes each gets its share of every batch.

    Args:
        labels: ``[N]``, of the images.
        config: how large a batch is, and whether it is made of images of a class at a time.
        order: draws the order at the beginning of every epoch.
        processes: whose shares these are; None: there is one.

    Attributes:
        done: how many batches of the next epoch to leave out; 0 again once it has begun.
    """

    def __init__(
        self,
        labels: Tensor,
        config: DataConfig,
        order: torch.Generator,
        processes: Processes | None = None,
    ) -> None:
        self.labels, self.order, self.processes = labels, order, processes
        self.size, self.per_class = config.batch_size, config.per_class
        counts = labels.unique(return_counts=True)[1]
        groups = -(-counts // (self.per_class or 1))
        self.total = int(groups.sum()) * (self.per_class or 1)
        self.done = 0

    def __len__(self) -> int:
        """Of a whole epoch."""
        return -(-self.total // self.size)

    def size_of(self, batch: int) -> int:
        """How many images all processes together have in that batch of an epoch."""
        return min(self.size, self.total - batch * self.size)

    def __iter__(self) -> Iterator[list[int]]:
        # As a DataLoader draws that shuffles by itself, a seed of its workers first: results that
        # were recorded with one keep their order of images.
        torch.empty((), dtype=torch.int64).random_(generator=self.order)
        drawn = torch.tensor(list(RandomSampler(self.labels, generator=self.order)))
        done, self.done = self.done, 0
        for batch in self._grouped(drawn).split(self.size)[done:]:
            yield (batch if self.processes is None else self.processes.of(batch)).tolist()

    def _grouped(
        self,
        drawn: Tensor,  # [N], the images in an order
    ) -> Tensor:  # [total]
        """Groups of one class in an order that is drawn, filled up with others of their class."""
        if not self.per_class:
            return drawn
        by_class = drawn[self.labels[drawn].argsort(stable=True)]
        counts = self.labels.unique(return_counts=True)[1]
        filled = [
            members[
                torch.arange(-(-len(members) // self.per_class) * self.per_class) % len(members)
            ]
            for members in by_class.split(counts.tolist())
        ]
        groups = torch.cat(filled).view(-1, self.per_class)
        return groups[torch.randperm(len(groups), generator=self.order)].flatten()


def loader(
    images: Dataset, config: DataConfig, *, persistent: bool = False, **options
) -> DataLoader:
    """Batches of images, read by as many processes as the configuration says.

    Args:
        images: what is in memory needs no processes.
        persistent: the processes stay for the next epoch.
        options: of the ``DataLoader``.
    """
    workers = config.workers if isinstance(images, Images) else 0
    return DataLoader(
        images,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own: no other random numbers are taken
        worker_init_fn=leave_interrupts,
        **options,
    )


def leave_interrupts(_: int) -> None:
    """In a process that reads images: Ctrl-C reaches all processes, but it is the trainer's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(images: Dataset, config: DataConfig, places: Tensor | None = None) -> Iterator[Tensor]:
    """The images alone, in order: all, or those at these places."""
    chosen = None if places is None else places.tolist()
    for batch, *_ in loader(images, config, batch_size=config.batch_size, sampler=chosen):
        yield batch


def in_memory(images: Dataset, config: DataConfig, places: Tensor) -> Tensor:
    """``[K, channels, height, width]``: the images at these places."""
    return torch.cat(list(batches(images, config, places)))


def damaged(
    images: Tensor,  # [N, channels, height, width]
    labels: Tensor,  # [N] int64, 0 .. number of classes - 1
    config: DataConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Copies of the images and labels with ``config``'s shares of them damaged.

    Mixed first, by the true labels, then blurred; an image may meet with more than one damage. Each
    kind has its own random numbers: none changes which images another one takes.
    """
    images, labels, truth = images.clone(), labels.clone(), labels.numpy()
    shares = config.mixed, config.blurred, config.label_noise
    draws = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)]
    mixed, blurred, relabelled = (
        torch.from_numpy(draw.permutation(len(truth))[: round(share * len(truth))])
        for share, draw in zip(shares, draws, strict=True)
    )
    others = [draws[0].choice(np.flatnonzero(truth != truth[i])) for i in mixed]
    images[mixed] = (images[mixed] + images[others]) / 2  # the right side is all still undamaged
    for severity, chosen in enumerate(blurred.tensor_split(5), start=1):
        images[chosen] = CORRUPTIONS["blur"](images[chosen], severity)
    # A step of 1 .. C - 1 around the circle of the classes: every other one is as likely.
    count = labels.unique().numel()
    steps = draws[2].integers(1, count, len(relabelled))
    labels[relabelled] = (labels[relabelled] + torch.from_numpy(steps)) % count
    return images, labels
