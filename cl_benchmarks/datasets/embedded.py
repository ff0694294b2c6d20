"""Data sets that are there offline, and the choice between them and downloads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cl_benchmarks import fractals
from cl_benchmarks.datasets.tiny_imagenet import find_tree, read_tree
from cl_benchmarks.images import Dataset, ImageData, check_least
from dynmoe.errors import UserError
from dynmoe.lab.cache import notice

TRAIN_PER_CLASS = 140
TEST_PER_CLASS = 34
"""The rarest digit, 8, has 174 images. Equal counts divide into many numbers of chunks."""


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
        check_least("dataset", config, train_per_class=1, test_per_class=1)
        if config.classes < 2:
            raise UserError(f"dataset classes {config.classes} is too small; use 2 to 200")
        fractals.check(range(config.classes), config.size, config.views, seed=0)
        super().__init__(config)

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


def shuffled_digits() -> tuple[np.ndarray, list[np.ndarray]]:
    """Scikit-learn's digits, float64 `[N, 8, 8]` in 0 .. 255; each class's indices, shuffled."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    by_class = [order[digits.target[order] == label] for label in range(10)]
    return digits.images * (255 / 16), by_class


class Digits(
    Dataset, name="digits", source="Alpaydin and Kaynak 1998 (UCI), by way of scikit-learn"
):
    """8x8 gray handwritten digits that come with scikit-learn: 1,400 to train on, 340 to test."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Dataset.Config):
        """The data set has no options."""

    def load(self, seed: int) -> ImageData:
        """The same split for every seed: 140 and 34 images of each digit; 57 are left out.

        Images `[N, 1, 8, 8]` in order of class, their 17 gray levels spread over 0 .. 255.
        """
        values, by_class = shuffled_digits()
        images = torch.from_numpy(np.rint(values).astype(np.uint8))[:, None]
        both = np.stack([own[: TRAIN_PER_CLASS + TEST_PER_CLASS] for own in by_class])
        labels = torch.arange(10)
        return ImageData(
            name="digits",
            train_images=images[both[:, :TRAIN_PER_CLASS].ravel()],
            train_labels=labels.repeat_interleave(TRAIN_PER_CLASS),
            test_images=images[both[:, TRAIN_PER_CLASS:].ravel()],
            test_labels=labels.repeat_interleave(TEST_PER_CLASS),
            num_classes=10,
        )


class Auto(Dataset, name="auto"):
    """Tiny ImageNet where it is found, else fractal images; says which, and so does the name."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Fractal.Config):
        """Where to look, and the options of the fractal images, which photographs do not heed."""

        data_dir: Path | None = None
        """the folder tiny-imagenet-200 or the one above it; by default ./data and Avalanche's
        folder are searched"""

    def __init__(self, config: Config) -> None:
        options = {f.name: getattr(config, f.name) for f in fields(Fractal.Config)}
        self.fractal = Fractal(Fractal.Config(**options))
        super().__init__(config)

    def load(self, seed: int) -> ImageData:
        """One line on stderr tells when the fractal images are used.

        Raises:
            UserError: a Tiny ImageNet is there but cannot be read, or a folder was named and holds
                none; no silent change of data then.
        """
        tree, places = find_tree(self.config.data_dir)
        if tree is not None:
            return read_tree(tree)
        if self.config.data_dir is not None:
            raise UserError(
                f"no Tiny ImageNet in [{', '.join(map(str, places))}]; give the folder "
                "tiny-imagenet-200 or the one above it, or leave --dataset.data-dir out"
            )
        notice(
            f"dataset: Tiny ImageNet not found in [{', '.join(map(str, places))}]; using the "
            "embedded fractal images (--dataset tiny-imagenet --dataset.data-dir DIR for the real "
            "ones)"
        )
        return self.fractal.load(seed)
