"""What the routers' tests share: routers of every name, samples, and what routers may ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynmoe import registry
from dynmoe.moe import Router, Routing

DIM, ROOM = 6, 5
SIZES = torch.tensor([4, 2, 7, 3, 1])
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "switch with capacity": ("switch", {"capacity_factor": 1.0}),
    "noisy-topk, fixed, one": ("noisy-topk", {"noise": "fixed", "k": 1}),
    "top-p, not renormalised": ("top-p", {"renormalise": False}),
    "norm of long samples": ("norm", {"k_max": 4}),
    "hierarchical, soft": ("hierarchical", {"coarse": "soft"}),
    "hierarchical, product": ("hierarchical", {"gate": "product"}),
    "random, shares": ("random", {"gate": "share"}),
    "slots, two each": ("slots", {"slots_per_expert": 2}),
    "domain, sparse": ("domain", {"k": 2}),
    "nexus, sparse": ("nexus", {"k": 2}),
}
"""Options that change what a router does, by the name of the case."""
CASES = [*registry.names("router"), *VARIANTS]


def make_router(
    name: str, experts: int = 3, room: int = ROOM, seed: int = 0, **options: Any
) -> Router:
    """A float64 router in training mode, drawn from `seed`; `name` may be that of a variant."""
    name, more = VARIANTS.get(name, (name, {}))
    options = more | options
    generator = torch.Generator().manual_seed(seed)
    config = registry.get("router", name).Config(**options)
    return config.build(DIM, experts, room, generator).double()


def samples(n: int, scale: float = 1.0) -> Tensor:
    """[n, DIM] normal samples."""
    return scale * torch.randn(n, DIM, dtype=torch.double)


def route(
    router: Router, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None
) -> Routing:
    """Route x [N, D] with everything that some router asks for."""
    context = torch.arange(len(x)) % 3 if context is None else context
    return router(x, mask=mask, context=context, sizes=SIZES)


def same_routing(first: Routing, second: Routing, **tolerance: float) -> None:
    """Everything that two decisions say is equal."""
    for name in ("gates", "logits", "probabilities", "chosen", "load", "losses"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(
                one, other, msg=lambda text, n=name: f"{n}: {text}", **tolerance
            )
    assert (first.slots is None) == (second.slots is None)
    if first.slots is not None:
        torch.testing.assert_close(vars(first.slots), vars(second.slots), **tolerance)
