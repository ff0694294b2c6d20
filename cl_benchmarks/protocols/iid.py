"""Chunks that all look alike."""

from __future__ import annotations

from dataclasses import dataclass

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import (
    Chunk,
    Protocol,
    balanced_parts,
    check_divides,
    generator,
    whole_test_set,
)


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
