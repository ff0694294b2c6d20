"""Tiny ImageNet's folders, in every layout that is around, and when something is wrong."""

from __future__ import annotations

import io
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cl_benchmarks.datasets import reading, tiny_imagenet
from cl_benchmarks.images import ImageData
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.lab import cache

NAMES = [f"n{(i * 77) % 200:08d}" for i in range(200)]
"""In the order of wnids.txt, which is not the sorted one. Class i is gray i + 20."""
LAYOUTS = ["annotated", "images", "flat"]


def _jpeg(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (64, 64), level).save(file, "JPEG")
    return file.getvalue()


def _tree(root: Path, layout: str = "annotated", classes: int = 200) -> Path:
    """One training and one validation image per class; the training one of class 3 is RGB."""
    tree = root / "tiny-imagenet-200"
    val = tree / "val"
    (val / "images").mkdir(parents=True)
    (tree / "wnids.txt").write_text("\n".join(NAMES[:classes]) + "\n")
    lines = []
    for label, name in enumerate(NAMES[:classes]):
        folder = tree / "train" / name / "images"
        folder.mkdir(parents=True)
        (folder / f"{name}_0.JPEG").write_bytes(_jpeg(label + 20))
        (folder.parent / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t63\t63\n")
        target = {"annotated": val / "images", "images": val / name / "images", "flat": val / name}[
            layout
        ]
        file = f"val_{label}.JPEG"
        target.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes(_jpeg(label + 20))
        lines.append(f"{file}\t{name}\t0\t0\t63\t63\n")
    if layout == "annotated":
        (val / "val_annotations.txt").write_text("".join(reversed(lines)))
    red = Image.new("RGB", (64, 64), (250, 10, 10))
    if classes > 3:
        red.save(tree / "train" / NAMES[3] / "images" / f"{NAMES[3]}_0.JPEG", quality=95)
    return tree


def _load(data_dir: Path | None, **options: Any) -> ImageData:
    return (
        registry.get("dataset", "tiny-imagenet")
        .Config(data_dir=data_dir, **options)
        .build()
        .load(0)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_each_layout(layout: str, tmp_path: Path) -> None:
    data = _load(_tree(tmp_path, layout))
    assert data.name == "tiny-imagenet" and data.num_classes == 200 and data.shape == (3, 64, 64)
    assert sorted(data.test_labels.tolist()) == list(range(200))
    assert data.train_labels.tolist() == list(range(200))
    level = data.test_images.float().mean((1, 2, 3)) - 20
    assert (level - data.test_labels).abs().max() < 1  # each image has its own class's label
    level = data.train_images.float().mean((1, 2, 3)) - 20
    level[3] = 3
    assert (level - data.train_labels).abs().max() < 1
    red = data.train_images[3].float().mean((1, 2))
    assert red[0] > 230 and red[1:].max() < 30  # channels in the order RGB


def test_finds_the_tree_and_its_parent_and_the_usual_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = _tree(tmp_path / "here")
    assert tiny_imagenet.find_tree(tree)[0] == tree
    assert tiny_imagenet.find_tree(tree.parent)[0] == tree
    assert tiny_imagenet.find_tree(None)[0] is None
    avalanche = tmp_path / "home" / ".avalanche" / "data" / "tinyimagenet"
    avalanche.parent.mkdir(parents=True)
    tree.parent.rename(avalanche)
    assert tiny_imagenet.find_tree(None)[0] == avalanche / "tiny-imagenet-200"
    (tmp_path / "work" / "data").symlink_to(avalanche)
    assert tiny_imagenet.find_tree(None)[0] == Path("data") / "tiny-imagenet-200"
    auto = registry.get("dataset", "auto").Config().build().load(0)
    assert auto.name == "tiny-imagenet" and capsys.readouterr().err == ""


def test_decoded_images_are_cached_until_a_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = _tree(tmp_path)
    first = _load(tree)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "decode", lambda *a: pytest.fail("decoded although cached"))
        again = _load(tree)
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_labels, again.test_labels)
    extra = tree / "train" / NAMES[7] / "images" / "extra.JPEG"
    extra.write_bytes(_jpeg(27))
    assert len(_load(tree).train_labels) == 201


