"""The mixture-of-experts layer: one router, one expert bank, and the record of the last routing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ExpertBank
from dynmoe.moe.experts.pool import HiddenPool
from dynmoe.moe.router import Router
from dynmoe.moe.routers.cosine import CosineRouter
from dynmoe.moe.routing import Routing, load_balance
from dynmoe.registry import PartConfig

GateScale = Literal["experts", "one"]


class MoELayer(nn.Module):
    """Experts mixed by a router, `[..., D_in] -> [..., D_out]`; every leading position is routed.

    Args:
        dim_in, dim_out: input and output width.
        hidden: hidden units of all experts together (the parameter budget).
        num_experts: experts at the start.
        max_experts: most experts the layer can grow to; default `num_experts`.
        router, bank: Configs of registered parts.
        gate_scale: "one" leaves the gates as the router gives them (DynamicMoE's plain form);
            "experts" multiplies them by the number of experts that a sample uses, so that the
            layer's output keeps its scale as experts multiply.
        activation: "relu", "gelu" or "tanh".
        balance_weight: factor of the Switch load-balancing loss; 0 (as in DynamicMoE) for none.
        generator: draws the initial weights; default one seeded with 0.

    Attributes:
        birth: buffer [M] int64, the growth count at which each expert was born (0: the start).
        last_routing: the Routing of the latest forward pass, or None.

    Raises:
        UserError: an expert would be left without hidden units.
    """

    birth: Tensor

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        hidden: int,
        *,
        num_experts: int = 1,
        max_experts: int | None = None,
        router: PartConfig | None = None,
        bank: PartConfig | None = None,
        gate_scale: GateScale = "experts",
        activation: str = "relu",
        balance_weight: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        max_experts = max(num_experts, max_experts or 0)
        if not 1 <= num_experts <= hidden:
            raise UserError(
                f"{num_experts} experts cannot share {hidden} hidden units: each needs at least "
                f"one; allowed are 1 to {hidden} experts"
            )
        generator = generator or torch.Generator().manual_seed(0)
        router = router or CosineRouter.Config()
        bank = bank or HiddenPool.Config()
        self.gate_scale = gate_scale
        self.balance_weight = balance_weight
        self.router: Router = router.build(dim_in, num_experts, max_experts, generator)
        self.bank: ExpertBank = bank.build(
            dim_in, dim_out, hidden, num_experts, max_experts, activation, generator
        )
        self.register_buffer("birth", torch.zeros(max_experts, dtype=torch.long))
        self.last_routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Route and mix x [..., D_in] to [..., D_out]."""
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat)
        self.last_routing = routing
        return self.bank(flat, routing, self._scale(routing)).view(*x.shape[:-1], -1)

    def _scale(self, routing: Routing) -> Tensor | float:
        if self.gate_scale == "one":
            return 1.0
        return routing.alive.sum() if routing.indices is None else float(routing.indices.shape[1])

    def gate_factor(self, experts: int) -> int:
        """What gates are multiplied by while that many experts exist."""
        return 1 if self.gate_scale == "one" else min(experts, self.router.k or experts)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last routing out: its tensors belong to a graph."""
        return {**self.__dict__, "last_routing": None}

    @property
    def num_experts(self) -> int:
        """Experts that exist now."""
        return int(self.router.alive.sum())

    @property
    def max_experts(self) -> int:
        """Experts that the layer can hold."""
        return len(self.router.alive)

    def extra_repr(self) -> str:
        """Shown in `print(model)`."""
        sizes = self.bank.hidden_sizes()
        return f"experts={self.num_experts}/{self.max_experts}, hidden_sizes={sizes}"


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoELayer]]:
    """(name, layer) of every MoE layer in a model, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            yield name, module


def collect_aux_losses(model: nn.Module) -> dict[str, Tensor]:
    """Weighted auxiliary losses of the latest forward pass, by `layer.loss` name; scalars.

    Layers whose weight is 0 contribute nothing, so the result may be empty.
    """
    losses = {}
    for name, layer in moe_layers(model):
        if layer.balance_weight and layer.last_routing is not None:
            balance = load_balance(layer.last_routing)
            losses[f"{name}.load_balance"] = layer.balance_weight * balance
    return losses
