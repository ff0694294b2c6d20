"""What all tests share: one thread for each process, and a cache for the run.

Test processes run side by side. More threads would only wait for one another, and what one process
has compiled or trained the others find in the cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; children inherit it

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of all processes of this run; the user's is neither read nor written."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker's is a folder in the run's
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder / "cache"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A command that was tested before may have asked for more."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before the option -m chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make all but some cases of the tests marked `thin` slow.

    Which cases run is the same every time: the first, the last, and others evenly between them.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("thin"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for own in cases.values():
        marker = own[0].get_closest_marker("thin")
        assert marker is not None
        count, last = min(marker.args[0], len(own)), len(own) - 1
        kept = {round(i * last / max(count - 1, 1)) for i in range(count)}
        for number, item in enumerate(own):
            if number not in kept:
                item.add_marker(pytest.mark.slow)
