"""The same images again and again, with labels that mean nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol, generator
from dynmoe.errors import UserError


class Shuffle(
    Protocol,
    name="shuffle",
    source="after Lyle et al. 2023 (arXiv 2303.01486) and Kumar et al. 2023 (arXiv 2308.11958)",
):
    """A fixed set of images whose labels are drawn anew in every chunk: pure memorisation.

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
