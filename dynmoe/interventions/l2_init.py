"""Regularisation towards the first weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.anchor import Anchor
from dynmoe.interventions.intervention import Intervention
from dynmoe.registry import PartConfig


class L2Init(
    Intervention, name="l2-init", source="Kumar et al. 2023 (arXiv 2308.11958), Section 4"
):
    """Penalises the squared distance of all parameters from their first values.

    `strength * ||theta - theta_0||^2`, summed over all parameters, biases too. What a growth draws
    or copies is measured from where it stood then.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of L2-Init."""

        strength: float = 1e-3
        """factor of the squared distance"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.strength >= 0:
            raise UserError(f"l2-init: strength={config.strength} must be at least 0")

    def begin(self) -> None:
        """Keep the first weights."""
        self.anchor = Anchor(self.model)

    def penalty(self) -> Tensor:
        """The penalty at the present weights."""
        distances = [(p - first).square().sum() for p, first in self.anchor.pairs()]
        return self.config.strength * torch.stack(distances).sum()

    def state(self) -> dict[str, Any]:
        """The first weights."""
        return {"first": self.anchor.first}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the first weights back."""
        self.anchor.load(state["first"])

    def grown(self, before: dict[str, Tensor]) -> None:
        """New units are measured from where they begin."""
        self.anchor.grown(before)
