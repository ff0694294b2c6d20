"""What the tests of this folder share: numbers of environments, and jax set up for the run's cache.

Compiling takes most of their time. Programs are shared by all environments of one game, number and
kind of observation, so tests keep to the numbers below.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from envs import craftax_game, jax_setup

FEW, FULL = 4, 2
"""environments of Craftax-Classic, and of Craftax, which takes thrice as long to compile"""


@pytest.fixture(scope="session", autouse=True)
def own_cache(shared_cache: Path) -> Iterator[Path]:
    """What ran before in this process may have used another folder."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DYNMOE_CACHE", raising=False)
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        for function in (jax_setup.prepare, craftax_game.programs, craftax_game.view):
            function.cache_clear()
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        jax_setup.prepare()
        yield shared_cache


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make the cases of the full game slow, but for its codes: compiling it takes a minute."""
    for item in items:
        if item.path.name in ("test_craftax_env.py", "test_craftax_render.py"):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            names = [v for v in params.values() if isinstance(v, str) and v.startswith("Craftax-")]
            full = any("Classic" not in name for name in names)
            if full or params.get("classic") is False:
                item.add_marker(pytest.mark.slow)
