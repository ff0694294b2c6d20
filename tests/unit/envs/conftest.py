"""What the tests of this folder share: a cache of their own, kept for all of them.

Compiling takes most of their time. Programs are shared by all environments of one game, number and
kind of observation, so tests keep to the numbers below.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from envs import craftax_game, jax_setup

FEW, FULL = 4, 2
"""environments of Craftax-Classic, and of Craftax, which takes thrice as long to compile"""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache is neither read nor written, whatever ran before in this process."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("DYNMOE_CACHE", raising=False)
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        for function in (jax_setup.prepare, craftax_game.programs, craftax_game.view):
            function.cache_clear()
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        jax_setup.prepare()
        yield folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
