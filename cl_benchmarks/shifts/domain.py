"""A domain: labelled test images of one distribution.

Shapes: n images, S rows and columns. Images are uint8 `[n, 3, S, S]`, 255 is white; a label is an
index among the model's outputs.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from cl_benchmarks.image_reader import read_rgb, to_tensor
from cl_benchmarks.images import DECODERS
from dynmoe.errors import UserError


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

    def images(self, indices: Sequence[int]) -> Tensor:
        """See Domain."""
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

    def images(self, indices: Sequence[int]) -> Tensor:
        """See Domain.

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
