"""Streams of shifted images: where they come from, and their order, in batches asked for by number.

Shapes: N images in all, B images in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cl_benchmarks.shifts.domain import CORRUPTIONS, EXTRA, Domain
from dynmoe import seeding
from dynmoe.errors import UserError, unknown

Order = Literal["mixed", "sequential", "gradual"]
OTHERS = ("rendition", "sketch", "adversarial")
"""The shifts besides corruption: ImageNet-R, -Sketch and -A, or their embedded stand-ins."""
STREAMS: dict[str, tuple[str, ...]] = {
    "classical": CORRUPTIONS,
    "potpourri": (*CORRUPTIONS, *OTHERS),
    "potpourri+": (*CORRUPTIONS, *OTHERS, "clean"),
    "classical+": (*CORRUPTIONS, "clean"),
    "validation": EXTRA,
    "all-corruptions": CORRUPTIONS + EXTRA,
    **{name: (name,) for name in (*OTHERS, "clean")},
}
"""Stream -> its domains. The first three are those of MoETTA (arXiv 2511.13760); classical+ shows
forgetting where there are corruptions alone; validation holds the four that are kept for tuning;
the last are one domain alone."""
GRADUAL = (1, 2, 3, 4, 5, 4, 3, 2, 1)
"""Severities of the gradual order (Wang et al. 2022, CoTTA, arXiv 2203.13591, Section 4)."""
DOMAINS = (*CORRUPTIONS, *EXTRA, *OTHERS, "clean")
"""All that a stream may hold."""


def domains_of(stream: str) -> tuple[str, ...]:
    """The domains of one of STREAMS, or of a stream of one's own: names joined by `+`.

    Raises:
        UserError: an unknown name, or one that stands there twice.
    """
    if stream in STREAMS:
        return STREAMS[stream]
    names = tuple(stream.split("+"))
    wrong = [name for name in names if name not in DOMAINS]
    if wrong and len(names) == 1:
        raise unknown("stream", stream, dict.fromkeys((*STREAMS, *DOMAINS)))
    if wrong:
        raise unknown(f"domain of the stream {stream}:", wrong[0], DOMAINS)
    if len(set(names)) < len(names):
        raise UserError(f"the stream {stream} names a domain twice; name each once")
    return names


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
    """One of STREAMS, or one of domains of one's own.

    Args:
        source: the domains.
        stream: see `domains_of`.
        order: mixed: all images shuffled together. sequential: one domain after another. gradual:
            the same, with the severity of a corruption rising and falling as in GRADUAL; its images
            are dealt over the nine steps (our choice), so that every order shows as many.
        severity: of the corruptions, 1 to 5; the gradual order has its own.
        batch_size: images per batch.
        seed: decides order and choice of images.
        limit: images of each domain, drawn at random; None for all.

    Raises:
        UserError: an unknown stream or order, data that are missing, a limit below 1, numbers of
            images that differ between severities in the gradual order.
    """
    if order not in ("mixed", "sequential", "gradual"):
        raise unknown("order", order, ("mixed", "sequential", "gradual"))
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is too small; use 1 or more images of each domain")
    segments: list[Segment] = []
    for name in domains_of(stream):
        corruption = name in CORRUPTIONS + EXTRA
        domain = source.corrupted(name, severity) if corruption else source.other(name)
        shuffled = torch.randperm(len(domain), generator=seeding.generator(seed, "images", name))
        chosen = shuffled[:limit]  # unshuffled, a class-sorted folder would give its first classes
        if corruption and order == "gradual":
            steps = [source.corrupted(name, s) for s in GRADUAL]
            _check_alike(name, steps)
            parts = torch.tensor_split(chosen, len(GRADUAL))
            segments += [Segment(d, part) for d, part in zip(steps, parts, strict=True)]
        else:
            segments.append(Segment(domain, chosen))
    return Stream(segments, order, batch_size, seed)


def _check_alike(name: str, steps: list[Domain]) -> None:
    """Refuse a corruption with another number of images at one severity than at the others."""
    counts = {severity: len(step) for severity, step in zip(GRADUAL, steps, strict=True)}
    if len(set(counts.values())) > 1:
        have = ", ".join(f"{count} at severity {s}" for s, count in sorted(counts.items()))
        raise UserError(
            f"the gradual order needs the same images of {name} at every severity, and there are "
            f"{have}; complete them, or use --order mixed or sequential"
        )


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
    places: list[tuple[Domain, int]]
    """[B] where each image is from: the domain and its index there"""


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
        places: list[Any] = [None] * len(chosen)
        for s in segment.unique().tolist():
            rows = (segment == s).nonzero()[:, 0]
            domain = self.segments[s].domain
            indices = self.segments[s].indices[place[rows]]
            read = domain.images(indices.tolist())
            for row, image, index in zip(rows.tolist(), read, indices.tolist(), strict=True):
                images[row], places[row] = image, (domain, index)
            labels[rows] = domain.labels[indices]
            domains[rows] = self.names.index(domain.name)
        return Batch(torch.stack(images), labels, domains, places)
