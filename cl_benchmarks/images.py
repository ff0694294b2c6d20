"""Images and labels of a data set in memory, and reading them from files as people have them.

Shapes: N images, C channels, H rows, W columns; a value of 255 is white. Every loader of image
folders reads through `read_rgb`, as 8-bit RGB, and leaves out what systems put beside the images.
What becomes of a file:

- gray ones are repeated in each channel; palettes, CMYK and black-and-white are converted;
- transparent pixels are laid over white;
- 16-bit gray: 0 .. 65535 becomes 0 .. 255 (a 12-bit TIFF's 0 .. 4095 likewise);
- float gray: 0 .. 1 becomes 0 .. 255; other values and 32-bit integers have no known white, and
  are refused;
- of an animation the first frame;
- pixels stay as they are stored: an EXIF orientation is not applied, as in torchvision's
  ImageFolder, on which the published numbers of these sets rest.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.registry import Part, PartConfig

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

READER_VERSION = 2
"""Raise it when the same file gives other pixels: what is cached of decoded images is then made
again."""
SYSTEM_NAMES = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found",
                "thumbs.db", "desktop.ini"}  # fmt: skip
"""In lower case; besides, every name that begins with a dot."""
TIFF_BITS, TIFF_INK = 258, 262
"""the TIFF tags BitsPerSample and PhotometricInterpretation; where the latter is 0, 0 is white"""
SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
STATS_IMAGES = 10_000
"""Images that `channel_stats` looks at, at most."""
DECODERS = 4
"""Threads that decode images, at most; PIL lets them run side by side."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in memory.

    Raises:
        ValueError: tensors whose types or shapes do not fit together.
    """

    name: str
    """what the numbers of a run are about; stands in its folder, plots and tables"""
    train_images: Tensor
    """uint8 `[N, C, H, W]`; or float32, in units that a network can take as they are"""
    train_labels: Tensor
    """int64 `[N]`, each in 0 .. num_classes-1"""
    test_images: Tensor
    """the same type, `[N_test, C, H, W]`"""
    test_labels: Tensor
    """int64 `[N_test]`"""
    num_classes: int
    """classes of the data set, also those that happen to have no image"""
    train_domains: Tensor | None = None
    """int64 `[N]`, each in 0 .. len(domain_names)-1; None for data without domains"""
    test_domains: Tensor | None = None
    """int64 `[N_test]`; a domain may have no test images (CORe50's training sessions)"""
    domain_names: tuple[str, ...] = ()
    """as they stand in tables"""
    in_time_order: bool = False
    """rows as they came. Test rows are then the training rows: a protocol must test on what comes
    after a row, not on what was learnt (`online` does)"""
    files: tuple[Path, ...] = ()
    """that the images were read from; () for images that were made, or that are not in files"""
    tables: tuple[Path, ...] = ()
    """text files that rows and labels were read from"""

    def __post_init__(self) -> None:
        for split, images, labels, domains in (
            ("train", self.train_images, self.train_labels, self.train_domains),
            ("test", self.test_images, self.test_labels, self.test_domains),
        ):
            if images.dtype not in (torch.uint8, torch.float32) or images.dim() != 4:
                raise ValueError(f"{split} images must be uint8 or float32 [N, C, H, W], got "
                                 f"{images.dtype} {list(images.shape)}")  # fmt: skip
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(f"{split} labels must be int64 [{len(images)}], got "
                                 f"{labels.dtype} {list(labels.shape)}")  # fmt: skip
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(f"{split} labels must lie in 0 .. {self.num_classes - 1}")
            if (domains is None) == bool(self.domain_names):
                raise ValueError(f"{split} domains and the names of domains go together")
            if domains is not None:
                if domains.dtype != torch.int64 or domains.shape != labels.shape:
                    raise ValueError(f"{split} domains must be int64 [{len(labels)}]")
                if not set(domains.unique().tolist()) <= set(range(len(self.domain_names))):
                    raise ValueError(f"{split} domains must have one of {self.domain_names}")
        if self.train_images.dtype != self.test_images.dtype:
            raise ValueError("train and test images must have one type")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(f"train images are {list(self.train_images.shape[1:])}, test images "
                             f"{list(self.test_images.shape[1:])}")  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of one image."""
        c, h, w = self.train_images.shape[1:]
        return c, h, w


def check_least(kind: str, options: Any, **least: int) -> None:
    """Refuse options of a `kind` of part that are below `least`.

    Raises:
        UserError: names the option.
    """
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise UserError(
                f"{kind} {name} {getattr(options, name)} is too small; use {smallest} or more"
            )


def channel_stats(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each channel, for values scaled to 0 .. 1.

    Summed in float64 over at most STATS_IMAGES images, evenly spaced over uint8 `[N, C, H, W]`.
    A deviation is at least 1/255, one gray level, so that a constant channel can be divided by it.
    Of float32 images, which need no scaling, the mean is 0 and the deviation 1.

    Returns:
        mean `[C]`, std `[C]`, float32.
    """
    if images.is_floating_point():
        return torch.zeros(images.shape[1]), torch.ones(images.shape[1])
    count = min(len(images), STATS_IMAGES)
    index = torch.linspace(0, len(images) - 1, count, dtype=torch.float64).long()
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares, pixels = torch.zeros_like(total), 0
    for part in index.split(512):  # keeps the float64 copy small
        values = images[part].double() / 255
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
        pixels += values.numel() // values.shape[1]
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.float(), std.float()


def image_files(folder: Path) -> list[Path]:
    """Image files right inside a folder, sorted by name; others and systems' own are left out."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not is_system(e.name) and e.is_file()]
    suffixed = [name for name in sorted(names) if os.path.splitext(name)[1].lower() in SUFFIXES]
    return [folder / name for name in suffixed]


def class_files(folder: Path) -> list[Path]:
    """Images of one class: those in `folder/images` where there are any, else in `folder`."""
    return image_files(folder / "images") or image_files(folder)


def class_folders(root: Path) -> list[Path]:
    """Folders right inside `root`, sorted by name, hidden ones and systems' own left out."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and not is_system(p.name))


def check_class_folders(root: Path, split: str, expected: int) -> list[Path]:
    """The class folders in `root/split`.

    Raises:
        UserError: not `expected` many; names a folder beside, above or below that has them.
    """
    found = class_folders(root / split)
    if len(found) == expected:
        return found
    near = [root.parent, root.parent.parent, *class_folders(root)]
    right = [p for p in near if len(class_folders(p / split)) == expected]
    hint = f"Did you mean {right[0]}?" if right else f"Give the folder that holds {split}."
    raise UserError(
        f"expected {expected} class folders in {root / split}, found {len(found)}. {hint}"
    )


def class_tree_files(
    root: Path, split: str, expected: int, names: Sequence[str] | None = None
) -> tuple[list[Path], list[int], list[str]]:
    """Images in `root/split/<class>/*` or `root/split/<class>/images/*`.

    `names` gives the classes' order; without it they are sorted.

    Returns:
        N files, their labels, class names.

    Raises:
        UserError: wrong number of classes, a class that is missing or empty.
    """
    found = check_class_folders(root, split, expected)
    order = list(names) if names else [p.name for p in found]
    return *files_by_class([root / split / name for name in order], class_files), order


def files_by_class(
    folders: Sequence[Path], find: Callable[[Path], list[Path]], what: str = "data set"
) -> tuple[list[Path], list[int]]:
    """Images that `find` sees in the folders, one folder per class, and the folders' numbers.

    Raises:
        UserError: a class without images.
    """
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        own = find(folder)
        if not own:
            raise UserError(f"no images in {folder}; unpack the {what} again")
        files += own
        labels += [label] * len(own)
    return files, labels


def decode(
    files: Sequence[Path], size: int, read_one: Callable[[Path], Picture] | None = None
) -> Tensor:
    """Decode image files to uint8 `[N, 3, size, size]`.

    Args:
        read_one: gives a file's RGB picture, `size` pixels wide and high; by default `read_rgb`.

    Raises:
        UserError: names the file that cannot be read or is of another size.
    """
    read_one = read_one or (lambda path: read_rgb(path, (size, size)))
    out = torch.empty((len(files), 3, size, size), dtype=torch.uint8)

    def read(start: int) -> None:
        for i in range(start, min(start + 256, len(files))):
            out[i] = to_tensor(read_one(files[i]))

    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(read, start) for start in range(0, len(files), 256)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden or a system's own, and no part of a set."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> Picture:
    """A file as an RGB picture.

    Args:
        path: the file.
        size: the width and height that it must have; told from its header, before it is decoded.

    Raises:
        UserError: names the file that is missing, truncated, no image, too large, of another size,
            or whose values have no known white.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if size is not None and image.size != size:
                raise UserError(
                    f"image {path} is {image.width}x{image.height}, expected {size[0]}x{size[1]}; "
                    "restore the file"
                )
            return _rgb(image, path)
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = str(error).split(",")[0]  # such as "Image size (N pixels) exceeds limit of M"
        raise UserError(f"image {path} is too large: {reason}; shrink or remove it") from None
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        reason = (str(error) or type(error).__name__).split("\n")[0].replace(f" '{path}'", "")
        raise UserError(f"cannot read image {path}: {reason}; restore or delete the file") from None


def to_tensor(image: Picture) -> Tensor:
    """uint8 `[3, H, W]` of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _rgb(image: Picture, path: Path) -> Picture:
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _gray(_sixteen(image))
    if image.mode == "F":
        return _gray(255 * _unit(np.asarray(image), path))
    if image.mode == "I":
        raise UserError(
            f"image {path} holds 32-bit integers, whose white is not known; save it with 8 or 16 "
            "bits, or as float in 0 .. 1"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _sixteen(image: Picture) -> NDArray[np.float64]:
    """Values of 0 .. 255 from those of 16 or, in a TIFF, fewer bits."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image) * (255 / (2 ** int(tags.get(TIFF_BITS, (16,))[0]) - 1))
    return 255 - values if tags.get(TIFF_INK) == 0 else values  # PIL turns those of 8 bits alone


def _unit(values: NDArray[np.float32], path: Path) -> NDArray[np.float32]:
    """The same values, once all are known to lie in 0 .. 1."""
    if not np.isfinite(values).all():
        raise UserError(f"image {path} holds values that are not finite; restore or remove it")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise UserError(
            f"image {path} holds floats in {low:g} .. {high:g}; scale them to 0 .. 1, or save it "
            "with 8 or 16 bits"
        )
    return values


def _gray(values: NDArray[Any]) -> Picture:
    from PIL import Image

    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


class Dataset(Part, ABC, kind="dataset"):
    """Base of all data sets. A subclass takes its `Config` and defines `load`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of a data set."""

    def __init__(self, config: Any) -> None:
        """Check the options, where there are any.

        Raises:
            UserError: an option that cannot work.
        """
        self.config = config

    @abstractmethod
    def load(self, seed: int) -> ImageData:
        """All images. `seed` decides those that are generated; files are what they are.

        Raises:
            UserError: the data cannot be found or read; says where it was looked for.
        """
