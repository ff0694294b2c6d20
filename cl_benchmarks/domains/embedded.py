"""Domains made on the spot from embedded images, in styles; needs no file and no network.

A style takes gray images [N, S, S] in 0 .. 1, bright shapes on black, and returns colours
[N, 3, S, S] in 0 .. 1. Per-image choices come from the generator. All of it is ours; the domains
are to differ in look and to keep the shapes, as photo, cartoon and sketch do in PACS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_benchmarks import fractals
from cl_benchmarks.datasets.embedded import shuffled_digits
from cl_benchmarks.domain_set import Domain, DomainData, DomainSet
from cl_benchmarks.images import check_least
from dynmoe import seeding
from dynmoe.errors import UserError, unknown

SEED = 0
"""The set is one fixed data set, as a downloaded one is; a run's seed splits it."""
MOST = {"fractals": 100, "digits": 10}
"""Classes there are. Fractals from 100 on are those that the embedded backbone learns from."""
DIGITS_PER_CLASS = 174
"""Images of the rarest digit."""
Style = Callable[[Tensor, torch.Generator], Tensor]


def plain(gray: Tensor, generator: torch.Generator) -> Tensor:
    """White on black.

    Gray images [N, H, W] in 0..1 to [N, 3, H, W].
    """
    return gray[:, None].expand(-1, 3, -1, -1)


def coloured(gray: Tensor, generator: torch.Generator) -> Tensor:
    """A random colour on a darker one, at least 0.4 apart in brightness.

    Gray images [N, H, W] in 0..1 to [N, 3, H, W].
    """
    count = len(gray)
    colours = torch.rand(2, count, 3, 1, 1, generator=generator)
    light = colours.mean(dim=2, keepdim=True)
    swap = light[0] < light[1]
    front, back = (torch.where(swap, colours[1 - i], colours[i]) for i in (0, 1))
    # Pushing the two apart in brightness keeps the shape visible in gray values too.
    push = (0.4 - (light[0] - light[1]).abs()).clamp(min=0) / 2
    front, back = (front + push).clamp(0, 1), (back - push).clamp(0, 1)
    return back + (front - back) * gray[:, None]


def textured(gray: Tensor, generator: torch.Generator) -> Tensor:
    """The shape shows through as a change of one grating into another, finer one."""
    front = _grating(gray, 0.25, 0.35, generator)
    back = _grating(gray, 0.06, 0.12, generator)
    mask = (gray > 0.25).float()
    values = mask * (0.45 + 0.55 * front) + (1 - mask) * 0.45 * back
    tint = 0.6 + 0.4 * torch.rand(len(gray), 3, 1, 1, generator=generator)
    return values[:, None] * tint


def noisy(gray: Tensor, generator: torch.Generator) -> Tensor:
    """Half the contrast, under Gaussian noise of deviation 0.2 in each channel.

    Gray images [N, H, W] in 0..1 to [N, 3, H, W].
    """
    noise = torch.randn(len(gray), 3, *gray.shape[1:], generator=generator)
    return (0.25 + 0.5 * gray[:, None] + 0.2 * noise).clamp(0, 1)


def edges(gray: Tensor, generator: torch.Generator) -> Tensor:
    """White outlines on black: the length of the gradient (Sobel), as chalk would draw them.

    Gray images [N, H, W] in 0..1 to [N, 3, H, W].
    """
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    both = torch.stack([kernel, kernel.T])[:, None]
    slopes = F.conv2d(F.pad(gray[:, None], (1, 1, 1, 1), mode="replicate"), both)
    length = slopes.square().sum(dim=1, keepdim=True).sqrt()
    peak = length.amax(dim=(2, 3), keepdim=True).clamp(min=0.01)
    return (length / peak).expand(-1, 3, -1, -1)


def rotated(gray: Tensor, generator: torch.Generator) -> Tensor:
    """White on black, turned by 45 to 135 degrees to either side.

    Gray images [N, H, W] in 0..1 to [N, 3, H, W].
    """
    turn = math.pi / 4 * (1 + 2 * torch.rand(len(gray), generator=generator))
    turn = turn * torch.where(torch.rand(len(gray), generator=generator) < 0.5, 1.0, -1.0)
    zero = torch.zeros_like(turn)
    rows = [torch.stack([turn.cos(), -turn.sin(), zero], 1),
            torch.stack([turn.sin(), turn.cos(), zero], 1)]  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1), [len(gray), 1, *gray.shape[1:]], False)
    return F.grid_sample(gray[:, None], grid, align_corners=False).expand(-1, 3, -1, -1)


