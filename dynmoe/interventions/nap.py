"""Normalise and project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.anchor import Anchor
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.layernorm import insert_norms
from dynmoe.interventions.weights import weight_matrices
from dynmoe.registry import PartConfig


class NaP(Intervention, name="nap", source="Lyle et al. 2024 (arXiv 2407.01800), Section 4"):
    """Normalises before activations, and keeps every weight matrix at its first norm.

    Layers are normalised as by the strategy `layernorm`. After optimizer steps each weight matrix
    is scaled back to the Frobenius norm that it began with (after a growth: that its units began
    with). Biases and the normalisation's scales learn freely.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of normalise and project."""

        every: int = 1
        """optimizer steps between two projections"""
        normalise: bool = True
        """insert the normalisation; without it only norms are kept"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.every < 1:
            raise UserError(f"nap: every={config.every} must be at least 1")

    def transform(self, model: nn.Module, generator: torch.Generator) -> None:
        """Normalise before activations."""
        if self.config.normalise:
            insert_norms(model)

    def begin(self) -> None:
        """Keep the first weights, for their norms."""
        self.anchor = Anchor(self.model)

    @torch.no_grad()
    def after_step(self) -> None:
        """Project when it is time."""
        if self.steps % self.config.every:
            return
        first = {parameter: value for parameter, value in self.anchor.pairs()}
        for slot in weight_matrices(self.model):
            weight = slot.parameter
            weight.mul_(first[weight].norm() / weight.norm().clamp_min(1e-12))

    def state(self) -> dict[str, Any]:
        """The first weights."""
        return {"first": self.anchor.first}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the first weights back."""
        self.anchor.load(state["first"])

    def grown(self, before: dict[str, Tensor]) -> None:
        """New units count with the weights they begin with."""
        self.anchor.grown(before)
