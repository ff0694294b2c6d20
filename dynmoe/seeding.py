"""Randomness from one seed: every consumer gets a generator of its own, derived by name."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def derive(seed: int, *keys: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `derive(seed, "batches", task, epoch)`.

    Hash-based, so that adding a consumer changes no other's numbers.
    """
    text = "/".join(map(str, (seed, *keys)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *keys: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `derive`."""
    return torch.Generator(device).manual_seed(derive(seed, *keys))


@contextmanager
def seeded(seed: int, *keys: str | int) -> Iterator[None]:
    """Run library code that draws from torch's global CPU generator, without disturbing it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, *keys))
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Leave the global generators as they are, whatever happens inside.

    Some libraries draw numbers as they are imported; a run that is resumed imports them later.
    """
    state = global_state()
    try:
        yield
    finally:
        load_global_state(state)


def seed_global(seed: int) -> None:
    """Seed the global generators of python, numpy and torch, for library code that uses them."""
    import numpy as np

    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    torch.manual_seed(derive(seed, "torch"))


def global_state() -> dict[str, Any]:
    """State of the global generators as plain values and tensors."""
    import numpy as np

    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_global_state(state: dict[str, Any]) -> None:
    """Restore `global_state()`."""
    import numpy as np

    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
