"""Interventions that perturb, reset or average weights now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import (
    Anchored,
    Batches,
    Intervention,
    Limit,
    Periodic,
    late,
    one_task,
)
from dynmoe.interventions.units import full_precision
from dynmoe.interventions.weights import Anchor, fresh_draw, linear_outputs, weight_matrices
from dynmoe.moe.model import moe_layers, undisturbed
from dynmoe.registry import PartConfig


class HeadReset(
    Periodic, name="head-reset", source="Nikishin et al. 2022 (arXiv 2205.07802), Section 4"
):
    """At each task start, puts the output layer back to its first weights, or to zero.

    Its optimizer state is cleared as well; what is frozen stays. First weights are what Lee et al.
    2024 (arXiv 2406.02596) take, zeros what Dohare et al. 2024 do.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Periodic.Config):
        """Options of head resets."""

        to: Literal["first", "zeros"] = "first"
        """what the output layer becomes"""

    def begin(self) -> None:
        """Keep the first weights of the output layers, which must be linear."""
        layers = linear_outputs(self.model, self.name)
        self.parameters = [p for layer in layers for p in layer.parameters()]
        self.first = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def act(self) -> None:
        """Reset."""
        for parameter, first in zip(self.parameters, self.first, strict=True):
            if not parameter.requires_grad:
                continue
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
    Periodic,
    Anchored,
    name="shrink-perturb",
    source="Ash & Adams 2020 (arXiv 1910.08475), Section 4",
):
    """At each task start, shrinks all parameters towards zero and adds some of a new network.

    `theta <- shrink * theta + sigma * p`, where p is a new draw of the network's first values (or
    standard normal). Bare Parameters of modules without a `reset_parameters`, such as a class
    token, are left alone with the former, as nobody knows what they are drawn from. With
    `towards_init`, `theta <- shrink * theta + (1 - shrink) * theta_0`, as in Lee et al. 2024 (arXiv
    2406.02596); their coefficient is 1 - shrink. Optimizer state and running statistics are left
    alone.
    """

    limits: ClassVar = Periodic.limits | {"shrink": Limit.SHARE, "sigma": Limit.AT_LEAST_0}

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

    def unused(self) -> dict[str, str]:
        """Towards the first weights nothing is drawn."""
        reason = "--intervention.towards-init draws nothing; leave it out"
        return dict.fromkeys(("sigma", "noise"), reason) if self.config.towards_init else {}

    def begin(self) -> None:
        """Keep the first weights, if they are wanted."""
        if self.config.towards_init:
            super().begin()

    @torch.no_grad()
    def act(self) -> None:
        """Shrink and perturb."""
        shrink, sigma = self.config.shrink, self.config.sigma
        if self.config.towards_init:
            for parameter, first in self.pairs():
                parameter.mul_(shrink).add_(first, alpha=1 - shrink)
            return
        parameters = dict(self.model.named_parameters())
        if self.config.noise == "init":
            added = fresh_draw(self.model, self.generator)
        else:
            draws = (torch.randn(p.shape, generator=self.generator) for p in parameters.values())
            added = {n: draw.to(parameters[n]) for n, draw in zip(parameters, draws, strict=True)}
        for name, parameter in parameters.items():
            if name in added and parameter.requires_grad:
                parameter.mul_(shrink).add_(added[name], alpha=sigma)


