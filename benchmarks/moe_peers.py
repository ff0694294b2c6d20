"""The field's MoE layers on equal terms: E experts of hidden size 4 D / E, top-2 where it applies.

Peers come with `pip install -e ".[bench]"`; one that is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 256
"""Tokens per sequence for peers whose cost is quadratic in it."""


class LoopMoE(nn.Module):
    """Experts as separate modules in a python loop: how MoE layers are often written."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(dense(dim, 4 * dim // experts) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Softly mix all experts for x [N, D]."""
        gates = self.router(x).softmax(dim=1)
        mixed = [gates[:, i, None] * expert(x) for i, expert in enumerate(self.experts)]
        return torch.stack(mixed).sum(dim=0)


class Grouped(nn.Module):
    """A layer of [B, T, D] sequences that returns a tuple, as one of [N, D] rows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        y = self.layer(x.view(-1, GROUP, x.shape[1]))
        return (y if isinstance(y, Tensor) else y[0]).reshape(x.shape)


class Transformers(nn.Module):
    """A linear top-2 router before experts that run by one of transformers' implementations."""

    def __init__(self, dim: int, experts: nn.Module, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, count, bias=False)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        weights, indices = self.router(x).softmax(dim=1).topk(2, dim=1)
        return self.experts(x, indices, weights / weights.sum(dim=1, keepdim=True))


def dense(dim: int, hidden: int) -> nn.Module:
    """A plain two-layer MLP with GELU."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def hf_grouped(dim: int, experts: int) -> nn.Module:
    """transformers' `grouped_mm` path with the same plain experts as ours, without biases."""
    from transformers.integrations.moe import use_experts_implementation

    hidden = 4 * dim // experts

    @use_experts_implementation(has_gate=False)
    class Experts(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.num_experts = experts
            self.up_proj = nn.Parameter(torch.randn(experts, hidden, dim) * dim**-0.5)
            self.down_proj = nn.Parameter(torch.randn(experts, dim, hidden) * hidden**-0.5)
            self.act_fn = F.gelu

        def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            raise AssertionError("transformers takes over")

    return Transformers(
        dim, Experts(SimpleNamespace(_experts_implementation="grouped_mm")), experts
    )


def hf_eager(dim: int, experts: int) -> nn.Module:
    """Mixtral's own loop over experts; gated, so with 2/3 of the hidden size."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = SimpleNamespace(
        num_local_experts=experts,
        hidden_size=dim,
        intermediate_size=round(2 / 3 * 4 * dim / experts),
        hidden_act="gelu",
        _experts_implementation="eager",
    )
    layer = MixtralExperts(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=dim**-0.5)
    return Transformers(dim, layer, experts)


def mixture_of_experts(dim: int, experts: int) -> nn.Module:
    """mixture-of-experts: capacity 1.25, drops tokens."""
    from mixture_of_experts import MoE

    return Grouped(MoE(dim, num_experts=experts, hidden_dim=4 * dim // experts, activation=nn.GELU))


def st_moe(dim: int, experts: int) -> nn.Module:
    """st-moe-pytorch: capacity 1.25, drops tokens, GEGLU with 2/3 of the hidden size."""
    from st_moe_pytorch import MoE

    return Grouped(MoE(dim, num_experts=experts, expert_hidden_mult=4 / experts))


def soft_moe(dim: int, experts: int) -> nn.Module:
    """soft-moe-pytorch: slots; each expert sees T / E of them."""
    from soft_moe_pytorch import SoftMoE

    mult = 4 / experts  # its widths are dim * mult and must be whole numbers
    return Grouped(SoftMoE(dim, seq_len=GROUP, num_experts=experts, expert_mult=mult))


PEERS: dict[str, tuple[str, Callable[[int, int], nn.Module]]] = {
    "hf grouped": ("transformers", hf_grouped),
    "hf eager": ("transformers", hf_eager),
    "mixture-of-experts*": ("mixture_of_experts", mixture_of_experts),
    "st-moe*": ("st_moe_pytorch", st_moe),
    "soft-moe": ("soft_moe_pytorch", soft_moe),
}
"""Column -> (the package it needs, its maker). With a star: drops tokens, so does less work."""


def installed() -> dict[str, Callable[[int, int], nn.Module]]:
    """The makers, (dim, experts) -> layer, of the peers that are installed."""
    return {name: make for name, (package, make) in PEERS.items() if find_spec(package)}
