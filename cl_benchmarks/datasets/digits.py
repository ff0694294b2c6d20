"""Scikit-learn's handwritten digits: the quickest real data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cl_benchmarks.dataset import Dataset
from cl_benchmarks.images import ImageData

TRAIN_PER_CLASS = 140
TEST_PER_CLASS = 34
"""The rarest digit, 8, has 174 images. Equal counts divide into many numbers of chunks."""


class Digits(
    Dataset, name="digits", source="Alpaydin and Kaynak 1998 (UCI), by way of scikit-learn"
):
    """8x8 gray handwritten digits that come with scikit-learn: 1,400 to train on, 340 to test."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Dataset.Config):
        """The data set has no options."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self, seed: int) -> ImageData:
        """The same split for every seed: 140 and 34 images of each digit; 57 are left out.

        Images `[N, 1, 8, 8]` in order of class, their 17 gray levels spread over 0 .. 255.
        """
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        order = np.random.default_rng(0).permutation(len(images))
        train, test = [], []
        for label in range(10):
            own = order[digits.target[order] == label]
            train.append(own[:TRAIN_PER_CLASS])
            test.append(own[TRAIN_PER_CLASS : TRAIN_PER_CLASS + TEST_PER_CLASS])
        labels = torch.arange(10)
        return ImageData(
            name="digits",
            train_images=images[np.concatenate(train)],
            train_labels=labels.repeat_interleave(TRAIN_PER_CLASS),
            test_images=images[np.concatenate(test)],
            test_labels=labels.repeat_interleave(TEST_PER_CLASS),
            num_classes=10,
        )
