"""Chunks of classes that end when nobody expects it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol, generator
from cl_benchmarks.protocols.class_ import ClassChunks
from dynmoe.errors import UserError


class Unknown(Protocol, name="unknown"):
    """The class chunks, each cut to a random share of its images: no schedule can be aligned.

    The share is uniform between `least` and 1, from the seed and the chunk's number, so tasks take
    different numbers of steps, and triggers that go by the clock (`every`, `at`) meet boundaries by
    chance only. The trigger `task` is still told of them. Test images are all of the chunk's.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the unknown protocol."""

        least: float = 0.25
        """smallest share of a chunk's images that is kept"""
        head: Literal["shared", "full"] = "shared"
        """as in protocol class"""

    def __init__(self, config: Config) -> None:
        if not 0 < config.least <= 1:
            raise UserError(f"protocol least {config.least} must be above 0 and at most 1")
        self.config = config
        self.classes: ClassChunks = ClassChunks.Config(head=config.head).build()

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """The class chunks of the seed, shortened; images in order of their index."""
        parts = []
        for k, part in enumerate(self.classes.split(data, chunks, seed)):
            rng, total = generator(seed, "unknown", k), len(part.train_index)
            count = max(1, round(rng.uniform(self.config.least, 1) * total))
            keep = torch.from_numpy(rng.permutation(total)[:count]).sort().values
            parts.append(
                Chunk(
                    part.train_index[keep], part.train_labels[keep],
                    part.test_index, part.test_labels,
                )
            )  # fmt: skip
        return parts

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """As protocol class."""
        return self.classes.num_outputs(data, chunks)

    def no_cumulative(self) -> str | None:
        """As protocol class."""
        reason = self.classes.no_cumulative()
        return reason.replace("protocol class", "protocol unknown") if reason else None
