"""Images of the same classes in several domains, and the kind of part that gives them.

A domain's images are either in memory, or files that are decoded when they are needed: DomainNet
has 600,000. Shapes: N images of one domain, C classes, B images of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cl_benchmarks.image_reader import read_rgb, to_tensor
from dynmoe.errors import UserError
from dynmoe.registry import Part, PartConfig


@dataclass(frozen=True, eq=False)
class Domain:
    """The images of one domain.

    Raises:
        ValueError: images and labels that do not fit together.
    """

    name: str
    """as it stands in tables"""
    images: Tensor | tuple[Path, ...]
    """uint8 [N, 3, H, W], or N image files"""
    labels: Tensor
    """int64 [N]"""

    def __post_init__(self) -> None:
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            raise ValueError(f"{self.name}: {len(self.images)} images, labels {self.labels.shape}")
        if isinstance(self.images, Tensor) and (
            self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3
        ):
            raise ValueError(f"{self.name}: images must be uint8 [N, 3, H, W]")

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int) -> Tensor:
        """One image, uint8 [3, H, W].

        Raises:
            UserError: names the file that cannot be read.
        """
        if isinstance(self.images, Tensor):
            return self.images[index]
        return read_image(self.images[index])


@dataclass(frozen=True, eq=False)
class DomainSet:
    """All domains of a data set; their order decides the number that each has.

    Raises:
        ValueError: fewer than two domains, or labels outside 0 .. C-1.
    """

    name: str
    """what the numbers of a run are about"""
    domains: tuple[Domain, ...]
    """at least two: one is held out"""
    classes: tuple[str, ...]
    """names of the C classes, the same in each domain"""

    def __post_init__(self) -> None:
        if len(self.domains) < 2:
            raise ValueError(f"{self.name} has {len(self.domains)} domain(s); it takes two")
        for domain in self.domains:
            if len(domain) and not 0 <= int(domain.labels.min()) <= int(domain.labels.max()) < len(
                self.classes
            ):
                raise ValueError(f"{domain.name}: labels must lie in 0 .. {len(self.classes) - 1}")

    @property
    def names(self) -> list[str]:
        """Names of the domains, in order."""
        return [domain.name for domain in self.domains]


class DomainData(Part, ABC, kind="domains"):
    """Base of all sets of domains. A subclass takes its `Config` and defines `load`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of a set of domains."""

    @abstractmethod
    def __init__(self, config: Config) -> None:
        """Check the options.

        Raises:
            UserError: an option that cannot work.
        """

    @abstractmethod
    def load(self) -> DomainSet:
        """All domains, the same at each call.

        Raises:
            UserError: the data cannot be found or read; says where it was looked for.
        """


def read_image(path: Path) -> Tensor:
    """A file as uint8 [3, H, W].

    Raises:
        UserError: names the file that cannot be read, see `read_rgb`.
    """
    return to_tensor(read_rgb(path))


def check_domains(known: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Numbers of the chosen domains, all of them if none is named.

    Raises:
        UserError: a name that is no domain, or one twice.
    """
    from dynmoe.errors import unknown

    for name in chosen:
        if name not in known:
            raise unknown("domain", name, known)
        if list(chosen).count(name) > 1:
            raise UserError(f"domain {name!r} is named twice; name each once")
    return [known.index(name) for name in chosen or known]
