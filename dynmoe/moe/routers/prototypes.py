"""Routing by clusters of the input: prototypes that follow their samples, and a mixture model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_entries, every
from dynmoe.moe.passes import (
    Passes,
    batch_sum,
    join_processes,
    new_pass,
    one_batch,
    sum_over_processes,
)
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option
from dynmoe.moe.routers.soft import distances
from dynmoe.registry import PartConfig


class PrototypeRouter(
    Router,
    name="prototypes",
    source="Nzoyem et al. 2025 (arXiv 2502.05335); Zhang et al. 2025 (arXiv 2507.11181), Eq. 19",
):
    """The expert whose prototype is nearest, with gate 1; prototypes follow their samples.

    Clustering in place of gradients, as MixER does. No gradient reaches prototypes or passes
    through them. Our choices: features are x itself or the context given, without a learned map;
    after each optimizer step each prototype moves to the running mean of its samples (online
    k-means) in the step's training passes, over all processes.

    A prototype without samples stays where it is, also that of a new expert, which starts near 0.
    After `patience` steps without any it moves onto the sample that is farthest from its own
    prototype (the restart of k-means); several take the farthest samples in turn.

    Attributes:
        weight: Parameter [M, D] without gradient, the prototypes ([M, C] for contexts).
        idle: buffer [M] int64, optimizer steps since each active expert had a sample.
        sums, counts: [M, D] and [M] int64, samples of each prototype in this step.
        far, far_off: [M, D] and [M], the step's M samples that are farthest from their own
            prototypes, and their squared distances, 0 where there are fewer. These four are not
            saved.

    Raises:
        UserError: `use` is context and the context is missing or not C wide.
    """

    idle: Tensor
    step_notes = ("sums", "counts", "far", "far_off")
    k = 1
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the prototype router."""

        use: Literal["x", "context"] = "x"
        """what is compared: the layer's input, or the context given with it"""
        context_dim: int = 0
        """width C of the context [N, C]; needed where that is used"""
        decay: float = 0.99
        """how much of a prototype is left after a step; the rest is the mean of its samples"""
        patience: int = 20
        """optimizer steps without samples after which a prototype restarts; 0: never"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, num_experts, most, generator = size
        check_option(config, "use", config.use in ("x", "context"), "x or context")
        self.by_context = config.use == "context"
        width = config.context_dim if self.by_context else dim
        known = not self.by_context or width >= 1
        check_option(config, "context_dim", known, "at least 1 with use=context")
        check_option(config, "decay", 0 <= config.decay <= 1, "between 0 and 1")
        check_option(config, "patience", config.patience >= 0, "at least 0")
        super().__init__(width, num_experts, most, generator)
        self.weight.requires_grad_(False)
        self.decay = config.decay
        self.patience = config.patience
        self.register_buffer("idle", torch.zeros(most, dtype=torch.long))
        self.sums, self.far = torch.zeros(most, width), torch.zeros(most, width)
        self.counts, self.far_off = torch.zeros(most, dtype=torch.long), torch.zeros(most)
        self._passes = Passes()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start; no prototype has waited for samples."""
        super().reset_parameters(generator)
        self.idle.zero_()
        self._forget()

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]: `argmin_e ||f - mu_e||^2`; logits are the negative squared distances."""
        features = self._features(inputs)
        squared = distances(features, self.weight).square().to(self.weight.dtype)
        logits = self.mask(-squared)
        chosen = self.choose(logits, 1)
        if self.training and self._passes.learns(new_pass()):
            own = chosen if inputs.mask is None else chosen & inputs.mask.unsqueeze(1)
            self._note(features, squared, own)
        return Routing(
            gates=chosen.to(inputs.x.dtype),
            logits=logits,
            probabilities=logits.softmax(dim=1),
            active=self.active,
            chosen=chosen,
        )

    def _features(self, inputs: RouterInput) -> Tensor:
        """[N, D] what is compared with the prototypes."""
        if not self.by_context:
            return inputs.x.detach().to(self.weight.dtype)
        width = self.weight.shape[1]
        if inputs.context is None:
            raise UserError(
                f"prototypes router: use=context needs a context [N, {width}]; give it to the "
                "layer, or to the whole model with dynmoe.moe.routing_inputs"
            )
        if inputs.context.shape != (len(inputs.x), width):
            raise UserError(
                f"prototypes router: the context is {list(inputs.context.shape)}, but must be "
                f"[{len(inputs.x)}, {width}] (context_dim={width})"
            )
        return inputs.context.detach().to(self.weight.dtype)

    @torch.no_grad()
    def _note(self, features: Tensor, squared: Tensor, own: Tensor) -> None:
        """Note features [N, D], their squared distances [N, M] and prototypes [N, M] of a pass."""
        self.notes_to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            self.sums += own.to(features.dtype).T @ features
        self.counts += own.sum(dim=0)
        off = torch.where(own, squared, 0.0).sum(dim=1)  # [N], 0 for padding
        self._keep_farthest(torch.cat([self.far_off, off]), torch.cat([self.far, features]))

    def _keep_farthest(self, off: Tensor, rows: Tensor) -> None:
        """Keep the M farthest of rows [R, D], by their squared distances [R]."""
        best = off.topk(len(self.far_off))
        self.far_off.copy_(best.values)
        self.far.copy_(rows[best.indices])

    @torch.no_grad()
    def finish_step(self) -> None:
        """Move the prototypes by the samples of the step's passes."""
        self.notes_to(self.active.device)
        counts = sum_over_processes(self.counts)
        means = sum_over_processes(self.sums) / counts.clamp(min=1).unsqueeze(1)
        has = counts > 0
        moved = self.decay * self.weight + (1 - self.decay) * means
        moved = torch.where(has.unsqueeze(1), moved, self.weight)
        lonely = self.active & ~has & has.any()
        idle = torch.where(lonely, self.idle + 1, torch.where(has, 0, self.idle))
        if self.patience:
            self._keep_farthest(join_processes(self.far_off), join_processes(self.far))
            late = self.active & (idle >= self.patience)
            turn = (late.cumsum(dim=0) - 1).clamp(min=0)  # [M] which of the farthest samples
            late = late & (self.far_off[turn] > 0)
            moved = torch.where(late.unsqueeze(1), self.far[turn], moved)
            idle = torch.where(late, 0, idle)
        self.weight.copy_(moved)
        self.idle.copy_(idle)
        self._forget()

    def _forget(self) -> None:
        for noted in self.notes():
            noted.zero_()
        self._passes.clear()


