"""From stored images to a network's input: resizing, DomainBed's augmentation, normalising.

All random numbers come from a generator that is given, so that a batch can be made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_benchmarks.domain_set import Domain

CROP = (0.7, 1.0)
"""area of the random crop, as a share"""
RATIO = (3 / 4, 4 / 3)
"""its sides, width over height"""
JITTER = 0.3
"""brightness, contrast and saturation by 1 - JITTER .. 1 + JITTER, hue by +- JITTER turns"""
GRAY = 0.1
"""probability of losing the colours"""


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
