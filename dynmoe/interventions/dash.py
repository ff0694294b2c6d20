"""Direction-aware shrinking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Batches, Intervention
from dynmoe.interventions.weights import weight_matrices
from dynmoe.moe.evaluation import undisturbed
from dynmoe.registry import PartConfig


class DASH(Intervention, name="dash", source="Shin et al. 2024 (arXiv 2410.23495), Algorithm 1"):
    """Before each task, shrinks weights that do not point where its data would move them.

    One pass over the new task's batches, without a step, averages the descent direction,
    `G <- (1 - alpha) G + alpha * (-gradient)`. Each unit's incoming weights w are then multiplied
    by `clip(cos(G, w), least, 1)`; in a convolution each slice between two channels on its own; a
    layer's bias by the factor of its whole vector. Gradients are of the cross entropy in evaluation
    mode, so nothing else changes. Routers and normalisation layers are left alone.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of DASH."""

        alpha: float = 0.3
        """weight of the newest gradient in the average"""
        least: float = 0.3
        """smallest factor (the paper's lambda)"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 < config.alpha <= 1:
            raise UserError(f"dash: alpha={config.alpha} must be above 0 and at most 1")
        if not 0 <= config.least <= 1:
            raise UserError(f"dash: least={config.least} must be in 0 .. 1")

    def task_starts(self, task: int, batches: Batches | None) -> None:
        """Shrink for the task that comes."""
        assert batches is not None  # see `without_tasks`
        parameters = self._shrunk()
        averages = [torch.zeros_like(p) for p in parameters]
        with undisturbed(self.model), torch.enable_grad():
            for inputs, labels in batches():
                loss = F.cross_entropy(self.model(inputs), labels)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for average, gradient in zip(averages, gradients, strict=True):
                    average.mul_(1 - self.config.alpha)
                    if gradient is not None:
                        average.sub_(gradient, alpha=self.config.alpha)
        self.shrink(parameters, averages)

    @torch.no_grad()
    def shrink(self, parameters: list[nn.Parameter], directions: list[Tensor]) -> None:
        """Multiply weights by their clipped cosines with the descent directions."""
        for parameter, direction in zip(parameters, directions, strict=True):
            axes = 2 if parameter.dim() > 2 else parameter.dim() - 1
            shape = (*parameter.shape[:axes], -1)
            one, two = direction.reshape(shape), parameter.reshape(shape)
            cosine = F.cosine_similarity(one, two, dim=-1, eps=1e-30)  # gradients may be tiny
            factor = cosine.clamp(self.config.least, 1.0)
            parameter.mul_(factor.view(*factor.shape, *[1] * (parameter.dim() - axes)))

    def without_tasks(self) -> str | None:
        """It needs the next task's data."""
        return "strategy dash looks at the data of the next task, and there are no tasks here"

    def _shrunk(self) -> list[nn.Parameter]:
        """Weights and biases of layers, and of MoE layers' pools."""
        found: list[nn.Parameter] = []
        for slot in weight_matrices(self.model):
            found.append(slot.parameter)
            if slot.bias is not None and slot.bias.dim() == 1:
                found.append(slot.bias)
        return [p for p in found if p.requires_grad]
