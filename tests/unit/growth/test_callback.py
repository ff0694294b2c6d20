"""Growth in a loop of one's own: the callback asks, notes figures, and writes growths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe import GrowthController, MoELayer, registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthCallback, Signals
from dynmoe.growth.triggers.clock import Trigger
from dynmoe.registry import PartConfig, get


class Written:
    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.rows.append((tag, scalar_value, global_step))


class Watching(Trigger, name="watching-in-test"):
    """Grows never; keeps what it is shown."""

    needs = frozenset({"loss", "grad_norm"})

    def __init__(self, config: PartConfig) -> None:
        super().__init__(config)
        self.seen: list[Signals] = []

    def fires(self, signals: Signals) -> bool:
        self.seen.append(signals)
        return False

    def planned(self, steps: int, tasks: int) -> int:
        return 0


del registry._PARTS["trigger"]["watching-in-test"]  # other tests read the registry


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layer = MoELayer(8, 8, hidden=12, num_experts=1, max_experts=4)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 3))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(count)]


def train(
    model: nn.Module, optimizer: Any, callback: Any, data: Any, first: tuple[int, ...]
) -> None:
    for step, (x, y) in enumerate(data):
        callback(step, task_starts=step in first)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        callback.backward_done(loss)
        optimizer.step()


def test_it_grows_as_a_controller_that_is_asked_by_hand() -> None:
    data, generator = batches(6), torch.Generator().manual_seed(2)
    models = []
    for by_hand in (False, True):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        controller = GrowthController(model, optimizer, generator=generator.manual_seed(2))
        written = Written()
        if by_hand:
            for step, (x, y) in enumerate(data):
                if step in (2, 4):
                    controller.grow(step, data[0])
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        else:
            train(model, optimizer, GrowthCallback(controller, written, data[0]), data, (2, 4))
            experts = [row for row in written.rows if row[0] == "growth/experts"]
            assert experts == [("growth/experts", 2.0, 2), ("growth/experts", 3.0, 4)]
            tags = {tag for tag, _, _ in written.rows}
            assert {"growth/parameters", "growth/output_change", "growth/loss_after"} <= tags
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], value) for name, value in models[1].items())


def test_a_trigger_is_shown_loss_and_gradient_of_the_latest_step_once() -> None:
    model, data = network(), batches(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = GrowthController(model, optimizer, trigger=Watching.Config())
    train(model, optimizer, GrowthCallback(controller), data, (1,))
    trigger: Any = controller.trigger
    assert [(s.step, s.task_starts) for s in trigger.seen] == [
        (0, False), (1, True), (1, False), (2, False)
    ]  # fmt: skip
    assert trigger.seen[0].loss != trigger.seen[0].loss and trigger.seen[1].loss != 0  # nan
    for signals, (x, y) in zip([trigger.seen[2], trigger.seen[3]], data[:2], strict=True):
        loss = F.cross_entropy(model(x), y)
        own = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        norm = torch.cat([g.flatten() for g in own if g is not None]).norm()
        assert signals.loss == pytest.approx(float(loss.detach()))
        assert signals.grad_norm == pytest.approx(float(norm))


def test_a_trigger_of_other_figures_is_refused() -> None:
    trigger = get("trigger", "plateau").Config()
    controller = GrowthController(network(), trigger=trigger)
    with pytest.raises(UserError, match=r"plateau looks at score, .* use the trigger task"):
        GrowthCallback(controller)
