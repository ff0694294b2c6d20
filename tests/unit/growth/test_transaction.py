"""A growth succeeds and is recorded, or leaves everything as it was."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Budget, GrowthController, Signals
from dynmoe.growth.new_experts import NewExperts
from dynmoe.growth.pruning import UtilityUnits
from dynmoe.moe import MoELayer, moe_layers, share_router

BUDGETS = [Budget(), Budget(mode="per-growth", units=4)]
X, Y = torch.randn(40, 6), torch.randint(0, 6, (40,))


def make_model(bank: str = "pool") -> nn.Sequential:
    config = registry.get("bank", bank).Config()
    layers = [MoELayer(6, 6, 24, num_experts=2, max_experts=8, bank=config) for _ in range(2)]
    return nn.Sequential(*layers)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def picture(model: nn.Module, optimizer: torch.optim.Optimizer, controller: Any) -> Any:
    """Everything that a growth may change."""
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "optimizer": optimizer.state_dict(),
            "held": [[id(p) for p in g["params"]] for g in optimizer.param_groups],
            "objects": [id(p) for p in model.parameters()],
            "controller": controller.state_dict(),
            "copies": [one.state_dict() for one in controller.copies],
        }
    )


class PlannedError(RuntimeError):
    """The failure that a test arranges."""


def fail(*_: Any, **__: Any) -> Any:
    raise PlannedError


def fail_in(where: str, controller: GrowthController, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrange that the next growth fails there."""
    layers = [layer for _, layer in moe_layers(controller.model)]
    if where == "draws of the last layer":
        monkeypatch.setattr(layers[-1].bank, "draw_experts", fail)
    elif where == "plan of the last layer":
        monkeypatch.setattr(controller.init, "plan", fail)
    elif where == "draws of a copy":
        monkeypatch.setattr(next(moe_layers(controller.copies[0]))[1].router, "draw_rows", fail)
    elif where == "listener":
        controller.listeners.append(fail)
    elif where == "probe after":
        model, calls = controller.model, []
        forward = model.forward

        def second_fails(x: Tensor) -> Tensor:
            calls.append(1)
            return forward(x) if len(calls) == 1 else fail()

        monkeypatch.setattr(model, "forward", second_fails)
    else:
        monkeypatch.setattr(controller, "measure_shock", fail)


