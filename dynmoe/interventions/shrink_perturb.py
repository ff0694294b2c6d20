"""Shrinking the weights, and adding a little of new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.anchor import Anchor
from dynmoe.interventions.periodic import Periodic
from dynmoe.interventions.weights import fresh_draw


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
