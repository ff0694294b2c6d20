"""What data sets of image files share: choice of files, held-out ones, decoding into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cl_benchmarks.images import READER_VERSION, decode, read_rgb
from dynmoe.errors import UserError
from dynmoe.lab import cache

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Fit = Literal["crop", "exact"]
"""crop: the shorter side is resized, then the middle taken; exact: images have the size already"""


def first_by_name(
    files: Sequence[Path], groups: Sequence[object], count: int
) -> tuple[list[int], int]:
    """Indices of the first `count` files of each group, by name, in their old order.

    Args:
        files: N of them.
        groups: what a file belongs to, such as its class.
        count: 0 for all.

    Returns:
        indices, and the most files that a group has.

    Raises:
        UserError: a group has fewer.
    """
    members: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    most = max(map(len, members.values()))
    if not count:
        return list(range(len(files))), most
    kept = []
    for own in members.values():
        if len(own) < count:
            raise UserError(
                f"{count} images per class were asked for, and {files[own[0]].parent} has "
                f"{len(own)}; ask for {min(map(len, members.values()))} or fewer, or 0 for all"
            )
        kept += sorted(own, key=lambda index: files[index].name)[:count]
    return sorted(kept), most


def held_out(
    files: Sequence[Path], groups: Sequence[object], share: float
) -> tuple[list[int], list[int]]:
    """Indices of training and test files: of each group a share is for tests, at least one file.

    Files are ranked by the SHA-256 of their names, so the choice looks random, needs no seed, and
    hardly moves when files are added.

    Raises:
        UserError: a group has a single file.
    """
    members: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    test: set[int] = set()
    for own in members.values():
        if len(own) < 2:
            raise UserError(
                f"{files[own[0]].parent} has 1 image, and one must be held out for tests; add "
                "images, or give a test folder"
            )
        own.sort(key=lambda index: hashlib.sha256(files[index].name.encode()).digest())
        test.update(own[: min(max(1, round(share * len(own))), len(own) - 1)])
    return [i for i in range(len(files)) if i not in test], sorted(test)


def averaged(stored: int, size: int) -> Callable[[Path], Picture]:
    """A reader of images of `stored` pixels a side, made `size` by averages over squares.

    Raises:
        UserError: the size does not divide that of the files.
    """
    if size < 1 or stored % size:
        sizes = [n for n in range(8, stored + 1) if stored % n == 0]
        raise UserError(f"dataset size {size} must be one of {', '.join(map(str, sizes))}")

    def read(path: Path) -> Picture:
        picture = read_rgb(path, (stored, stored))
        return picture if size == stored else picture.reduce(stored // size)

    return read


def fitted(size: int, fit: Fit) -> Callable[[Path], Picture]:
    """A reader of images of any size, made `size` pixels wide and high; bicubic."""

    def read(path: Path) -> Picture:
        from PIL import Image

        if fit == "exact":
            return read_rgb(path, (size, size))
        picture = read_rgb(path)
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)

    return read


def decode_cached(
    name: str,
    train: Sequence[Path],
    test: Sequence[Path],
    size: int,
    how: str,
    read: Callable[[Path], Picture],
) -> tuple[Tensor, Tensor]:
    """Training and test images, uint8 `[N, 3, size, size]`; from the cache where it has them.

    Args:
        name: begins the name of the file in the cache.
        how: all that decides pixels besides files and size.

    Raises:
        UserError: names the file that cannot be read.
    """
    key = cache.digest({
        "reader": READER_VERSION, "size": size, "how": how, "train": len(train),
        "files": cache.file_states([*train, *test]),
    })  # fmt: skip
    arrays = cache.load_or_make(
        f"{name}-{key}",
        lambda: {
            "train_images": decode(train, size, read).numpy(),
            "test_images": decode(test, size, read).numpy(),
        },
    )
    return torch.from_numpy(arrays["train_images"]), torch.from_numpy(arrays["test_images"])


def thinned(name: str, *parts: str) -> str:
    """A data set's name with what was left out or changed, such as "x (10 of 50 per class)"."""
    said = ", ".join(part for part in parts if part)
    return f"{name} ({said})" if said else name
