"""Regularisation of the largest singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import NORMS, Slot
from dynmoe.interventions.weights import weight_matrices
from dynmoe.registry import PartConfig


class Spectral(
    Intervention, name="spectral", source="Lewandowski et al. 2025 (arXiv 2406.06811), Section 4"
):
    """Keeps the largest singular value of every layer near 1.

    `strength * (sum_l (sigma_max(W_l)^k - 1)^2 + sum_b ||b||^(2k))` over all weight matrices W and
    their bias vectors b; scales of normalisation layers count as diagonal matrices. sigma_max is
    u^T W v with vectors u and v that follow W by one power iteration per step. Convolutions count
    as [out, in * height * width]. The form for biases and scales is our reading of the paper. The
    output biases of an MoE layer's experts are left out.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of spectral regularisation."""

        strength: float = 1e-4
        """factor of the penalty (our choice)"""
        power: int = 2
        """k"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.strength >= 0:
            raise UserError(f"spectral: strength={config.strength} must be at least 0")
        if config.power < 1:
            raise UserError(f"spectral: power={config.power} must be at least 1")

    def begin(self) -> None:
        """Begin the power iterations with random vectors."""
        self.vectors = [self._draw(slot) for slot in weight_matrices(self.model)]

    def penalty(self) -> Tensor:
        """The penalty at the present weights; one power iteration on the way."""
        k, slots = self.config.power, weight_matrices(self.model)
        if len(slots) != len(self.vectors):
            self.vectors = [self._draw(slot) for slot in slots]
        terms = []
        for number, slot in enumerate(slots):
            sigma = self._sigma(number, slot)
            terms.append((sigma**k - 1).square())
            if slot.bias is not None and slot.bias.dim() == 1:
                terms.append(slot.bias.square().sum() ** k)
        terms += [(scale.abs().max() ** k - 1).square() for scale in self._scales()]
        return self.config.strength * torch.stack(terms).sum()

    def _sigma(self, number: int, slot: Slot) -> Tensor:
        weight = slot.parameter.flatten(1)
        with torch.no_grad():
            if len(self.vectors[number]) != len(weight):
                self.vectors[number] = self._draw(slot)
            v = F.normalize(weight.T @ self.vectors[number], dim=0)
            u = F.normalize(weight @ v, dim=0)
            self.vectors[number] = u
        return u @ weight @ v

    def _draw(self, slot: Slot) -> Tensor:
        weight = slot.parameter
        return F.normalize(torch.randn(len(weight), generator=self.generator), dim=0).to(weight)

    def _scales(self) -> list[nn.Parameter]:
        norms = [m for m in self.model.modules() if isinstance(m, NORMS)]
        return [norm.weight for norm in norms if norm.weight is not None]

    def state(self) -> dict[str, Any]:
        """The power iterations' vectors."""
        return {"vectors": list(self.vectors)}

    def restore(self, state: dict[str, Any]) -> None:
        """Put them back."""
        device = next(self.model.parameters()).device
        self.vectors = [vector.clone().to(device) for vector in state["vectors"]]