def _rewrite(path: Path) -> None:
    path.write_bytes(_jpeg(200))


def _replace_keeping_size_and_time(path: Path) -> None:
    before = path.stat()
    path.with_suffix(".new").write_bytes(_jpeg(200).ljust(before.st_size, b"\0"))
    os.utime(path.with_suffix(".new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_suffix(".new").replace(path)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def _write_keeping_size_and_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(_jpeg(200).ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [_rewrite, _replace_keeping_size_and_time, _write_keeping_size_and_time]
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_that_changed_in_any_way_is_read_again(
    split: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    tree = _tree(tmp_path)
    path = next((tree / split).rglob("*7*.JPEG"))
    path.write_bytes(_jpeg(30).ljust(2000, b"\0"))
    images = "train_images" if split == "train" else "test_images"
    first = getattr(_load(tree), images)
    change(path)
    second = getattr(_load(tree), images)
    changed = (first != second).flatten(1).any(1)
    assert changed.sum() == 1 and second[changed].float().mean() == pytest.approx(200, abs=1)


def test_the_cache_leaves_out_system_files_in_every_folder(tmp_path: Path) -> None:
    tree = _tree(tmp_path)
    first = _load(tree)
    for place in [tree, *(p for p in tree.rglob("*") if p.is_dir())]:
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x.JPEG"):
            (place / name).write_bytes(b"no image")
        (place / "__MACOSX").mkdir()
        (place / "__MACOSX" / "x.JPEG").write_bytes(b"no image")
    again = _load(tree)
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_labels, again.test_labels)
    assert len(list(cache.folder().glob("tiny-imagenet-*"))) == 1


def _truncate_train(tree: Path) -> None:
    path = tree / "train" / NAMES[9] / "images" / f"{NAMES[9]}_0.JPEG"
    path.write_bytes(path.read_bytes()[:-100])


def _lose_val(tree: Path) -> None:
    (tree / "val" / "images" / "val_5.JPEG").unlink()


def _odd_class(tree: Path) -> None:
    path = tree / "val" / "val_annotations.txt"
    path.write_text("val_0.JPEG\tn999\t0\t0\t1\t1\n" + path.read_text())


def _lose_train(tree: Path) -> None:
    folder = tree / "train" / NAMES[9] / "images"
    (folder / f"{NAMES[9]}_0.JPEG").rename(folder / "other.JPEG")


def _odd_columns(tree: Path) -> None:
    path = tree / "val" / "val_annotations.txt"
    lines = path.read_text().splitlines()
    lines[2] = "\t".join(lines[2].split("\t")[:3])
    path.write_text("\n".join(lines))


def _twice(tree: Path) -> None:
    path = tree / "val" / "val_annotations.txt"
    path.write_text(path.read_text() + "\n" + path.read_text().splitlines()[0])


def _unlisted(tree: Path) -> None:
    (tree / "val" / "images" / "val_900.JPEG").write_bytes(_jpeg(20))


def _small(tree: Path) -> None:
    Image.new("L", (32, 32)).save(tree / "val" / "images" / "val_5.JPEG")


def _no_val(tree: Path) -> None:
    for path in (tree / "val" / "images").iterdir():
        path.unlink()


def _odd_list(tree: Path) -> None:
    (tree / "wnids.txt").write_text("\n".join([*NAMES[:-1], "n777"]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate_train, rf"cannot read image .*{NAMES[9]}_0\.JPEG"),
        (_lose_val, r"val_annotations\.txt line 195 names val_5\.JPEG, which is not in .*images"),
        (_lose_train, rf"{NAMES[9]}_boxes\.txt line 1 names {NAMES[9]}_0\.JPEG, which is missing"),
        (_odd_class, r"val_annotations\.txt line 1 names no class of wnids\.txt, but 'n999'"),
        (_odd_columns, r"val_annotations\.txt line 3 has 3 columns, not 6 separated by tabs"),
        (_twice, r"val_annotations\.txt line 202 names val_199\.JPEG again, as line 1 does"),
        (_unlisted, r"val_annotations\.txt names no val_900\.JPEG, which is in .*images"),
        (_small, r"val_5\.JPEG is 32x32, expected 64x64"),
        (_no_val, rf"no validation images of class {NAMES[0]} in .*unpack"),
        (_odd_list, r"wnids\.txt and the folders in .* differ in 2 names"),
    ],
)
def test_damage_is_named_in_one_line(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    tree = _tree(tmp_path)
    damage(tree)
    with pytest.raises(UserError, match=message) as caught:
        _load(tree)
    assert "\n" not in str(caught.value)
    assert not cache.folder().exists()  # nothing half-read is kept


def test_a_thinned_set_says_so_and_takes_the_first_by_name(tmp_path: Path) -> None:
    tree = _tree(tmp_path)
    for label, name in enumerate(NAMES):
        folder = tree / "train" / name / "images"
        (folder / f"{name}_1.JPEG").write_bytes(_jpeg(250 - label % 50))
    whole = _load(tree)
    assert len(whole.train_labels) == 400 and whole.name == "tiny-imagenet"
    assert _load(tree, per_class=2).name == "tiny-imagenet"  # nothing was left out
    data = _load(tree, classes=5, per_class=1, size=32)
    assert data.name == "tiny-imagenet (5 of 200 classes, 1 of 2 per class, 32 px)"
    assert data.num_classes == 5 and data.shape == (3, 32, 32)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert sorted(data.test_labels.tolist()) == [0, 1, 2, 3, 4]
    squares = whole.train_images[0:10:2].float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert (data.train_images - squares).abs().max() <= 0.5


def test_folder_names_are_plain(tmp_path: Path) -> None:
    from cl_benchmarks.experiment import ContinualLearning
    from dynmoe.cl import presets

    data = _load(_tree(tmp_path), size=32)
    label = ContinualLearning().label(presets()["laptop"], data)
    assert label == "dynamicmoe-tiny-imagenet-32-px"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 201}, "dataset classes 201 must be 2 to 200, or 0 for all"),
        ({"classes": 1}, "dataset classes 1 must be"),
        ({"per_class": -1}, "per_class -1 is too small"),
        ({"size": 48}, "dataset size 48 must be one of 8, 16, 32, 64"),
        ({"per_class": 2}, f"2 images per class were asked for, and .*{NAMES[0]}.* has 1"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        _load(_tree(tmp_path), **options)


def test_too_few_classes_are_counted(tmp_path: Path) -> None:
    tree = _tree(tmp_path, classes=3)
    with pytest.raises(UserError, match=f"expected 200 class folders in {tree}/train, found 3"):
        _load(tree)


def test_wrong_or_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "a")
    with pytest.raises(UserError, match=rf"train/train, found 0\. Did you mean {tree}\?"):
        _load(tree / "train")
    with pytest.raises(UserError, match=r"not found in data/tiny.*, .*avalanche.*data-dir DIR"):
        _load(None)
    with pytest.raises(UserError, match=f"not found in {tmp_path}/none, .*--dataset.download"):
        _load(tmp_path / "none")


def test_download_goes_through_avalanche_next_to_the_given_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("avalanche.benchmarks.datasets")
    asked = []

    def fetch(root: Path, download: bool) -> None:
        asked.append((root, download))
        _tree(root)

    fake.TinyImagenet = fetch  # type: ignore[attr-defined]
    for name in ("avalanche", "avalanche.benchmarks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    target = tmp_path / "new"
    assert len(_load(target / "tiny-imagenet-200", download=True).train_labels) == 200
    assert len(_load(target, download=True).train_labels) == 200  # there now: not fetched again
    assert asked == [(target, True)]

    def fail(root: Path, download: bool) -> None:
        raise OSError("no route\nto host")

    fake.TinyImagenet = fail  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="could not be fetched into .*other: no route; fetch"):
        _load(tmp_path / "other", download=True)
