"""A fast network that is put back to its own slow average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.anchor import Anchor
from dynmoe.interventions.intervention import Intervention
from dynmoe.moe import moe_layers
from dynmoe.registry import PartConfig


class HareTortoise(
    Intervention, name="hare-tortoise", source="Lee et al. 2024 (arXiv 2406.02596), Section 4"
):
    """Keeps an exponential average of the weights, and restarts training from it now and then.

    After each optimizer step `tortoise <- momentum * tortoise + (1 - momentum) * hare`, running
    statistics of normalisation layers included; every `period` steps `hare <- tortoise`. The
    network that learns, and is measured, is the hare. The optimizer's state stays. What a growth
    draws or rescales starts its average again; buffers of MoE layers stay as they are.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of hare and tortoise."""

        momentum: float = 0.999
        """of the average, per optimizer step"""
        period: int = 500
        """optimizer steps between two restarts (our choice; the paper's is 10 epochs)"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= config.momentum < 1:
            raise UserError(f"hare-tortoise: momentum={config.momentum} must be in 0 .. 1")
        if config.period < 1:
            raise UserError(f"hare-tortoise: period={config.period} must be at least 1")

    def begin(self) -> None:
        """The tortoise starts where the hare does."""
        self.tortoise = Anchor(self.model)
        self.buffers = {name: b.clone() for name, b in self._averaged().items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """The tortoise follows; now and then the hare goes back to it."""
        weight, first = 1 - self.config.momentum, self.tortoise.first
        back = self.steps % self.config.period == 0
        buffers = self._averaged()
        for slow, fast in ((first, dict(self.model.named_parameters())), (self.buffers, buffers)):
            for name, value in fast.items():
                slow[name] = slow[name].lerp(value, weight)
                if back:
                    value.copy_(slow[name])

    def _averaged(self) -> dict[str, Tensor]:
        """Buffers that have an average: floating-point ones outside MoE layers."""
        inside = tuple(f"{name}." if name else "" for name, _ in moe_layers(self.model))
        return {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if buffer.is_floating_point() and not name.startswith(inside)
        }

    def state(self) -> dict[str, Any]:
        """The tortoise."""
        return {"weights": dict(self.tortoise.first), "buffers": dict(self.buffers)}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the tortoise back."""
        self.tortoise.load(state["weights"])
        now = self._averaged()
        self.buffers = {name: state["buffers"][name].clone().to(b) for name, b in now.items()}

    def grown(self, before: dict[str, Tensor]) -> None:
        """What is new starts its average again."""
        self.tortoise.grown(before)
