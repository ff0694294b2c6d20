"""Reading images from folders and describing them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cl_benchmarks import images
from cl_benchmarks.images import ImageData, channel_stats, class_tree_files, decode
from dynmoe.errors import UserError


def _save(path: Path, color: tuple[int, int, int] | int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if isinstance(color, tuple) else "L", (size, size), color).save(path)
    return path


def test_reads_both_layouts_and_gray_images(tmp_path: Path) -> None:
    _save(tmp_path / "train" / "b" / "1.png", (1, 2, 3))
    _save(tmp_path / "train" / "b" / "0.png", 9)
    _save(tmp_path / "train" / "a" / "images" / "x.png", (4, 5, 6))
    (tmp_path / "train" / "a" / "boxes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    files, y, names = class_tree_files(tmp_path, "train", 2)
    x = decode(files, 8)
    assert names == ["a", "b"] and y == [0, 1, 1] and x.shape == (3, 3, 8, 8)
    assert x[:, :, 0, 0].tolist() == [[4, 5, 6], [9, 9, 9], [1, 2, 3]]
    _, y, _ = class_tree_files(tmp_path, "train", 2, names=["b", "a"])
    assert y == [0, 0, 1]


def test_keeps_rows_columns_and_channels_apart(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    got = decode([tmp_path / "x.png"] * 600, 8)
    assert (got == torch.from_numpy(pixels).permute(2, 0, 1)).all()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    good = [_save(tmp_path / f"{i}.jpeg", size=64) for i in range(5)]
    content = good[3].read_bytes()
    bad = {"truncated": content[:-200], "text": b"hello", "empty": b""}[damage]
    good[3].write_bytes(bad)
    with pytest.raises(UserError, match=r"cannot read image .*3\.jpeg: ") as caught:
        decode(good, 64)
    assert "\n" not in str(caught.value)


def test_missing_image_and_other_size_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read image .*gone\.png"):
        decode([tmp_path / "gone.png"], 8)
    with pytest.raises(UserError, match=r"odd\.png is 9x9, expected 8x8"):
        decode([_save(tmp_path / "odd.png", size=9)], 8)


@pytest.mark.parametrize(("given", "right"), [("top", "top/set"), ("top/set/train", "top/set"),
                                              ("top/set/train/a", "top/set")])  # fmt: skip
def test_wrong_folder_gets_a_suggestion(tmp_path: Path, given: str, right: str) -> None:
    for name in "ab":
        _save(tmp_path / "top" / "set" / "train" / name / "0.png")
    with pytest.raises(UserError) as caught:
        class_tree_files(tmp_path / given, "train", 2)
    text = str(caught.value)
    assert f"expected 2 class folders in {tmp_path / given / 'train'}, found 0" in text
    assert text.endswith(f"Did you mean {tmp_path / right}?")


def test_missing_and_empty_classes_are_named(tmp_path: Path) -> None:
    _save(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(UserError, match="expected 3 class folders in .*train, found 1"):
        class_tree_files(tmp_path, "train", 3)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(UserError, match="no images in .*train/b"):
        class_tree_files(tmp_path, "train", 2)


def test_channel_stats_are_those_of_numpy(data: ImageData) -> None:
    mean, std = channel_stats(data.train_images)
    pixels = data.train_images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-6)


def test_channel_stats_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 1, 2, 2)
    exact, _ = channel_stats(ramp)
    monkeypatch.setattr(images, "STATS_IMAGES", 11)
    sampled, std = channel_stats(ramp)
    assert abs(float(sampled - exact)) < 0.01 and float(std) > 0.1
    assert float(
        channel_stats(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8))[1]
    ) == 1 / np.float32(255)


def test_image_data_refuses_what_does_not_fit(data: ImageData) -> None:
    from dataclasses import replace

    assert data.shape == (2, 4, 4)
    for change in (
        {"train_images": data.train_images.float()},
        {"train_labels": data.train_labels[1:]},
        {"test_labels": data.test_labels.int()},
        {"num_classes": 11},
        {"test_images": data.test_images[:, :1]},
    ):
        with pytest.raises(ValueError, match="train|test"):
            replace(data, **change)  # type: ignore[arg-type]
