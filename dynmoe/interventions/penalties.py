"""Penalties on weights: towards 0, towards the start, on spectra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.anchor import Anchor
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import NORMS, Slot
from dynmoe.interventions.weights import weight_matrices
from dynmoe.moe import moe_layers
from dynmoe.registry import PartConfig


class L2(Intervention, name="l2", source="Krogh & Hertz 1991, Eq. 1"):
    """Penalises the squared norm of all parameters.

    `strength * ||theta||^2`, summed over all parameters, biases too; rows reserved for experts to
    come do not count. Unlike weight decay it goes through the optimizer's moments.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of L2."""

        strength: float = 1e-4
        """factor of the squared norm (our choice; Dohare et al. 2024 search 1e-3 to 1e-6)"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.strength >= 0:
            raise UserError(f"l2: strength={config.strength} must be at least 0")

    def penalty(self) -> Tensor:
        """The penalty at the present weights."""
        active: dict[Tensor, Tensor] = {}
        for _, layer in moe_layers(self.model):
            for rows in (*layer.router.expert_rows(), *layer.bank.expert_rows()):
                active[rows] = layer.router.active.view(-1, *[1] * (rows.dim() - 1))
        squares = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                square = parameter.square()
                if parameter in active:
                    square = torch.where(active[parameter], square, 0.0)
                squares.append(square.sum())
        return self.config.strength * torch.stack(squares).sum()


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


class Parseval(
    Intervention, name="parseval", source="Chung et al. 2024 (arXiv 2412.07224), Section 3"
):
    """Penalises hidden layers whose weight rows are not orthogonal and of one length.

    `strength * sum_l ||W_l W_l^T - scale * I||_F^2` over all layers but the output layers.
    Convolutions count as [out, in * height * width]; an MoE layer's pool as one matrix in and one
    out. Where W has more rows than columns the penalty cannot reach 0; its gradient is that of the
    columns' penalty.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of Parseval regularisation."""

        strength: float = 1e-3
        """factor of the penalty"""
        scale: float = 1.0
        """squared length that rows should have"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.strength >= 0:
            raise UserError(f"parseval: strength={config.strength} must be at least 0")
        if not config.scale > 0:
            raise UserError(f"parseval: scale={config.scale} must be above 0")

    def penalty(self) -> Tensor | float:
        """The penalty at the present weights."""
        terms = []
        for slot in weight_matrices(self.model, outputs=False):
            weight = slot.parameter.flatten(1)
            target = self.config.scale * torch.eye(len(weight)).to(weight)
            terms.append((weight @ weight.T - target).square().sum())
        return self.config.strength * torch.stack(terms).sum() if terms else 0.0
