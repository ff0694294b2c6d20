"""The growth controller: events, growth shock, and resuming."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController, Signals
from dynmoe.moe import MoELayer, moe_layers
from dynmoe.moe.model import undisturbed
from dynmoe.registry import PartConfig

CONSTANT, PER_GROWTH = Budget(), Budget(mode="per-growth", units=4)


def make_model(router: str = "cosine") -> nn.Sequential:
    """Two MoE layers of different sizes, and modules that act otherwise in training."""
    config = registry.get("router", router).Config()
    first = MoELayer(6, 8, 13, num_experts=2, max_experts=8, router=config)
    second = MoELayer(8, 5, 20, num_experts=2, max_experts=8, router=config)
    return nn.Sequential(first, nn.BatchNorm1d(8), nn.Sequential(nn.Dropout(0.5), second))


def part(kind: str, name: str, **options: Any) -> PartConfig:
    return registry.get(kind, name).Config(**options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 2) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(32, 6)), torch.randint(0, 5, (32,))).backward()
        optimizer.step()


@pytest.fixture
def probe() -> tuple[Tensor, Tensor]:
    return torch.randn(40, 6), torch.randint(0, 5, (40,))


@pytest.mark.parametrize("budget", [CONSTANT, PER_GROWTH], ids=str)
def test_events_say_what_happened(budget, probe):
    model = make_model()
    controller = GrowthController(model, granularity=2, budget=budget)
    events = [controller.grow(7, probe), controller.grow(19, probe)]
    assert controller.events == events
    assert [e.step for e in events] == [7, 19] and [e.count for e in events] == [1, 2]
    assert [e.experts for e in events] == [4, 6]
    if budget is CONSTANT:
        sizes = [{"0": [4, 3, 3, 3], "2.1": [5, 5, 5, 5]},
                 {"0": [3, 2, 2, 2, 2, 2], "2.1": [4, 4, 3, 3, 3, 3]}]  # fmt: skip
    else:
        sizes = [{"0": [7, 6] + [4] * n, "2.1": [10, 10] + [4] * n} for n in (2, 4)]
    assert [e.hidden_sizes for e in events] == sizes
    heads = 2 * 8 * (6 + 8) / 2 + 2 * 8 * (8 + 5) / 2 + 16  # routers and output biases, BatchNorm
    expected = [
        heads + sum(e.hidden_sizes["0"]) * (6 + 1 + 8) + sum(e.hidden_sizes["2.1"]) * (8 + 1 + 5)
        for e in events
    ]
    assert [e.parameters for e in events] == expected
    for _, layer in moe_layers(model):
        assert layer.created.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("router", ["cosine", "softmax", "topk"])
def test_shock_equals_an_independent_measurement(router, probe):
    model = make_model(router)
    train(model, torch.optim.Adam(model.parameters()), 0)
    before = copy.deepcopy(model).eval()
    event = GrowthController(model, granularity=2).grow(1, probe)
    after = copy.deepcopy(model).eval()
    x, labels = probe
    with torch.no_grad():
        old, new = before(x), after(x)
    expected = {"output_change": (new - old).square().sum().sqrt() / old.square().sum().sqrt()}
    for when, y in (("before", old), ("after", new)):
        expected[f"loss_{when}"] = -y.log_softmax(dim=1)[range(40), labels].mean()
        expected[f"accuracy_{when}"] = (y.argmax(dim=1) == labels).double().mean()
    assert event.shock == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)
    assert event.shock["output_change"] > 0.01


def test_shock_without_labels_and_without_a_probe(probe):
    event = GrowthController(make_model(), pruning=part("pruning", "random")).grow(
        1, (probe[0], None)
    )
    assert event.shock.keys() == {"output_change"}
    event = GrowthController(make_model(), pruning=part("pruning", "random")).grow(1)
    assert event.shock == {} and event.experts == 3


class TwoHeads(nn.Module):
    """Returns a tuple, as an actor-critic does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_model()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return y[:, :4], y[:, 4]


@pytest.mark.parametrize("labelled", [True, False])
def test_shock_is_measured_as_the_caller_says(labelled, probe):
    """On what the model returns in eval mode before and after, whatever that is."""
    model, calls = TwoHeads(), []

    def measure(before: Any, after: Any, labels: Tensor | None) -> dict[str, float]:
        calls.append((before, after, labels))
        return {"moved": float((before[1] - after[1]).abs().max()), "count": len(calls)}

    x, labels = probe[0], probe[1] if labelled else None
    controller = GrowthController(model, measure_shock=measure)
    before = copy.deepcopy(model).eval()(x)
    first = controller.grow(1, (x, labels))
    after = copy.deepcopy(model).eval()(x)
    for seen, expected in zip(calls[0][:2], (before, after), strict=True):
        torch.testing.assert_close(seen, expected)
        assert not any(part.requires_grad for part in seen)
    assert calls[0][2] is labels
    assert first.shock == {"moved": pytest.approx((after[1] - before[1]).abs().max().item()),
                           "count": 1} and first.shock["moved"] > 0.01  # fmt: skip
    assert controller.grow(2, (x, labels)).shock["count"] == 2
    bare = GrowthController(TwoHeads(), pruning=part("pruning", "reinit"), measure_shock=measure)
    assert bare.grow(3).shock == {} and len(calls) == 2  # without a probe nothing is measured


