"""Switch routing: one expert per sample, with a capacity that experts may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.noise import Noise
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class SwitchRouter(
    Router, name="switch", source="Fedus et al. 2021 (arXiv 2101.03961), Sections 2.1-2.2, 2.4"
):
    """The most probable expert, with its probability as gate; experts may have a capacity.

    Fedus et al. 2021 (arXiv 2101.03961), Sections 2.1, 2.2 (capacity) and 2.4 (jitter). A sample
    that finds its expert full is dropped: no expert, gate 0, output 0.
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

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if not 0 <= config.jitter < 1:
            raise UserError(f"switch router: jitter={config.jitter} must be at least 0, below 1")
        if config.capacity_factor < 0:
            raise UserError(
                f"switch router: capacity_factor={config.capacity_factor} must be at least 0 "
                "(0: no limit)"
            )
        super().__init__(dim, num_experts, max_experts, generator)
        self.jitter = config.jitter
        self.capacity_factor = config.capacity_factor
        self.noise = Noise(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, the noise included."""
        super().reset_parameters(generator)
        self.noise.reset_parameters(generator)

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D] to one expert each, or to none where that expert is full."""
        x = given.x
        if self.training and self.jitter > 0:
            x = x * (1 + self.jitter * (2 * self.noise.uniform(x) - 1))
        logits = self.mask(F.linear(x, self.weight))
        chosen = self.choose(logits, 1)
        if self.capacity_factor > 0 and not self.independent:
            chosen = self._within_capacity(chosen, given.mask)
        return self.sparse(logits, logits.softmax(dim=1), chosen, renormalise=False)

    def _within_capacity(self, chosen: Tensor, mask: Tensor | None) -> Tensor:
        """[N, M] bool: of the chosen [N, M], the first ones of each expert; padding takes none."""
        if mask is None:
            mask = torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)
        chosen = chosen & mask.unsqueeze(1)
        capacity = (self.capacity_factor * mask.sum().double() / self.alive.sum()).ceil()
        return chosen & (chosen.long().cumsum(dim=0) <= capacity)
