"""Two processes that train together: what moves by data moves alike, as if it were one batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynmoe import registry
from dynmoe.moe import MoELayer, collect_aux_losses, finish_step
from dynmoe.moe.passes import share_batch

DIM, STEPS = 6, 3
States = dict[tuple[str, str], dict[str, Tensor]]
"""The state after training, of each router and loss."""
CASES = [
    *((router, "none") for router in registry.names("router") if router != "oracle"),
    *(("topk", loss) for loss in registry.names("loss") if loss != "load"),
    ("noisy-topk", "load"),
]
MOVED_BY_DATA = [("prototypes", "none"), ("relu", "none"), ("topk", "loss-free")]
"""Whose state, moved by two processes, is that of one process with the whole batch."""
SHARED = [case for case in CASES if not registry.get("router", case[0]).competing]
"""Which learn from a batch that two processes share what one process learns from it."""


class WithLosses(nn.Module):
    """A layer whose auxiliary losses leave by the model's output, as data parallel asks."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.square().mean() + sum(collect_aux_losses(self).values())


def make_model(router: str, loss: str) -> WithLosses:
    config = registry.get("router", router).Config()
    losses = [registry.get("loss", loss).Config(weight=0.1)]
    generator = torch.Generator().manual_seed(0)
    layer = MoELayer(DIM, DIM, 24, num_experts=3, router=config, losses=losses, generator=generator)
    return WithLosses(layer.double())


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return 2 * torch.randn(16, DIM, dtype=torch.double, generator=generator)


def train(model: nn.Module, parts: slice, steps: int = STEPS) -> dict[str, Tensor]:
    """Steps on every batch's rows `parts`; two accumulated passes each. Returns the state."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        for x in batch(step)[parts].chunk(2):
            model(x).backward()
        optimizer.step()
        finish_step(model)
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return copy.deepcopy(plain.state_dict())


def _in_parallel(rank: int) -> States:
    """By torch's data parallel."""
    states: States = {}
    for router, loss in CASES:
        model: nn.Module = make_model(router, loss)
        if any(p.requires_grad for p in model.parameters()):
            model = DistributedDataParallel(model, find_unused_parameters=True)
        states[router, loss] = train(model, slice(rank, None, 2))
    return states


def train_on_shares(model: WithLosses, part: slice, size: int) -> dict[str, Tensor]:
    """Steps on rows of batches of 15 that processes share, by averaged gradients; the state."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model.layer(batch(step)[:15][part]).square().sum() * size / (15 * DIM)
        (loss + sum(collect_aux_losses(model).values())).backward()
        for parameter in model.parameters() if size > 1 else ():
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
        optimizer.step()
        finish_step(model)
    return copy.deepcopy(model.state_dict())


def _noted(rank: int) -> States:
    """One step of state alone, by two synchronised passes: weights move by what these noted."""
    states: States = {}
    for router, loss in MOVED_BY_DATA:
        model = DistributedDataParallel(make_model(router, loss), find_unused_parameters=True)
        for x in batch(0)[rank::2].chunk(2):
            model(x).backward()
        finish_step(model)
        states[router, loss] = model.module.state_dict()
    return states


def _on_shares(rank: int) -> States:
    share_batch()
    rows = slice(rank, None, 2)
    return {case: train_on_shares(make_model(*case), rows, 2) for case in SHARED}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # nothing may hang on it
    torch.save([work(rank) for work in (_in_parallel, _noted, _on_shares)], f"{folder}/{rank}.pt")
    dist.barrier()  # gloo aborts a process that leaves while another still needs it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[list[States]]:
    """What each process ended with: in parallel, with what passes noted, and on shares."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_end_with_one_state(ends: list[list[States]]):
    first, second = (in_parallel for in_parallel, _, _ in ends)
    for case in CASES:
        torch.testing.assert_close(
            first[case], second[case], rtol=0, atol=0, msg=lambda text, c=case: f"{c}: {text}"
        )


def test_statistics_of_two_processes_are_those_of_the_whole_batch(
    ends: list[list[States]],
):
    for router, loss in MOVED_BY_DATA:
        model = make_model(router, loss)
        before = copy.deepcopy(model.state_dict())
        model(batch(0))
        finish_step(model)
        whole = model.state_dict()
        assert any(not torch.equal(whole[name], before[name]) for name in before), router
        for _, noted, _ in ends:
            torch.testing.assert_close(noted[router, loss], whole)
    for case in SHARED:
        whole = train_on_shares(make_model(*case), slice(None), 1)
        for _, _, on_shares in ends:
            torch.testing.assert_close(
                on_shares[case], whole, rtol=1e-9, atol=1e-12,
                msg=lambda text, c=case: f"{c}: {text}",
            )  # fmt: skip
