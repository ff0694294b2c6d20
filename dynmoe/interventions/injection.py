"""Plasticity injection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Batches, Intervention
from dynmoe.interventions.weights import linear_outputs, replace_module, swap_parameter
from dynmoe.registry import PartConfig


class Injection(
    Intervention, name="injection", source="Nikishin et al. 2023 (arXiv 2305.15555), Section 4"
):
    """Once, freezes the output layer and lets a new one learn beside it.

    The output becomes `h(z) + h_new(z) - h_copy(z)`, where h is the layer as it stands and h_copy
    what h_new starts with; both stay as they are. The outputs do not change at that moment, and as
    many parameters learn as before. The head is the last linear layer here; the paper's is deeper.
    """

    reshapes = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of plasticity injection."""

        task: int = 2
        """the task at whose start to inject; the first is 0, where nothing happens"""
        step: int = 0
        """the optimizer step after which to inject instead; 0 for at a task start"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.task < 1:
            raise UserError(f"injection: task={config.task} must be at least 1")
        if config.step < 0:
            raise UserError(f"injection: step={config.step} must be at least 0")

    def begin(self) -> None:
        """Look at the output layers.

        Raises:
            UserError: one is not linear.
        """
        self.done = False
        linear_outputs(self.model, self.name)

    def task_starts(self, task: int, batches: Batches | None) -> None:
        """Inject when it is time."""
        if not self.config.step and task == self.config.task:
            self.inject()

    def after_step(self) -> None:
        """Inject when it is time."""
        if self.steps == self.config.step:
            self.inject()

    def inject(self) -> None:
        """Freeze the output layers and put new ones beside them; the optimizer follows."""
        for old in linear_outputs(self.model, self.name):
            head = Injected(old, self.generator)
            for name, parameter in old.named_parameters():
                swap_parameter(self.optimizer, parameter, getattr(head.new, name))
            replace_module(self.model, old, head)
        self.done = True

    def without_tasks(self) -> str | None:
        """It must count steps there."""
        if self.config.step:
            return None
        return "intervention injection acts at a task start, and there are none here; set its step"

    def state(self) -> dict[str, Any]:
        """Whether it has happened."""
        return {"done": self.done}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing more: `rebuild` has been here."""

    def rebuild(self, state: dict[str, Any]) -> None:
        """Let there be new output layers, if there were."""
        if state["done"] and not self.done:
            self.inject()


class Injected(nn.Module):
    """A frozen linear layer with a new one beside it; [..., D_in] -> [..., D_out].

    Args:
        frozen: the layer so far.
        generator: draws the new one, uniform in +-1/sqrt(D_in).

    Attributes:
        new: the layer that learns; all else is kept in buffers.
    """

    frozen_weight: Tensor
    frozen_bias: Tensor | None
    copy_weight: Tensor
    copy_bias: Tensor | None

    def __init__(self, frozen: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        weight, bound = frozen.weight.detach(), frozen.in_features**-0.5
        self.new = nn.utils.skip_init(  # which draws nothing from torch's global generator
            nn.Linear, frozen.in_features, frozen.out_features, bias=frozen.bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        for parameter in self.new.parameters():
            fresh = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(fresh)
        for name in ("weight", "bias"):
            for kind, layer in (("frozen", frozen), ("copy", self.new)):
                value = getattr(layer, name)
                kept = None if value is None else value.detach().clone()
                self.register_buffer(f"{kind}_{name}", kept)

    def forward(self, z: Tensor) -> Tensor:
        """The frozen outputs, plus what the new layer has learnt."""
        frozen = F.linear(z, self.frozen_weight, self.frozen_bias)
        return frozen + self.new(z) - F.linear(z, self.copy_weight, self.copy_bias)
