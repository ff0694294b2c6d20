"""New output layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from dynmoe.interventions.periodic import Periodic
from dynmoe.interventions.weights import linear_outputs


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
