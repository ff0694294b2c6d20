"""Image files as people have them, read as 8-bit RGB; and the files that systems leave beside them.

Every loader of image folders reads through here. What becomes of a file:

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

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynmoe.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

VERSION = 2
"""Raise it when the same file gives other pixels: what is cached of decoded images is then made
again."""
SYSTEM_NAMES = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found",
                "thumbs.db", "desktop.ini"}  # fmt: skip
"""In lower case; besides, every name that begins with a dot."""
TIFF_BITS, TIFF_INK = 258, 262
"""the TIFF tags BitsPerSample and PhotometricInterpretation; where the latter is 0, 0 is white"""


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
