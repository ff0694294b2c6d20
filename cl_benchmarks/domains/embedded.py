"""Domains made on the spot from embedded images; needs no file and no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_benchmarks import domain_styles, fractals
from cl_benchmarks.domain_set import Domain, DomainData, DomainSet
from dynmoe import seeding
from dynmoe.errors import UserError, unknown

SEED = 0
"""The set is one fixed data set, as a downloaded one is; a run's seed splits it."""
MOST = {"fractals": 100, "digits": 10}
"""Classes there are. Fractals from 100 on are those that the embedded backbone learns from."""
DIGITS_PER_CLASS = 174
"""Images of the rarest digit."""


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
            if style not in domain_styles.STYLES:
                raise unknown("style", style, domain_styles.STYLES)
        if len(set(config.styles)) != len(config.styles) or len(config.styles) < 2:
            raise UserError(f"styles {' '.join(config.styles)}: name two or more, each once")
        most = MOST[config.content]
        if not 2 <= config.classes <= most:
            raise UserError(f"domains classes {config.classes} is out of range; use 2 to {most}")
        if config.per_class < 5:
            raise UserError(f"domains per_class {config.per_class} is too small; use 5 or more")
        if config.content == "digits" and config.per_class * len(config.styles) > DIGITS_PER_CLASS:
            raise UserError(
                f"domains per_class {config.per_class}: there are {DIGITS_PER_CLASS} images of a "
                f"digit for {len(config.styles)} domains; use at most "
                f"{DIGITS_PER_CLASS // len(config.styles)}"
            )
        fractals.check(range(config.classes), config.size, config.views, SEED)
        self.config = config

    def load(self) -> DomainSet:
        """Images in order of class; the same pixels at each call."""
        c = self.config
        gray = self._gray()  # [classes, domains * per_class, S, S]
        labels = torch.arange(c.classes).repeat_interleave(c.per_class)
        domains = []
        for number, style in enumerate(c.styles):
            own = gray[:, number * c.per_class : (number + 1) * c.per_class].flatten(0, 1)
            generator = seeding.generator(SEED, "style", style)
            domains.append(Domain(style, domain_styles.draw(own, style, generator), labels))
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
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.images))
    chosen = [order[digits.target[order] == label][:count] for label in range(classes)]
    small = torch.from_numpy(digits.images[np.concatenate(chosen)] * (255 / 16)).float()
    large = F.interpolate(small[:, None], size=(size, size), mode="bicubic", align_corners=False)
    pixels = large.round().clamp(0, 255).to(torch.uint8)
    return pixels.view(classes, count, size, size)
