"""ImageNet's shifted test sets, read from the folders that their archives unpack to.

    DIR/imagenet-c/<corruption>/<severity>/<wnid>/*.JPEG      1000 classes, 224 pixels already
    DIR/imagenet-r/<wnid>/*            200 classes
    DIR/imagenet-a/<wnid>/*            200 classes
    DIR/imagenet-sketch/sketch/<wnid>/*   1000 classes (or without sketch/)
    DIR/imagenet-1k_2012/val/<wnid>/*  1000 classes, the clean validation set

ImageNet-C's archives hold groups (noise/, blur/, weather/, digital/, extra/); corruptions are found
inside these too.

Two label protocols, which give different numbers and must not be mixed. all-1000 (MoETTA's): the
label is ImageNet's index and the model answers with all 1000 classes. subset (the sets' authors',
EATA's and DeYO's): the model's outputs are first cut down to the set's 200 classes, and the label
is an index among them; it exists for the streams rendition and adversarial alone.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cl_benchmarks.images import READER_VERSION, class_folders, files_by_class, image_files
from cl_benchmarks.shifts.domain import Corrupted, Domain, Files, Resized, check
from cl_benchmarks.shifts.folders import check_classes, corruption_folder
from cl_benchmarks.shifts.stream import OTHERS, ShiftSource
from dynmoe.errors import UserError, unknown
from dynmoe.lab import cache

Labels = Literal["all-1000", "subset"]
CLASSES, SIZE, RESIZE = 1000, 224, 256
PLACES = {
    "corruption": ("imagenet-c", "ImageNet-C", "imagenet_c"),
    "rendition": ("imagenet-r", "ImageNet-R", "imagenet_r"),
    "adversarial": ("imagenet-a", "ImageNet-A", "imagenet_a"),
    "sketch": ("imagenet-sketch/sketch", "imagenet-sketch", "ImageNet-Sketch/sketch"),
    "clean": ("imagenet-1k_2012/val", "imagenet/val", "imagenet-1k/val", "val"),
}
"""Where each set may lie below the data folder; the first that is there is taken."""
SUBSETS = {"rendition": "imagenet_r_indices.txt", "adversarial": "imagenet_a_indices.txt"}
"""timm's lists of the classes that the two sets have."""


class Imagenet(ShiftSource):
    """The test sets below one folder.

    Args:
        root: the folder that holds imagenet-c and the others, those that the stream needs.
        labels: the label protocol, see above.
        on_the_fly: corrupt the clean validation set here, through imagecorruptions-imaug and a disk
            cache, instead of reading imagenet-c.
        mean, std: what the model expects.
        seed: of the on-the-fly corruptions.
        size: side of what the model gets; images are cropped, and corrupted, at 224 pixels.

    Raises:
        UserError: no folder given, or it is not there.
    """

    def __init__(
        self,
        root: Path | None,
        labels: Labels = "all-1000",
        on_the_fly: bool = False,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        seed: int = 0,
        size: int = SIZE,
    ) -> None:
        if root is None:
            raise UserError("no data folder; give the one with imagenet-c in it as --data-dir DIR")
        self.root = root.expanduser()
        if not self.root.is_dir():
            raise UserError(f"data folder {self.root} is not there; give another --data-dir")
        self.labels, self.on_the_fly, self.seed = labels, on_the_fly, seed
        self.name = "ImageNet" if labels == "all-1000" else "ImageNet, 200 classes"
        self.num_classes, self.size, self.mean, self.std = CLASSES, size, mean, std
        if labels == "subset":
            self.num_classes = 200

    def corrupted(self, corruption: str, severity: int) -> Domain:
        """See ShiftSource.

        Raises:
            UserError: a corruption or severity without a folder, wrong classes, an empty class.
        """
        check(corruption, severity)
        if self.on_the_fly:
            clean = self._set("clean")
            made = Corrupted(clean, _identity(clean), corruption, severity, self.seed)
            return self._sized(made)
        root = self._place("corruption")
        folder = corruption_folder(root, corruption, severity)
        return self._sized(self._read(corruption, folder, None, torch.arange(CLASSES)))

    def other(self, shift: str) -> Domain:
        """See ShiftSource.

        Raises:
            UserError: a set that is not there, wrong classes, an empty class.
        """
        if shift not in (*OTHERS, "clean"):
            raise unknown("shift", shift, (*OTHERS, "clean"))
        return self._sized(self._set(shift))

    def _set(self, shift: str) -> Files:
        indices = subset(shift) if shift in SUBSETS else torch.arange(CLASSES)
        return self._read(shift, self._place(shift), RESIZE, indices)

    def _sized(self, domain: Domain) -> Domain:
        return domain if self.size == SIZE else Resized(domain, self.size)

    def _place(self, key: str) -> Path:
        for name in PLACES[key]:
            if (self.root / name).is_dir():
                return self.root / name
        raise UserError(f"no {PLACES[key][0]} in {self.root}; unpack it there, or leave it out of "
                        "the stream")  # fmt: skip

    def _read(self, name: str, folder: Path, resize: int | None, indices: Tensor) -> Files:
        """Images in `folder/<wnid>`; class folder i, sorted, is ImageNet's class indices[i]."""
        wnids = _lines("imagenet_synsets.txt")
        expected = [wnids[i] for i in indices.tolist()]
        found = class_folders(folder)
        check_classes(folder, [p.name for p in found], expected)
        files, positions = files_by_class(found, image_files, "set")
        cut = self.labels == "subset" and name in SUBSETS
        labels = torch.tensor(positions) if cut else indices[positions]
        return Files(name, files, labels, resize, SIZE)


def subset(shift: str) -> Tensor:
    """ImageNet's class indices [200], ascending, of the stream rendition or adversarial.

    Raises:
        UserError: another stream, which is not made of one set with 200 classes.
    """
    if shift not in SUBSETS:
        raise UserError(
            f"labels subset needs the stream {' or '.join(SUBSETS)}, not {shift!r}: its images "
            "come from sets with different classes; use --labels all-1000"
        )
    return torch.tensor([int(line) for line in _lines(SUBSETS[shift])])


def _lines(file: str) -> list[str]:
    """Lines of one of timm's packaged lists."""
    return (resources.files("timm.data") / "_info" / file).read_text().split()


def _identity(domain: Files) -> str:
    """Changes with any of the files."""
    return cache.digest({"reader": READER_VERSION, "files": cache.file_states(domain.files)})
