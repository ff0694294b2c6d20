"""A control: routing by labels that are given."""

from __future__ import annotations

import torch

from dynmoe.errors import UserError
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing, hard_routing
from dynmoe.registry import PartConfig


class OracleRouter(Router, name="oracle", source="ours"):
    """Expert = label modulo the number of experts, with gate 1; a control that is told the answer.

    Labels, task ids or the like come as context. Nothing is learned: `weight` is not used and takes
    no gradient.
    """

    k = 1

    def __init__(
        self,
        config: PartConfig,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(dim, num_experts, max_experts, generator)
        self.weight.requires_grad_(False)

    def route(self, given: RouterInput) -> Routing:
        """Route by the labels [N] in the context.

        Raises:
            UserError: no context, or one that is no list of whole numbers.
        """
        label = given.context
        if label is None:
            raise UserError(
                "oracle router: no labels; run the model inside "
                "`with dynmoe.moe.routing_inputs(model, context=labels)`"
            )
        if label.dim() != 1 or label.is_floating_point():
            raise UserError(
                f"oracle router: a context of shape {list(label.shape)} and {label.dtype} is no "
                "list of labels; give one int64 per sample"
            )
        everywhere = torch.ones_like(label, dtype=torch.bool)
        owner = label.long() % self.alive.sum()
        return hard_routing(owner, everywhere, self.alive, given.x)
