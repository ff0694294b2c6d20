"""What the tests of interventions share: tiny networks, and a training loop that can be resumed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.pruning import UtilityUnits
from dynmoe.interventions.intervention import Intervention
from dynmoe.moe import MoELayer, collect_aux_losses

TASK = 4
"""optimizer steps per task"""
CLASSES = 3


def mlp() -> nn.Module:
    """Images of 2x4x4 pixels through two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


def conv() -> nn.Module:
    """Convolutions with batch normalisation and pooling, flattened into a hidden layer."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8),
        nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def moe() -> nn.Module:
    """A hidden layer, an MoE layer with room for growth and a shared expert, and a classifier."""
    layer = MoELayer(
        8, 6, 8, num_experts=2, max_experts=8, shared_hidden=4,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), layer, nn.Linear(6, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "moe": moe}


def batch(number: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Images [size, 2, 4, 4] and labels [size]; the same for the same number."""
    g = torch.Generator().manual_seed(number)
    images = torch.randn(size, 2, 4, 4, generator=g)
    return images, torch.randint(CLASSES, (size,), generator=g)


def seeded(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def make(name: str, **options: Any) -> Intervention:
    """An intervention by name."""
    return registry.get("intervention", name).Config(**options).build()


class Loop:
    """Training by hand: steps, tasks of four steps, and growths at given steps."""

    def __init__(
        self,
        network: str | Callable[[], nn.Module],
        name: str,
        tasks: bool = True,
        grows: tuple[int, ...] = (),
        budget: Budget | None = None,
        lr: float = 0.01,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = (NETWORKS[network] if isinstance(network, str) else network)()
        self.intervention = make(name, **options)
        self.intervention.transform(self.model, seeded(1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr)
        self.intervention.attach(self.model, self.optimizer, seeded(2))
        self.tasks, self.grows, self.steps = tasks, grows, 0
        self.controller = GrowthController(
            self.model,
            self.optimizer,
            granularity=2,
            budget=budget,
            pruning=UtilityUnits.Config(),
            generator=seeded(3),
        )
        self.controller.listeners.append(self.intervention.grown)

    def run(self, until: int) -> Loop:
        """Train up to that step."""
        while self.steps < until:
            torch.rand(1)  # a loop may draw from torch's generator, too
            if self.tasks and self.steps and self.steps % TASK == 0:
                self.intervention.task_starts(self.steps // TASK, self.batches)
            if self.steps in self.grows:
                self.controller.grow(self.steps, batch(99))
            images, labels = batch(self.steps)
            self.model.train()
            loss = F.cross_entropy(self.model(images), labels)
            loss = loss + sum(collect_aux_losses(self.model).values())
            loss = loss + self.intervention.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            self.intervention.gradients_ready()
            self.optimizer.step()
            self.intervention.step_done()
            self.steps += 1
        return self

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the task that starts."""
        return (batch(self.steps + i) for i in range(TASK))

    def state(self) -> dict[str, Any]:
        """Everything to go on from, through a file as checkpoints go."""
        state = {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "intervention": self.intervention.state_dict(),
            "controller": self.controller.state_dict(),
            "random": torch.get_rng_state(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def restore(self, state: dict[str, Any]) -> Loop:
        """Go on from `state()`, in the order that runs have."""
        self.intervention.rebuild_from(state["intervention"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.intervention.load_state_dict(state["intervention"])
        self.controller.load_state_dict(state["controller"])
        self.steps = state["steps"]
        torch.set_rng_state(state["random"])
        return self


def assert_equal(one: object, two: object, where: str = "") -> None:
    """Equal in every tensor and value, however deep."""
    assert type(one) is type(two), where
    if isinstance(one, Tensor):
        assert isinstance(two, Tensor) and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert isinstance(two, dict) and one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert isinstance(two, list | tuple) and len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal(a, b, f"{where}/{i}")
    else:
        assert one == two, where


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
