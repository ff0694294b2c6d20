"""The mixture that is re-initialised at each task."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from cl_benchmarks.method import RenewExperts, Training
from dynmoe.interventions.intervention import NoIntervention
from dynmoe.moe import MoELayer


def plugin_on_trained_model() -> tuple[RenewExperts, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), MoELayer(6, 5, 8, num_experts=3))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(9, 4)).square().sum().backward()
        optimizer.step()
    training = Training(
        model, optimizer, torch.Generator().manual_seed(1), lambda _: model,
        NoIntervention(NoIntervention.Config()),
    )  # fmt: skip
    return RenewExperts(training), model, optimizer


def start(plugin: RenewExperts, model: nn.Module, task: int, resuming: bool = False) -> None:
    clock = SimpleNamespace(train_exp_counter=task)
    plugin.before_training_exp(SimpleNamespace(clock=clock, model=model, resuming=resuming))


def test_every_expert_is_drawn_and_nothing_else() -> None:
    plugin, model, optimizer = plugin_on_trained_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start(plugin, model, 2)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if name.startswith("0."):
            assert torch.equal(parameter, before[name]) and state["exp_avg"].any()
        else:
            assert (parameter != before[name]).all(), name
            assert not state["exp_avg"].any()
            assert (state["exp_avg_sq"] == state["exp_avg_sq"].flatten()[0]).all()
            assert state["exp_avg_sq"].flatten()[0] > 0
    assert model[1].num_experts == 3 and model[1].bank.hidden_sizes() == [3, 3, 2]


def test_not_at_the_first_task_nor_at_a_resumed_one() -> None:
    plugin, model, _ = plugin_on_trained_model()
    before = [p.detach().clone() for p in model.parameters()]
    start(plugin, model, 0)
    start(plugin, model, 3, resuming=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_generator_resumes() -> None:
    plugin, model, _ = plugin_on_trained_model()
    start(plugin, model, 1)
    saved = plugin.state_dict()
    start(plugin, model, 2)
    expected = [p.detach().clone() for p in model.parameters()]
    plugin.load_state_dict(saved)
    start(plugin, model, 2)
    assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))
