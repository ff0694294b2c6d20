"""A control: routing that is fixed at random and never learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from dynmoe.errors import UserError
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class RandomRouter(Router, name="random", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 15"):
    """The K best of random linear scores that are never trained, each with gate 1.

    Zhang et al. 2025 (arXiv 2507.11181), Eq. 15: gates are 0 or 1, and a layer adds up the chosen
    experts' outputs. `gate=share` divides them by the number of experts used, so that they sum to 1
    as other routers' do; in layers with `gate_scale="experts"` the outputs are the same. The
    scores' `weight` takes no gradient; growth draws rows for new experts as it does for every
    router.
    """

    k: int
    steerable = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the random router."""

        k: int = 2
        """experts per sample; all of them while fewer exist"""
        gate: Literal["one", "share"] = "one"
        """gate of each chosen expert: 1 (Eq. 15), or 1 / number of experts used"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if not 1 <= config.k <= max_experts:
            raise UserError(f"random router: k={config.k} must be between 1 and {max_experts}")
        if config.gate not in ("one", "share"):
            raise UserError(f"random router: gate={config.gate!r} must be one or share")
        super().__init__(dim, num_experts, max_experts, generator)
        self.weight.requires_grad_(False)
        self.k = config.k
        self.normalised = config.gate == "share"

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D] to min(K, E) experts with equal gates."""
        logits = self.mask(F.linear(given.x, self.weight))
        chosen = self.choose(logits, self.k)
        gates = chosen.to(logits.dtype)
        return Routing(
            gates=gates / gates.sum(dim=1, keepdim=True) if self.normalised else gates,
            logits=logits,
            probabilities=logits.softmax(dim=1),
            alive=self.alive,
            chosen=chosen,
        )
