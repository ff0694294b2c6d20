"""Protocols that split a data set: by class, at random, with new labels or pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import (
    Chunk,
    Protocol,
    balanced_parts,
    check_divides,
    generator,
    whole_test_set,
)
from dynmoe.errors import UserError


class ClassChunks(Protocol, name="class"):
    """New classes in every chunk, in an order drawn from the seed; test on the same classes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the class protocol."""

        head: Literal["shared", "full"] = "shared"
        """shared: every chunk labels its c classes 0 .. c-1 for one head of c outputs (pure
        plasticity: old classes are overwritten). full: one output for each class of the data"""

    def __init__(self, config: Config) -> None:
        self.config = config

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Disjoint sets of equally many classes; images in order of their index."""
        check_divides(chunks, data.num_classes, "classes")
        order = generator(seed, "class").permutation(data.num_classes)
        return [
            Chunk(
                *self._select(data.train_labels, classes), *self._select(data.test_labels, classes)
            )
            for classes in torch.from_numpy(order).chunk(chunks)
        ]

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """Classes of one chunk (shared) or of the data (full)."""
        return data.num_classes // chunks if self.config.head == "shared" else data.num_classes

    def no_cumulative(self) -> str | None:
        """With the shared head, output 0 would stand for one class of every chunk."""
        if self.config.head == "full":
            return None
        return (
            "access cumulative with protocol class and head shared gives the same label to "
            "different classes; use --protocol.head full or --access limited"
        )

    def _select(self, labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Index and labels of the images of some classes."""
        index = torch.isin(labels, classes).nonzero().squeeze(1)
        if self.config.head == "full":
            return index, labels[index]
        position = torch.zeros(int(max(labels.max(), classes.max())) + 1, dtype=torch.int64)
        position[classes] = torch.arange(len(classes))
        return index, position[labels[index]]


class Iid(Protocol, name="iid", source="after Lee et al. 2024 (arXiv 2406.02596)"):
    """Equal random parts of the training set, each with all classes; test on the whole test set.

    With 10 chunks the reading nearest to DynamicMoE (2511.18987), after FIRE (2602.08040) and
    Hare & Tortoise (2406.02596). Clean data of this kind shows little loss of plasticity.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """The protocol has no options."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Parts of equal size; counts of a class in two parts differ by one at most."""
        check_divides(chunks, len(data.train_labels), "training images")
        parts = balanced_parts(data.train_labels, chunks, generator(seed, "iid"))
        test = whole_test_set(data)
        return [Chunk(index, data.train_labels[index], *test) for index in parts]

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """All classes."""
        return data.num_classes

    def no_cumulative(self) -> str | None:
        """Chunks may be joined."""
        return None


class Shuffle(
    Protocol,
    name="shuffle",
    source="after Lyle et al. 2023 (arXiv 2303.01486) and Kumar et al. 2023 (arXiv 2308.11958)",
):
    """A fixed set of images whose labels are resampled in every chunk: pure memorisation.

    After the random-label tasks of Lyle et al. (2303.01486) and Kumar et al. (2308.11958), the
    stream that shows loss of plasticity soonest. Test labels are random too, so test accuracy is at
    chance, 1 / classes, by construction: only training accuracy means something.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the shuffle protocol."""

        images: int = 1000
        """training images, drawn once from all of them; also the most test images used"""
        classes: int = 10
        """labels to draw from; has nothing to do with the images' own classes"""

    def __init__(self, config: Config) -> None:
        if config.images < 1:
            raise UserError(f"protocol images {config.images} is too small; use 1 or more")
        if config.classes < 2:
            raise UserError(f"protocol classes {config.classes} is too small; use 2 or more")
        self.config = config

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Chunks with the same indices and independent labels, uniform per image."""
        available = len(data.train_labels)
        if self.config.images > available:
            raise UserError(
                f"protocol images {self.config.images} is more than the {available} training "
                f"images of {data.name}; use --protocol.images {available} or fewer"
            )
        if chunks < 1:
            raise UserError(f"{chunks} chunks are too few; use --chunks 1 or more")
        train = self._subset(available, seed, "train")
        test = self._subset(len(data.test_labels), seed, "test")
        return [
            Chunk(
                train, self._labels(len(train), seed, "train", k),
                test, self._labels(len(test), seed, "test", k),
            )
            for k in range(chunks)
        ]  # fmt: skip

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """The labels there are to draw from."""
        return self.config.classes

    def no_cumulative(self) -> str | None:
        """An image has another label in each chunk."""
        return (
            "access cumulative with protocol shuffle gives every image several labels; "
            "use --access limited"
        )

    def _subset(self, available: int, seed: int, split: str) -> Tensor:
        order = generator(seed, "shuffle", split).permutation(available)
        return torch.from_numpy(order[: self.config.images])

    def _labels(self, count: int, seed: int, split: str, chunk: int) -> Tensor:
        rng = generator(seed, "shuffle", split, chunk)
        return torch.from_numpy(rng.integers(self.config.classes, size=count))


class Permuted(
    Protocol,
    name="permuted",
    source="Dohare et al. 2024 (Nature 632), online permuted MNIST; Kumar et al. 2023 "
    "(arXiv 2308.11958)",
):
    """A fixed set of images whose pixels get a new random order in every chunk; labels stay.

    The order is one for all images of a chunk, its whole test set included, and for all channels;
    the first chunk has one, too. Meant for --network mlp: a convolution finds nothing in it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the permuted protocol."""

        images: int = 1000
        """training images, drawn once from all of them; 0 for all"""

    def __init__(self, config: Config) -> None:
        if config.images < 0:
            raise UserError(f"protocol images {config.images} is too small; use 0 or more")
        self.config = config

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Chunks with the same images and independent orders of pixels."""
        available, wanted = len(data.train_labels), self.config.images
        if wanted > available:
            raise UserError(
                f"protocol images {wanted} is more than the {available} training images of "
                f"{data.name}; use --protocol.images {available} or fewer"
            )
        if chunks < 1:
            raise UserError(f"{chunks} chunks are too few; use --chunks 1 or more")
        order = generator(seed, "permuted", "images").permutation(available)
        index = torch.from_numpy(order[: wanted or available])
        labels, test = data.train_labels[index], whole_test_set(data)
        size = data.train_images[0, 0].numel()
        return [
            Chunk(
                index, labels, *test,
                torch.from_numpy(generator(seed, "permuted", k).permutation(size)),
            )
            for k in range(chunks)
        ]  # fmt: skip

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """All classes."""
        return data.num_classes

    def no_cumulative(self) -> str | None:
        """A chunk has one order of pixels."""
        return (
            "access cumulative with protocol permuted would give an image several orders of its "
            "pixels; use --access limited"
        )
