"""A domain: labelled test images of one distribution, in memory, in files, or corrupted on the fly.

Shapes: n images, S rows and columns. Images are uint8 `[n, 3, S, S]`, 255 is white; a label is an
index among the model's outputs. Corrupting needs the package imagecorruptions-imaug, an extra:
`pip install dynmoe[tta]`. Its pixels are not bit for bit those of the released ImageNet-C, whose
images were stored as JPEG.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_benchmarks.images import DECODERS, read_rgb, to_tensor
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


class Domain(ABC):
    """Images that are read when they are asked for, and their labels.

    Args:
        name: stands in tables; domains of one name are counted together.
        labels: int64 [N].
    """

    def __init__(self, name: str, labels: Tensor) -> None:
        self.name, self.labels = name, labels

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    @abstractmethod
    def identity(self) -> str:
        """Text that changes with the images or their order: what is kept of them is known by it."""

    @abstractmethod
    def images(self, indices: Sequence[int]) -> Tensor:
        """Images uint8 `[n, 3, S, S]` at n indices, in their order.

        Raises:
            UserError: an image that cannot be read; names it.
        """


class Memory(Domain):
    """Images held in memory.

    Args:
        name: see Domain.
        images: uint8 `[N, 3, S, S]`.
        labels: int64 [N].
    """

    def __init__(self, name: str, images: Tensor, labels: Tensor) -> None:
        super().__init__(name, labels)
        self.tensor = images

    @cached_property
    def identity(self) -> str:
        """A digest of the values."""
        values = self.tensor.contiguous().numpy()
        return f"{hashlib.sha256(values.tobytes()).hexdigest()[:16]}-{values.shape}"

    def images(self, indices: Sequence[int]) -> Tensor:
        """See Domain: uint8 [n, 3, S, S]."""
        return self.tensor[torch.as_tensor(indices, dtype=torch.int64)]


class Files(Domain):
    """Images in files, decoded as RGB and cropped when they are asked for.

    Args:
        name: see Domain.
        files: one path per image.
        labels: int64 [N].
        resize: the shorter side is resized to this many pixels (bilinear) before the crop; None
            crops the image as it is, which is right for ImageNet-C.
        size: side of the centre crop.
    """

    def __init__(
        self, name: str, files: Sequence[Path], labels: Tensor, resize: int | None, size: int
    ) -> None:
        super().__init__(name, labels)
        self.files, self.resize, self.size = list(files), resize, size

    @cached_property
    def identity(self) -> str:
        """A digest of the files' states, and how they are cropped."""
        values = {"files": cache.file_states(self.files), "crop": [self.resize, self.size]}
        return cache.digest(values)

    def images(self, indices: Sequence[int]) -> Tensor:
        """See Domain: uint8 [n, 3, S, S].

        Raises:
            UserError: a file that is missing, damaged, no image, or too small to be cropped.
        """

        def read(index: int) -> Tensor:
            return read_image(self.files[index], self.resize, self.size)

        with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(read, indices)))


def read_image(path: Path, resize: int | None, size: int) -> Tensor:
    """One image file as uint8 `[3, size, size]`: resize the shorter side, then crop the centre.

    Raises:
        UserError: see `Files.images`.
    """
    from PIL import Image

    rgb = read_rgb(path)
    width, height = rgb.size
    if resize is not None:
        short = min(width, height)
        width, height = int(resize * width / short), int(resize * height / short)
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    if min(width, height) < size:
        raise UserError(
            f"image {path} is {width}x{height}, smaller than the crop of {size}x{size}; "
            "restore the file"
        )
    left, top = round((width - size) / 2), round((height - size) / 2)
    return to_tensor(rgb.crop((left, top, left + size, top + size)))


def check(corruption: str, severity: int) -> None:
    """Refuse an unknown corruption or severity.

    Raises:
        UserError: it is unknown; names those that there are.
    """
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
        try:
            import imagecorruptions
        except ImportError as error:
            raise UserError(
                f"on-the-fly corruptions need imagecorruptions-imaug ({error}); "
                "pip install 'dynmoe[tta]'"
            ) from None
        number = seeding.derive(seed, corruption, severity) % 2**32
        np.random.seed(number)
        options = {"seed": number} if corruption in SEEDED else {}
        pixels = imagecorruptions.corrupt(
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

    @cached_property
    def identity(self) -> str:
        """As the corrupted images are known in the cache."""
        return self._folder

    def images(self, indices: Sequence[int]) -> Tensor:
        """See Domain: uint8 [n, 3, S, S].

        An image is corrupted once; 150 kB each are cached at 224 pixels.
        """
        return torch.stack([self._one(int(i)) for i in indices])

    def _one(self, index: int) -> Tensor:
        def make() -> cache.Arrays:
            clean = self.domain.images([index])[0]
            seed = seeding.derive(self.seed, index)
            return {"image": corrupt(clean, self.name, self.severity, seed).numpy()}

        made = cache.load_or_make(f"{self._folder}/{index:08d}", make)
        return torch.from_numpy(made["image"])


class Resized(Domain):
    """Another domain's images at another size, resized as they are asked for (bilinear).

    Args:
        domain: square images.
        size: side in pixels, 1 or more.
    """

    def __init__(self, domain: Domain, size: int) -> None:
        super().__init__(domain.name, domain.labels)
        self.domain, self.size = domain, size

    @cached_property
    def identity(self) -> str:
        """The other domain's, and the size."""
        return f"{self.domain.identity}, {self.size} px"

    def images(self, indices: Sequence[int]) -> Tensor:
        """See Domain: uint8 [n, 3, S, S]."""
        x = self.domain.images(indices).float()
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return x.round().clamp(0, 255).to(torch.uint8)
