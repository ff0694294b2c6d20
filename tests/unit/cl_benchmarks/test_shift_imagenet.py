"""ImageNet-C, -R, -A, -Sketch and the clean set, read from trees of their real layouts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shift_trees import SYNSETS, WNIDS, image, lines, tree

from cl_benchmarks.shifts.domain import read_image
from cl_benchmarks.shifts.imagenet import Imagenet, subset
from cl_benchmarks.shifts.stream import make_stream
from dynmoe.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    square = image(folder / "square.jpg", 224, 224)
    wide = image(folder / "wide.jpg", 400, 300, seed=1)
    tree(folder / "imagenet-c" / "fog" / "5", WNIDS, square)
    tree(folder / "imagenet-c" / "noise" / "shot_noise" / "5", WNIDS, square)
    tree(folder / "imagenet-r", SYNSETS["r"], wide)
    tree(folder / "imagenet-a", SYNSETS["a"], wide)
    tree(folder / "imagenet-sketch" / "sketch", WNIDS, wide)
    tree(folder / "imagenet-1k_2012" / "val", WNIDS, wide)
    return folder


def test_corrupted_images_are_cropped_but_not_resized(root: Path) -> None:
    domain = Imagenet(root).corrupted("fog", 5)
    assert domain.name == "fog" and torch.equal(domain.labels, torch.arange(1000))
    pixels = np.array(Image.open(root / "square.jpg").convert("RGB"))
    read = domain.images([7, 3])
    assert read.shape == (2, 3, 224, 224) and read.dtype == torch.uint8
    assert torch.equal(read[1], torch.from_numpy(pixels).permute(2, 0, 1))


def test_other_images_are_resized_to_256_and_cropped(root: Path) -> None:
    read = Imagenet(root).other("sketch").images([0])[0]
    resized = Image.open(root / "wide.jpg").convert("RGB").resize((341, 256), Image.BILINEAR)
    left = round((341 - 224) / 2)
    expected = np.array(resized)[16:240, left : left + 224]
    assert torch.equal(read, torch.from_numpy(expected).permute(2, 0, 1))


def test_corruptions_are_found_inside_the_archives_groups(root: Path) -> None:
    assert len(Imagenet(root).corrupted("shot_noise", 5)) == 1000


@pytest.mark.parametrize(("shift", "key"), [("rendition", "r"), ("adversarial", "a")])
def test_label_protocols(root: Path, shift: str, key: str) -> None:
    indices = [int(line) for line in lines(f"imagenet_{key}_indices.txt")]
    assert [WNIDS[i] for i in indices] == SYNSETS[key]
    everything, cut = Imagenet(root), Imagenet(root, labels="subset")
    assert everything.other(shift).labels.tolist() == indices
    assert cut.other(shift).labels.tolist() == list(range(200))
    assert (everything.num_classes, cut.num_classes) == (1000, 200)
    assert subset(shift).tolist() == indices


def test_subset_labels_need_one_set_with_200_classes() -> None:
    for stream in ("potpourri", "classical", "clean"):
        with pytest.raises(UserError, match="rendition or adversarial"):
            subset(stream)


def test_a_stream_of_files(root: Path) -> None:
    stream = make_stream(Imagenet(root), "rendition", batch_size=8, limit=20, seed=1)
    assert [len(stream.batch(n).labels) for n in range(len(stream))] == [8, 8, 4]
    assert stream.names == ["rendition"]


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no corruption 'snow' in .*imagenet-c; .* fog, noise"):
        Imagenet(root).corrupted("snow", 5)
    with pytest.raises(UserError, match=r"no severity 3 of fog in .*; there: 5"):
        Imagenet(root).corrupted("fog", 3)
    with pytest.raises(UserError, match=r"unknown corruption 'fogg'.*'fog'"):
        Imagenet(root).corrupted("fogg", 5)
    with pytest.raises(UserError, match="severity 6"):
        Imagenet(root).corrupted("fog", 6)
    with pytest.raises(UserError, match="unknown shift 'cartoon'"):
        Imagenet(root).other("cartoon")
    with pytest.raises(UserError, match="no imagenet-r in"):
        Imagenet(tmp_path).other("rendition")
    with pytest.raises(UserError, match="--data-dir"):
        Imagenet(None)
    with pytest.raises(UserError, match="is not there"):
        Imagenet(tmp_path / "nowhere")


def test_a_wrong_class_subset_is_refused(tmp_path: Path) -> None:
    picture = image(tmp_path / "x.jpg", 256, 256)
    tree(tmp_path / "imagenet-r", SYNSETS["a"], picture)
    missing = len(set(SYNSETS["r"]) - set(SYNSETS["a"]))
    message = f"200 class folders of its set: {missing} are missing .* do not belong there"
    with pytest.raises(UserError, match=message):
        Imagenet(tmp_path).other("rendition")
    tree(tmp_path / "imagenet-a", SYNSETS["a"], picture)
    shutil.rmtree(tmp_path / "imagenet-a" / SYNSETS["a"][4])
    with pytest.raises(UserError, match=f"1 are missing .{SYNSETS['a'][4]}"):
        Imagenet(tmp_path).other("adversarial")
    (tmp_path / "imagenet-a" / SYNSETS["a"][4]).mkdir()
    with pytest.raises(UserError, match=f"no images in .*{SYNSETS['a'][4]}"):
        Imagenet(tmp_path).other("adversarial")


def test_bad_image_files_are_named(tmp_path: Path) -> None:
    whole = image(tmp_path / "a.jpg", 230, 240).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.jpg", "text.jpg", "gone.jpg"):
        with pytest.raises(UserError, match=f"cannot read image .*{name}"):
            read_image(tmp_path / name, None, 224)
    with pytest.raises(UserError, match=r"a\.jpg is 230x240, smaller than the crop of 256x256"):
        read_image(tmp_path / "a.jpg", None, 256)


def test_system_files_are_left_out_at_every_level(tmp_path: Path) -> None:
    picture = image(tmp_path / "x.jpg", 256, 256)
    noise = tree(tmp_path / "imagenet-c" / "noise" / "shot_noise" / "5", WNIDS, picture)
    other = tree(tmp_path / "imagenet-r", SYNSETS["r"], picture)
    first = noise / WNIDS[0]
    for place in (tmp_path, *[p for p in first.parents if tmp_path in p.parents], first, other,
                  other / SYNSETS["r"][3]):  # fmt: skip
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x.JPEG"):
            (place / name).write_bytes(b"no image")
        for name in ("__MACOSX", ".hidden"):
            (place / name).mkdir()
            (place / name / "x.JPEG").write_bytes(b"no image")
    assert len(Imagenet(tmp_path).corrupted("shot_noise", 5)) == 1000
    assert len(Imagenet(tmp_path).other("rendition")) == 200
    with pytest.raises(UserError, match=r"folders there: noise"):
        Imagenet(tmp_path).corrupted("snow", 5)


def test_corruptions_of_a_file_that_changed_are_made_again(tmp_path: Path) -> None:
    picture = image(tmp_path / "x.jpg", 256, 256)
    val = tree(tmp_path / "val", WNIDS, picture)
    path = val / WNIDS[5] / "ILSVRC2012_val_0.JPEG"
    path.unlink()  # it is linked into every class
    path.write_bytes(picture.read_bytes().ljust(50_000, b"\0"))
    before = path.stat()
    first = Imagenet(tmp_path, on_the_fly=True).corrupted("contrast", 1).images([5])
    other = image(tmp_path / "y.jpg", 256, 256, seed=1)
    path.write_bytes(other.read_bytes().ljust(50_000, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = Imagenet(tmp_path, on_the_fly=True).corrupted("contrast", 1).images([5])
    assert not torch.equal(first, again)


def test_on_the_fly_corruptions_of_the_clean_set(root: Path, tmp_path: Path) -> None:
    source = Imagenet(root, on_the_fly=True)
    first = source.corrupted("contrast", 3).images([5, 900])
    files = list((tmp_path / "cache").rglob("*.npz"))
    assert len(files) == 2 and first.shape == (2, 3, 224, 224)
    marked = np.zeros((3, 224, 224), dtype=np.uint8)
    for file in files:
        np.savez(file, image=marked)
    again = Imagenet(root, on_the_fly=True).corrupted("contrast", 3).images([900])
    assert int(again.sum()) == 0  # read, not made again
    clean = source.other("clean").images([5])[0].double()
    assert first[0].double().std() < 0.5 * clean.std()
