"""Growth on two processes: one plan, equal weights, and failure of all if one fails."""

from __future__ import annotations

import socket

import growth_processes
import pytest
import torch
import torch.multiprocessing as mp

from dynmoe import registry
from dynmoe.growth import GrowthController


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """Names of the files that two processes left for the checks that passed, and the failure."""
    folder = tmp_path_factory.mktemp("processes")
    model = growth_processes.make_model()
    controller = GrowthController(model, pruning=registry.get("pruning", "random").Config())
    for growth in range(2):
        controller.grow(growth, growth_processes.shard(0, 1))
    torch.save(model.state_dict(), folder / "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failure = None
    try:
        mp.spawn(growth_processes.work, args=(2, port, str(folder)), nprocs=2)
    except mp.ProcessRaisedException as error:
        failure = error
    return {path.name for path in folder.iterdir()}, failure


@pytest.mark.parametrize("check", growth_processes.CHECKS, ids=lambda check: check.__name__)
def test_on_two_processes(passed, check):
    names, failure = passed
    assert {f"{check.__name__}-{rank}" for rank in (0, 1)} <= names, failure
