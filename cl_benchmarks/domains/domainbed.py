"""Data sets in DomainBed's folders, `root/<domain>/<class>/<image>`: its five, and any other.

DomainBed (Gulrajani and Lopez-Paz 2021, arXiv 2007.01434) numbers domains and classes by the sorted
names of the folders and images by their sorted paths; its splits depend on that order. Whatever
folder lies in the root becomes a domain there; here one that is none is refused. Hidden files and
folders, and those that systems leave (`is_system`), are left out at every level.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from cl_benchmarks.domain_set import Domain, DomainData, DomainSet
from cl_benchmarks.images import class_folders, files_by_class, is_system
from dynmoe.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision's ImageFolder takes for an image, so that the order is the same."""


class _Tree(DomainData):
    """Base of the sets that are read from folders."""

    folder: ClassVar[str]
    domains: ClassVar[tuple[str, ...]]
    classes: ClassVar[int]

    @dataclass(frozen=True, kw_only=True)
    class Config(DomainData.Config):
        """Where the data lie."""

        data_dir: Path = Path("data")
        """the folder that holds the data set's folder, as DomainBed's --data_dir"""
        note: str = ""
        """what is special about this copy, such as "resized to 112 px"; stands in all tables"""

    def load(self) -> DomainSet:
        """Domains and classes in the order of their names; images are decoded when needed."""
        root = self.config.data_dir.expanduser() / self.folder
        name = noted(self.name, self.config.note)
        return read_tree(name, root, self.domains, self.classes, self._left_out())

    def _left_out(self) -> list[Path]:
        return []


class Pacs(_Tree, name="pacs", source="Li et al. 2017 (arXiv 1710.03077)"):
    """PACS: 9,991 images of 7 classes; art paintings, cartoons, photos, sketches."""

    folder = "PACS"
    domains = ("art_painting", "cartoon", "photo", "sketch")
    classes = 7


class Vlcs(_Tree, name="vlcs", source="Fang et al. 2013 (ICCV)"):
    """VLCS: 10,729 photos of 5 classes from Caltech101, LabelMe, SUN09 and VOC2007."""

    folder = "VLCS"
    domains = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
    classes = 5


class OfficeHome(_Tree, name="office-home", source="Venkateswara et al. 2017 (arXiv 1706.07522)"):
    """OfficeHome: 15,588 images of 65 classes; art, clip art, product photos, real world."""

    folder = "office_home"
    domains = ("Art", "Clipart", "Product", "Real World")
    classes = 65


class TerraIncognita(_Tree, name="terra-incognita", source="Beery et al. 2018 (arXiv 1807.04975)"):
    """TerraIncognita: 24,330 photos of 10 classes by camera traps at four locations."""

    folder = "terra_incognita"
    domains = ("location_100", "location_38", "location_43", "location_46")
    classes = 10


class DomainNet(_Tree, name="domain-net", source="Peng et al. 2019 (arXiv 1812.01754)"):
    """DomainNet: 586,575 images of 345 classes in 6 domains, once duplicates are left out."""

    @dataclass(frozen=True, kw_only=True)
    class Config(_Tree.Config):
        """Where the data lie, and the images that do not count."""

        duplicates: Path | None = None
        """DomainBed's domain_net_duplicates.txt: images to leave out, one per line; without it
        all images in the folders count"""

    folder = "domain_net"
    domains = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    classes = 345
    config: Config

    def _left_out(self) -> list[Path]:
        if self.config.duplicates is None:
            return []
        return read_duplicates(self.config.duplicates.expanduser(), self.folder)


class Folder(DomainData, name="folder", source="ours; DomainBed's layout"):
    """Any data set in the folders `data_dir/<domain>/<class>/<image>`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DomainData.Config):
        """Where the data lie."""

        data_dir: Path = Path("data")
        """the folder that holds the domains' folders"""
        note: str = ""
        """what is special about this copy, such as "resized to 112 px"; stands in all tables"""

    def load(self) -> DomainSet:
        """Whatever domains and classes are there, in the order of their names."""
        root = self.config.data_dir.expanduser()
        return read_tree(noted(root.resolve().name, self.config.note), root)


