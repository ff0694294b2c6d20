"""Images of the same classes in several domains: the kind of part that gives them, splits, batches.

A domain's images are either in memory, or files that are decoded when they are needed: DomainNet
has 600,000. Splits, batches and augmentation are DomainBed's (Gulrajani and Lopez-Paz 2021, arXiv
2007.01434): each domain is cut into "out", a fifth for validation, and "in", the rest; a model
trains on "in" of the source domains. All random numbers come from a seed or a generator that is
given, so that a batch can be made again.

Shapes: N images of one domain, C classes, B images of a batch.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_benchmarks.images import read_rgb, to_tensor
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.registry import Part, PartConfig

HOLDOUT = 0.2
CROP = (0.7, 1.0)
"""area of the random crop, as a share"""
RATIO = (3 / 4, 4 / 3)
"""its sides, width over height"""
JITTER = 0.3
"""brightness, contrast and saturation by 1 - JITTER .. 1 + JITTER, hue by +- JITTER turns"""
GRAY = 0.1
"""probability of losing the colours"""


@dataclass(frozen=True, eq=False)
class Domain:
    """The images of one domain.

    Raises:
        ValueError: images and labels that do not fit together.
    """

    name: str
    """as it stands in tables"""
    images: Tensor | tuple[Path, ...]
    """uint8 [N, 3, H, W], or N image files"""
    labels: Tensor
    """int64 [N]"""

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            raise ValueError(f"{self.name}: {len(self.images)} images, labels {self.labels.shape}")
        if isinstance(self.images, Tensor) and (
            self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3
        ):
            raise ValueError(f"{self.name}: images must be uint8 [N, 3, H, W]")

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int) -> Tensor:
        """One image, uint8 [3, H, W].

        Raises:
            UserError: names the file that cannot be read.
        """
        if isinstance(self.images, Tensor):
            return self.images[index]
        return read_image(self.images[index])


@dataclass(frozen=True, eq=False)
class DomainSet:
    """All domains of a data set; their order decides the number that each has.

    Raises:
        ValueError: fewer than two domains, or labels outside 0 .. C-1.
    """

    name: str
    """what the numbers of a run are about"""
    domains: tuple[Domain, ...]
    """at least two: one is held out"""
    classes: tuple[str, ...]
    """names of the C classes, the same in each domain"""

    def __post_init__(self) -> None:
        if len(self.domains) < 2:
            raise ValueError(f"{self.name} has {len(self.domains)} domain(s); it takes two")
        for domain in self.domains:
            if len(domain) and not 0 <= int(domain.labels.min()) <= int(domain.labels.max()) < len(
                self.classes
            ):
                raise ValueError(f"{domain.name}: labels must lie in 0 .. {len(self.classes) - 1}")

    @property
    def files(self) -> list[Path]:
        """Of all images that are in files, domain by domain."""
        read = [d.images for d in self.domains if not isinstance(d.images, Tensor)]
        return [file for images in read for file in images]

    @property
    def names(self) -> list[str]:
        """Names of the domains, in order."""
        return [domain.name for domain in self.domains]


class DomainData(Part, ABC, kind="domains"):
    """Base of all sets of domains. A subclass takes its `Config` and defines `load`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of a set of domains."""

    def __init__(self, config: Any) -> None:
        """Check the options, where there are any.

        Raises:
            UserError: an option that cannot work.
        """
        self.config = config

    @abstractmethod
    def load(self) -> DomainSet:
        """All domains, the same at each call.

        Raises:
            UserError: the data cannot be found or read; says where it was looked for.
        """


def read_image(path: Path) -> Tensor:
    """A file as uint8 [3, H, W].

    Raises:
        UserError: names the file that cannot be read, see `read_rgb`.
    """
    return to_tensor(read_rgb(path))


def check_domains(known: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Numbers of the chosen domains, all of them if none is named.

    Raises:
        UserError: a name that is no domain, or one twice.
    """
    from dynmoe.errors import unknown

    for name in chosen:
        if name not in known:
            raise unknown("domain", name, known)
        if list(chosen).count(name) > 1:
            raise UserError(f"domain {name!r} is named twice; name each once")
    return [known.index(name) for name in chosen or known]


