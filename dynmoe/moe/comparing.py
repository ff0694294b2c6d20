"""What losses that compare experts with each other have in common.

Shapes: M most experts, N samples, H hidden units, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.moe.bank import UnitBank
from dynmoe.moe.loss import LossInput


def living_pairs(alive: Tensor) -> Tensor:
    """[M, M] bool: ordered pairs of two different living experts, from alive [M]."""
    same = torch.eye(len(alive), dtype=torch.bool, device=alive.device)
    return alive & alive.unsqueeze(1) & ~same


def mean_over_pairs(values: Tensor, alive: Tensor) -> Tensor:
    """Mean of values [..., M, M] over ordered pairs of living experts: `[...]`; 0 for one."""
    pairs = living_pairs(alive)
    return torch.where(pairs, values, 0.0).sum(dim=(-2, -1)) / pairs.sum().clamp(min=1)


def living_outputs(given: LossInput) -> tuple[Tensor, Tensor]:
    """Outputs [M, N, F] of each expert for each sample, 0 for reserved ones; alive [M].

    Costs a pass of every expert over every sample. Outputs of more than one axis are flattened.
    """
    outputs = given.bank.expert_outputs(given.x).flatten(2)
    alive = given.routing.alive[: len(outputs)]
    return torch.where(alive.view(-1, 1, 1), outputs, 0.0), alive


def unit_inputs(bank: UnitBank) -> list[Tensor]:
    """Matrices [H, F] of the weights through which inputs reach hidden units; no biases."""
    out = bank.output_weight()
    entries = [(getattr(bank, name), axis) for name, axis in bank.unit_axes()]
    return [p.movedim(axis, 0).flatten(1) for p, axis in entries if p is not out and p.dim() > 1]
