"""Embedded fractal images; needs no file and no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cl_benchmarks import fractals
from cl_benchmarks.dataset import Dataset
from cl_benchmarks.images import ImageData
from dynmoe.errors import UserError


class Fractal(
    Dataset,
    name="fractal",
    source="after Kataoka et al. 2020 (ACCV) and Anderson and Farrell 2022 (arXiv 2110.03091)",
):
    """Gray fractal images, one iterated function system per class (FractalDB, 2110.03091)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Dataset.Config):
        """Options of the fractal images."""

        classes: int = 200
        """how many of the 200 systems, 2 to 200"""
        size: int = 32
        """image side in pixels, 8 to 256"""
        train_per_class: int = 100
        """training images of each class"""
        test_per_class: int = 20
        """test images of each class, from a random stream of their own"""
        views: Literal["easy", "middle", "hard"] = "hard"
        """how much a class varies. easy: parameters +-40%, flips. middle: the same, rotated by
        +-20 degrees, zoomed and shifted. hard: parameters +-80%, any rotation, zoom +-40%, shift
        15%: a small network memorises the training images but hardly generalises"""

    def __init__(self, config: Config) -> None:
        for option in ("train_per_class", "test_per_class"):
            if getattr(config, option) < 1:
                raise UserError(
                    f"dataset {option} {getattr(config, option)} is too small; use 1 or more"
                )
        if config.classes < 2:
            raise UserError(f"dataset classes {config.classes} is too small; use 2 to 200")
        fractals.check(range(config.classes), config.size, config.views, seed=0)
        self.config = config

    def load(self, seed: int) -> ImageData:
        """Render, or read from the cache; gray images `[N, 1, size, size]` in order of class."""
        c = self.config
        labels = torch.arange(c.classes)
        return ImageData(
            name=f"fractal-{c.views}-{c.size}",
            train_images=fractals.render_cached(
                c.classes, c.train_per_class, c.size, c.views, seed, "train"
            ),
            train_labels=labels.repeat_interleave(c.train_per_class),
            test_images=fractals.render_cached(
                c.classes, c.test_per_class, c.size, c.views, seed, "test"
            ),
            test_labels=labels.repeat_interleave(c.test_per_class),
            num_classes=c.classes,
        )
