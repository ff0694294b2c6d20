"""Chunks of classes not seen before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol, check_divides, generator


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
