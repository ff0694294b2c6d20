"""Tiny ImageNet, read from its folders: looked for on the disk, and fetched on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cl_benchmarks.datasets.reading import averaged, decode_cached, first_by_name, thinned
from cl_benchmarks.images import (
    Dataset,
    ImageData,
    check_class_folders,
    check_least,
    class_files,
    class_tree_files,
    image_files,
)
from dynmoe.errors import UserError

TREE = "tiny-imagenet-200"
CLASSES, SIZE = 200, 64
COLUMNS = (2, 6)
"""of a line of val_annotations.txt: file and class, and in the original four numbers of a box"""


class TinyImagenet(Dataset, name="tiny-imagenet", source="Le and Yang 2015 (Stanford cs231n)"):
    """64x64 colour photographs of 200 classes (Stanford cs231n): 100,000 train, 10,000 test."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Dataset.Config):
        """Options of Tiny ImageNet."""

        data_dir: Path | None = None
        """the folder tiny-imagenet-200 or the one above it; by default ./data and Avalanche's
        folder are searched"""
        download: bool = False
        """fetch it into data_dir (by default ./data) where it is missing, 240 MB"""
        classes: int = 0
        """classes taken, the first in the order of wnids.txt; 0 for all 200"""
        per_class: int = 0
        """training images of each class, the first by name, the same in every run; 0 for all 500"""
        test_per_class: int = 0
        """test images of each class, likewise; 0 for all 50"""
        size: int = 64
        """pixels a side: 64, or by averages over squares 32, 16 or 8"""

    def __init__(self, config: Config) -> None:
        _check_options(config)
        super().__init__(config)

    def load(self, seed: int) -> ImageData:
        """Images `[N, 3, size, size]`; label = line of wnids.txt; the validation set is for tests.

        Decoded images are kept in the cache folder (1.4 GB of the whole set), under a name that
        changes with any of the files (`cache.file_states`). The data set's name says what was left
        out.
        """
        tree, places = find_tree(self.config.data_dir)
        if tree is None and self.config.download:
            _download(self.config.data_dir or Path("data"))
            tree, places = find_tree(self.config.data_dir)
        if tree is None:
            if self.config.data_dir is not None and places[0].is_dir():
                check_class_folders(places[0], "train", CLASSES)  # may know the right folder
            raise UserError(
                f"Tiny ImageNet not found in {', '.join(map(str, places))}; "
                "use --dataset.data-dir DIR, or --dataset.download to fetch it"
            )
        return read_tree(tree, self.config)


def _check_options(config: TinyImagenet.Config) -> None:
    check_least("dataset", config, classes=0, per_class=0, test_per_class=0, size=8)
    averaged(SIZE, config.size)
    if config.classes == 1 or config.classes > CLASSES:
        raise UserError(f"dataset classes {config.classes} must be 2 to {CLASSES}, or 0 for all")


def find_tree(data_dir: Path | None) -> tuple[Path | None, list[Path]]:
    """The folder with train/ and val/, if there is one, and all folders looked at, in order."""
    if data_dir is not None:
        given = data_dir.expanduser()
        places = [given, given / TREE]
    else:
        avalanche = Path.home() / ".avalanche" / "data" / "tinyimagenet"
        places = [Path("data") / TREE, avalanche / TREE]
    found = [p for p in places if (p / "train").is_dir() and (p / "val").is_dir()]
    return (found[0] if found else None), places


def read_tree(tree: Path, config: TinyImagenet.Config | None = None) -> ImageData:
    """Decode a tree, or take it from the cache; with the options of `config`.

    Raises:
        UserError: not 200 classes, a class without images, a list that does not match the images,
            an image that cannot be read or is of another size.
    """
    config = config or TinyImagenet.Config()
    names = _class_names(tree, check_class_folders(tree, "train", CLASSES))
    count = config.classes or CLASSES
    train, train_labels, _ = class_tree_files(tree, "train", CLASSES, names)
    for name in names[:count]:
        _check_listed(tree / "train" / name)
    test, test_labels = validation_files(tree / "val", names)
    train, train_labels, most = _thin(train, train_labels, count, config.per_class)
    test, test_labels, most_test = _thin(test, test_labels, count, config.test_per_class)
    train_images, test_images = decode_cached(
        "tiny-imagenet", train, test, config.size, "averages", averaged(SIZE, config.size)
    )
    return ImageData(
        name=thinned(
            "tiny-imagenet",
            f"{count} of {CLASSES} classes" * (count < CLASSES),
            f"{config.per_class} of {most} per class" * (0 < config.per_class < most),
            f"{config.test_per_class} of {most_test} test images per class"
            * (0 < config.test_per_class < most_test),
            f"{config.size} px" * (config.size < SIZE),
        ),
        num_classes=count,
        train_images=train_images,
        train_labels=torch.tensor(train_labels),
        test_images=test_images,
        test_labels=torch.tensor(test_labels),
        files=(*train, *test),
    )