PLACES = ["plan of the last layer", "draws of the last layer", "draws of a copy", "probe after",
          "measurement", "listener"]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("init", registry.names("init"))
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_a_growth_that_fails_leaves_no_trace(budget, init, where, shared, monkeypatch):
    """And one that is tried again is the growth that it would have been."""
    model = make_model()
    if shared:
        share_router(model)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    train(model, optimizer)
    controller = GrowthController(
        model, optimizer, granularity=2, budget=budget, pruning=UtilityUnits.Config(),
        init=registry.get("init", init).Config(), new_experts=NewExperts(logit=-1.0),
        trigger=registry.get("trigger", "every").Config(steps=3), copies=[AveragedModel(model)],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    controller.grow(0, (X, Y))
    train(model, optimizer)
    controller.copies[0].update_parameters(model)
    expected = copy.deepcopy(controller)
    before = picture(model, optimizer, controller)
    with monkeypatch.context() as patch:
        fail_in(where, controller, patch)
        with pytest.raises(PlannedError):
            controller.step(Signals(step=3), lambda: (X, Y))
        controller.listeners.clear()
    torch.testing.assert_close(
        picture(model, optimizer, controller), before, rtol=0, atol=0, equal_nan=True
    )
    assert controller.step(Signals(step=3), lambda: (X, Y)) is not None
    assert expected.step(Signals(step=3), lambda: (X, Y)) is not None
    torch.testing.assert_close(model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    assert len(controller.events) == 2
    train(model, optimizer)


@pytest.mark.parametrize("bank", [n for n in registry.names("bank") if n in ("networks", "swiglu")])
def test_other_banks_are_put_back_too(bank):
    model = make_model(bank)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    init = registry.get("init", "zero-output").Config()
    controller = GrowthController(model, optimizer, pruning=UtilityUnits.Config(), init=init)
    controller.listeners.append(fail)
    before = picture(model, optimizer, controller)
    with pytest.raises(PlannedError):
        controller.grow(0, (X, Y))
    torch.testing.assert_close(picture(model, optimizer, controller), before, rtol=0, atol=0)


# Any call signature and output.


@dataclasses.dataclass
class Output:
    """As a model may return."""

    loss: Tensor | None
    scores: Tensor


OUTPUTS = {
    "tensor": lambda y: y,
    "dict": lambda y: {"hidden": y.exp(), "logits": y},
    "ordered": lambda y: OrderedDict(count=torch.ones(3, dtype=torch.long), y=y),
    "tuple": lambda y: (torch.zeros(2, dtype=torch.long), [y, y.exp()]),
    "dataclass": lambda y: Output(None, y),
}


class Keywords(nn.Module):
    """Takes keywords only, and several inputs; calls its layer with keywords."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.body, self.output = make_model()[0], output

    def forward(self, *, input_ids: Tensor, task_labels: Tensor) -> Any:
        return OUTPUTS[self.output](self.body(x=input_ids + task_labels.unsqueeze(1)))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_probe_may_be_a_function_that_runs_the_model(output, labelled):
    model, tasks = Keywords(output), torch.randint(0, 3, (40,))
    plain = copy.deepcopy(model.body)

    def run(model: nn.Module) -> Any:
        return model(input_ids=X, task_labels=tasks)

    def grown(model: nn.Module, probe: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        pruning = UtilityUnits.Config()
        return GrowthController(model, pruning=pruning, generator=generator).grow(0, probe)

    event = grown(model, (run, Y) if labelled else run)
    expected = grown(plain, (X + tasks.unsqueeze(1), Y))
    shock = expected.shock if labelled else {"output_change": expected.shock["output_change"]}
    assert event.shock == pytest.approx(shock) and event.shock["output_change"] > 0


@pytest.mark.parametrize("returned", [None, {"ids": torch.arange(3)}, "text", ()], ids=str)
def test_outputs_that_cannot_be_compared_are_no_failure(returned):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_model()

        def forward(self, x: Tensor) -> Any:
            self.body(x)
            return returned

    event = GrowthController(Model()).grow(0, (X, Y))
    assert event.shock == {} and event.experts == 3


def test_labels_of_every_position_are_compared():
    model = make_model()[0]
    x, labels = torch.randn(4, 10, 6), torch.randint(0, 6, (4, 10))
    shock = GrowthController(model).grow(0, (x, labels)).shock
    again = F.cross_entropy(model(x).flatten(0, 1), labels.flatten())
    assert shock["loss_after"] == pytest.approx(again.item())


def test_padding_does_not_count_in_utilities():
    model, mask = make_model()[0], torch.rand(40) > 0.3
    twin = copy.deepcopy(model)
    spoiled = torch.where(mask.unsqueeze(1), X, float("nan"))
    for grown, probe in (
        (model, lambda m: m(spoiled, mask=mask.long())),
        (twin, lambda m: m(X[mask])),
    ):
        generator = torch.Generator().manual_seed(0)
        GrowthController(grown, pruning=UtilityUnits.Config(), generator=generator).grow(0, probe)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


# The default, and copies.


def test_the_default_is_that_of_the_commands():
    from dynmoe.growth.settings import GrowthSettings

    settings, model = GrowthSettings(), make_model()
    optimizer = torch.optim.Adam(model.parameters())
    theirs = settings.make_controller(model, optimizer, torch.Generator())
    ours = GrowthController(model, optimizer, granularity=settings.granularity)
    for name in ("pruning", "init", "trigger"):
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
        assert getattr(ours, name).__dict__.keys() == getattr(theirs, name).__dict__.keys()
    assert ours.init.reinit_router == theirs.init.reinit_router
    assert (ours.moments, ours.budget) == (theirs.moments, theirs.budget)
    assert ours.grow(0).experts == 4  # without a probe


@pytest.mark.parametrize("init", registry.names("init"))
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_an_averaged_model_follows(budget, init):
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    controller = GrowthController(
        model, optimizer, budget=budget, pruning=UtilityUnits.Config(),
        init=registry.get("init", init).Config(), copies=[ema],
    )  # fmt: skip
    for growth in range(2):
        for _ in range(3):
            train(model, optimizer, 1)
            ema.update_parameters(model)
        old = copy.deepcopy(ema.module)
        controller.grow(growth, (X, Y))
        for mine, theirs, before in zip(model, ema.module, old, strict=True):
            assert torch.equal(mine.bank.segment, theirs.bank.segment)
            assert mine.bank.w_in.shape == theirs.bank.w_in.shape
            units = len(before.bank.segment)
            stays = (theirs.bank.w_in[:units] == before.bank.w_in).all(dim=1)
            assert stays.any()
            if init == "random":
                drawn = torch.ones(len(mine.bank.segment), dtype=torch.bool)
                drawn[:units] = ~stays
                assert drawn.any()
                assert torch.equal(theirs.bank.w_in[drawn], mine.bank.w_in[drawn])
                assert torch.equal(theirs.bank.w_out[:, drawn], mine.bank.w_out[:, drawn])
    train(model, optimizer, 1)
    ema.update_parameters(model)
    assert ema(X).isfinite().all()


def test_a_copy_of_another_size_is_refused():
    model, other = make_model(), make_model()
    GrowthController(other, budget=BUDGETS[1]).grow(0)
    with pytest.raises(UserError, match="copies="):
        GrowthController(model, copies=[other]).grow(0)
    assert model[0].num_experts == 2
