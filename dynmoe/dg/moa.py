"""MoA: a token gate and adapters of several ranks beside frozen linear layers.

Lee et al. 2025, "Domain generalization using large pretrained models with mixture-of-adapters"
(WACV). For each token: y = x W^T + b + P_e (x H_e) + c, with e the adapter of largest gate logit.
The layers here own no adapter: they are handed a `Theta`, one for all samples (MoA) or one per
sample (MoE²). So the gate is a function of given tensors and not the core's `token` router, which
owns its parameters; formulas and noise are the same.

Shapes: B samples, N tokens, D_in and D_out widths, I inner adapters, G width of the gate's space,
R ranks of all adapters together, T Kronecker terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.dg.adapters import Factors, check_terms, default_terms, update
from dynmoe.dg.backbone import beside, wide
from dynmoe.errors import UserError
from dynmoe.moe import Routing
from dynmoe.moe.bank import owners
from dynmoe.moe.draws import Noise
from dynmoe.moe.losses.balance import cv_squared
from dynmoe.moe.passes import batch_sum
from dynmoe.registry import PartConfig

Adapter = Literal["kadaptation", "lora"]


@dataclass(frozen=True, kw_only=True)
class MoAConfig(PartConfig):
    """Options of MoA layers."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """rank of each adapter of a layer"""
    terms: int = 0
    """terms of the Kronecker adapter; 0: the largest power of two that divides the width and leaves
    slices of at least 12, which is MoA's 64 for a width of 768"""
    gate_dim: int = 256
    """width of the space in which tokens and adapters are compared"""
    every: int = 2
    """adapters go into every so-manieth block, the first included"""
    dropout: float = 0.5
    """chance that a rank of a term of an adapter is left out of a training pass (the dense update's
    entries, in MoA's own code)"""
    balance: float = 0.01
    """weight of the load-balancing loss, (CV²(importance) + CV²(load)) / 2 summed over layers"""


@dataclass
class Theta:
    """The parameters with which one layer runs."""

    factors: Factors
    """the updates, of batch B or 1; R ranks, adapter by adapter"""
    bias: Tensor
    """[B or 1, D_out], added to every token"""
    project: Tensor
    """[B or 1, G, D_in] the gate's projection"""
    offset: Tensor
    """[B or 1, G] added to the projected token"""
    anchors: Tensor
    """[B or 1, I, G] what it is compared with"""
    log_scale: Tensor
    """[B or 1] logarithm of the gate's sharpness"""
    term_weights: Tensor | None = None
    """[B, T] where terms are weighted sample by sample, and factors are of batch 1"""


