"""Ways to change how images look, by name: the domains of `--protocol domains`.

Each style is fast, and the same at every call: a function of uint8 images `[k, C, H, W]` and of
their numbers `[k]` in the data set, which only `noise` uses. Sizes stay. They are plain, strong
changes of our own choice; the corruptions of `cl_benchmarks.shifts` are the published ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Style = Callable[[Tensor, Tensor], Tensor]
PART = 512
"""images that `restyle` changes at a time, to keep float copies small"""
NOISE = 64.0
"""standard deviation of `noise`, in gray levels"""
POOL = 1 << 18
"""normal numbers that the noise of all images is cut from"""


def _rotated(turns: int) -> Style:
    """By a quarter to the left, `turns` times; a turned image of unequal sides is resized."""

    def change(images: Tensor, _: Tensor) -> Tensor:
        turned = torch.rot90(images, turns, dims=(2, 3))
        if turned.shape == images.shape:
            return turned.contiguous()
        return _bytes(F.interpolate(turned.float(), images.shape[2:], mode="area"))

    return change


def _blurred(images: Tensor, _: Tensor) -> Tensor:
    """The mean of a square around each pixel, of about a tenth of the image's height."""
    half = max(1, images.shape[2] // 20)
    padded = F.pad(images.float(), [half] * 4, mode="replicate")
    return _bytes(F.avg_pool2d(padded, 2 * half + 1, stride=1))


def _noisy(images: Tensor, numbers: Tensor) -> Tensor:
    """Normal noise, another one for each image of the set, and always the same for an image."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(images.device)
    start = (numbers.to(images.device) * 7919)[:, None]  # a prime: starts spread over the pool
    each = torch.arange(images[0].numel(), device=images.device)
    noise = pool[(start + each) % POOL].view(images.shape)
    return _bytes(images.float() + NOISE * noise)


def _edges(images: Tensor, _: Tensor) -> Tensor:
    """How much a pixel differs from its lower and right neighbours, four times enlarged."""
    values = images.float()
    down = F.pad(values.diff(dim=2).abs(), [0, 0, 0, 1])
    right = F.pad(values.diff(dim=3).abs(), [0, 1])
    return _bytes(4 * (down + right) / 2)


def _swapped(images: Tensor, _: Tensor) -> Tensor:
    """Channels one place on. Of gray images: halves above and below change places."""
    if images.shape[1] > 1:
        return images.roll(1, dims=1)
    return images.roll(images.shape[2] // 2, dims=2)


def _posterised(images: Tensor, _: Tensor) -> Tensor:
    """Two gray levels in each channel: above and below the channel's mean in that image."""
    mean = images.float().mean(dim=(2, 3), keepdim=True)
    return ((images > mean) * 255).to(torch.uint8)


def _pixelated(images: Tensor, _: Tensor) -> Tensor:
    """Eight squares a side at most, each of its mean."""
    height, width = images.shape[2:]
    coarse = F.adaptive_avg_pool2d(images.float(), (min(8, height), min(8, width)))
    return _bytes(F.interpolate(coarse, (height, width), mode="nearest"))


def _faint(images: Tensor, _: Tensor) -> Tensor:
    """A fifth of the contrast, on a bright ground."""
    return _bytes(images.float() / 5 + 180)


def _quadrants(images: Tensor, _: Tensor) -> Tensor:
    """Quadrants change places across the middle."""
    height, width = images.shape[2:]
    return images.roll((height // 2, width // 2), dims=(2, 3))


STYLES: dict[str, Style] = {
    "none": lambda images, _: images,
    "inverted": lambda images, _: 255 - images,
    "rotated-180": _rotated(2),
    "noise": _noisy,
    "edges": _edges,
    "swapped": _swapped,
    "pixelated": _pixelated,
    "rotated-90": _rotated(1),
    "posterised": _posterised,
    "blurred": _blurred,
    "quadrants": _quadrants,
    "faint": _faint,
    "rotated-270": _rotated(3),
}
"""In the order of `--protocol.order fixed`."""


def restyle(images: Tensor, numbers: Tensor, name: str) -> Tensor:
    """Images in a style, uint8 `[k, C, H, W]`, of the same shape.

    Args:
        images: uint8 `[k, C, H, W]`.
        numbers: int64 `[k]`, their places in the data set.
        name: a key of STYLES.
    """
    change = STYLES[name]
    if name == "none" or not len(images):
        return images
    parts = zip(images.split(PART), numbers.split(PART), strict=True)
    return torch.cat([change(part, own) for part, own in parts])


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)
