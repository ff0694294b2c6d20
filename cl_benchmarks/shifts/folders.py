"""Test images in class folders, with corruptions made here or read as they are published.

    DIR/<class>/*, or DIR/val/<class>/* beside DIR/train/<class>/*       anyone's
    DIR/[tiny-imagenet-200/]val, train, wnids.txt                        Tiny ImageNet
    CORRUPTED/<corruption>/<severity>/<class>/*     Tiny-ImageNet-C and sets published like it

Classes are in the order of their sorted names (of Tiny ImageNet: wnids), as torchvision's
ImageFolder has them; which output of a model stands for each is told by `outputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cl_benchmarks.images import (
    READER_VERSION,
    class_files,
    class_folders,
    files_by_class,
    image_files,
)
from cl_benchmarks.shifts.domain import GROUPS, Corrupted, Domain, Files, Resized, check
from cl_benchmarks.shifts.stream import ShiftSource
from dynmoe.errors import UserError
from dynmoe.lab import cache

Split = Literal["train", "val"]
TREE, TINY = "tiny-imagenet-200", 64
"""Tiny ImageNet's folder, and the side of its images."""


@dataclass(frozen=True)
class ClassImages:
    """Files of labelled images.

    Raises:
        UserError: fewer than two classes.
    """

    name: str
    """what the numbers are about"""
    classes: tuple[str, ...]
    """sorted names"""
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    """per file, the position of its class"""

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise UserError(f"{self.name} has {len(self.classes)} class; use data of 2 or more")


def tiny_imagenet(root: Path | None, split: Split = "val") -> ClassImages:
    """Tiny ImageNet's 10,000 validation images, or the training images, as published.

    Raises:
        UserError: it is not in `root` or `root/tiny-imagenet-200`, or is not whole.
    """
    from cl_benchmarks.datasets.tiny_imagenet import validation_files

    root = _folder(root)
    places = [p for p in (root, root / TREE) if (p / "val").is_dir()]
    if not places:
        raise UserError(f"no Tiny ImageNet in {root}; unpack {TREE}.zip there, or give another "
                        "--data-dir")  # fmt: skip
    tree = places[0]
    listed = tree / "wnids.txt"
    found = listed.read_text(errors="replace").split() if listed.is_file() else []
    for name in found:
        if name == ".." or Path(name).name != name or len(set(found)) < len(found):
            raise UserError(f"{listed} must name each class folder once; {name!r} is none, or some "
                            "name stands twice; unpack it again")  # fmt: skip
    names = sorted(found or [p.name for p in class_folders(tree / "train")])
    if not names:
        raise UserError(f"neither wnids.txt nor class folders in train in {tree}; unpack it again")
    if split == "val":
        files, labels = validation_files(tree / "val", names)
    else:
        files, labels = files_by_class([tree / "train" / name for name in names], class_files)
    return ClassImages("Tiny ImageNet", tuple(names), tuple(files), tuple(labels))


def class_folder(root: Path | None, split: Split = "val") -> ClassImages:
    """Images of one folder per class: in `root`, or in its folders train and val.

    Raises:
        UserError: no such folder, no class folders, an empty one, or no training images.
    """
    root = _folder(root)
    parted = all(class_folders(root / part) for part in ("train", "val"))
    if split == "train" and not parted:
        raise UserError(f"no training images in {root}: it needs train/<class>/* and val/<class>/*")
    folder = root / split if parted else root
    found = class_folders(folder)
    if not found:
        raise UserError(f"no class folders in {folder}; --data folder reads {folder}/<class>/*")
    files, labels = files_by_class(found, image_files, "folder")
    return ClassImages(
        root.resolve().name, tuple(p.name for p in found), tuple(files), tuple(labels)
    )


@dataclass(frozen=True)
class Fit:
    """How a file becomes a square image: resized, cropped, corrupted, and at last resized again."""

    crop: int
    """side of the centre crop, at which images are corrupted"""
    resize: int | None = None
    """pixels of the shorter side before the crop; None: as it is"""
    size: int | None = None
    """side of what the model gets; None: that of the crop"""


TINY_FIT = Fit(TINY)
"""Tiny ImageNet's images as they are."""


