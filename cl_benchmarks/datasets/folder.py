"""Anyone's images in folders, with or without domains; CORe50 in Avalanche's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cl_benchmarks.datasets.reading import (
    Fit,
    averaged,
    decode_cached,
    first_by_name,
    fitted,
    held_out,
    thinned,
)
from cl_benchmarks.images import (
    Dataset,
    ImageData,
    check_least,
    class_files,
    class_folders,
    files_by_class,
    image_files,
)
from dynmoe.errors import UserError

TEST_SHARE = 0.2
"""of each class, where there is no folder of test images"""
SESSIONS, OBJECTS, STORED = 11, 50, 128
TEST_SESSIONS = (3, 7, 10)
"""CORe50's, in all its benchmarks (Lomonaco and Maltoni 2017)"""


class Folder(Dataset, name="folder", source="ours; the layouts are torchvision's and DomainBed's"):
    """Anyone's images: train/CLASS and test/CLASS, or CLASS, or DOMAIN/CLASS in one folder."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Dataset.Config):
        """Where the images are, and how they are read."""

        data_dir: Path = Path("data")
        """the folder of all images: of train/CLASS/* with test/CLASS/* or val/CLASS/*; or of
        CLASS/*; or of DOMAIN/CLASS/*, each domain with the same classes"""
        size: int = 64
        """pixels a side"""
        fit: Fit = "crop"
        """crop: the shorter side is resized to `size`, then the middle taken; exact: other sizes
        are refused"""
        test_share: float | None = None
        """share of each class (of each domain) held out for tests where there is no test or val
        folder, by a rule that knows file names only; 0.2 by default"""
        per_class: int = 0
        """training images of each class (of each domain), the first by name; 0 for all"""

    def __init__(self, config: Config) -> None:
        check_least("dataset", config, size=1, per_class=0)
        if config.test_share is not None and not 0 < config.test_share < 1:
            raise UserError(f"dataset test_share {config.test_share} must lie between 0 and 1")
        super().__init__(config)

    def load(self, seed: int) -> ImageData:
        """Images `[N, 3, size, size]`; classes and domains are numbered by their sorted names.

        Classes may have different numbers of images. The seed decides nothing.
        """
        c, root = self.config, self.config.data_dir.expanduser()
        if not root.is_dir():
            raise UserError(
                f"{root} is no folder; give the folder of the images: --dataset.data-dir DIR"
            )
        domains: tuple[str, ...] = ()
        test_root = _test_folder(root)
        if test_root is not None:
            if c.test_share is not None:
                raise UserError(
                    f"dataset test_share has no effect: {test_root} is there; leave it out"
                )
            names = _class_names(root / "train")
            _check_same(root / "train", names, test_root, _class_names(test_root))
            train, train_labels = _of_classes(root / "train", names)
            test, test_labels = _of_classes(test_root, names)
            train_domains, test_domains = [0] * len(train), [0] * len(test)
        else:
            train_root = root / "train" if _is_split(root / "train") else root
            files, labels, numbers, names, domains = _read(train_root)
            groups = list(zip(numbers, labels, strict=True))
            first, last = held_out(files, groups, c.test_share or TEST_SHARE)
            train, test = [files[i] for i in first], [files[i] for i in last]
            train_labels, test_labels = [labels[i] for i in first], [labels[i] for i in last]
            train_domains, test_domains = [numbers[i] for i in first], [numbers[i] for i in last]
        if len(names) < 2:
            raise UserError(f"{root} has 1 class, {names[0]}; two or more are needed")
        groups = list(zip(train_domains, train_labels, strict=True))
        kept, most = first_by_name(train, groups, c.per_class)
        images = decode_cached(
            "folder", [train[i] for i in kept], test, c.size, c.fit, fitted(c.size, c.fit)
        )
        return ImageData(
            name=thinned(
                f"{root.resolve().name}-{c.size}",
                f"{c.per_class} of {most} per class" * (0 < c.per_class < most),
            ),
            train_images=images[0],
            train_labels=torch.tensor(train_labels)[kept],
            test_images=images[1],
            test_labels=torch.tensor(test_labels),
            num_classes=len(names),
            files=(*(train[i] for i in kept), *test),
            **_domain_fields(domains, [train_domains[i] for i in kept], test_domains),
        )


class Core50(Dataset, name="core50", source="Lomonaco and Maltoni 2017 (arXiv 1705.03550)"):
    """CORe50: 50 objects in a hand, filmed in 11 sessions, in the folders of Avalanche."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Dataset.Config):
        """Options of CORe50."""

        data_dir: Path | None = None
        """the folder core50_128x128 or the one above it; by default ./data and Avalanche's folder
        are searched"""
        size: int = 32
        """pixels a side: 128, or by averages over squares 64, 32, 16 or 8"""
        labels: str = "objects"
        """objects: 50 classes; categories: 10 classes of 5 objects each"""
        every: int = 1
        """N: only every Nth frame of each film; neighbouring frames are nearly alike"""

    def __init__(self, config: Config) -> None:
        check_least("dataset", config, size=8, every=1)
        averaged(STORED, config.size)
        if config.labels not in ("objects", "categories"):
            raise UserError(f"dataset labels {config.labels!r} must be objects or categories")
        super().__init__(config)

    def load(self, seed: int) -> ImageData:
        """Images `[N, 3, size, size]`; domains are the sessions s1 .. s11.

        Sessions s3, s7 and s10 are for tests, the other eight for training, so no domain has both.

        Raises:
            UserError: not found; a session or object is missing; a file cannot be read.
        """
        root, size = self._root(), self.config.size
        fives = 5 if self.config.labels == "categories" else 1
        learnt = [s for s in range(1, SESSIONS + 1) if s not in TEST_SESSIONS]
        train, train_labels, train_domains = self._films(root, learnt, fives)
        test, test_labels, test_domains = self._films(root, TEST_SESSIONS, fives)
        images = decode_cached("core50", train, test, size, "averages", averaged(STORED, size))
        sessions = tuple(f"s{session}" for session in range(1, SESSIONS + 1))
        return ImageData(
            name=thinned(
                f"core50-{self.config.labels}-{size}",
                f"1 of {self.config.every} frames" * (self.config.every > 1),
            ),
            train_images=images[0],
            train_labels=torch.tensor(train_labels),
            test_images=images[1],
            test_labels=torch.tensor(test_labels),
            num_classes=OBJECTS // fives,
            files=(*train, *test),
            **_domain_fields(sessions, train_domains, test_domains),
        )

    def _films(
        self, root: Path, sessions: Sequence[int], fives: int
    ) -> tuple[list[Path], list[int], list[int]]:
        """Frames of some sessions, their labels and the sessions' numbers from 0."""
        files: list[Path] = []
        labels: list[int] = []
        domains: list[int] = []
        for session in sessions:
            films = [root / f"s{session}" / f"o{n}" for n in range(1, OBJECTS + 1)]
            own, objects = files_by_class(films, self._frames)
            files += own
            labels += [number // fives for number in objects]
            domains += [session - 1] * len(own)
        return files, labels, domains

    def _frames(self, film: Path) -> list[Path]:
        return image_files(film)[:: self.config.every]

    def _root(self) -> Path:
        tree = f"core50_{STORED}x{STORED}"
        places = [Path("data") / tree, Path.home() / ".avalanche" / "data" / "core50" / tree]
        if self.config.data_dir is not None:
            given = self.config.data_dir.expanduser()
            places = [given, given / tree]
        for place in places:
            if (place / "s1").is_dir():
                return place
        raise UserError(
            f"CORe50 not found: no s1 in {', '.join(map(str, places))}; unpack {tree}.zip of its "
            "authors (vlomonaco.github.io/core50) and use --dataset.data-dir DIR"
        )


def _domain_fields(names: tuple[str, ...], train: list[int], test: list[int]) -> dict[str, Any]:
    """`ImageData`'s fields of domains; none without names."""
    if not names:
        return {}
    return {
        "domain_names": names,
        "train_domains": torch.tensor(train),
        "test_domains": torch.tensor(test),
    }


def _is_split(folder: Path) -> bool:
    """Whether it holds the training images of all classes; a class may be called `train`, too."""
    return folder.is_dir() and (bool(class_folders(folder)) or not class_files(folder))


def _test_folder(root: Path) -> Path | None:
    """The folder of test images beside `train`, if there is one."""
    if not _is_split(root / "train"):
        return None
    return next((root / n for n in ("test", "val") if (root / n).is_dir()), None)


def _read(root: Path) -> tuple[list[Path], list[int], list[int], list[str], tuple[str, ...]]:
    """Files, labels and domains' numbers, names of classes and of domains (none: of CLASS/*)."""
    folders = class_folders(root)
    if not folders:
        raise UserError(f"no folders of classes in {root}; it takes CLASS/* or DOMAIN/CLASS/*")
    flat = [folder for folder in folders if class_files(folder)]
    if len(flat) == len(folders):
        names = _class_names(root)
        files, labels = _of_classes(root, names)
        return files, labels, [0] * len(files), names, ()
    if flat:
        other = next(folder for folder in folders if folder not in flat)
        raise UserError(
            f"{flat[0]} holds images and {other} does not; {root} must hold CLASS/* only or "
            "DOMAIN/CLASS/* only"
        )
    names = _class_names(folders[0])
    files, labels, numbers = [], [], []
    for number, folder in enumerate(folders):
        _check_same(folders[0], names, folder, _class_names(folder))
        own, own_labels = _of_classes(folder, names)
        files += own
        labels += own_labels
        numbers += [number] * len(own)
    return files, labels, numbers, names, tuple(folder.name for folder in folders)


def _class_names(root: Path) -> list[str]:
    """Sorted names of the classes in a folder."""
    names = [folder.name for folder in class_folders(root)]
    if not names:
        raise UserError(f"no images and no folders of classes in {root}; remove it, or fill it")
    return names


def _of_classes(root: Path, names: list[str]) -> tuple[list[Path], list[int]]:
    """Files and labels of `root/CLASS/*`."""
    return files_by_class([root / name for name in names], class_files)


def _check_same(first: Path, names: list[str], other: Path, found: list[str]) -> None:
    """Refuse two folders whose classes differ."""
    differing = sorted(set(names) ^ set(found))
    if differing:
        has, lacks = (other, first) if differing[0] in found else (first, other)
        raise UserError(
            f"{has} has a class {differing[0]!r} and {lacks} does not; both need the same classes"
        )
