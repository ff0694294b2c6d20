"""What one of several processes does in the tests of growth with torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController, Signals, rewrap
from dynmoe.moe import MoELayer

BUDGETS = [Budget(), Budget(mode="per-growth", units=6)]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layer = MoELayer(10, 16, hidden=32, num_experts=2, max_experts=8)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 3))


def shard(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The process's part of the data."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 10, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return x[rank::size], y[rank::size]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x, y) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def check_equal(model: nn.Module, what: object) -> None:
    """Every weight, gradient and buffer is rank 0's."""
    for name, mine in model.state_dict().items():
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, mine), (what, name)


def combinations() -> Iterator[tuple[str, str, Budget]]:
    for pruning in registry.names("pruning"):
        for budget in BUDGETS:
            yield pruning, "random", budget
    for init in registry.names("init"):
        for budget in BUDGETS:
            yield "utility", init, budget


def grows_alike(rank: int, size: int) -> None:
    """Each process has its own data, and a generator of its own."""
    x, y = shard(rank, size)
    for what in combinations():
        pruning, init, budget = what
        ddp = DistributedDataParallel(make_model())
        model = ddp.module
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        controller = GrowthController(
            model, optimizer, granularity=2, budget=budget,
            pruning=registry.get("pruning", pruning).Config(),
            init=registry.get("init", init).Config(),
            generator=torch.Generator().manual_seed(rank),
        )  # fmt: skip
        for growth in range(2):
            for _ in range(3):
                step(ddp, optimizer, x, y)
            controller.grow(growth, (x, y))
            if budget.mode == "per-growth":
                ddp = rewrap(ddp)
            check_equal(model, what)
        for _ in range(20):
            step(ddp, optimizer, x, y)
        check_equal(model, what)
        events: list = [None] * size
        dist.all_gather_object(events, controller.events)
        assert all(event == events[0] for event in events), what


def equals_one_process(rank: int, size: int) -> None:
    """With equal generators and data a growth is that of a single process."""
    x, y = shard(0, 1)
    model = make_model()
    controller = GrowthController(model, pruning=registry.get("pruning", "random").Config())
    for growth in range(2):
        controller.grow(growth, (x, y))
    dist.barrier()
    alone = torch.load(os.environ["ALONE"], weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, alone[name]), name


def decides_alike(rank: int, size: int) -> None:
    """A trigger that watches a figure sees the mean over the processes."""
    trigger = registry.get("trigger", "plateau").Config(patience=3, gain=0.1, limit=2)
    model = make_model()
    controller = GrowthController(model, trigger=trigger)
    for count in range(1, 10):
        # Rank 0's score rises for ever, rank 1's falls as fast.
        controller.step(Signals(step=count, score=10.0 + (2 * rank - 1) * count))
    assert [event.step for event in controller.events] == [4, 7]
    check_equal(model, "trigger")


def fails_together(rank: int, size: int) -> None:
    """A growth that fails on one process leaves all as they were."""
    for late in (False, True):
        model = make_model()
        controller = GrowthController(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}

        def listener(old, late=late):
            if late and rank == 1:
                raise ZeroDivisionError("planned")

        controller.listeners.append(listener)
        width = 7 if rank == 1 and not late else 10
        own = ZeroDivisionError if late else RuntimeError
        theirs = pytest.raises(UserError, match="process 1")
        with pytest.raises(own) if rank == 1 else theirs:
            controller.grow(0, (torch.randn(4, width), None))
        assert not controller.events
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


def refuses_a_stale_wrapper(rank: int, size: int) -> None:
    x, y = shard(rank, size)
    ddp = DistributedDataParallel(make_model(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    step(ddp, optimizer, x, y)
    GrowthController(ddp, optimizer, budget=BUDGETS[1]).grow(0, (x, y))
    with pytest.raises(UserError, match="rewrap"):
        ddp(x)
    renewed = rewrap(ddp)
    assert renewed.find_unused_parameters
    step(renewed, optimizer, x, y)
    check_equal(renewed.module, "renewed")


def refuses_shards(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    with pytest.raises(UserError, match="0.router.weight.* fully_shard"):
        GrowthController(model).grow(0)


CHECKS = (
    grows_alike, equals_one_process, decides_alike, fails_together, refuses_a_stale_wrapper,
    refuses_shards,
)  # fmt: skip


def work(rank: int, size: int, port: int, folder: str) -> None:
    """Run every check in turn, and leave a file for each that has passed."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ALONE": f"{folder}/alone"}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    for check in CHECKS:
        check(rank, size)
        open(f"{folder}/{check.__name__}-{rank}", "w").close()
    dist.barrier()  # gloo aborts a process that leaves while another still needs it
    dist.destroy_process_group()
