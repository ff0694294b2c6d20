"""How the experts of earlier growths are treated: their pace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
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


class SlowDown:
    """Carries out `OldExperts` on a model's MoE layers, by hooks unless their pace is the usual."""

    def __init__(self, options: OldExperts, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.options, self.model = options, model
        self._before: list[tuple[nn.Parameter, int, Tensor, Tensor]] = []
        if optimizer is not None and options.lr != 1:
            optimizer.register_step_pre_hook(lambda *_: self._step_comes())
            optimizer.register_step_post_hook(lambda *_: self._step_done())

    @torch.no_grad()
    def _step_comes(self) -> None:
        """Note where the old experts' entries stand."""
        for _, layer in moe_layers(self.model):
            experts = older_experts(layer)
            if len(experts):
                rows = [(parameter, 0, experts) for parameter in layer.router.expert_rows()]
                for parameter, axis, index in rows + layer.bank.entries(experts):
                    value = parameter.index_select(axis, index)
                    self._before.append((parameter, axis, index, value))

    @torch.no_grad()
    def _step_done(self) -> None:
        """Shorten the step that they took."""
        for parameter, axis, index, before in self._before:
            moved = parameter.index_select(axis, index) - before
            parameter.index_copy_(axis, index, before + self.options.lr * moved)
        self._before = []


def older_experts(layer: MoELayer) -> Tensor:
    """[n] the experts that were there before a layer's latest growth; none before its first."""
    active = layer.router.active
    return (active & (layer.created < layer.created[active].max())).nonzero().flatten()