def seed_hash(*values: int) -> int:
    """DomainBed's seed from integers: the MD5 of the tuple's text, modulo 2^31."""
    return int(hashlib.md5(str(values).encode()).hexdigest(), 16) % 2**31


def split(count: int, trial: int, domain: int, holdout: float = HOLDOUT) -> tuple[Tensor, Tensor]:
    """Indices of "in" and "out" of a domain of `count` images, as DomainBed draws them.

    `in` and `out` are int64 [count - held] and [held].

    Args:
        trial: the trial's seed.
        domain: the domain's number.
        holdout: share that is held out; rounded down to whole images.

    Returns:
        in, out: int64.
    """
    keys = list(range(count))
    np.random.RandomState(seed_hash(trial, domain)).shuffle(keys)
    size = int(count * holdout)
    return torch.tensor(keys[size:]), torch.tensor(keys[:size], dtype=torch.long)


def batch_indices(indices: Tensor, size: int, step: int, seed: int, domain: int) -> Tensor:
    """The images of a domain that training step `step` takes, int64 [size].

    Drawn from `indices` with replacement, each image independently of all others, as DomainBed's
    training loader does. Nothing is kept between steps: a run that is resumed takes the same
    images.
    """
    generator = seeding.generator(seed, "batches", domain, step)
    return indices[torch.randint(len(indices), (size,), generator=generator)]


@dataclass(frozen=True)
class Preparation:
    """What a backbone expects of its images."""

    size: int
    """rows and columns in pixels"""
    mean: tuple[float, float, float]
    """subtracted from each channel, for values of 0 .. 1"""
    std: tuple[float, float, float]
    """divides each channel"""

    def batch(
        self, domain: Domain, indices: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images of a domain, float32 [B, 3, size, size]; augmented where a generator is given."""
        if isinstance(domain.images, Tensor) and generator is None:
            pixels = self._resized(domain.images[indices])
        else:
            images = [domain.pixels(i) for i in indices.tolist()]
            if generator is None:
                pixels = torch.stack([self._resized(image) for image in images])
            else:
                pixels = torch.stack([augment(image, self.size, generator) for image in images])
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def _resized(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] -> [..., 3, size, size], without keeping the ratio of the sides."""
        if images.shape[-2:] == (self.size, self.size):
            return images
        from torchvision.transforms.v2 import functional

        return functional.resize(images, [self.size, self.size], antialias=True)


def augment(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """DomainBed's augmentation of one image, uint8 [3, H, W] -> [3, size, size].

    A random crop of 0.7 to 1 of the area, resized; a mirror image for half of them; colour jitter
    of 0.3 in random order; one in ten gray. Gulrajani and Lopez-Paz 2021 (arXiv 2007.01434),
    Appendix.
    """
    from torchvision.transforms.v2 import functional

    draw = torch.rand(8, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    top, left, height, width = _crop(image.shape[-2:], generator)
    image = functional.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    if draw[0] < 0.5:
        image = functional.horizontal_flip(image)
    brightness, contrast, saturation = (1 + JITTER * (2 * d - 1) for d in draw[1:4])
    for change in order:
        if change == 0:
            image = functional.adjust_brightness(image, brightness)
        elif change == 1:
            image = functional.adjust_contrast(image, contrast)
        elif change == 2:
            image = functional.adjust_saturation(image, saturation)
        else:
            image = functional.adjust_hue(image, JITTER * (2 * draw[4] - 1))
    if draw[5] < GRAY:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    return image


def _crop(shape: Sequence[int], generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop; the middle if ten draws do not fit."""
    rows, columns = shape
    low, high = (math.log(r) for r in RATIO)
    for _ in range(10):
        area, ratio, y, x = torch.rand(4, generator=generator).tolist()
        area = rows * columns * (CROP[0] + (CROP[1] - CROP[0]) * area)
        ratio = math.exp(low + (high - low) * ratio)
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= rows and 0 < width <= columns:
            return int(y * (rows - height + 1)), int(x * (columns - width + 1)), height, width
    height, width = min(rows, round(columns / RATIO[0])), min(columns, round(rows * RATIO[1]))
    return (rows - height) // 2, (columns - width) // 2, height, width
