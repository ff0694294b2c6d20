"""Small trees of image files in DomainBed's layout."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image


def png(color: tuple[int, int, int], size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def make_tree(root: Path, domains: list[str], classes: list[str], count: int = 2) -> Path:
    """`count` images in each class of each domain, all the same bytes."""
    data = png((200, 100, 50))
    for domain in domains:
        for name in classes:
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(data)
    return root
