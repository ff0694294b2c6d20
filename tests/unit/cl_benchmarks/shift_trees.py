"""Small trees in the exact layouts of ImageNet's test sets: one image, linked into every class."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image


def lines(file: str) -> list[str]:
    return (resources.files("timm.data") / "_info" / file).read_text().split()


WNIDS = lines("imagenet_synsets.txt")
SYNSETS = {key: lines(f"imagenet_{key}_synsets.txt") for key in ("r", "a")}


def image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A random smooth JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR).save(path)
    return path


def tree(folder: Path, wnids: list[str], picture: Path) -> Path:
    """`folder/<wnid>/ILSVRC2012_val_0.JPEG` for every wnid."""
    for wnid in wnids:
        (folder / wnid).mkdir(parents=True)
        os.link(picture, folder / wnid / "ILSVRC2012_val_0.JPEG")
    return folder
