"""The kind of part that cuts a data set into chunks, `--protocol NAME`, and those that split it.

A chunk is what the learner sees between two boundaries. Protocols deal in indices into the images
of a data set, in labels, which a protocol may change, and in the order of pixels; they never copy
an image. Here: splits by class and at random. All others are in `cl_benchmarks.protocols`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

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
    style: str | None = None
    """how the images look, a key of `cl_benchmarks.styles.STYLES`; None for as they are"""
    in_time_order: bool = False
    """training images come as they stand here, and nothing is told of where the chunk begins"""


class Protocol(Part, ABC, kind="protocol"):
    """Base of all protocols. A subclass takes its `Config`; `stream` is what callers use.

    Attributes:
        in_time_order: it keeps the order of data that have one, and tells of no task boundary.
        one_test_set: all tasks are tested on the same images, so that none can be forgotten.
    """

    in_time_order: ClassVar[bool] = False
    one_test_set: ClassVar[bool] = False

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of a protocol."""

    resets_head: ClassVar[bool] = False
    """whether the output layer starts every task with zeros, in all methods"""

    def __init__(self, config: Any) -> None:
        """Check the options, where there are any.

        Raises:
            UserError: an option that cannot work.
        """
        self.config = config

    @abstractmethod
    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Cut the data into `chunks` chunks.

        Raises:
            UserError: the data does not divide into that many; names numbers near it that work.
        """

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """Outputs of the head that all chunks share; by default one for each class."""
        return data.num_classes

    def keeps_labels(self) -> bool:
        """Whether old tasks can still be asked: an output always stands for the same class."""
        return True

    @final
    def no_old_tasks(self) -> str | None:
        """Why the accuracy on old tasks is not measured; None where it is."""
        if not self.keeps_labels():
            return f"with protocol {self.name} outputs mean something else in each task"
        if self.one_test_set or self.in_time_order:
            return f"protocol {self.name} has no test images of old tasks only"
        return None

    def plugins(self, train: list[Any], others: list[Any], seed: int) -> list[Any]:
        """Avalanche plugins of the protocol's own; none by default.

        Args:
            train: the stream's chunks, as `ChunkDataset`s.
            others: plugins that must act in further optimizer steps, too.
            seed: the run's.
        """
        return []

    @abstractmethod
    def no_cumulative(self) -> str | None:
        """Why chunks must not be joined, with the way out; None where they may be."""

    @final
    def stream(self, data: ImageData, chunks: int, access: Access, seed: int) -> list[Chunk]:
        """The chunks that the learner gets, in order.

        With access "limited", chunk k is all that is seen at step k; with "cumulative" it is
        chunks 0 .. k.

        Raises:
            UserError: as `split`; or joined chunks would contradict themselves; or the data's order
                is not what the protocol needs.
        """
        if data.in_time_order and not self.in_time_order:
            raise UserError(
                f"protocol {self.name} would mix up {data.name}, whose rows are in time order; "
                "use --protocol online"
            )
        if self.in_time_order and not data.in_time_order:
            raise UserError(
                f"protocol {self.name} needs data in time order, and {data.name} has no order; "
                "use --dataset stream"
            )
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


def check_divides(chunks: int, total: int, what: str, least: int = 1, otherwise: str = "") -> None:
    """Refuse a number of chunks that does not divide `total`.

    Args:
        chunks, total: the numbers.
        what: is divided.
        least: of it in a chunk, in the numbers that the error suggests.
        otherwise: what to do where no number of chunks above 1 is left.

    Raises:
        UserError: it does not; names numbers near it that do.
    """
    if chunks >= 1 and total % chunks == 0:
        return
    divisors = [d for d in range(1, total // least + 1) if total % d == 0]
    near = [d for d in divisors if d < chunks][-2:] + [d for d in divisors if d > chunks][:2]
    use = f"use --chunks {', '.join(map(str, near))}"
    if otherwise and not any(d > 1 for d in near):
        use = otherwise
    raise UserError(f"{chunks} chunks do not divide {total} {what}; {use}")


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
    """Index and labels of all test images, int64 [N] each."""
    return torch.arange(len(data.test_labels)), data.test_labels


class ClassChunks(Protocol, name="class"):
    """New classes in every chunk, in an order drawn from the seed; test on the same classes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the class protocol."""

        head: Literal["shared", "full"] = "shared"
        """shared: every chunk labels its c classes 0 .. c-1 for one head of c outputs (pure
        plasticity: old classes are overwritten). full: one output for each class of the data"""

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Disjoint sets of equally many classes; images in order of their index.

        Raises:
            UserError: `chunks` does not divide the classes, or leaves a shared head one output.
        """
        least = 2 if self.num_outputs(data, data.num_classes) == 1 else 1
        shuffle = "use --protocol shuffle, which draws other labels in each chunk"
        check_divides(chunks, data.num_classes, "classes", least, shuffle)
        if self.num_outputs(data, chunks) == 1:
            raise UserError(
                f"{chunks} chunks of {data.num_classes} classes have one class each, so there is "
                "nothing to tell apart; use fewer --chunks, --protocol.head full, or --protocol "
                "shuffle, which draws other labels in each chunk"
            )
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

    def keeps_labels(self) -> bool:
        """Not with the shared head: its outputs stand for other classes in each chunk."""
        return self.config.head == "full"

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


class Iid(Protocol, name="iid", source="after Lee et al. 2024 (arXiv 2406.02596)"):
    """Equal random parts of the training set, each with all classes; test on the whole test set.

    With 10 chunks the reading nearest to DynamicMoE (2511.18987), after FIRE (2602.08040) and
    Hare & Tortoise (2406.02596). Clean data of this kind shows little loss of plasticity.
    """

    one_test_set = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """The protocol has no options."""

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """Parts of equal size; counts of a class in two parts differ by one at most."""
        check_divides(chunks, len(data.train_labels), "training images")
        parts = balanced_parts(data.train_labels, chunks, generator(seed, "iid"))
        test = whole_test_set(data)
        return [Chunk(index, data.train_labels[index], *test) for index in parts]

    def no_cumulative(self) -> str | None:
        """Chunks may be joined."""
        return None
