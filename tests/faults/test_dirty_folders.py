"""Folders of images with dirt in them, as cl, dg and tta read them: read rightly, or one line.

Of single files (16 bits, palettes, truncated ones, text, floats that are not finite, oversized)
test_image_reader.py tells, through the same three readers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cl_benchmarks.domains.domainbed import read_duplicates
from cl_benchmarks.shifts.folders import class_folder, tiny_imagenet
from dynmoe import registry
from dynmoe.errors import UserError

SIDE = 16


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root: Path) -> Path:
    """Two domains with two classes of four images."""
    for domain in ("art", "photo"):
        for label, name in enumerate(("cat", "dog")):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(4):
                (folder / f"{i}.png").write_bytes(png(50 * label + i))
    return root


def read_cl(root: Path) -> int:
    """Images that cl reads of the first domain."""
    options = {"data_dir": root / "art", "size": SIDE}
    data = registry.get("dataset", "folder").Config(**options).build().load(0)
    return len(data.train_images) + len(data.test_images)


def read_dg(root: Path) -> int:
    """Images of the first domain of dg, all of them decoded."""
    first = registry.get("domains", "folder").Config(data_dir=root).build().load().domains[0]
    for i in range(len(first)):
        first.pixels(i)
    return len(first)


def read_tta(root: Path) -> int:
    """Images that tta finds in the first domain; it decodes them batch by batch."""
    return len(class_folder(root / "art").files)


READERS = {"cl": read_cl, "dg": read_dg, "tta": read_tta}


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[Path], int]:
    return READERS[request.param]


def test_a_clean_folder(read: Callable[[Path], int], tmp_path: Path) -> None:
    assert read(tree(tmp_path / "set")) == 8


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_in_a_loop_brings_no_image_twice(
    target: str, read: Callable[[Path], int], tmp_path: Path
) -> None:
    root = tree(tmp_path / "set")
    (root / "art" / "cat" / "again").symlink_to(target)
    assert read(root) == 8


def test_a_class_that_is_a_link_elsewhere_is_read(
    read: Callable[[Path], int], tmp_path: Path
) -> None:
    """Data sets are often put together of links; whoever makes them means it."""
    root = tree(tmp_path / "set")
    (root / "art" / "dog").rename(tmp_path / "dogs")
    (root / "art" / "dog").symlink_to(tmp_path / "dogs")
    assert read(root) == 8


def test_an_empty_class_is_named(read: Callable[[Path], int], tmp_path: Path) -> None:
    root = tree(tmp_path / "set")
    for path in (root / "art" / "dog").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"(no images in .*art/dog; unpack|art/dog does not)"):
        read(root)


def test_a_class_of_links_to_nothing_is_named(read: Callable[[Path], int], tmp_path: Path) -> None:
    root = tree(tmp_path / "set")
    for path in (root / "art" / "dog").iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "gone.png")
    with pytest.raises(
        UserError, match=r"(no images in|cannot read|holds images) .*art/dog"
    ) as caught:
        read(root)
    assert "\n" not in str(caught.value)


def test_names_of_any_letters(read: Callable[[Path], int], tmp_path: Path) -> None:
    root = tree(tmp_path / "set")
    for domain in ("art", "photo"):
        (root / domain / "dog").rename(root / domain / "dög 'x'; $(y)\n<b>")
    assert read(root) == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(read: Callable[[Path], int], tmp_path: Path) -> None:
    root = tree(tmp_path / "set")
    (root / "art" / "dog").chmod(0)
    try:
        with pytest.raises(UserError, match="art/dog"):
            read(root)
    finally:
        (root / "art" / "dog").chmod(0o700)


@pytest.mark.parametrize("name", ["../../secret", "/etc", "a/b", ".."])
def test_names_in_a_list_of_classes_never_leave_the_folder(name: str, tmp_path: Path) -> None:
    for place in ("set/val/n01", "secret"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.png").write_bytes(png(9))
    listed = tmp_path / "set" / "wnids.txt"
    listed.write_text(f"n01\n{name}\n")
    with pytest.raises(UserError, match=r"wnids\.txt must name each class folder once") as caught:
        tiny_imagenet(tmp_path / "set")
    assert repr(name) in str(caught.value)


def test_a_list_of_classes_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "wnids.txt").write_bytes(b"\xff\xfe\x00n")
    with pytest.raises(UserError, match="unpack"):
        tiny_imagenet(tmp_path)


def test_a_list_of_duplicates_with_odd_lines(tmp_path: Path) -> None:
    """They name images to leave out, and are compared, never opened."""
    (tmp_path / "list.txt").write_text(".\n/\n../x.png\n\nreal/a.png\n")
    found = read_duplicates(tmp_path / "list.txt", "domain_net")
    assert found[-2:] == [Path("../x.png"), Path("real/a.png")]
