"""Protocols that show the same images in every chunk, with other labels or other pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_benchmarks.images import ImageData, check_least
from cl_benchmarks.protocol import Chunk, Protocol, generator, whole_test_set
from dynmoe.errors import UserError


def _check_images(images: int, data: ImageData, chunks: int) -> None:
    """Refuse more images than there are, and less than one chunk."""
    available = len(data.train_labels)
    if images > available:
        raise UserError(
            f"protocol images {images} is more than the {available} training images of "
            f"{data.name}; use --protocol.images {available} or fewer"
        )
    if chunks < 1:
        raise UserError(f"{chunks} chunks are too few; use --chunks 1 or more")


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
        check_least("protocol", config, images=1, classes=2)
        super().__init__(config)

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Chunks with the same indices and independent labels, uniform per image."""
        _check_images(self.config.images, data, chunks)
        train = self._subset(len(data.train_labels), seed, "train")
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

    def keeps_labels(self) -> bool:
        """An image has another label in each chunk."""
        return False

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
        check_least("protocol", config, images=0)
        super().__init__(config)

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Chunks with the same images and independent orders of pixels."""
        available, wanted = len(data.train_labels), self.config.images
        _check_images(wanted, data, chunks)
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

    def no_cumulative(self) -> str | None:
        """A chunk has one order of pixels."""
        return (
            "access cumulative with protocol permuted would give an image several orders of its "
            "pixels; use --access limited"
        )