def blocky(gray: Tensor, generator: torch.Generator) -> Tensor:
    """White on black, in pixels of three times the size.

    Gray images [N, H, W] in 0..1 to [N, 3, H, W].
    """
    small = F.interpolate(gray[:, None], size=-(-gray.shape[-1] // 3), mode="area")
    return F.interpolate(small, size=gray.shape[1:], mode="nearest").expand(-1, 3, -1, -1)


STYLES: dict[str, Style] = {
    "plain": plain,
    "coloured": coloured,
    "textured": textured,
    "noisy": noisy,
    "edges": edges,
    "rotated": rotated,
    "blocky": blocky,
}
"""Name of an embedded domain -> how its images are drawn."""


def draw(gray: Tensor, style: str, generator: torch.Generator) -> Tensor:
    """Images in a style: uint8 [N, S, S] -> uint8 [N, 3, S, S]."""
    values = STYLES[style](gray.float() / 255, generator)
    return (values * 255).round().clamp(0, 255).to(torch.uint8)


def _grating(gray: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Waves [N, S, S] in 0 .. 1 of random direction and phase, low .. high per pixel."""
    count, size = gray.shape[:2]
    draws = torch.rand(3, count, 1, 1, generator=generator)
    angle, phase = math.pi * draws[0], 2 * math.pi * draws[1]
    frequency = 2 * math.pi * (low + (high - low) * draws[2])
    place = torch.arange(size, dtype=torch.float32)
    along = angle.cos() * place + angle.sin() * place[:, None]
    return 0.5 + 0.5 * torch.sin(frequency * along + phase)


class Embedded(DomainData, name="embedded", source="ours; fractal images after 2020's FractalDB"):
    """Fractals or handwritten digits, drawn in another style in each domain."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DomainData.Config):
        """Options of the embedded domains."""

        content: Literal["fractals", "digits"] = "fractals"
        """what the images show: iterated function systems, or scikit-learn's digits"""
        styles: tuple[str, ...] = ("coloured", "edges", "noisy", "textured")
        """the domains: some of plain, coloured, textured, noisy, edges, rotated and blocky"""
        classes: int = 10
        """how many, 2 to 100 of the fractals, 2 to 10 digits"""
        per_class: int = 30
        """images of each class in each domain; no image is in two domains"""
        size: int = 32
        """image side in pixels, 8 to 256"""
        views: Literal["easy", "middle", "hard"] = "easy"
        """how much the fractals of a class differ"""

    def __init__(self, config: Config) -> None:
        for style in config.styles:
            if style not in STYLES:
                raise unknown("style", style, STYLES)
        if len(set(config.styles)) != len(config.styles) or len(config.styles) < 2:
            raise UserError(f"styles {' '.join(config.styles)}: name two or more, each once")
        most = MOST[config.content]
        if not 2 <= config.classes <= most:
            raise UserError(f"domains classes {config.classes} is out of range; use 2 to {most}")
        check_least("domains", config, per_class=5)
        if config.content == "digits" and config.per_class * len(config.styles) > DIGITS_PER_CLASS:
            raise UserError(
                f"domains per_class {config.per_class}: there are {DIGITS_PER_CLASS} images of a "
                f"digit for {len(config.styles)} domains; use at most "
                f"{DIGITS_PER_CLASS // len(config.styles)}"
            )
        fractals.check(range(config.classes), config.size, config.views, SEED)
        super().__init__(config)

    def load(self) -> DomainSet:
        """Images in order of class; the same pixels at each call."""
        c = self.config
        gray = self._gray()  # [classes, domains * per_class, S, S]
        labels = torch.arange(c.classes).repeat_interleave(c.per_class)
        domains = []
        for number, style in enumerate(c.styles):
            own = gray[:, number * c.per_class : (number + 1) * c.per_class].flatten(0, 1)
            generator = seeding.generator(SEED, "style", style)
            domains.append(Domain(style, draw(own, style, generator), labels))
        name = f"embedded {c.content}"
        return DomainSet(
            name, tuple(domains), tuple(f"{c.content[:-1]} {i}" for i in range(c.classes))
        )

    def _gray(self) -> Tensor:
        """All images, uint8 [classes, images of a class, S, S]."""
        c = self.config
        count = c.per_class * len(c.styles)
        if c.content == "digits":
            return _digits(c.classes, count, c.size)
        images = fractals.render_cached(c.classes, count, c.size, c.views, SEED, "train")
        return images.view(c.classes, count, c.size, c.size)


def _digits(classes: int, count: int, size: int) -> Tensor:
    """Scikit-learn's 8x8 digits, enlarged: uint8 [classes, count, size, size]."""
    values, by_class = shuffled_digits()
    chosen = np.concatenate([own[:count] for own in by_class[:classes]])
    small = torch.from_numpy(values[chosen]).float()
    large = F.interpolate(small[:, None], size=(size, size), mode="bicubic", align_corners=False)
    pixels = large.round().clamp(0, 255).to(torch.uint8)
    return pixels.view(classes, count, size, size)
