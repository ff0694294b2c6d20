"""The kind of part that cuts a data set into chunks: `--protocol NAME`.

A chunk is what the learner sees between two boundaries. Protocols deal in indices into the images
of a data set, in labels, which a protocol may change, and in the order of pixels; they never copy
an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from cl_benchmarks.images import ImageData
from dynmoe.errors import UserError
from dynmoe.registry import Part, PartConfig
from dynmoe.seeding import derive

Access = Literal["limited", "cumulative"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """One part of a stream. All int64; H and W are the images' height and width."""

    train_index: Tensor
    """`[n]` into `ImageData.train_images`"""
    train_labels: Tensor
    """`[n]` what the learner is told"""
    test_index: Tensor
    """`[m]` into `ImageData.test_images`"""
    test_labels: Tensor
    """`[m]`"""
    pixels: Tensor | None = None
    """`[H * W]` where each pixel of an image of this chunk comes from, row by row; None for images
    as they are"""


class Protocol(Part, ABC, kind="protocol"):
    """Base of all protocols. A subclass takes its `Config`; `stream` is what callers use."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of a protocol."""

    @abstractmethod
    def __init__(self, config: Config) -> None:
        """Check the options.

        Raises:
            UserError: an option that cannot work.
        """

    @abstractmethod
    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Cut the data into `chunks` chunks.

        Raises:
            UserError: the data does not divide into that many; names numbers near it that work.
        """

    @abstractmethod
    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """Outputs of the head that all chunks share."""

    @abstractmethod
    def no_cumulative(self) -> str | None:
        """Why chunks must not be joined, with the way out; None where they may be."""

    @final
    def stream(self, data: ImageData, chunks: int, access: Access, seed: int) -> list[Chunk]:
        """The chunks that the learner gets, in order.

        With access "limited", chunk k is all that is seen at step k; with "cumulative" it is
        chunks 0 .. k.

        Raises:
            UserError: as `split`; or joined chunks would contradict themselves.
        """
        reason = self.no_cumulative() if access == "cumulative" else None
        if reason:
            raise UserError(reason)
        parts = self.split(data, chunks, seed)
        return cumulative(parts) if access == "cumulative" else parts


def cumulative(chunks: list[Chunk]) -> list[Chunk]:
    """Chunk k of the result holds chunks 0 .. k. An image that comes again is kept once.

    Raises:
        ValueError: an image comes again with another label. `Protocol.stream` refuses, before,
            the protocols whose labels mean something else in each chunk.
    """
    return [
        Chunk(
            *_joined([(c.train_index, c.train_labels) for c in chunks[: k + 1]]),
            *_joined([(c.test_index, c.test_labels) for c in chunks[: k + 1]]),
        )
        for k in range(len(chunks))
    ]


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate pairs of index and labels, dropping what was there before."""
    index, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    _, first, back = np.unique(index.numpy(), return_index=True, return_inverse=True)
    if not torch.equal(labels[first][back], labels):
        raise ValueError("an image has different labels in two chunks; they cannot be joined")
    keep = torch.from_numpy(np.sort(first))
    return index[keep], labels[keep]


def generator(seed: int, *stream: str | int) -> np.random.Generator:
    """A random generator for one purpose; other names give independent ones for the same seed.

    Raises:
        UserError: a negative seed.
    """
    if seed < 0:
        raise UserError(f"seed {seed} is negative; use 0 or more")
    return np.random.default_rng(derive(seed, *stream))


def check_divides(chunks: int, total: int, what: str) -> None:
    """Raise a UserError, with numbers near it that work, unless `chunks` divides `total`."""
    if chunks >= 1 and total % chunks == 0:
        return
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    near = [d for d in divisors if d < chunks][-2:] + [d for d in divisors if d > chunks][:2]
    raise UserError(
        f"{chunks} chunks do not divide {total} {what}; use --chunks {', '.join(map(str, near))}"
    )


def balanced_parts(labels: Tensor, parts: int, rng: np.random.Generator) -> list[Tensor]:
    """Deal the indices of `labels` `[N]` into equal random parts, `[N / parts]` each, shuffled.

    Class by class in random order, like cards: a class's counts in two parts differ by one at most.
    """
    order = rng.permutation(len(labels))
    dealt = order[np.argsort(labels.numpy()[order], kind="stable")]
    return [torch.from_numpy(rng.permutation(dealt[k::parts])) for k in range(parts)]


def balanced_subset(labels: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Indices `[count]` of random images; counts of two classes differ by one at most.

    Unless a class has fewer images than that: then it gives all.
    """
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels.numpy()[order], kind="stable")]
    turn = np.empty(len(labels), dtype=np.int64)  # how many of its class come before an image
    turn[by_class] = np.concatenate([np.arange(n) for n in np.bincount(labels.numpy())])
    return torch.from_numpy(rng.permutation(order[np.argsort(turn[order], kind="stable")][:count]))


def whole_test_set(data: ImageData) -> tuple[Tensor, Tensor]:
    """Index and labels of all test images."""
    return torch.arange(len(data.test_labels)), data.test_labels