class DomainRouter(
    Router, name="domain", source="after Hua et al. 2025 (arXiv 2510.16448); the mixture is ours"
):
    """Experts are components of a Gaussian mixture of x; gates are its posterior probabilities.

    The idea of Input Domain Aware MoE (Hua et al. 2025, arXiv 2510.16448): a probabilistic mixture
    model routes, and is trained apart from the task. The rest is our choice: Gaussians with a
    mean, a diagonal variance and a prior weight per expert. The gates are cut off from the task's
    gradient, x from the mixture's. In training mode the router adds a loss `likelihood`: the
    negative log likelihood of x per dimension, nats. Logits and probabilities keep their gradient
    for auxiliary losses. The start suits features of scale 1. Densities are computed in float32 or
    wider, since they cancel in half precision; gates come in the dtype of x.

    Attributes:
        weight: Parameter [M, D], the means.
        log_variance: Parameter [M, D]; variances are `floor + exp` of it.
        prior: Parameter [M], logits of the components' weights.
    """

    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the domain router."""

        k: int = 0
        """experts per sample, the most probable ones; 0 for all"""
        likelihood: float = 1.0
        """factor of the mixture's own loss"""
        floor: float = 1e-3
        """least variance; keeps a component from shrinking onto one sample"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, _, most, generator = size
        check_option(config, "k", 0 <= config.k <= most, f"between 0 and {most}")
        check_option(config, "likelihood", config.likelihood >= 0, "at least 0")
        check_option(config, "floor", config.floor > 0, "above 0")
        super().__init__(*size)
        self.k = config.k or None
        self.likelihood, self.floor = config.likelihood, config.floor
        self.log_variance = nn.Parameter(torch.empty(most, dim))
        self.prior = nn.Parameter(torch.empty(most))
        for rows in (self.log_variance, self.prior):
            draw_entries(rows, 0, every(rows), dim**-0.5, generator)

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]; logits are `log N(x; mean_e, variance_e) + prior_e`."""
        x = inputs.x.detach().to(torch.promote_types(inputs.x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            logits = self.mask(self._log_density(x) + self.prior)
        probabilities = logits.softmax(dim=1)
        gates = probabilities.detach().to(inputs.x.dtype)
        if self.k is None:
            routing = Routing(
                gates=gates,
                logits=logits,
                probabilities=probabilities,
                active=self.active,
            )
        else:
            chosen = self.choose(logits, self.k)
            routing = self.sparse(logits, gates, chosen, renormalise=self.k > 1)
            routing.probabilities = probabilities
        if self.training:
            routing.losses["likelihood"] = self.likelihood * self._loss(logits, inputs)
        return routing

    def _log_density(self, x: Tensor) -> Tensor:
        """[N, M] log density of x [N, D] under each component; finite for unborn ones, too."""
        active = self.active.unsqueeze(1)
        mean = torch.where(active, self.weight.to(x.dtype), 0.0)
        variance = self.floor + torch.where(active, self.log_variance.to(x.dtype), 0.0).exp()
        quadratic = (
            F.linear(x.square(), 1 / variance)
            - 2 * F.linear(x, mean / variance)
            + (mean.square() / variance).sum(dim=1)
        )
        constant = variance.log().sum(dim=1) + x.shape[1] * math.log(2 * math.pi)
        return -0.5 * (quadratic + constant)

    def _loss(self, logits: Tensor, inputs: RouterInput) -> Tensor:
        """Mean negative log likelihood of the real samples per dimension, nats."""
        log_likelihood = logits.logsumexp(dim=1) - self.mask(self.prior).logsumexp(dim=0)
        real = inputs.mask
        if real is not None:
            log_likelihood = torch.where(real, log_likelihood, 0.0)
        count = max(len(logits), 1) if real is None else real.sum().clamp(min=1)
        total = log_likelihood.sum()
        if one_batch():
            own = total.new_tensor(len(logits)) if real is None else real.sum()
            total, count = batch_sum(total), sum_over_processes(own).clamp(min=1)
        return -total / count / inputs.x.shape[1]
