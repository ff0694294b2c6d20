"""The dense network whose block is re-initialised at each task, and heads set to zero."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from cl_benchmarks.method import Horizon, ResetBlock, Training, ZeroHead
from cl_benchmarks.networks import Network, build_network
from cl_benchmarks.settings import Config
from cl_benchmarks.trunks import MLP
from dynmoe.interventions.intervention import NoIntervention


def trained(blocks: int = 2, place: str = "last") -> tuple[Training, ResetBlock]:
    torch.manual_seed(0)
    method = ResetBlock.Config().build()
    config = MLP.Config(width=6, hidden=8, blocks=blocks, place=place)  # type: ignore[arg-type]
    model = build_network(config, (1, 3, 3), 4, method.make_block(Config(), Horizon(9, 3), 0))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(9, 1, 3, 3)), torch.arange(9) % 4).backward()
        optimizer.step()
    nothing = NoIntervention(NoIntervention.Config())
    generator = torch.Generator().manual_seed(1)
    return Training(model, optimizer, generator, lambda _: model, nothing), method


def start(plugin: object, model: nn.Module, task: int, resuming: bool = False) -> None:
    clock = SimpleNamespace(train_exp_counter=task)
    plugin.before_training_exp(  # type: ignore[attr-defined]
        SimpleNamespace(clock=clock, model=model, resuming=resuming)
    )


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    found = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return {".".join(name.split(".")[:2]) for name in found}


def copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_placed_blocks_are_drawn_and_nothing_else() -> None:
    for place, expected in (("last", {"blocks.2"}), ("all", {"blocks.0", "blocks.2"})):
        training, method = trained(place=place)
        model, optimizer = training.model, training.optimizer
        assert isinstance(model, Network)
        (plugin,) = method.plugins(Config(), training)
        before = copy(model)
        start(plugin, model, 0)
        start(plugin, model, 2, resuming=True)
        assert changed(model, before) == set()
        start(plugin, model, 1)
        assert changed(model, before) == expected
        first = optimizer.state[model.blocks[2][0].weight]
        assert not first["exp_avg"].any() and first["exp_avg_sq"].min() > 0
        assert first["exp_avg_sq"].unique().numel() == 1
        assert optimizer.state[model.classifier.weight]["exp_avg"].any()
        bound = 6**-0.5  # torch's own first values of a layer of 6 inputs
        assert 0.5 * bound < model.blocks[2][0].weight.abs().max() <= bound


def test_it_resumes_and_starts_like_the_dense_network() -> None:
    training, method = trained()
    (plugin,) = method.plugins(Config(), training)
    saved = plugin.state_dict()
    start(plugin, training.model, 1)
    expected = copy(training.model)
    plugin.load_state_dict(saved)
    start(plugin, training.model, 1)
    assert changed(training.model, expected) == set()
    torch.manual_seed(3)
    dense = build_network(MLP.Config(), (1, 3, 3), 4)
    torch.manual_seed(3)
    make = method.make_block(Config(), Horizon(9, 3), 0)
    assert changed(build_network(MLP.Config(), (1, 3, 3), 4, make), copy(dense)) == set()


def test_the_head_is_zero_at_every_task() -> None:
    training, _ = trained()
    plugin, model = ZeroHead(training), training.model
    before = copy(model)
    start(plugin, model, 1, resuming=True)
    assert changed(model, before) == set()
    for task in (0, 1):
        start(plugin, model, task)
        assert changed(model, before) == {"classifier.weight", "classifier.bias"}
        assert not model.classifier.weight.any() and not model.classifier.bias.any()
        assert model.classifier.weight not in training.optimizer.state
        with torch.no_grad():
            model.classifier.weight.fill_(1.0)
