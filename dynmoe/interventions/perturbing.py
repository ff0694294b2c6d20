"""Interventions that perturb or reset weights now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.anchor import Anchor
from dynmoe.interventions.intervention import Batches, Intervention
from dynmoe.interventions.periodic import Periodic
from dynmoe.interventions.weights import fresh_draw, linear_outputs, weight_matrices
from dynmoe.moe.model import undisturbed
from dynmoe.registry import PartConfig


class HeadReset(
    Periodic, name="head-reset", source="Nikishin et al. 2022 (arXiv 2205.07802), Section 4"
):
    """At each task start, puts the output layer back to its first weights, or to zero.

    Its optimizer state is cleared as well. First weights are what Lee et al. 2024 (arXiv
    2406.02596) take, zeros what Dohare et al. 2024 do.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Periodic.Config):
        """Options of head resets."""

        to: Literal["first", "zeros"] = "first"
        """what the output layer becomes"""

    config: Config

    def begin(self) -> None:
        """Keep the output layers' first weights.

        Raises:
            UserError: an output layer is not linear.
        """
        layers = linear_outputs(self.model, self.name)
        self.parameters = [p for layer in layers for p in layer.parameters()]
        self.first = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def act(self) -> None:
        """Reset."""
        for parameter, first in zip(self.parameters, self.first, strict=True):
            parameter.copy_(first if self.config.to == "first" else torch.zeros_like(first))
            self.optimizer.state.pop(parameter, None)

    def state(self) -> dict[str, Any]:
        """The first weights."""
        return {"first": list(self.first)}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the first weights back."""
        pairs = zip(state["first"], self.parameters, strict=True)
        self.first = [first.clone().to(parameter) for first, parameter in pairs]


class ShrinkPerturb(
    Periodic, name="shrink-perturb", source="Ash & Adams 2020 (arXiv 1910.08475), Section 4"
):
    """At each task start, shrinks all parameters towards zero and adds some of a new network.

    `theta <- shrink * theta + sigma * p`, where p is a new draw of the network's first values (or
    standard normal). With `towards_init`, `theta <- shrink * theta + (1 - shrink) * theta_0`, as in
    Lee et al. 2024 (arXiv 2406.02596); their coefficient is 1 - shrink. Optimizer state and
    running statistics are left alone.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Periodic.Config):
        """Options of shrink and perturb."""

        shrink: float = 0.6
        """factor of the present weights"""
        sigma: float = 0.01
        """factor of the new ones"""
        noise: Literal["init", "normal"] = "init"
        """what is added: a new draw of the first values, or standard normal numbers"""
        towards_init: bool = False
        """move towards the network's own first weights instead; sigma and noise do nothing"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= config.shrink <= 1:
            raise UserError(f"shrink-perturb: shrink={config.shrink} must be in 0 .. 1")
        if not config.sigma >= 0:
            raise UserError(f"shrink-perturb: sigma={config.sigma} must be at least 0")

    def begin(self) -> None:
        """Keep the first weights, if they are wanted."""
        self.anchor = Anchor(self.model) if self.config.towards_init else None

    @torch.no_grad()
    def act(self) -> None:
        """Shrink and perturb."""
        shrink, sigma = self.config.shrink, self.config.sigma
        if self.anchor is not None:
            for parameter, first in self.anchor.pairs():
                parameter.mul_(shrink).add_(first, alpha=1 - shrink)
            return
        added = self._normal() if self.config.noise == "normal" else self._fresh()
        for name, parameter in self.model.named_parameters():
            if name in added and parameter.requires_grad:
                parameter.mul_(shrink).add_(added[name], alpha=sigma)

    def _fresh(self) -> dict[str, Tensor]:
        return fresh_draw(self.model, self.generator)

    def _normal(self) -> dict[str, Tensor]:
        return {
            name: torch.randn(p.shape, generator=self.generator).to(p)
            for name, p in self.model.named_parameters()
        }

    def state(self) -> dict[str, Any]:
        """The first weights, if kept."""
        return {"first": self.anchor.first if self.anchor else None}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the first weights back."""
        if self.anchor is not None:
            self.anchor.load(state["first"])

    def grown(self, before: dict[str, Tensor]) -> None:
        """New units' first weights are those they begin with."""
        if self.anchor is not None:
            self.anchor.grown(before)


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
        return "intervention dash looks at the data of the next task, and there are no tasks here"

    def _shrunk(self) -> list[nn.Parameter]:
        """Weights and biases of layers, and of MoE layers' pools."""
        found: list[nn.Parameter] = []
        for slot in weight_matrices(self.model):
            found.append(slot.parameter)
            if slot.bias is not None and slot.bias.dim() == 1:
                found.append(slot.bias)
        return [p for p in found if p.requires_grad]


class FIRE(Periodic, name="fire", source="Han et al. 2026 (arXiv 2602.08040)"):
    """At each task start, moves every weight matrix to, or near, its nearest orthogonal matrix.

    `W <- sqrt(d_out / d_in) * polar(W)`, with the polar factor by Newton-Schulz iterations
    `X <- 1.5 X - 0.5 X X^T X` from `W / ||W||_F`. A convolution is treated tap by tap and divided
    by the number of taps. Biases and optimizer state are left alone.

    The authors' 10 iterations are no full orthogonalisation: they bring singular values of W
    within 1e-2 of 1 (before the scale) that are above 0.04 ||W||_F, and multiply small ones by
    1.5^10 / ||W||_F = 58 / ||W||_F. A new [128, 784] matrix ends within 1e-3, a new square
    [128, 128] one with its least between 0.001 and 0.05. `factor=svd` takes the exact polar
    factor, whose singular values are all 1.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Periodic.Config):
        """Options of FIRE."""

        iterations: int = 10
        """of Newton-Schulz"""
        factor: Literal["newton-schulz", "svd"] = "newton-schulz"
        """polar factor by the iterations, as the authors do, or exactly by the singular value
        decomposition"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.iterations < 1:
            raise UserError(f"fire: iterations={config.iterations} must be at least 1")
        if config.factor not in ("newton-schulz", "svd"):
            raise UserError(f"fire: factor={config.factor} must be newton-schulz or svd")

    @torch.no_grad()
    def act(self) -> None:
        """Replace all matrices."""
        exact = self.config.factor == "svd"
        for slot in weight_matrices(self.model):
            weight = slot.parameter
            taps = weight.flatten(2).movedim(2, 0) if weight.dim() > 2 else weight.unsqueeze(0)
            scale = math.sqrt(weight.shape[0] / weight.shape[1]) / len(taps)
            new = scale * (exact_polar(taps) if exact else polar(taps, self.config.iterations))
            weight.copy_(new.movedim(0, 2).reshape(weight.shape))


def polar(matrices: Tensor, iterations: int) -> Tensor:
    """Nearly the orthogonal polar factors of `[..., n, m]`; zero matrices stay zero."""
    norm = matrices.flatten(-2).norm(dim=-1).clamp_min(1e-12)
    x = matrices / norm[..., None, None]
    wide = x.shape[-1] > x.shape[-2]
    x = x.mT if wide else x
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x.mT if wide else x


def exact_polar(matrices: Tensor) -> Tensor:
    """The orthogonal polar factors of `[..., n, m]`; zero matrices stay zero."""
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left @ right * matrices.any(dim=(-2, -1), keepdim=True)
