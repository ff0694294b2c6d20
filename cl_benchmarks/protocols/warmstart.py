"""A little data first, then all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import (
    Chunk,
    Protocol,
    balanced_subset,
    generator,
    whole_test_set,
)
from dynmoe.errors import UserError


class WarmStart(
    Protocol,
    name="warmstart",
    source="Ash & Adams 2020 (arXiv 1910.08475); Lee et al. 2024 (arXiv 2406.02596)",
):
    """A small part of the data with wrong labels first, then all data clean: does it generalise?

    The gap to a network that begins with all data (`--compare fresh`) in the last task's test
    accuracy is the cost of a warm start. The default is Hare & Tortoise's: 10 % with half of the
    labels random. Ash & Adams: --protocol.share 0.5 --protocol.noise 0. Chunks after the second
    hold all data again.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the warm start."""

        share: float = 0.1
        """of the training images that the first chunk has, classes in turn"""
        noise: float = 0.5
        """share of the first chunk's labels drawn anew; a drawn label may be the right one"""

    def __init__(self, config: Config) -> None:
        if not 0 < config.share <= 1:
            raise UserError(f"protocol share {config.share} must be above 0 and at most 1")
        if not 0 <= config.noise <= 1:
            raise UserError(f"protocol noise {config.noise} must lie in 0 .. 1")
        self.config = config

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """The small part, then all data as often as there are chunks left."""
        if chunks < 2:
            raise UserError(f"{chunks} chunks are too few for a warm start; use --chunks 2 or more")
        rng, total = generator(seed, "warmstart"), len(data.train_labels)
        first = balanced_subset(data.train_labels, max(1, round(self.config.share * total)), rng)
        labels = data.train_labels[first].clone()
        hit = torch.from_numpy(rng.permutation(len(first))[: round(self.config.noise * len(first))])
        labels[hit] = torch.from_numpy(rng.integers(data.num_classes, size=len(hit)))
        test = whole_test_set(data)
        whole = Chunk(torch.arange(total), data.train_labels, *test)
        return [Chunk(first, labels, *test)] + [whole] * (chunks - 1)

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """All classes."""
        return data.num_classes

    def no_cumulative(self) -> str | None:
        """Later chunks have all images already, with other labels than the first one."""
        return "protocol warmstart is cumulative as it is; use --access limited"