class FolderShifts(ShiftSource):
    """The clean images of some class folders, and their corruptions.

    Args:
        images: the clean test images.
        fit: makes them square.
        outputs: int64 [classes], the model's output for each class.
        num_classes: outputs of the model.
        corrupted_dir: holds published corruptions; None makes them of the clean images through
            imagecorruptions-imaug and a disk cache.
        mean, std: what the model expects.
        seed: of the corruptions that are made here.

    Raises:
        UserError: `corrupted_dir` is not there.
    """

    def __init__(
        self,
        images: ClassImages,
        fit: Fit,
        outputs: Tensor,
        num_classes: int,
        corrupted_dir: Path | None = None,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        seed: int = 0,
    ) -> None:
        self.images, self.fit, self.outputs, self.seed = images, fit, outputs, seed
        self.num_classes, self.size = num_classes, fit.size or fit.crop
        self.mean, self.std = mean, std
        self.corrupted_dir = corrupted_dir.expanduser() if corrupted_dir else None
        self.name = images.name
        if self.corrupted_dir is not None:
            self.name = f"{images.name} ({self.corrupted_dir.name})"
            if not self.corrupted_dir.is_dir():
                raise UserError(f"folder {self.corrupted_dir} is not there; give another "
                                "--corrupted-dir")  # fmt: skip
        self._clean = self._files("clean", images.files, images.labels, fit.resize)
        states = cache.file_states(images.files)
        self._identity = cache.digest({"reader": READER_VERSION, "files": states,
                                       "crop": fit.crop, "resize": fit.resize})  # fmt: skip

    def corrupted(self, corruption: str, severity: int) -> Domain:
        """See ShiftSource.

        Raises:
            UserError: unknown corruption or severity, or none such in `corrupted_dir`.
        """
        check(corruption, severity)
        if self.corrupted_dir is None:
            return self._sized(
                Corrupted(self._clean, self._identity, corruption, severity, self.seed)
            )
        folder = corruption_folder(self.corrupted_dir, corruption, severity)
        found = class_folders(folder)
        check_classes(folder, [p.name for p in found], self.images.classes)
        files, labels = files_by_class(found, class_files, "set")
        resize = self.fit.crop if self.fit.resize else None  # the margin has been cut off
        return self._sized(self._files(corruption, files, labels, resize))

    def other(self, shift: str) -> Domain:
        """See ShiftSource.

        Raises:
            UserError: another shift than "clean".
        """
        if shift != "clean":
            raise UserError(f"{self.name} has no {shift}; use streams of corruptions or clean")
        return self._sized(self._clean)

    def _files(
        self, name: str, files: Sequence[Path], labels: Sequence[int], resize: int | None
    ) -> Files:
        return Files(name, files, self.outputs[torch.tensor(labels)], resize, self.fit.crop)

    def _sized(self, domain: Domain) -> Domain:
        return domain if self.size == self.fit.crop else Resized(domain, self.size)


def corruption_folder(root: Path, corruption: str, severity: int) -> Path:
    """`root/<corruption>/<severity>`, also inside the groups of ImageNet-C's archives.

    Raises:
        UserError: there is none; says what is there.
    """
    groups = [group for group, names in GROUPS.items() if corruption in names] or ["extra"]
    places = [root / corruption, *(root / group / corruption for group in groups)]
    found = [place for place in places if place.is_dir()]
    if not found:
        have = ", ".join(p.name for p in class_folders(root)) or "none"
        raise UserError(f"no corruption {corruption!r} in {root}; folders there: {have}")
    folder = found[0] / str(severity)
    if not folder.is_dir():
        have = ", ".join(p.name for p in class_folders(found[0])) or "none"
        raise UserError(f"no severity {severity} of {corruption} in {found[0]}; there: {have}")
    return folder


def check_classes(folder: Path, names: Sequence[str], expected: Sequence[str]) -> None:
    """Refuse class folders that are not exactly those of a set.

    Raises:
        UserError: says which are missing and which are too many.
    """
    if list(names) == list(expected):
        return
    missing, odd = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    parts = [f"{len(missing)} are missing ({missing[0]}, ...)"] if missing else []
    parts += [f"{len(odd)} do not belong there ({odd[0]}, ...)"] if odd else []
    raise UserError(
        f"{folder} must hold the {len(expected)} class folders of its set: {', '.join(parts)}; "
        "unpack it again"
    )


def _folder(root: Path | None) -> Path:
    if root is None:
        raise UserError("no data folder; give the one with the images as --data-dir DIR")
    if not root.expanduser().is_dir():
        raise UserError(f"data folder {root.expanduser()} is not there; give another --data-dir")
    return root.expanduser()
