"""How the experts of earlier growths are treated: their pace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.pace import Entries, Pace
from dynmoe.moe import MoELayer, moe_layers


@dataclass(frozen=True, kw_only=True)
class OldExperts:
    """Options for all but the experts of the latest growth."""

    lr: float = 1.0
    """multiplies each step that their weights and router rows take (the step and not the gradient,
    whose scale Adam ignores); 0 keeps what they have learnt"""

    def __post_init__(self) -> None:
        if not 0 <= self.lr <= 1:
            raise UserError(f"old_experts: lr={self.lr} must be in 0 .. 1")


def slow_down(options: OldExperts, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Carry out `OldExperts` on a model's MoE layers, by hooks unless their pace is the usual."""

    def entries() -> Entries:
        found: Entries = []
        for _, layer in moe_layers(model):
            experts = older_experts(layer)
            if len(experts):
                found += [(rows, 0, experts) for rows in layer.router.expert_rows()]
                found += layer.bank.entries(experts)
        return found

    if optimizer is not None and options.lr != 1:
        Pace(optimizer, options.lr, entries)


def older_experts(layer: MoELayer) -> Tensor:
    """[n] the experts that were there before a layer's latest growth; none before its first."""
    active = layer.router.active
    return (active & (layer.created < layer.created[active].max())).nonzero().flatten()
