"""CIFAR-100, read by torchvision: looked for on the disk, and fetched on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cl_benchmarks.images import Dataset, ImageData
from dynmoe.errors import UserError

CIFAR = "cifar-100-python"


class Cifar100(Dataset, name="cifar100", source="Krizhevsky 2009 (University of Toronto)"):
    """32x32 colour photographs of 100 classes (Krizhevsky 2009): 50,000 train, 10,000 test."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Dataset.Config):
        """Options of CIFAR-100."""

        data_dir: Path | None = None
        """the folder cifar-100-python or the one above it; by default ./data and Avalanche's
        folder are searched"""
        download: bool = False
        """fetch it into data_dir (by default ./data) where it is missing, 170 MB"""

    def load(self, seed: int) -> ImageData:
        """Images `[N, 3, 32, 32]` in the files' order, the 100 fine labels."""
        root, places = self._root()
        if root is None and not self.config.download:
            raise UserError(
                f"CIFAR-100 not found: no {CIFAR} in {', '.join(map(str, places))}; "
                "use --dataset.data-dir DIR, or --dataset.download to fetch it"
            )
        root = root or places[0]
        train, test = self._read(root, train=True), self._read(root, train=False)
        return ImageData(
            name="cifar100",
            train_images=torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(),
            train_labels=torch.tensor(train.targets),
            test_images=torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(),
            test_labels=torch.tensor(test.targets),
            num_classes=100,
        )

    def _root(self) -> tuple[Path | None, list[Path]]:
        """The folder that holds the data, if there is one, and the folders looked into."""
        places = [Path("data"), Path.home() / ".avalanche" / "data" / "cifar100"]
        if self.config.data_dir is not None:
            given = self.config.data_dir.expanduser()
            places = [given.parent if given.name == CIFAR else given]
        return next((p for p in places if (p / CIFAR).is_dir()), None), places

    def _read(self, root: Path, train: bool) -> Any:
        from torchvision.datasets import CIFAR100

        try:
            return CIFAR100(str(root), train=train, download=self.config.download)
        except (OSError, RuntimeError, EOFError) as error:  # torchvision checks the files' MD5
            reason = str(error).split("\n")[0]
            raise UserError(
                f"CIFAR-100 in {root / CIFAR} cannot be used: {reason}; "
                f"delete that folder and use --dataset.download"
            ) from None
