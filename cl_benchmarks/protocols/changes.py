"""Protocols in which data change: label noise, warm starts, blurred and unknown boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import (
    Chunk,
    ClassChunks,
    Protocol,
    balanced_parts,
    balanced_subset,
    check_divides,
    generator,
    whole_test_set,
)
from dynmoe.errors import UserError

HARE_TORTOISE = (0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.0)
"""Share of labels resampled in each of ten chunks (2406.02596, Tiny ImageNet settings)."""


class Noise(
    Protocol,
    name="noise",
    source="Lee et al. 2024 (arXiv 2406.02596), label noise on Tiny ImageNet",
):
    """The iid chunks with a share of random training labels that falls; clean test set.

    Hare & Tortoise (2406.02596). The images of each chunk are those of `iid` for the same seed. A
    drawn label may be the right one: of C classes, a share p leaves p (1 - 1/C) wrong labels.
    """

    one_test_set = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the noise protocol."""

        schedule: tuple[float, ...] | None = None
        """share of labels resampled in each chunk, one number per chunk; by default
        .5 .4 .4 .3 .3 .2 .2 .1 .1 0, stretched linearly over the chunks"""

    def __init__(self, config: Config) -> None:
        for share in config.schedule or ():
            if not 0 <= share <= 1:
                raise UserError(f"protocol schedule has {share}; shares lie in 0 .. 1")
        super().__init__(config)

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """The parts of `iid`; in chunk k exactly round(share_k n) labels are resampled."""
        check_divides(chunks, len(data.train_labels), "training images")
        shares = self.shares(chunks)
        parts = balanced_parts(data.train_labels, chunks, generator(seed, "iid"))
        test = whole_test_set(data)
        out = []
        for k, index in enumerate(parts):
            rng = generator(seed, "noise", k)
            out.append(Chunk(index, _resampled(data, index, shares[k], rng), *test))
        return out

    def no_cumulative(self) -> str | None:
        """Chunks may be joined: an image keeps the label it got with its chunk."""
        return None

    def shares(self, chunks: int) -> list[float]:
        """Share of labels resampled, per chunk.

        Raises:
            UserError: a schedule was given and is not `chunks` long.
        """
        given = self.config.schedule
        if given is None:
            at = np.linspace(0, len(HARE_TORTOISE) - 1, chunks)
            return np.interp(at, range(len(HARE_TORTOISE)), HARE_TORTOISE).tolist()
        if len(given) != chunks:
            raise UserError(
                f"protocol schedule has {len(given)} shares for {chunks} chunks; "
                f"give {chunks} or leave it out"
            )
        return list(given)


def _resampled(data: ImageData, index: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """The labels of some training images, exactly round(share n) of them drawn at random."""
    labels = data.train_labels[index].clone()
    hit = torch.from_numpy(rng.permutation(len(index))[: round(share * len(index))])
    labels[hit] = torch.from_numpy(rng.integers(data.num_classes, size=len(hit)))
    return labels


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

    one_test_set = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the warm start."""

        share: float = 0.1
        """of the training images that the first chunk has, classes in turn"""
        noise: float = 0.5
        """share of the first chunk's labels resampled; a drawn label may be the right one"""

    def __init__(self, config: Config) -> None:
        if not 0 < config.share <= 1:
            raise UserError(f"protocol share {config.share} must be above 0 and at most 1")
        if not 0 <= config.noise <= 1:
            raise UserError(f"protocol noise {config.noise} must lie in 0 .. 1")
        super().__init__(config)

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """The small part, then all data as often as there are chunks left."""
        if chunks < 2:
            raise UserError(f"{chunks} chunks are too few for a warm start; use --chunks 2 or more")
        rng, total = generator(seed, "warmstart"), len(data.train_labels)
        first = balanced_subset(data.train_labels, max(1, round(self.config.share * total)), rng)
        labels = _resampled(data, first, self.config.noise, rng)
        test = whole_test_set(data)
        whole = Chunk(torch.arange(total), data.train_labels, *test)
        return [Chunk(first, labels, *test)] + [whole] * (chunks - 1)

    def no_cumulative(self) -> str | None:
        """Later chunks have all images already, with other labels than the first one."""
        return "protocol warmstart is cumulative as it is; use --access limited"


class _OfClasses(Protocol):
    """Base of the protocols that change the class chunks. Their Config has `head`, as there."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classes: ClassChunks = ClassChunks.Config(head=config.head).build()

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """As protocol class."""
        return self.classes.num_outputs(data, chunks)

    def keeps_labels(self) -> bool:
        """As protocol class."""
        return self.classes.keeps_labels()

    def no_cumulative(self) -> str | None:
        """As protocol class."""
        reason = self.classes.no_cumulative()
        return reason.replace("protocol class", f"protocol {self.name}") if reason else None


class Blurred(_OfClasses, name="blurred"):
    """The class chunks with blurred boundaries: neighbours exchange images near them.

    The images of each class chunk stand in random order. At the boundary of two chunks, the i-th
    image before it changes places with the i-th after it with a probability that falls linearly
    from 1/2 at the boundary to 0 at half the width. Every image occurs once, and chunks keep their
    sizes; about width / 8 of a chunk is exchanged at each boundary. A chunk is shuffled again in
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
        super().__init__(config)

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


class Unknown(_OfClasses, name="unknown"):
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
        super().__init__(config)

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
