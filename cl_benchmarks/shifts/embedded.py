"""Shifted fractals: the embedded stand-in for ImageNet-C, -R, -Sketch and -A.

Clean images are fractals in "middle" views (`cl_benchmarks.fractals`), gray as RGB. Corruptions are
those of `small`. The stand-ins for the other sets are ours: rendition paints the fractal in a
colour on a coloured ground, sketch keeps its outlines, dark on white, and adversarial shows it in
"hard" views, from which a network that knows the middle ones errs most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_benchmarks import fractals
from cl_benchmarks.shifts import small
from cl_benchmarks.shifts.corruptions import check
from cl_benchmarks.shifts.domain import Domain, Memory
from cl_benchmarks.shifts.source import OTHERS, ShiftSource
from dynmoe import seeding
from dynmoe.errors import UserError, unknown
from dynmoe.lab import cache

SEED = 0
"""The embedded images are one fixed data set, as a downloaded one is."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedConfig:
    """Options of the embedded images."""

    classes: int = 20
    """how many of the 200 fractal systems, 2 to 200"""
    size: int = 32
    """image side in pixels, 16 to 256"""
    train_per_class: int = 500
    """clean images of each class that the source model learns"""
    test_per_class: int = 12
    """images of each class in every domain"""


class Embedded(ShiftSource):
    """The embedded images.

    Args:
        config: sizes.

    Raises:
        UserError: a size that cannot work.
    """

    def __init__(self, config: EmbeddedConfig) -> None:
        for option in ("train_per_class", "test_per_class"):
            if getattr(config, option) < 1:
                raise UserError(
                    f"embedded {option} {getattr(config, option)} is too small; use 1 or more"
                )
        if config.classes < 2:
            raise UserError(f"embedded classes {config.classes} is too small; use 2 to 200")
        if config.size < 16:
            raise UserError(f"embedded size {config.size} is too small; use 16 to 256")
        fractals.check(range(config.classes), config.size, "middle", SEED)
        self.config, self.name = config, f"shifted fractals {config.size}"
        self.num_classes, self.size = config.classes, config.size
        self.mean, self.std = (0.2, 0.2, 0.2), (0.3, 0.3, 0.3)
        self._labels = torch.arange(config.classes).repeat_interleave(config.test_per_class)

    def training_images(self) -> tuple[Tensor, Tensor]:
        """Clean images uint8 `[N, 3, S, S]` and labels int64 [N] for the source model."""
        c = self.config
        images = self._rendered("middle", "train", c.train_per_class)
        return images, torch.arange(c.classes).repeat_interleave(c.train_per_class)

    def corrupted(self, corruption: str, severity: int) -> Domain:
        """See ShiftSource.

        Raises:
            UserError: unknown corruption or severity, or one of the four extra ones.
        """
        check(corruption, severity)
        key = cache.digest({
            "version": small.VERSION, "fractals": fractals.VERSION, "seed": SEED,
            "classes": self.config.classes, "per_class": self.config.test_per_class,
            "size": self.size, "corruption": corruption, "severity": severity,
        })  # fmt: skip

        def make() -> cache.Arrays:
            made = small.corrupt(self._clean(), corruption, severity, SEED)
            return {"images": made.numpy()}

        images = cache.load_or_make(f"shifted-fractals-{key}", make)["images"]
        return Memory(corruption, torch.from_numpy(images), self._labels)

    def other(self, shift: str) -> Domain:
        """See ShiftSource."""
        if shift == "clean":
            images = self._clean()
        elif shift == "rendition":
            images = _rendition(self._clean())
        elif shift == "sketch":
            images = _sketch(self._clean())
        elif shift == "adversarial":
            images = self._rendered("hard", "test", self.config.test_per_class)
        else:
            raise unknown("shift", shift, (*OTHERS, "clean"))
        return Memory(shift, images, self._labels)

    def _clean(self) -> Tensor:
        return self._rendered("middle", "test", self.config.test_per_class)

    def _rendered(self, views: fractals.ViewName, split: fractals.Split, each: int) -> Tensor:
        c = self.config
        gray = fractals.render_cached(c.classes, each, c.size, views, SEED, split)
        return gray.expand(-1, 3, -1, -1)


def _rendition(images: Tensor) -> Tensor:
    """Each image between two random colours: a dark ground, a bright figure."""
    g = seeding.generator(SEED, "rendition")
    ground = torch.rand((len(images), 3, 1, 1), generator=g) * 0.5
    figure = 0.5 + torch.rand((len(images), 3, 1, 1), generator=g) * 0.5
    x = images.float() / 255
    return ((ground + (figure - ground) * x) * 255).round().to(torch.uint8)


def _sketch(images: Tensor) -> Tensor:
    """Outlines by Sobel's gradient, half as dark as they could be, on white."""
    x = images[:, :1].float() / 255
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernel = torch.stack([across, across.T])[:, None]
    edges = F.conv2d(F.pad(x, (1,) * 4, mode="replicate"), kernel).norm(dim=1, keepdim=True)
    paper = 1 - 0.5 * edges.clamp(0, 1)
    return (paper * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
