"""One router for several MoE layers of a model."""

from __future__ import annotations

from torch import nn

from dynmoe.errors import UserError
from dynmoe.moe.layer import moe_layers
from dynmoe.moe.router import Router


def share_router(model: nn.Module) -> list[str]:
    """Let MoE layers that are alike use the router module of the first of them.

    One router for all layers is the Omni-router's (Gu et al. 2025, arXiv 2507.05724). Layers are
    alike if their routers are of one kind and of equal shapes (input width and most experts among
    them) and the same experts exist; there may be several such sets. Each layer still routes its
    own input. What a router counts or adapts in training mode then sees every pass of every layer,
    and growth draws its new rows once.

    Call this before the optimizer is made and before growth. A growth that splits gates
    (`init duplicate`) preserves the function where the layers have equal hidden sizes.

    Returns:
        Names of the layers whose router was replaced.

    Raises:
        UserError: no two MoE layers are alike.
    """
    routers: dict[object, Router] = {}
    layers = list(moe_layers(model))
    replaced = []
    for name, layer in layers:
        first = routers.setdefault(_likeness(layer.router), layer.router)
        if first is not layer.router:
            layer.router = first
            replaced.append(name)
    if len(routers) == len(layers):
        raise UserError(
            f"no router can be shared: the model has {len(layers)} MoE layers, and no two of them "
            "agree in kind of router, input width, number of experts and max_experts"
        )
    return replaced


def _likeness(router: Router) -> object:
    """A key that is equal for routers that can stand for each other."""
    shapes = tuple((name, tuple(value.shape)) for name, value in router.state_dict().items())
    return type(router), shapes, tuple(router.active.tolist())
