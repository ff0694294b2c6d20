"""Chunks that all look alike, with wrong labels that become fewer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cl_benchmarks.images import ImageData
from cl_benchmarks.protocol import (
    Chunk,
    Protocol,
    balanced_parts,
    check_divides,
    generator,
    whole_test_set,
)
from dynmoe.errors import UserError

HARE_TORTOISE = (0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.0)
"""Share of labels drawn anew in each of ten chunks (2406.02596, Tiny ImageNet settings)."""


class Noise(
    Protocol,
    name="noise",
    source="Lee et al. 2024 (arXiv 2406.02596), label noise on Tiny ImageNet",
):
    """The iid chunks with a share of random training labels that falls; clean test set.

    Hare & Tortoise (2406.02596). The images of each chunk are those of `iid` for the same seed. A
    drawn label may be the right one: of C classes, a share p leaves p (1 - 1/C) wrong labels.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the noise protocol."""

        schedule: tuple[float, ...] | None = None
        """share of labels drawn anew in each chunk, one number per chunk; by default
        .5 .4 .4 .3 .3 .2 .2 .1 .1 0, stretched linearly over the chunks"""

    def __init__(self, config: Config) -> None:
        for share in config.schedule or ():
            if not 0 <= share <= 1:
                raise UserError(f"protocol schedule has {share}; shares lie in 0 .. 1")
        self.config = config

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """The parts of `iid`; in chunk k exactly round(share_k n) labels are drawn anew."""
        check_divides(chunks, len(data.train_labels), "training images")
        shares = self.shares(chunks)
        parts = balanced_parts(data.train_labels, chunks, generator(seed, "iid"))
        test = whole_test_set(data)
        out = []
        for k, index in enumerate(parts):
            rng = generator(seed, "noise", k)
            labels = data.train_labels[index].clone()
            hit = torch.from_numpy(rng.permutation(len(index))[: round(shares[k] * len(index))])
            labels[hit] = torch.from_numpy(rng.integers(data.num_classes, size=len(hit)))
            out.append(Chunk(index, labels, *test))
        return out

    def num_outputs(self, data: ImageData, chunks: int) -> int:
        """All classes."""
        return data.num_classes

    def no_cumulative(self) -> str | None:
        """Chunks may be joined: an image keeps the label it got with its chunk."""
        return None

    def shares(self, chunks: int) -> list[float]:
        """Share of labels drawn anew, per chunk.

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
