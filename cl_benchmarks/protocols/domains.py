"""The domain-incremental protocol: the classes stay, and how images look changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_benchmarks.images import ImageData, check_least
from cl_benchmarks.protocol import (
    Chunk,
    Protocol,
    balanced_parts,
    balanced_subset,
    check_divides,
    generator,
    whole_test_set,
)
from cl_benchmarks.styles import STYLES
from dynmoe.errors import UserError


class Domains(
    Protocol,
    name="domains",
    source="domain-incremental learning: van de Ven et al. 2022 (Nature Machine Intelligence 4)",
):
    """The same classes in every chunk, in another style: old tasks can be asked at any time.

    Where the data set tells its images' domains, a chunk is one domain, and its test images are
    that domain's, or all there are if it has none (CORe50). Otherwise a chunk is a random part of
    the training images, class by class, in one of the styles of `cl_benchmarks.styles`, and its
    test images are all those of the data set in that style.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Protocol.Config):
        """Options of the domain-incremental protocol."""

        order: Literal["drawn", "fixed"] = "drawn"
        """of domains or styles: drawn from the seed, or as listed (the first style is none)"""
        images: Literal["parts", "same"] = "parts"
        """of a chunk in a style: a part of the training images, or all of them in every chunk"""
        test_images: int = 0
        """most test images of a chunk, classes in turn; 0 for all"""

    config: Config

    def __init__(self, config: Config) -> None:
        check_least("protocol", config, test_images=0)
        super().__init__(config)

    def split(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """A chunk per domain or style.

        Raises:
            UserError: more chunks than there are domains or styles.
        """
        if chunks < 1:
            raise UserError(f"{chunks} chunks are too few; use --chunks 1 or more")
        if data.train_domains is not None:
            return self._told(data, chunks, seed)
        names = self._ordered(list(STYLES), chunks, seed, "styles")
        test = self._test(*whole_test_set(data), seed)
        train = self._parts(data, chunks, seed)
        return [
            Chunk(index, data.train_labels[index], *test, style=name)
            for index, name in zip(train, names, strict=True)
        ]

    def no_cumulative(self) -> str | None:
        """A chunk has one style."""
        return "protocol domains shows each chunk in its own style; use --access limited"

    def _told(self, data: ImageData, chunks: int, seed: int) -> list[Chunk]:
        """The domains that the data set tells of."""
        train, test = data.train_domains, data.test_domains
        assert train is not None and test is not None
        known = torch.unique(train).tolist()
        found = []
        for domain in self._ordered(known, chunks, seed, f"domains of {data.name}"):
            index, own = (train == domain).nonzero()[:, 0], (test == domain).nonzero()[:, 0]
            if not len(own):  # CORe50: some domains are for learning, others for tests
                own = torch.arange(len(test))
            asked = self._test(own, data.test_labels[own], seed)
            found.append(Chunk(index, data.train_labels[index], *asked))
        return found

    def _ordered(self, names: list, chunks: int, seed: int, what: str) -> list:
        """The first `chunks` of them in the order of the settings."""
        if chunks > len(names):
            raise UserError(
                f"{chunks} chunks are more than the {len(names)} {what}; "
                f"use --chunks {len(names)} or fewer"
            )
        if self.config.order == "drawn":
            names = [names[i] for i in generator(seed, "domains").permutation(len(names))]
        return names[:chunks]

    def _parts(self, data: ImageData, chunks: int, seed: int) -> list[Tensor]:
        """Index of the training images of each chunk."""
        total = len(data.train_labels)
        if self.config.images == "same":
            return [torch.arange(total)] * chunks
        if total // chunks < 1:
            check_divides(chunks, total, "training images")
        parts = balanced_parts(data.train_labels, chunks, generator(seed, "domains", "parts"))
        least = min(map(len, parts))  # equal sizes: the first parts may have an image more
        return [part[:least] for part in parts]

    def _test(self, index: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Index and labels of the test images that are used of these."""
        wanted = self.config.test_images
        if not wanted or wanted >= len(index):
            return index, labels
        keep = balanced_subset(labels, wanted, generator(seed, "domains", "test"))
        return index[keep], labels[keep]
