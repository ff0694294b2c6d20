"""One expert per sample: Switch, MoA's token gate, and the straight-through gate of MoETTA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.draws import Noise, draw_linear, draw_normal, seeded_linear
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option, most_samples
from dynmoe.registry import PartConfig


class SwitchRouter(
    Router, name="switch", source="Fedus et al. 2021 (arXiv 2101.03961), Sections 2.1-2.2, 2.4"
):
    """The most probable expert, with its probability as gate; experts may have a capacity.

    A sample that finds its expert full is dropped: no expert, gate 0, output 0.
    """

    k = 1
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the switch router."""

        jitter: float = 0.01
        """training multiplies what the router sees by random numbers in 1 +- jitter"""
        capacity_factor: float = 0.0
        """an expert takes ceil(capacity_factor * samples / experts) samples, the first ones of the
        batch; 0: no limit. The paper has 1 to 1.25, and a connection around the layer for the
        samples that are dropped"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "jitter", 0 <= config.jitter < 1, "at least 0, below 1")
        factor = config.capacity_factor
        check_option(config, "capacity_factor", factor >= 0, "at least 0 (0: no limit)")
        super().__init__(*size)
        self.jitter, self.capacity_factor = config.jitter, factor
        self.competing = factor > 0
        self.noise = Noise(size[3])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, the noise included."""
        super().reset_parameters(generator)
        self.noise.reset_parameters(generator)

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to one expert each, or to none where that expert is full."""
        x = inputs.x
        if self.training and self.jitter > 0:
            x = x * (1 + self.jitter * (2 * self.noise.uniform(x) - 1))
        logits = self.mask(F.linear(x, self.weight))
        chosen = self.choose(logits, 1)
        if self.capacity_factor > 0 and not self.independent:
            chosen = self._within_capacity(chosen, inputs.mask)
        return self.sparse(logits, logits.softmax(dim=1), chosen, renormalise=False)

    def _within_capacity(self, chosen: Tensor, mask: Tensor | None) -> Tensor:
        """[N, M] bool: of the chosen [N, M], the first ones of each expert; padding takes none."""
        if mask is None:
            mask = torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)
        chosen = chosen & mask.unsqueeze(1)
        most = most_samples(self.capacity_factor, mask.sum(), self.active.sum())
        return chosen & (chosen.long().cumsum(dim=0) <= most)


class TokenRouter(
    Router,
    name="token",
    source="MoA's token gate; cosine scores after Chi et al. 2022 (arXiv 2204.09179), Section 3",
):
    """Top-1 by cosine to prototypes in a learned space of its own, with a learned temperature.

    The token gate of MoA: `q = normalise(A x + a)`, logits `cos(q, w_e) * exp(min(s, ln 100))`,
    s = ln 2 at the start. Training mode adds noise of standard deviation 1/E to the logits; the
    gate is the (noisy) probability of the expert picked, not renormalised. `Routing.logits` and
    `probabilities` are free of noise. `load` is the chance `Phi((P_e - max_f P'_f) E)`, P without
    noise and P' with it; 1/E is 0.25 for MoA's 4 experts.

    Attributes:
        weight: Parameter [M, dim], the prototypes.
        projection: submodule, A and a.
        log_scale: Parameter, scalar, s.
    """

    k = 1
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the token router."""

        dim: int = 256
        """width of the space in which tokens and prototypes are compared"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, num_experts, max_experts, generator = size
        check_option(config, "dim", config.dim >= 1, "at least 1")
        super().__init__(config.dim, num_experts, max_experts, generator)
        self.projection = seeded_linear(dim, config.dim, generator)
        self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))
        self.noise = Noise(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: space, temperature and noise included."""
        super().reset_parameters(generator)
        draw_linear(self.projection, generator)
        self.log_scale.fill_(math.log(2.0))
        self.noise.reset_parameters(generator)

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to one expert each."""
        query = F.normalize(self.projection(inputs.x), dim=1)
        scale = self.log_scale.clamp(max=math.log(100.0)).exp()
        logits = self.mask(F.linear(query, F.normalize(self.weight, dim=1)) * scale)
        probabilities = logits.softmax(dim=1)
        noisy, used = logits, probabilities
        if self.training:
            noisy = logits + self.noise.normal(logits) / self.active.sum()
            used = noisy.softmax(dim=1)
        routing = self.sparse(logits, used, self.choose(noisy, 1), renormalise=False)
        routing.probabilities = probabilities
        gap = probabilities - used.amax(dim=1, keepdim=True)
        load = torch.special.ndtr(gap * self.active.sum())
        routing.load = torch.where(self.active, load, 0.0)
        return routing


class StraightThroughRouter(
    Router, name="straight-through", source="Fan et al. 2025 (arXiv 2511.13760), MoE-LayerNorm"
):
    """The most probable expert with gate 1, whose gradient is that of `log p`.

    The gate is p / stopgrad(p): its value says nothing about how sure the router is, its gradient
    dp / p trains the router. With k experts a gate is p_e / stopgrad(sum of the k largest p), as in
    the authors' code, which has k = 1 everywhere. Linear with a bias; weights Xavier-normal over
    all M rows (for layers that do not grow these are the E of the authors' code), biases 0.

    Attributes:
        weight: Parameter [M, D]. bias: Parameter [M].
    """

    k: int
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the straight-through router."""

        k: int = 1
        """experts per sample; all of them while fewer exist"""
        per: Literal["sample", "batch"] = "sample"
        """sample: each sample gets its own experts; batch: all samples of a batch get those of the
        largest mean probability, which then is p"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "k", 1 <= config.k <= size[2], f"between 1 and {size[2]}")
        super().__init__(*size)
        self.k, self.per = config.k, config.per
        self.competing = config.per == "batch"
        self.bias = nn.Parameter(torch.zeros(size[2]))

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] to k experts each."""
        logits = self.mask(F.linear(inputs.x, self.weight, self.bias))
        p = logits.softmax(dim=1)
        scores = logits
        if self.per == "batch" and not self.independent:
            p = _batch_mean(p, inputs.mask).expand_as(p)
            scores = p
        chosen, fixed = self.choose(scores, self.k), p.detach()
        tiny = torch.finfo(p.dtype).tiny
        if self.k == 1:  # in this form the value is exactly 1, and 0 / 0 cannot happen
            gates = 1 + (p - fixed) / fixed.clamp_min(tiny)
        else:
            total = torch.where(chosen, fixed, 0.0).sum(dim=1, keepdim=True)
            gates = p / total.clamp_min(tiny)
        return Routing(
            gates=torch.where(chosen, gates, 0.0),
            logits=logits,
            probabilities=p,
            active=self.active,
            chosen=chosen,
        )

    @torch.no_grad()
    def draw_rows(self, index: torch.Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the rows `index` [n]: N(0, 2 / (D + M)), biases 0."""
        experts, dim = self.weight.shape
        draw_normal(self.weight, index, (2 / (dim + experts)) ** 0.5, generator)
        for name, rows in [*self.named_parameters(recurse=False), *self.named_buffers()]:
            if name in ("bias", "logit_shift", "selection_bias"):
                rows[index] = 0.0


def _batch_mean(p: Tensor, mask: Tensor | None) -> Tensor:
    """[1, M] mean over the real samples of probabilities [N, M]."""
    if mask is None:
        return p.mean(dim=0, keepdim=True)
    real = mask.unsqueeze(1)
    return torch.where(real, p, 0.0).sum(dim=0, keepdim=True) / mask.sum().clamp(min=1)
