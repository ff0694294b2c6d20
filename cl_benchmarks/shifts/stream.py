"""Streams: the domains' images in some order, in batches that can be asked for at any position.

Shapes: N images in all, B images in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_benchmarks.shifts.domain import Domain
from dynmoe import seeding
from dynmoe.errors import UserError

Order = Literal["mixed", "sequential", "gradual"]


@dataclass(frozen=True, eq=False)
class Segment:
    """Some images of one domain, shown one after another unless the stream is mixed."""

    domain: Domain
    indices: Tensor
    """int64, which of the domain's images"""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a method sees at one step, and what it is judged by."""

    images: Tensor
    """uint8 `[B, 3, S, S]`"""
    labels: Tensor
    """int64 [B]"""
    domains: Tensor
    """int64 [B], index into the stream's `names`"""


class Stream:
    """Every image of the segments once.

    Args:
        segments: what is shown.
        order: mixed shuffles all images together. Otherwise the segments come in their order, each
            shuffled within; a batch then holds images of one segment alone.
        batch_size: images per batch; the last of a stream, or of a segment, may be smaller.
        seed: decides the shuffling.

    Attributes:
        names: the domains' names in their order of appearance in `segments`.

    Raises:
        UserError: no image at all, or a batch size below 1.
    """

    def __init__(
        self, segments: Sequence[Segment], order: Order, batch_size: int, seed: int
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} is too small; use 1 or more")
        self.segments = [s for s in segments if len(s.indices)]
        if not self.segments:
            raise UserError("the stream holds no image")
        self.names = list(dict.fromkeys(s.domain.name for s in self.segments))
        sizes = torch.tensor([len(s.indices) for s in self.segments])
        segment = torch.arange(len(sizes)).repeat_interleave(sizes)
        place = torch.cat([torch.arange(int(n)) for n in sizes])
        generator = seeding.generator(seed, "stream")
        if order == "mixed":
            shuffled = torch.randperm(len(segment), generator=generator)
            cuts = list(shuffled.split(batch_size))
        else:
            parts = torch.arange(len(segment)).split(sizes.tolist())
            shuffled_parts = [p[torch.randperm(len(p), generator=generator)] for p in parts]
            cuts = [cut for p in shuffled_parts for cut in p.split(batch_size)]
        self._segment, self._place, self._cuts = segment, place, cuts

    def __len__(self) -> int:
        return len(self._cuts)

    @property
    def num_images(self) -> int:
        """N."""
        return len(self._segment)

    @property
    def smallest_batch(self) -> int:
        """Images in the smallest batch."""
        return min(len(cut) for cut in self._cuts)

    def batch(self, number: int) -> Batch:
        """Batch `number`, 0 .. len - 1; needs none of those before it.

        Raises:
            UserError: an image that cannot be read.
        """
        chosen = self._cuts[number]
        segment, place = self._segment[chosen], self._place[chosen]
        images: list[Tensor] = [torch.empty(0)] * len(chosen)
        labels = torch.empty(len(chosen), dtype=torch.int64)
        domains = torch.empty(len(chosen), dtype=torch.int64)
        for s in segment.unique().tolist():
            rows = (segment == s).nonzero()[:, 0]
            domain = self.segments[s].domain
            indices = self.segments[s].indices[place[rows]]
            read = domain.images(indices.tolist())
            for row, image in zip(rows.tolist(), read, strict=True):
                images[row] = image
            labels[rows] = domain.labels[indices]
            domains[rows] = self.names.index(domain.name)
        return Batch(torch.stack(images), labels, domains)
