"""Class folders and Tiny ImageNet as shifted test sets, from small trees of their layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shift_trees import image

from cl_benchmarks.shifts.domain import corrupt, read_image
from cl_benchmarks.shifts.folders import (
    TINY_FIT,
    Fit,
    FolderShifts,
    class_folder,
    tiny_imagenet,
)
from dynmoe import seeding
from dynmoe.errors import UserError

WNIDS = ["n03", "n01", "n02"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three classes, listed in another order than that of their names; two images each."""
    tree = tmp_path / "tiny-imagenet-200"
    lines = []
    for number in range(6):
        image(tree / "val" / "images" / f"val_{number}.JPEG", 64, 64, seed=number)
        lines.append(f"val_{number}.JPEG\t{WNIDS[number % 3]}\t0\t0\t1\t1\n")
    (tree / "val" / "val_annotations.txt").write_text("".join(lines))
    (tree / "wnids.txt").write_text("\n".join(WNIDS))
    for wnid in WNIDS:
        image(tree / "train" / wnid / "images" / f"{wnid}_0.JPEG", 64, 64)
    return tmp_path


def test_tiny_imagenets_labels_follow_the_sorted_wnids(tiny: Path) -> None:
    found = tiny_imagenet(tiny)
    assert found.classes == ("n01", "n02", "n03")
    by_file = {path.name: found.classes[label]
               for path, label in zip(found.files, found.labels, strict=True)}  # fmt: skip
    assert by_file == {f"val_{number}.JPEG": WNIDS[number % 3] for number in range(6)}
    assert tiny_imagenet(tiny / "tiny-imagenet-200") == found
    train = tiny_imagenet(tiny, "train")
    assert [p.parents[1].name for p in train.files] == ["n01", "n02", "n03"]


def test_corruptions_are_made_at_64_pixels_and_resized_after(tiny: Path) -> None:
    images = tiny_imagenet(tiny)
    outputs = torch.tensor([7, 5, 9])
    small = FolderShifts(images, TINY_FIT, outputs, 10).corrupted("contrast", 2)
    for index in (0, 3):
        clean = read_image(images.files[index], None, 64)
        expected = corrupt(clean, "contrast", 2, seeding.derive(0, index))
        assert torch.equal(small.images([index])[0], expected)
    assert small.labels.tolist() == [[7, 5, 9][label] for label in images.labels]
    large = FolderShifts(images, Fit(64, None, 96), outputs, 10)
    assert large.size == 96
    resized = large.corrupted("contrast", 2).images([3])[0]
    expected = torch.nn.functional.interpolate(
        small.images([3]).float(), (96, 96), mode="bilinear", antialias=True
    )
    assert resized.dtype == torch.uint8 and torch.equal(resized, expected[0].round().byte())


def test_published_corruptions_are_read_by_class_name(tiny: Path) -> None:
    images = tiny_imagenet(tiny)
    root = tiny / "Tiny-ImageNet-C"
    for number, wnid in enumerate(WNIDS):
        image(root / "fog" / "3" / wnid / "test_0.JPEG", 64, 64, seed=20 + number)
    source = FolderShifts(images, TINY_FIT, torch.arange(3), 3, root)
    fog = source.corrupted("fog", 3)
    assert source.name == "Tiny ImageNet (Tiny-ImageNet-C)" and fog.labels.tolist() == [0, 1, 2]
    read = read_image(root / "fog" / "3" / "n03" / "test_0.JPEG", None, 64)
    assert torch.equal(fog.images([2])[0], read)
    with pytest.raises(UserError, match="no severity 5 of fog in .*; there: 3"):
        source.corrupted("fog", 5)
    (root / "fog" / "3" / "n02").rename(root / "fog" / "3" / "other")
    with pytest.raises(UserError, match=r"3 class folders .* \(n02, ...\), 1 do not belong"):
        source.corrupted("fog", 3)
    with pytest.raises(UserError, match=r"folder .* is not there; give another --corrupted-dir"):
        FolderShifts(images, TINY_FIT, torch.arange(3), 3, tiny / "none")


def test_class_folders_with_and_without_a_training_part(tmp_path: Path) -> None:
    for name in ("cat", "bee"):
        image(tmp_path / "pets" / name / "a.png", 40, 30)
    plain = class_folder(tmp_path / "pets")
    assert plain.classes == ("bee", "cat") and plain.name == "pets"
    with pytest.raises(UserError, match="no training images in .*pets"):
        class_folder(tmp_path / "pets", "train")
    (tmp_path / "pets").rename(tmp_path / "val")
    image(tmp_path / "train" / "bee" / "b.png", 40, 30)
    parted = class_folder(tmp_path)
    assert [p.parent.name for p in parted.files] == ["bee", "cat"]
    assert {p.parents[1].name for p in parted.files} == {"val"}
    source = FolderShifts(class_folder(tmp_path), Fit(24, 32), torch.arange(2), 2)
    clean = source.other("clean").images([1])[0]
    assert torch.equal(clean, read_image(tmp_path / "val" / "cat" / "a.png", 32, 24))


def test_what_is_wrong_with_folders_is_told(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match="no data folder; .*--data-dir"):
        class_folder(None)
    with pytest.raises(UserError, match="is not there"):
        class_folder(tmp_path / "none")
    (tmp_path / "flat").mkdir()
    with pytest.raises(UserError, match="no class folders in .*flat"):
        class_folder(tmp_path / "flat")
    image(tmp_path / "flat" / "one" / "a.png", 40, 40)
    with pytest.raises(UserError, match="flat has 1 class"):
        class_folder(tmp_path / "flat")
    (tmp_path / "flat" / "two").mkdir()
    with pytest.raises(UserError, match="no images in .*two"):
        class_folder(tmp_path / "flat")
    with pytest.raises(UserError, match="no Tiny ImageNet in .*flat"):
        tiny_imagenet(tmp_path / "flat")
    source = FolderShifts(tiny_imagenet(tiny), TINY_FIT, torch.arange(3), 3)
    with pytest.raises(UserError, match="Tiny ImageNet has no sketch"):
        source.other("sketch")
