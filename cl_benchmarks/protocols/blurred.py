"""Chunks of classes that run into each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol, generator
from cl_benchmarks.protocols.class_ import ClassChunks
from dynmoe.errors import UserError


class Blurred(Protocol, name="blurred"):
    """The class chunks with blurred boundaries: neighbours exchange images near them.

    The images of each class chunk stand in random order. At the boundary of two chunks, the i-th
    image before it changes places with the i-th after it with a probability that falls linearly
    from 1/2 at the boundary to 0 at half the width. Every image occurs once, and chunks keep their
    sizes; about width / 8 of a chunk is exchanged at each boundary. A chunk is shuffled anew in
    each epoch, so what the learner meets is a mixture, not the moment. Test images are those of the
    chunk's own classes.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the blurred protocol."""

        width: float = 1.0
        """of the blurred zone around a boundary, in chunks: half of it lies on either side"""
        head: Literal["shared", "full"] = "shared"
        """as in protocol class; with the shared head an image keeps its label in the other chunk"""

    def __init__(self, config: Config) -> None:
        if not 0 <= config.width <= 1:
            raise UserError(f"protocol width {config.width} must lie in 0 .. 1")
        self.config = config
        self.classes: ClassChunks = ClassChunks.Config(head=config.head).build()

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """The class chunks of the seed, with images exchanged."""
        parts = self.classes.split(data, chunks, seed)
        index, labels = [], []
        for k, part in enumerate(parts):
            rng = generator(seed, "blurred", k)
            order = torch.from_numpy(rng.permutation(len(part.train_index)))
            index.append(part.train_index[order])
            labels.append(part.train_labels[order])
        for k in range(chunks - 1):
            half = int(self.config.width * min(len(index[k]), len(index[k + 1])) / 2)
            near = torch.arange(half)
            chance = 0.5 * (1 - near / max(half, 1))
            draws = torch.from_numpy(generator(seed, "blurred", "boundary", k).random(half))
            after = near[draws < chance]
            before = len(index[k]) - 1 - after
            for values in (index, labels):
                values[k][before], values[k + 1][after] = (
                    values[k + 1][after], values[k][before],
                )  # fmt: skip
        return [
            Chunk(index[k], labels[k], part.test_index, part.test_labels)
            for k, part in enumerate(parts)
        ]

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """As protocol class."""
        return self.classes.num_outputs(data, chunks)

    def no_cumulative(self) -> str | None:
        """As protocol class."""
        reason = self.classes.no_cumulative()
        return reason.replace("protocol class", "protocol blurred") if reason else None
