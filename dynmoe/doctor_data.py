"""Where the data sets lie that `dynmoe doctor` looks for, as the commands expect them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TABLES = (".csv", ".tsv", ".data", ".dat")
"""Endings of files that may hold a stream of vectors."""


@dataclass(frozen=True)
class DataPlace:
    """A data set: where it lies below the data folder, and who reads it."""

    name: str
    folders: tuple[str, ...]
    """the first that is there is taken"""
    inside: tuple[str, ...]
    """what that folder must hold"""
    use: str
    """what to add to a command; {data} is the data folder"""


PLACES = (
    DataPlace("Tiny ImageNet", ("tiny-imagenet-200",), ("train", "val", "wnids.txt"),
              "cl --dataset tiny-imagenet --dataset.data-dir {data}"),
    DataPlace("CIFAR-100", ("cifar-100-python",), ("train", "test", "meta"),
              "cl --dataset cifar100 --dataset.data-dir {data}"),
    DataPlace("CORe50", ("core50_128x128",), ("s1", "s11"),
              "cl --dataset core50 --dataset.data-dir {data}"),
    DataPlace("PACS", ("PACS",), ("art_painting", "cartoon", "photo", "sketch"),
              "dg --domains pacs --domains.data-dir {data}"),
    DataPlace("VLCS", ("VLCS",), ("Caltech101", "LabelMe", "SUN09", "VOC2007"),
              "dg --domains vlcs --domains.data-dir {data}"),
    DataPlace("OfficeHome", ("office_home",), ("Art", "Clipart", "Product", "Real World"),
              "dg --domains office-home --domains.data-dir {data}"),
    DataPlace("TerraIncognita", ("terra_incognita",),
              ("location_100", "location_38", "location_43", "location_46"),
              "dg --domains terra-incognita --domains.data-dir {data}"),
    DataPlace("DomainNet", ("domain_net",),
              ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
              "dg --domains domain-net --domains.data-dir {data}"),
    DataPlace("ImageNet-C", ("imagenet-c", "ImageNet-C", "imagenet_c"), (),
              "tta --preset imagenet --data-dir {data}"),
)  # fmt: skip


def data_checks(data_dir: Path) -> Iterator[tuple[Literal["ok", "note"], str]]:
    """A line for each data set that is there, and one that names the others."""
    missing = []
    for one in PLACES:
        folder = next((data_dir / f for f in one.folders if (data_dir / f).is_dir()), None)
        lacking = [] if folder is None else [n for n in one.inside if not (folder / n).exists()]
        if folder is None:
            missing.append(f"{one.name} ({one.folders[0]})")
        elif lacking:
            yield "note", f"{one.name} in {folder} lacks {', '.join(lacking)}; unpack it again"
        else:
            yield "ok", f"{one.name} in {folder}: dynmoe {one.use.format(data=data_dir)}"
    if tables := vector_files(data_dir):
        more = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
        use = f"cl --protocol online --network mlp --dataset stream --dataset.file {tables[0]}"
        labels = "labels in a file of their own: --dataset.labels FILE"
        yield "ok", f"tables of numbers such as {tables[0]}{more}: dynmoe {use} ({labels})"
    else:
        missing.append(f"streams of sensors ({', '.join('*' + end for end in TABLES)})")
    if missing:
        where = f"not in {data_dir}" if data_dir.is_dir() else f"no folder {data_dir} with"
        what = "The default commands bring their own images; for these, name the folder above them"
        yield "note", f"{where}: {', '.join(missing)}. {what} with --data-dir"


def vector_files(data_dir: Path) -> list[Path]:
    """Text tables in the data folder and in those directly below it, by name; none of labels."""
    known = {name for one in PLACES for name in one.folders}
    folders = [data_dir]
    if data_dir.is_dir():
        folders += sorted(p for p in data_dir.iterdir() if p.is_dir() and p.name not in known)
    files = [path for f in folders if f.is_dir() for path in sorted(f.iterdir()) if path.is_file()]
    return [p for p in files if p.suffix in TABLES and not re.search("label|class", p.stem.lower())]
