"""The kind of part that gives images: `--dataset NAME`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from cl_benchmarks.images import ImageData
from dynmoe.registry import Part, PartConfig


class Dataset(Part, ABC, kind="dataset"):
    """Base of all data sets. A subclass takes its `Config` and defines `load`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of a data set."""

    @abstractmethod
    def __init__(self, config: Config) -> None:
        """Check the options.

        Raises:
            UserError: an option that cannot work.
        """

    @abstractmethod
    def load(self, seed: int) -> ImageData:
        """All images. `seed` decides those that are generated; files are what they are.

        Raises:
            UserError: the data cannot be found or read; says where it was looked for.
        """
