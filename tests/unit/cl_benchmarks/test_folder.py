"""Anyone's folders of images, with domains or without, and CORe50's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cl_benchmarks.images import ImageData
from dynmoe import registry
from dynmoe.errors import UserError


def _load(name: str = "folder", **options: Any) -> ImageData:
    return registry.get("dataset", name).Config(**options).build().load(0)


def _save(path: Path, level: int, size: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)


def _classes(root: Path, counts: dict[str, int], level: int = 0) -> Path:
    """Folders of so many images; the i-th class is gray 10 i + level."""
    for number, (name, count) in enumerate(counts.items()):
        for image in range(count):
            _save(root / name / f"{image}.png", 10 * number + level)
    return root


def _fits(images: torch.Tensor, labels: torch.Tensor, level: int = 0) -> bool:
    """Whether each image has the gray of its label."""
    return bool((images.float().mean((1, 2, 3)) == 10.0 * labels + level).all())


def test_plain_classes_hold_out_a_share_of_each(tmp_path: Path) -> None:
    root = _classes(tmp_path / "birds", {"a": 10, "b": 5, "c": 2})
    data = _load(data_dir=root, size=8)
    assert data.name == "birds-8" and data.num_classes == 3 and data.shape == (3, 8, 8)
    assert data.train_labels.bincount().tolist() == [8, 4, 1]
    assert data.test_labels.bincount().tolist() == [2, 1, 1]
    assert _fits(data.train_images, data.train_labels)
    assert _fits(data.test_images, data.test_labels)
    assert data.train_domains is None and data.domain_names == ()
    half = _load(data_dir=root, size=8, test_share=0.5)
    assert half.test_labels.bincount().tolist() == [5, 2, 1]


def test_the_choice_of_test_images_follows_their_names_only(tmp_path: Path) -> None:
    for image in range(20):
        for name in "ab":
            _save(tmp_path / "x" / name / f"{image}.png", image)
    first = _load(data_dir=tmp_path / "x", size=8)
    assert first.test_images[:4].equal(first.test_images[4:])  # class b as class a
    assert int(first.test_images.max()) > 0 and len(first.test_labels) == 8


def test_a_class_called_train(tmp_path: Path) -> None:
    root = _classes(tmp_path / "cars", {"car": 4, "test": 4, "train": 4})
    data = _load(data_dir=root, size=8)
    assert data.num_classes == 3 and _fits(data.train_images, data.train_labels)


@pytest.mark.parametrize("name", ["test", "val"])
def test_train_and_test_folders(name: str, tmp_path: Path) -> None:
    _classes(tmp_path / "train", {"a": 3, "b": 2})
    _classes(tmp_path / name, {"a": 1, "b": 4})
    data = _load(data_dir=tmp_path, size=8)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test_labels.tolist() == [0, 1, 1, 1, 1]
    thin = _load(data_dir=tmp_path, size=8, per_class=2)
    assert thin.train_labels.tolist() == [0, 0, 1, 1] and "(2 of 3 per class)" in thin.name
    with pytest.raises(UserError, match="test_share has no effect: .*is there"):
        _load(data_dir=tmp_path, test_share=0.5)
    (tmp_path / name / "b").rename(tmp_path / name / "c")
    with pytest.raises(UserError, match="train has a class 'b' and .* does not"):
        _load(data_dir=tmp_path)


def test_images_are_cropped_to_the_middle(tmp_path: Path) -> None:
    root = tmp_path / "set"
    wide = Image.new("L", (32, 8), 0)
    wide.paste(200, (12, 0, 20, 8))
    for name in "ab":
        for image in range(2):
            path = root / name / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            wide.save(path)
    assert (_load(data_dir=root, size=8).train_images == 200).all()
    with pytest.raises(UserError, match="is 32x8, expected 8x8"):
        _load(data_dir=root, size=8, fit="exact")


def test_domains_are_told(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number, domain in enumerate(("art", "photo", "sketch")):
        _classes(root / domain, {"cat": 5, "dog": 4 + number}, level=50 * number)
    data = _load(data_dir=root, size=8)
    assert data.domain_names == ("art", "photo", "sketch") and data.num_classes == 2
    assert data.train_domains is not None and data.test_domains is not None
    assert data.train_domains.bincount().tolist() == [7, 8, 9]
    assert data.test_domains.bincount().tolist() == [2, 2, 2]
    for images, labels, domains in (
        (data.train_images, data.train_labels, data.train_domains),
        (data.test_images, data.test_labels, data.test_domains),
    ):
        assert all(_fits(images[domains == d], labels[domains == d], 50 * d) for d in range(3))
    (root / "photo" / "dog").rename(root / "photo" / "fox")
    with pytest.raises(UserError, match="art has a class 'dog' and .*photo does not"):
        _load(data_dir=root)


def test_what_is_wrong_with_folders_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is no folder; .*--dataset.data-dir"):
        _load(data_dir=tmp_path / "none")
    with pytest.raises(UserError, match="no folders of classes in"):
        _load(data_dir=tmp_path)
    _classes(tmp_path / "one", {"a": 3})
    with pytest.raises(UserError, match="has 1 class, a"):
        _load(data_dir=tmp_path / "one")
    _classes(tmp_path / "mixed", {"a": 3})
    _classes(tmp_path / "mixed" / "art", {"a": 3})
    with pytest.raises(UserError, match="mixed/a holds images and .*mixed/art does not"):
        _load(data_dir=tmp_path / "mixed")
    _classes(tmp_path / "few", {"a": 3, "b": 1})
    with pytest.raises(UserError, match="few/b has 1 image, and one must be held out"):
        _load(data_dir=tmp_path / "few")
    (tmp_path / "few" / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image .*1\.png"):
        _load(data_dir=tmp_path / "few")
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match="test_share .* must lie between"):
            _load(data_dir=tmp_path, test_share=share)


@pytest.mark.parametrize(("protocol", "message"), [
    ("iid", "10 chunks do not divide 13 training images"),
    ("class", "10 chunks do not divide 3 classes"),
])  # fmt: skip
def test_protocols_of_equal_parts_refuse_uneven_folders(
    protocol: str, message: str, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    data = _load(data_dir=_classes(root, {"a": 10, "b": 5, "c": 2}), size=8)
    part = registry.get("protocol", protocol).Config().build()
    with pytest.raises(UserError, match=message):
        part.stream(data, 10, "limited", 0)
    whole = registry.get("protocol", "class").Config(head="full").build()
    chunks = whole.stream(data, 3, "limited", 0)
    assert sorted(len(c.train_index) for c in chunks) == [1, 4, 8]


@pytest.fixture
def core50(tmp_path: Path) -> Path:
    """Two frames of each object and session; gray is the object, plus 60 in later sessions."""
    root = tmp_path / "core50_128x128"
    for session in range(1, 12):
        for thing in range(1, 51):
            for frame in range(2):
                name = f"C_{session:02d}_{thing:02d}_{frame:03d}.png"
                level = thing + 10 * session
                _save(root / f"s{session}" / f"o{thing}" / name, level, (128, 128))
    return root


def test_core50(core50: Path) -> None:
    data = _load("core50", data_dir=core50.parent, size=8)
    assert data.name == "core50-objects-8" and data.num_classes == 50
    assert len(data.train_labels) == 8 * 100 and len(data.test_labels) == 3 * 100
    assert data.train_domains is not None and data.test_domains is not None
    assert data.domain_names == tuple(f"s{n}" for n in range(1, 12))
    assert data.test_domains.unique().tolist() == [2, 6, 9]
    assert data.train_domains.unique().tolist() == [0, 1, 3, 4, 5, 7, 8, 10]
    gray = data.train_images.float().mean((1, 2, 3))
    assert gray.equal(data.train_labels + 1.0 + 10 * (data.train_domains + 1))
    ten = _load("core50", data_dir=core50, size=8, labels="categories", every=2)
    assert ten.num_classes == 10 and ten.train_labels.bincount().tolist() == [40] * 10
    assert ten.name == "core50-categories-8 (1 of 2 frames)"
    gray = ten.train_images.float().mean((1, 2, 3)) - 10 * (ten.train_domains + 1)
    assert ten.train_labels.equal((gray.long() - 1) // 5)


def test_core50_names_what_is_missing(core50: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"CORe50 not found: no s1 in data/core50.*avalanche"):
        _load("core50")
    with pytest.raises(UserError, match="labels 'odd' must be objects or categories"):
        _load("core50", labels="odd")
    with pytest.raises(UserError, match="size 48 must be one of"):
        _load("core50", size=48)
    (core50 / "s4" / "o7").rename(core50 / "gone")
    with pytest.raises(UserError, match="no images in .*s4/o7"):
        _load("core50", data_dir=core50, size=8)