def noted(name: str, note: str) -> str:
    """A data set's name, with what its user says of this copy."""
    return f"{name} ({note.strip()})" if note.strip() else name


def read_tree(
    name: str,
    root: Path,
    domains: Sequence[str] | None = None,
    classes: int | None = None,
    left_out: Collection[Path] = (),
) -> DomainSet:
    """Find the images of all domains in `root`; none is decoded.

    Args:
        name: of the data set.
        root: the folder of the domains.
        domains: the folders that must be there, and no other; any two or more if None.
        classes: how many there must be; any number if None.
        left_out: images that do not count, as paths below `root`.

    Raises:
        UserError: a folder too many or too few, class folders that differ between domains, a class
            without images.
    """
    if not root.is_dir():
        raise UserError(f"{name} not found: {root} is no folder; give its folder's parent")
    found = _folders(root)
    _check_domains(name, root, found, domains)
    if not any(_folders(root / domain) for domain in found):
        raise UserError(
            f"{name}: no class folders in {root / found[0]}; it takes DOMAIN/CLASS/* in {root}"
        )
    names = _folders(root / found[0])
    for domain in found[1:]:
        _check_same(root, found[0], names, domain, _folders(root / domain))
    if classes is not None and len(names) != classes:
        raise UserError(
            f"{name} has {classes} classes, but {root / found[0]} has {len(names)} folders; "
            "unpack the data set again"
        )
    if len(names) < 2:
        raise UserError(f"{root} has 1 class, {names[0]}; two or more are needed")
    drop = {root / path for path in left_out}
    read = tuple(_domain(root / domain, names, drop) for domain in found)
    return DomainSet(name, read, tuple(names))


def read_duplicates(file: Path, folder: str) -> list[Path]:
    """DomainNet's list of duplicates: an image per line, below the set's folder or its parent.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"cannot read the list of duplicates {file}: {reason}") from None
    paths = [Path(line.strip()) for line in lines if line.strip()]
    return [Path(*p.parts[1:]) if p.parts[:1] == (folder,) else p for p in paths]


def _folders(root: Path) -> list[str]:
    """Names of all folders in `root`, sorted."""
    return [path.name for path in class_folders(root)]


def _check_domains(name: str, root: Path, found: list[str], domains: Sequence[str] | None) -> None:
    expected = found if domains is None else list(domains)
    extra, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if missing:
        raise UserError(
            f"{name}: no domain {missing[0]} in {root}; its domains are {', '.join(expected)}"
        )
    if extra:
        raise UserError(
            f"{root / extra[0]} is no domain of {name} ({', '.join(expected)}); "
            f"move it out of {root}"
        )
    if len(found) < 2:
        raise UserError(f"{name}: {root} has {len(found)} domain folder(s); it takes two or more")


def _check_same(root: Path, first: str, names: list[str], other: str, found: list[str]) -> None:
    differing = sorted(set(names) ^ set(found))
    if differing:
        where = other if differing[0] in found else first
        lacking = first if where == other else other
        raise UserError(
            f"class lists differ in {root}: {where} has {differing[0]!r} and {lacking} has not; "
            "each domain needs the same class folders"
        )


def _domain(root: Path, classes: list[str], drop: set[Path]) -> Domain:
    files, labels = files_by_class(
        [root / name for name in classes], lambda p: [f for f in _images(p) if f not in drop]
    )
    return Domain(root.name, tuple(files), torch.tensor(labels))


def _images(folder: Path) -> list[Path]:
    """Image files at any depth, in ImageFolder's order: by folder, then by name.

    A link to a folder that was read already, or to one above, is not followed: each image is once.
    """
    found: list[tuple[str, list[str]]] = []
    own = os.path.realpath(folder)
    seen = {own, *map(str, Path(own).parents)}
    for place, folders, names in os.walk(folder, followlinks=True):
        real = {n: os.path.realpath(os.path.join(place, n)) for n in folders if not is_system(n)}
        folders[:] = [name for name in folders if name in real and real[name] not in seen]
        seen.update(real.values())
        found.append(
            (place, [n for n in names if n.lower().endswith(SUFFIXES) and not is_system(n)])
        )
    return [Path(place) / name for place, names in sorted(found) for name in sorted(names)]
