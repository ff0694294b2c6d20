"""What losses that compare experts with each other have in common.

Shapes: M most experts, N samples, H hidden units, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.moe.bank import UnitBank
from dynmoe.moe.loss import LossInput


def active_pairs(active: Tensor) -> Tensor:
    """[M, M] bool: ordered pairs of two different active experts, from active [M]."""
    same = torch.eye(len(active), dtype=torch.bool, device=active.device)
    return active & active.unsqueeze(1) & ~same


def mean_over_pairs(values: Tensor, active: Tensor) -> Tensor:
    """Mean of values [..., M, M] over ordered pairs of active experts: `[...]`; 0 for one."""
    pairs = active_pairs(active)
    return torch.where(pairs, values, 0.0).sum(dim=(-2, -1)) / pairs.sum().clamp(min=1)


def active_outputs(inputs: LossInput) -> tuple[Tensor, Tensor]:
    """Outputs [M, N, F] of each expert for each sample, 0 for reserved ones; active [M].

    Costs a pass of every expert over every sample. Outputs of more than one axis are flattened.
    """
    outputs = inputs.bank.expert_outputs(inputs.x).flatten(2)
    active = inputs.routing.active[: len(outputs)]
    return torch.where(active.view(-1, 1, 1), outputs, 0.0), active


def unit_inputs(bank: UnitBank) -> list[Tensor]:
    """Matrices [H, F] of the weights through which inputs reach hidden units; no biases."""
    out = bank.output_weight()
    entries = [(getattr(bank, name), axis) for name, axis in bank.unit_axes()]
    return [p.movedim(axis, 0).flatten(1) for p, axis in entries if p is not out and p.dim() > 1]
