"""Where shifted images come from, and the streams that are made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from cl_benchmarks.shifts.corruptions import CORRUPTIONS, EXTRA
from cl_benchmarks.shifts.domain import Domain
from cl_benchmarks.shifts.stream import Order, Segment, Stream
from dynmoe import seeding
from dynmoe.errors import UserError, unknown

OTHERS = ("rendition", "sketch", "adversarial")
"""The shifts besides corruption: ImageNet-R, -Sketch and -A, or their embedded stand-ins."""
STREAMS: dict[str, tuple[str, ...]] = {
    "classical": CORRUPTIONS,
    "potpourri": (*CORRUPTIONS, *OTHERS),
    "potpourri+": (*CORRUPTIONS, *OTHERS, "clean"),
    "validation": EXTRA,
    **{name: (name,) for name in (*OTHERS, "clean")},
}
"""Stream -> its domains. The first three are those of MoETTA (arXiv 2511.13760); validation holds
the four corruptions that are kept for tuning; the others are one domain alone."""
GRADUAL = (1, 2, 3, 4, 5, 4, 3, 2, 1)
"""Severities of the gradual order (Wang et al. 2022, CoTTA, arXiv 2203.13591, Section 4)."""


class ShiftSource(ABC):
    """Domains by name. A subclass says where they come from.

    Attributes:
        name: what the numbers are about.
        num_classes: outputs of a model whose indices the labels are.
        size: S, the image side.
        mean, std: per channel, of images scaled to 0 .. 1, that the model was trained with.
    """

    name: str
    num_classes: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @abstractmethod
    def corrupted(self, corruption: str, severity: int) -> Domain:
        """The test images under one corruption."""

    @abstractmethod
    def other(self, shift: str) -> Domain:
        """The domain of one of OTHERS, or "clean"."""


def make_stream(
    source: ShiftSource,
    stream: str,
    order: Order = "mixed",
    severity: int = 5,
    batch_size: int = 64,
    seed: int = 0,
    limit: int | None = None,
) -> Stream:
    """One of STREAMS.

    Args:
        source: the domains.
        stream: a key of STREAMS.
        order: mixed: all images shuffled together. sequential: one domain after another. gradual:
            the same, with the severity of a corruption rising and falling as in GRADUAL; its images
            are dealt over the nine steps (our choice), so that every order shows as many.
        severity: of the corruptions, 1 to 5; the gradual order has its own.
        batch_size: images per batch.
        seed: decides order and choice of images.
        limit: images of each domain, drawn at random; None for all.

    Raises:
        UserError: an unknown stream or order, data that are missing, a limit below 1.
    """
    if stream not in STREAMS:
        raise unknown("stream", stream, STREAMS)
    if order not in ("mixed", "sequential", "gradual"):
        raise unknown("order", order, ("mixed", "sequential", "gradual"))
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is too small; use 1 or more images of each domain")
    segments: list[Segment] = []
    for name in STREAMS[stream]:
        corruption = name in CORRUPTIONS + EXTRA
        domain = source.corrupted(name, severity) if corruption else source.other(name)
        chosen = _choice(len(domain), limit, seed, name)
        if corruption and order == "gradual":
            steps = [source.corrupted(name, s) for s in GRADUAL]
            parts = torch.tensor_split(chosen, len(GRADUAL))
            segments += [Segment(d, part) for d, part in zip(steps, parts, strict=True)]
        else:
            segments.append(Segment(domain, chosen))
    return Stream(segments, order, batch_size, seed)


def _choice(count: int, limit: int | None, seed: int, name: str) -> torch.Tensor:
    """Which images, in random order: a class-sorted folder would else give its first classes."""
    permuted = torch.randperm(count, generator=seeding.generator(seed, "images", name))
    return permuted if limit is None else permuted[:limit]
