"""The same images with their pixels in another order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol, generator, whole_test_set
from dynmoe.errors import UserError


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