def _thin(
    files: list[Path], labels: list[int], classes: int, per_class: int
) -> tuple[list[Path], list[int], int]:
    """The files of the first classes, the first by name of each; and the most that one had."""
    own = [i for i, label in enumerate(labels) if label < classes]
    files, labels = [files[i] for i in own], [labels[i] for i in own]
    kept, most = first_by_name(files, labels, per_class)
    return [files[i] for i in kept], [labels[i] for i in kept], most


def _check_listed(folder: Path) -> None:
    """Refuse a class that lacks an image which its list, <class>_boxes.txt, names."""
    listing = folder / f"{folder.name}_boxes.txt"
    if not listing.is_file():
        return
    found = {path.name for path in class_files(folder)}
    for number, line in _lines(listing):
        name = line.split("\t")[0]
        if name not in found:
            raise UserError(
                f"{listing} line {number} names {name}, which is missing; unpack the data set again"
            )


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _class_names(tree: Path, folders: list[Path]) -> list[str]:
    """Classes in the order of wnids.txt, as Avalanche numbers them; sorted where it is missing."""
    listing, found = tree / "wnids.txt", sorted(p.name for p in folders)
    names = listing.read_text(errors="replace").split() if listing.is_file() else found
    if sorted(names) != found:
        odd = sorted(set(names) ^ set(found)) or ["a name given twice"]
        raise UserError(
            f"{listing} and the folders in {tree / 'train'} differ in {len(odd)} names "
            f"({odd[0]}, ...); unpack the data set again"
        )
    return names


def validation_files(val: Path, names: list[str]) -> tuple[list[Path], list[int]]:
    """Files and labels, from val_annotations.txt with images/ or from one folder per class.

    Raises:
        UserError: a class has no images.
    """
    annotations = val / "val_annotations.txt"
    if annotations.is_file() and image_files(val / "images"):
        return _annotated(annotations, {name: label for label, name in enumerate(names)})
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        own = class_files(val / name)
        if not own:
            raise UserError(
                f"no validation images of class {name} in {val}; expected val_annotations.txt "
                "with images/, or one folder per class; unpack the data set again"
            )
        files += own
        labels += [label] * len(own)
    return files, labels


def _annotated(annotations: Path, labels: dict[str, int]) -> tuple[list[Path], list[int]]:
    """Files and labels. Each line: file name, class, four numbers of a box, separated by tabs.

    Raises:
        UserError: names the line that does not fit, or the image that has no line.
    """
    folder = annotations.parent / "images"
    there = {path.name for path in image_files(folder)}
    line_of: dict[str, int] = {}
    classes: list[int] = []
    for number, line in _lines(annotations):
        row = line.split("\t")
        wrong = None
        if len(row) not in COLUMNS:
            wrong = f"has {len(row)} columns, not {COLUMNS[1]} separated by tabs"
        elif row[1] not in labels:
            wrong = f"names no class of wnids.txt, but {row[1]!r}"
        elif row[0] in line_of:
            wrong = f"names {row[0]} again, as line {line_of[row[0]]} does"
        elif row[0] not in there:
            wrong = f"names {row[0]}, which is not in {folder}"
        if wrong:
            raise UserError(f"{annotations} line {number} {wrong}; unpack the data set again")
        line_of[row[0]] = number
        classes.append(labels[row[1]])
    unnamed = sorted(there - set(line_of))
    if unnamed:
        raise UserError(
            f"{annotations} names no {unnamed[0]}, which is in {folder}; unpack the data set again"
        )
    return [folder / name for name in line_of], classes


def _download(data_dir: Path) -> None:
    """Let Avalanche fetch and unpack the archive into `data_dir`."""
    from avalanche.benchmarks.datasets import TinyImagenet as AvalancheTinyImagenet

    target = data_dir.expanduser()
    target = target.parent if target.name == TREE else target
    try:
        target.mkdir(parents=True, exist_ok=True)
        AvalancheTinyImagenet(target, download=True)
    except Exception as error:  # network, checksum, disk: Avalanche raises whatever it met
        reason = str(error).split("\n")[0]
        raise UserError(
            f"Tiny ImageNet could not be fetched into {target}: {reason}; fetch "
            f"{TREE}.zip by other means, unpack it and use --dataset.data-dir DIR"
        ) from None
