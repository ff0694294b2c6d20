"""Every method, learnt by two processes that share each batch, is what one process learns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dg_cases import METHODS, make
from dg_learning import learn
from torch import Tensor

from dynmoe.moe.passes import share_batch

pytestmark = pytest.mark.slow


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    share_batch()
    torch.save({name: learn(name) for name in METHODS}, f"{folder}/{rank}.pt")
    os._exit(0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What two processes end with."""
    folder: Path = tmp_path_factory.mktemp("shared")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_does(
    name: str, shared: list[dict[str, dict[str, Tensor]]]
) -> None:
    first, second = (one[name] for one in shared)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    torch.testing.assert_close(first, learn(name), rtol=1e-9, atol=1e-9)
    start = make(name).state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in first.items() if key in start)
