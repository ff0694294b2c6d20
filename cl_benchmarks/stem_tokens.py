"""What a frozen convolutional stem says of all images of a domain set: computed once, and kept.

The tokens lie in the user's cache folder as 16-bit floats (`dynmoe.lab.kept_rows`), under a digest
of the stem's weights, of mean and deviation of its input, and of the images' files, so that all
methods, trials and later runs share them; what was interrupted goes on where it was. They are of
the images as they are: nothing can be augmented behind the stem.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_benchmarks.domain_set import Domain, DomainSet, Preparation
from cl_benchmarks.stem_vit import CHANNELS, SIZE, TOKENS, StemViT
from dynmoe.lab import cache
from dynmoe.lab.kept_rows import KeptRows

VERSION = 1
"""Raise it when the same stem and images give other tokens."""
MOST = 200_000
"""Images whose tokens are kept, 2.9 GB; those of larger sets are computed in each step."""
BATCH = 64
"""Images per pass of the stem."""
IMAGES = Preparation(SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Of a `StemViT`'s images, which normalises them itself."""


@dataclass(frozen=True, eq=False)
class StemTokens:
    """Stands in for a `Preparation`: gives a stem's tokens instead of images."""

    tokens: dict[str, Tensor] = field(repr=False)
    """name of a domain -> float16 [N, 64, 112]"""

    def batch(
        self, domain: Domain, indices: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Tokens of images of a domain, float32 [B, 64, 112].

        Raises:
            ValueError: a generator is given; these images cannot be augmented.
        """
        if generator is not None:
            raise ValueError("tokens of a stem cannot be augmented")
        return self.tokens[domain.name][indices].float()


def keep_tokens(model: StemViT, data: DomainSet) -> StemTokens:
    """The tokens of all images, from the cache if possible."""
    tensors = [*model.stem.state_dict().values(), model.mean, model.std]
    stem = _digest([value.numpy() for value in tensors])
    found = {}
    for domain in data.domains:
        key = cache.digest({"version": VERSION, "stem": stem, "images": _images_key(domain)})

        told: list[str] = []

        def make(places: list[int], domain: Domain = domain, told: list[str] = told) -> np.ndarray:
            if not told:
                told.append(f"stem: computing {len(domain)} images of {domain.name} (once)")
                cache.notice(told[0])
            return _tokens(model, domain, places)

        kept = KeptRows(f"stem-{key}", len(domain), (TOKENS, CHANNELS), np.float16, BATCH)
        found[domain.name] = torch.from_numpy(kept.rows(range(len(domain)), make))
    return StemTokens(found)


@torch.no_grad()
def _tokens(model: StemViT, domain: Domain, places: list[int]) -> np.ndarray:
    """float16 [n, 64, 112] of the images at these places."""
    values = model.features(IMAGES.batch(domain, torch.tensor(places)))
    return values.clamp(-65504, 65504).half().numpy()


def _images_key(domain: Domain) -> Any:
    """Values that change with the images of a domain or their order."""
    if isinstance(domain.images, Tensor):
        return _digest([domain.images.numpy()])
    return cache.file_states(domain.images)


def _digest(arrays: list[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(str(array.shape).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]
