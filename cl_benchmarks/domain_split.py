"""DomainBed's splits and batches.

Gulrajani and Lopez-Paz 2021 (arXiv 2007.01434): each domain is cut into "out", a fifth for
validation, and "in", the rest; a model trains on "in" of the source domains.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from dynmoe import seeding

HOLDOUT = 0.2


def seed_hash(*values: int) -> int:
    """DomainBed's seed from integers: the MD5 of the tuple's text, modulo 2^31."""
    return int(hashlib.md5(str(values).encode()).hexdigest(), 16) % 2**31


def split(count: int, trial: int, domain: int, holdout: float = HOLDOUT) -> tuple[Tensor, Tensor]:
    """Indices of "in" and "out" of a domain of `count` images, as DomainBed draws them.

    Args:
        trial: the trial's seed.
        domain: the domain's number.
        holdout: share that is held out; rounded down to whole images.

    Returns:
        in, out: int64.
    """
    keys = list(range(count))
    np.random.RandomState(seed_hash(trial, domain)).shuffle(keys)
    size = int(count * holdout)
    return torch.tensor(keys[size:]), torch.tensor(keys[:size], dtype=torch.long)


def batch_indices(indices: Tensor, size: int, step: int, seed: int, domain: int) -> Tensor:
    """The images of a domain that training step `step` takes, int64 [size].

    Drawn from `indices` with replacement, each image independently of all others, as DomainBed's
    training loader does. Nothing is kept between steps: a run that is resumed takes the same
    images.
    """
    generator = seeding.generator(seed, "batches", domain, step)
    return indices[torch.randint(len(indices), (size,), generator=generator)]
