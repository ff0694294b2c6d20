"""Tiny ImageNet, read from its folders: looked for on the disk, and fetched on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cl_benchmarks.images import (
    READER_VERSION,
    Dataset,
    ImageData,
    check_class_folders,
    class_files,
    class_tree_files,
    decode,
    image_files,
)
from dynmoe.errors import UserError
from dynmoe.lab import cache

TREE = "tiny-imagenet-200"
CLASSES, SIZE = 200, 64


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

    def load(self, seed: int) -> ImageData:
        """Images `[N, 3, 64, 64]`; label = line of wnids.txt. The labelled validation set tests.

        Decoded images are kept in the cache folder (1.4 GB), under a name that changes with any of
        the files (`cache.file_states`).
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
        return read_tree(tree)


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


def read_tree(tree: Path) -> ImageData:
    """Decode a tree, or take it from the cache.

    Raises:
        UserError: not 200 classes, a class without images, an image that cannot be read.
    """
    names = _class_names(tree, check_class_folders(tree, "train", CLASSES))
    train_files, train_labels, _ = class_tree_files(tree, "train", CLASSES, names)
    test_files, test_labels = _validation(tree / "val", names)

    def make() -> cache.Arrays:
        return {"train_images": decode(train_files, SIZE).numpy(),
                "test_images": decode(test_files, SIZE).numpy()}  # fmt: skip

    states = cache.file_states([*train_files, *test_files])
    key = cache.digest({"reader": READER_VERSION, "files": states})
    arrays = cache.load_or_make(f"tiny-imagenet-{key}", make)
    return ImageData(
        name="tiny-imagenet",
        num_classes=CLASSES,
        train_labels=torch.tensor(train_labels),
        test_labels=torch.tensor(test_labels),
        **{split: torch.from_numpy(array) for split, array in arrays.items()},
    )


def _class_names(tree: Path, folders: list[Path]) -> list[str]:
    """Classes in the order of wnids.txt, as Avalanche numbers them; sorted where it is missing."""
    listing, found = tree / "wnids.txt", sorted(p.name for p in folders)
    names = listing.read_text().split() if listing.is_file() else found
    if sorted(names) != found:
        odd = sorted(set(names) ^ set(found)) or ["a name given twice"]
        raise UserError(
            f"{listing} and the folders in {tree / 'train'} differ in {len(odd)} names "
            f"({odd[0]}, ...); unpack the data set again"
        )
    return names


def _validation(val: Path, names: list[str]) -> tuple[list[Path], list[int]]:
    """Files and labels, from val_annotations.txt with images/ or from one folder per class."""
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
    """Each line: file name, class, four numbers of a box, separated by tabs."""
    rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) < 2 or row[1] not in labels:
            raise UserError(
                f"{annotations} line {number} names no class of wnids.txt; "
                "unpack the data set again"
            )
    return [annotations.parent / "images" / r[0] for r in rows], [labels[r[1]] for r in rows]


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
