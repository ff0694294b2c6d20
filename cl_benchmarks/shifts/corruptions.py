"""ImageNet-C's corruptions, and making them on the fly with the package imagecorruptions-imaug.

The package is an extra: `pip install dynmoe[tta]`. Its pixels are not bit for bit those of the
released ImageNet-C, whose images were stored as JPEG.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_benchmarks.shifts.domain import Domain
from dynmoe import seeding
from dynmoe.errors import UserError, unknown
from dynmoe.lab import cache

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS = tuple(name for names in GROUPS.values() for name in names)
"""The 15 of Hendrycks and Dietterich 2019 (arXiv 1903.12261), in their order."""
EXTRA = ("speckle_noise", "spatter", "gaussian_blur", "saturate")
"""Their 4 further ones, kept for validation."""
SEVERITIES = (1, 2, 3, 4, 5)
SEEDED = ("impulse_noise", "glass_blur")
"""Those that the package does not draw from numpy's global generator: they take a seed."""
LEAST_SIZE = 32
VERSION = 1
"""Raise it when the same arguments give other pixels: cached images are then made again."""


def check(corruption: str, severity: int) -> None:
    """Refuse an unknown corruption or severity with a UserError."""
    if corruption not in CORRUPTIONS + EXTRA:
        raise unknown("corruption", corruption, CORRUPTIONS + EXTRA)
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity} does not exist; use 1 to 5")


def corrupt(image: Tensor, corruption: str, severity: int, seed: int) -> Tensor:
    """One image uint8 `[3, H, W]`, corrupted; the same for the same arguments, always.

    numpy's global generator, which the package draws from, is left as it was.

    Raises:
        UserError: unknown corruption or severity, an image under 32 pixels, or no such package.
    """
    check(corruption, severity)
    if min(image.shape[1:]) < LEAST_SIZE:
        raise UserError(
            f"the image is {image.shape[2]}x{image.shape[1]}; corruptions need {LEAST_SIZE}x"
            f"{LEAST_SIZE} or more"
        )
    with seeding.kept():  # around the import too
        corruptions = _package()
        number = seeding.derive(seed, corruption, severity) % 2**32
        np.random.seed(number)
        options = {"seed": number} if corruption in SEEDED else {}
        pixels = corruptions.corrupt(
            np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
            severity=severity,
            corruption_name=corruption,
            **options,
        )
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


class Corrupted(Domain):
    """Another domain's images, corrupted when they are asked for and kept in the cache folder.

    Args:
        domain: the clean images.
        identity: names the clean images in the cache, e.g. a digest of their files.
        corruption: one of CORRUPTIONS or EXTRA; also the name of this domain.
        severity: 1 to 5.
        seed: image i is corrupted with a seed derived from (seed, i).

    Raises:
        UserError: unknown corruption or severity.
    """

    def __init__(
        self, domain: Domain, identity: str, corruption: str, severity: int, seed: int
    ) -> None:
        check(corruption, severity)
        super().__init__(corruption, domain.labels)
        self.domain, self.severity, self.seed = domain, severity, seed
        key = cache.digest({"version": VERSION, "images": identity, "seed": seed})
        self._folder = f"corrupted-{key}/{corruption}-{severity}"

    def images(self, indices: Sequence[int]) -> Tensor:
        """See Domain. An image is corrupted once; 150 kB each are cached at 224 pixels."""
        return torch.stack([self._one(int(i)) for i in indices])

    def _one(self, index: int) -> Tensor:
        def make() -> cache.Arrays:
            clean = self.domain.images([index])[0]
            seed = seeding.derive(self.seed, index)
            return {"image": corrupt(clean, self.name, self.severity, seed).numpy()}

        made = cache.load_or_make(f"{self._folder}/{index:08d}", make)
        return torch.from_numpy(made["image"])


def _package() -> Any:
    try:
        import imagecorruptions
    except ImportError as error:
        raise UserError(
            f"on-the-fly corruptions need imagecorruptions-imaug ({error}); "
            "pip install 'dynmoe[tta]'"
        ) from None
    return imagecorruptions
