"""Tiny ImageNet where it is found, else the embedded fractal images."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from cl_benchmarks.dataset import Dataset
from cl_benchmarks.datasets.fractal import Fractal
from cl_benchmarks.datasets.tiny_imagenet import find_tree, read_tree
from cl_benchmarks.images import ImageData
from dynmoe.errors import UserError
from dynmoe.lab.cache import notice


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
        self.config = config

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