def test_measuring_leaves_training_flags_buffers_and_hooks_alone(probe):
    model = make_model().train()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    running = model[1].running_mean.clone()
    GrowthController(model).grow(1, probe)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(model[1].running_mean, running)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        _ = 1 / any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == flags


def test_hooks_go_even_if_the_probe_does_not_fit():
    model = make_model()
    with pytest.raises(RuntimeError):
        GrowthController(model).grow(1, (torch.randn(4, 7), None))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert next(moe_layers(model))[1].num_experts == 2


def test_utilities_come_from_each_layers_own_inputs(probe):
    """The second layer keeps the units of largest utility on what the first one sends it."""
    model = make_model()
    twin = copy.deepcopy(model).eval()
    layer, twin_layer = model[2][1], twin[2][1]
    with torch.no_grad():
        inputs = twin[2][0](twin[1](twin[0](probe[0])))
        hidden = F.relu(F.linear(inputs, twin_layer.bank.w_in, twin_layer.bank.b_in))
    utility = hidden.mean(dim=0) * twin_layer.bank.w_out.abs().sum(dim=0)
    GrowthController(model, granularity=2, pruning=part("pruning", "utility")).grow(1, probe)
    for run in range(2):  # ten units each, five are kept
        best = 10 * run + utility[10 * run : 10 * run + 10].topk(5).indices.sort().values
        assert (layer.bank.segment == run).nonzero().flatten().tolist() == best.tolist()
        assert torch.equal(layer.bank.w_in[best], twin_layer.bank.w_in[best])


def test_step_asks_the_trigger_and_makes_a_probe_only_to_grow(probe):
    made = []

    def make_probe() -> tuple[Tensor, Tensor]:
        made.append(1)
        return probe

    controller = GrowthController(make_model(), trigger=part("trigger", "every", steps=3))
    events = [controller.step(Signals(step=step), make_probe) for step in range(8)]
    assert [e.step for e in events if e is not None] == [3, 6]
    assert len(made) == 2 and len(controller.events) == 2


def test_generator_alone_decides_a_growth():
    def grown(seed: int) -> dict[str, Tensor]:
        model = copy.deepcopy(start)
        torch.manual_seed(1000 + len(seeds))  # must not matter
        seeds.append(seed)
        generator = torch.Generator().manual_seed(seed)
        GrowthController(model, pruning=part("pruning", "random"), generator=generator).grow(1)
        return model.state_dict()

    start, seeds = make_model(), list[int]()
    first, again, other = grown(1), grown(1), grown(2)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["0.bank.w_in"], other["0.bank.w_in"])


@pytest.mark.parametrize("init", registry.names("init"))
@pytest.mark.parametrize("budget", [CONSTANT, PER_GROWTH], ids=str)
def test_resuming_makes_the_next_growth_bit_equal(budget, init, probe):
    """Through a file of plain values, into a model of the size it had at its start."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer, GrowthController]:
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters())
        controller = GrowthController(
            model, optimizer, budget=budget, init=part("init", init),
            pruning=part("pruning", "random"),
            trigger=part("trigger", "every", steps=2), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return model, optimizer, controller

    model, optimizer, controller = parts = make()
    train(model, optimizer, 1)
    controller.grow(2, probe)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save([p.state_dict() for p in parts], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    others = make()
    for other, state in zip(others, saved, strict=True):
        other.load_state_dict(state)
    assert others[2].events == controller.events
    for model, optimizer, controller in (parts, others):
        assert controller.step(Signals(step=4), lambda: probe).count == 2
        train(model, optimizer, 3)
    for mine, theirs in zip(parts, others, strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_without_a_generator_a_growth_follows_the_global_seed():
    def grown(seed: int) -> dict[str, Tensor]:
        model = copy.deepcopy(start)
        controller = GrowthController(model, pruning=part("pruning", "random"))
        torch.manual_seed(seed)
        controller.grow(1)
        controller.grow(2)
        return model.state_dict()

    start = make_model()
    first, again, other = grown(1), grown(1), grown(2)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["0.bank.w_in"], other["0.bank.w_in"])


def saved(generator: torch.Generator | None) -> dict[str, Any]:
    """The state of a controller with that generator, through a file of plain values."""
    file = io.BytesIO()
    torch.save(GrowthController(make_model(), generator=generator).state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mine", [None, 5], ids=["global", "own"])
def test_a_controller_draws_on_from_what_was_saved(mine):
    """From the generator that was saved, or from the global one, which the caller keeps."""

    def make() -> GrowthController:
        generator = None if mine is None else torch.Generator().manual_seed(mine)
        return GrowthController(make_model(), generator=generator)

    controller = make()
    controller.load_state_dict(saved(torch.Generator().manual_seed(3)))
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(4, generator=controller.generator), expected)
    state = saved(None)
    assert state["generator"] is None
    controller = make()
    controller.load_state_dict(state)
    assert controller.generator is None


def test_misspelt_words_are_refused():
    with pytest.raises(UserError, match="moments='0' is neither mean nor zero"):
        GrowthController(make_model(), moments="0")
    with pytest.raises(UserError, match="init random: router='none' is neither new nor all"):
        GrowthController(make_model(), init=part("init", "random", router="none"))