class MoALinear(nn.Module):
    """A frozen linear layer [B, N, D_in] -> [B, N, D_out] that runs with the `theta` it is given.

    Without one it is the frozen layer alone.

    Attributes:
        theta: set before a pass and taken away after it.
        router: tokens [B, N, D_in] -> logits [B, N, I], in place of theta's gate; None.
        last_routing: Routing of the latest pass, B * N rows; the inner adapters are its experts.
        last_balance: its load-balancing loss, a scalar; None outside training mode.
    """

    def __init__(
        self, base: nn.Linear, config: MoAConfig, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = config.dropout
        self.noise = Noise(generator)
        self.ranks = list(config.ranks)
        owner = torch.empty(sum(config.ranks), dtype=torch.long)
        self.register_buffer("owner", owner, persistent=False)
        self.owner.copy_(owners(self.ranks))
        self.router: nn.Module | None = None
        self.theta: Theta | None = None
        self.last_routing: Routing | None = None
        self.last_balance: Tensor | None = None

    owner: Tensor

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: noise of a new seed; the base keeps its weights."""
        self.noise.reset_parameters(generator)
        self.owner.copy_(owners(self.ranks))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D_in] -> [B, N, D_out]."""
        y, theta = self.base(x), self.theta
        if theta is None:
            return y
        gates = self._route(gate_logits(x, theta) if self.router is None else self.router(x))
        factors = theta.factors
        if self.training and self.dropout > 0:
            factors = replace(factors, left=factors.left * self._kept(factors))
        if theta.term_weights is not None:
            delta = self._weighted_update(x, factors, gates, theta.term_weights)
        else:
            rows, ranks = x, gates.index_select(2, self.owner)  # [B, N, R]
            if len(factors.left) == 1:  # one update for all: one long sequence of tokens
                rows, ranks = (each.flatten(0, 1).unsqueeze(0) for each in (x, ranks))
            delta = update(rows, factors, ranks.unsqueeze(1))
        # In place: y is nobody else's, and a copy of it costs as much as a small product.
        return y.add_(delta.view(y.shape)).add_(theta.bias.unsqueeze(1))

    def _weighted_update(
        self, x: Tensor, factors: Factors, gates: Tensor, term_weights: Tensor
    ) -> Tensor:
        """[B * N, D_out] of x [B, N, D_in] where samples share terms and weigh them [B, T] each."""
        rows, flat = x.flatten(0, 1), gates.flatten(0, 1)
        terms = term_weights.repeat_interleave(x.shape[1], dim=0).t()  # [T, B * N]
        if torch.compiler.is_compiling():  # no shape may depend on data: all ranks for all tokens
            ranks = terms.unsqueeze(2) * flat.index_select(1, self.owner)
            return update(rows.unsqueeze(0), factors, ranks.unsqueeze(0)).squeeze(0)
        # Terms are K times as many as a set has: each token pays for its own adapter only.
        gate, chosen = flat.max(dim=1)
        order = chosen.argsort()
        counts = chosen.bincount(minlength=len(self.ranks)).tolist()
        parts = zip(
            rows[order].split(counts),
            (terms * gate)[:, order].split(counts, dim=1),
            factors.left.split(self.ranks, dim=3),
            factors.right.split(self.ranks, dim=2),
            strict=True,
        )
        deltas = [
            update(own.unsqueeze(0), replace(factors, left=left, right=right), g[None, :, :, None])
            for own, g, left, right in parts
            if len(own)
        ]
        return torch.cat(deltas, dim=1).squeeze(0)[order.argsort()]

    def _kept(self, factors: Factors) -> Tensor:
        """Dropout's factors of the ranks of the terms, one draw per update: 0 or 1/(1 - p).

        A single update is that of all samples.
        """
        left = factors.left
        like = left[:, :, :1]  # [B, T, 1, R]
        drawn = self.noise.uniform(like, by_row=len(left) > 1)
        return (drawn >= self.dropout).to(left.dtype) / (1 - self.dropout)

    def _route(self, logits: Tensor) -> Tensor:
        """Gates [B, N, I] of logits [B, N, I], 0 but for one adapter per token."""
        count, flat = logits.shape[2], wide(logits.flatten(0, 1))
        probabilities = flat.softmax(dim=1)
        noisy, used, load = flat, probabilities, None
        self.last_balance = None
        if self.training:
            noisy = flat + self.noise.normal(logits).flatten(0, 1) / count
            used = noisy.softmax(dim=1)
            load = torch.special.ndtr((probabilities - used.amax(dim=1, keepdim=True)) * count)
            self.last_balance = balance_loss(probabilities, load)
        chosen = F.one_hot(noisy.argmax(dim=1), count).bool()
        self.last_routing = Routing(
            gates=torch.where(chosen, used, 0.0),
            logits=flat,
            probabilities=probabilities,
            active=torch.ones(count, dtype=torch.bool, device=logits.device),
            chosen=chosen,
            load=load,
        )
        return self.last_routing.gates.view(logits.shape)

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles leave the last pass out: its tensors belong to a graph."""
        return {**self.__dict__, "theta": None, "last_routing": None, "last_balance": None}


def gate_logits(x: Tensor, theta: Theta) -> Tensor:
    """Noise-free logits [B, N, I] of tokens x [B, N, D_in]."""
    if len(theta.project) == 1:
        query = F.linear(x, theta.project[0], theta.offset[0])
    else:
        query = torch.baddbmm(theta.offset.unsqueeze(1), x, theta.project.transpose(1, 2))
    scale = theta.log_scale.clamp(max=math.log(100.0)).exp().view(-1, 1, 1)
    length = query.norm(dim=2, keepdim=True).clamp(min=1e-12)
    # Few logits are divided by the length instead of many entries of the query.
    return query @ F.normalize(theta.anchors, dim=2).transpose(1, 2) * (scale / length)


def balance_loss(probabilities: Tensor, load: Tensor) -> Tensor:
    """(CV²(importance) + CV²(load)) / 2 of one layer, from [tokens, I] each; 0 for one adapter.

    Importance is the sum of the noise-free probabilities (not of the gates, which the core's
    `importance` loss takes), load that of the chances to be picked. Shazeer et al. 2017 (arXiv
    1701.06538), Eqs. 6-7 and Appendix A, as MoA uses them.
    """
    all_live = torch.ones(load.shape[1], dtype=torch.bool, device=load.device)
    importance = cv_squared(batch_sum(probabilities.sum(dim=0)), all_live)
    return (importance + cv_squared(batch_sum(load.sum(dim=0)), all_live)) / 2


def check_config(config: MoAConfig, adapter: Adapter, dim_in: int, dim_out: int) -> None:
    """Refuse options that cannot work.

    Raises:
        UserError: one line that names the option.
    """
    if adapter not in get_args(Adapter):
        raise UserError(f"adapter={adapter!r} must be one of {', '.join(get_args(Adapter))}")
    if not config.ranks or min(config.ranks) < 1:
        raise UserError(f"ranks={config.ranks} must be at least one number, each at least 1")
    if config.gate_dim < 1 or config.every < 1:
        raise UserError(f"gate_dim={config.gate_dim} and every={config.every} must be at least 1")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout={config.dropout} must be at least 0 and below 1")
    if not 0 <= config.balance < float("inf"):
        raise UserError(f"balance={config.balance} must be a number of at least 0")
    if adapter == "kadaptation":
        check_terms(config.terms or default_terms(dim_in), dim_in, dim_out)


def insert_moa(
    backbone: nn.Module, config: MoAConfig, generator: torch.Generator | None
) -> list[MoALinear]:
    """Freeze a backbone and put MoA layers beside the fused qkv map of every second block.

    Args:
        backbone: changed in place.
        config: `every` and what the layers need.
        generator: seeds the layers' noise.

    Returns:
        The layers, first block first.
    """
    backbone.requires_grad_(False)
    count = len(backbone.blocks)  # type: ignore[arg-type]

    return [
        beside(backbone, block, "qkv", lambda base: MoALinear(base, config, generator))
        for block in range(0, count, config.every)
    ]
