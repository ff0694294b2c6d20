"""A long sequence of two-class tasks: the form of Continual ImageNet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import Chunk, Protocol, generator
from dynmoe.errors import UserError


class Pairs(
    Protocol,
    name="pairs",
    source="Dohare et al. 2024 (Nature 632, 768-774), Continual ImageNet",
):
    """Each chunk tells two classes apart, another pair every time; the head is zero at each start.

    Classes are matched anew in rounds, drawn from the seed: in a round each class has one partner,
    and no pair comes twice. So with C classes there are C (C - 1) / 2 tasks at most, and at any
    time classes have been used equally often, but for one time (two, if C is odd). Test images are
    those of the two classes. The measure is test accuracy over hundreds of tasks.
    """

    resets_head = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """The protocol has no options."""

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """One pair of classes per chunk, labelled 0 and 1; images in order of their index.

        Raises:
            UserError: more chunks than pairs.
        """
        count = data.num_classes
        if not 1 <= chunks <= count * (count - 1) // 2:
            raise UserError(
                f"{chunks} chunks of protocol pairs: the {count} classes of {data.name} make "
                f"{count * (count - 1) // 2} pairs; use --chunks 1 to {count * (count - 1) // 2}"
            )
        train, test = (_by_class(labels, count) for labels in (data.train_labels, data.test_labels))
        return [
            Chunk(*_told_apart(train, pair), *_told_apart(test, pair))
            for pair in matches(count, chunks, generator(seed, "pairs"))
        ]

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """One for each class of a pair."""
        return 2

    def keeps_labels(self) -> bool:
        """Outputs stand for other classes in each chunk."""
        return False

    def no_cumulative(self) -> str | None:
        """Labels 0 and 1 would stand for one class of every chunk."""
        return (
            "access cumulative with protocol pairs gives the same label to different classes; "
            "use --access limited"
        )


def matches(count: int, wanted: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The first pairs of a tournament of all against all, in random order of rounds and in them.

    By the circle method: one player stays, the others move on by one place after each round. With
    an odd number one player rests in each round.
    """
    players = rng.permutation(count).tolist() + [None] * (count % 2)
    half, rounds = len(players) // 2, len(players) - 1
    found: list[tuple[int, int]] = []
    for turn in rng.permutation(rounds)[: -(-wanted // max(count // 2, 1))]:
        places = [players[0], *(players[1 + (turn + k) % rounds] for k in range(rounds))]
        opposite = [(places[k], places[-1 - k]) for k in range(half)]
        pairs = [pair for pair in opposite if None not in pair]
        found += [
            pairs[k] if rng.random() < 0.5 else pairs[k][::-1] for k in rng.permutation(len(pairs))
        ]
    return found[:wanted]


def _by_class(labels: Tensor, count: int) -> list[Tensor]:
    """Index of the images of each class."""
    return [(labels == label).nonzero()[:, 0] for label in range(count)]


def _told_apart(images: list[Tensor], pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Index of the images of two classes, in order, and their labels 0 and 1."""
    index = torch.cat([images[label] for label in pair])
    labels = torch.cat([torch.full_like(images[label], k) for k, label in enumerate(pair)])
    order = index.argsort()
    return index[order], labels[order]