class DASH(Intervention, name="dash", source="Shin et al. 2024 (arXiv 2410.23495), Algorithm 1"):
    """Before each task, shrinks weights that do not point where its data would move them.

    One pass over the new task's batches, without a step, averages the descent direction,
    `G <- (1 - alpha) G + alpha * (-gradient)`. Each unit's incoming weights w are then multiplied
    by `clip(cos(G, w), least, 1)`; in a convolution each slice between two channels on its own; a
    layer's bias by the factor of its whole vector. Gradients are of the cross entropy in evaluation
    mode, so nothing else changes. Routers and normalisation layers are left alone.
    """

    by_batch = True
    limits: ClassVar = {"alpha": Limit.ABOVE_0_TO_1, "least": Limit.SHARE}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of DASH."""

        alpha: float = 0.3
        """weight of the newest gradient in the average"""
        least: float = 0.3
        """smallest factor (the paper's lambda)"""

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
        """Multiply weights by their clipped cosines with the descent directions.

        A direction has its parameter's shape: [n, D] with a cosine for each row, or [n, C, h, w]
        with one for each of the n C kernels.
        """
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

    def too_late(self, tasks: float, steps: int) -> str | None:
        """There must be a next task."""
        return one_task(tasks)

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

    limits: ClassVar = Periodic.limits | {"iterations": Limit.AT_LEAST_1}

    @dataclass(frozen=True, kw_only=True)
    class Config(Periodic.Config):
        """Options of FIRE."""

        iterations: int = 10
        """of Newton-Schulz"""
        factor: Literal["newton-schulz", "svd"] = "newton-schulz"
        """polar factor by the iterations, as the authors do, or exactly by the singular value
        decomposition"""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.factor not in ("newton-schulz", "svd"):
            raise UserError(f"fire: factor={config.factor} must be newton-schulz or svd")

    def unused(self) -> dict[str, str]:
        """The exact factor takes no iterations."""
        exact = self.config.factor == "svd"
        return {"iterations": "--intervention.factor svd has none; leave it out"} if exact else {}

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
    """The orthogonal polar factors of `[..., n, m]`, float32 at least; zero matrices stay zero."""
    left, _, right = torch.linalg.svd(full_precision(matrices), full_matrices=False)
    return left @ right * matrices.any(dim=(-2, -1), keepdim=True)


class HareTortoise(
    Intervention, name="hare-tortoise", source="Lee et al. 2024 (arXiv 2406.02596), Section 4"
):
    """Keeps an exponential average of the weights, and restarts training from it now and then.

    After each optimizer step `tortoise <- momentum * tortoise + (1 - momentum) * hare`, running
    statistics of normalisation layers included; every `period` steps `hare <- tortoise`. The
    network that learns, and is measured, is the hare. The optimizer's state stays. What a growth
    draws or rescales starts its average again; buffers of MoE layers stay as they are.
    """

    limits: ClassVar = {"momentum": Limit.BELOW_1, "period": Limit.AT_LEAST_1}

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of hare and tortoise."""

        momentum: float = 0.999
        """of the average, per optimizer step"""
        period: int = 500
        """optimizer steps between two restarts (our choice; the paper's is 10 epochs)"""

    def begin(self) -> None:
        """The tortoise starts where the hare does."""
        self.tortoise = Anchor(self.model)
        self.buffers = {name: b.clone() for name, b in self._averaged().items()}
        self._widen()

    def too_late(self, tasks: float, steps: int) -> str | None:
        """The first restart has to come."""
        return late("period", self.config.period, steps)

    @torch.no_grad()
    def after_step(self) -> None:
        """The tortoise follows; now and then the hare goes back to it."""
        weight, first = 1 - self.config.momentum, self.tortoise.first
        back = self.steps % self.config.period == 0
        buffers = self._averaged()
        for slow, fast in ((first, dict(self.model.named_parameters())), (self.buffers, buffers)):
            for name, value in fast.items():
                slow[name] = slow[name].lerp(value.to(slow[name]), weight)
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
        self.buffers = {
            name: state["buffers"][name].clone().to(b.device) for name, b in now.items()
        }
        self._widen()

    def grown(self, before: dict[str, Tensor]) -> None:
        """What is new starts its average again."""
        self.tortoise.grown(before)
        self._widen()

    def _widen(self) -> None:
        """Averages in float32 at least: bfloat16 would round their small steps away."""
        for averages in (self.tortoise.first, self.buffers):
            averages.update({name: full_precision(value) for name, value in averages.items()})
