"""LayerNorm with experts: a scale and a shift per sample, chosen by a router."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe import MoELayer, Router
from dynmoe.moe.experts.rows import AffineBank
from dynmoe.moe.losses.balance import SwitchLoss
from dynmoe.moe.routers.fixed import OracleRouter
from dynmoe.moe.routers.top1 import StraightThroughRouter
from dynmoe.tta.clusters import Clusters


class MoELayerNorm(nn.Module):
    """A LayerNorm whose scale and shift get an expert's changes, one expert per sample.

    `y = (x - mean) / sqrt(var + eps) * (gamma + s dGamma_e) + (beta + s dBeta_e)`, where e is the
    most probable expert of the mean of the layer's input x over its positions, and s = p_e /
    stopgrad(p_e) (Fan et al. 2025, arXiv 2511.13760, MoE-LayerNorm). gamma, beta and eps are the
    norm's and stay; the experts start at 0, so the model starts as it was.

    Args:
        norm: an affine LayerNorm over the last axis.
        num_experts: experts at the start.
        max_experts: most experts it can grow to; default `num_experts`.
        generator: draws the router; None: torch's global one.
        top_k: experts per sample; their changes are added up with gates p_e / stopgrad(sum of the
            top_k largest p), see `StraightThroughRouter`.
        per: "sample" or "batch", what gets experts of its own.
        clusters: chooses the experts in place of a router, for several norms together; `top_k` and
            `per` then have no effect. The first of the norms that the model calls leads: its
            input decides.

    Attributes:
        leads: this norm leads its `clusters`.
        layer: the MoELayer that holds router and experts; its loss is the balance of the batch.
    """

    def __init__(
        self,
        norm: nn.LayerNorm,
        num_experts: int = 9,
        max_experts: int | None = None,
        generator: torch.Generator | None = None,
        top_k: int = 1,
        per: Literal["sample", "batch"] = "sample",
        clusters: Clusters | None = None,
    ) -> None:
        super().__init__()
        (dim,) = norm.normalized_shape
        self.eps = norm.eps
        self.clusters, self.leads = clusters, False
        learned = StraightThroughRouter.Config(k=top_k, per=per)
        self.layer = MoELayer(
            dim,
            dim,
            num_experts,
            num_experts=num_experts,
            max_experts=max_experts,
            router=OracleRouter.Config() if clusters else learned,  # which is told by clusters
            bank=AffineBank.Config(),
            losses=(SwitchLoss.Config(weight=1.0),),
            gate_scale="one",  # gates sum to 1 as they are
            generator=generator,
        ).to(norm.weight)
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        self.bank.stand_on(norm.weight, bias)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, as `MoELayer.reset_parameters`; the norm's scale and shift stay."""
        self.layer.reset_parameters(generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., D] -> [B, ..., D].

        Raises:
            UserError: the clusters are of another width than the norm that leads them.
        """
        routing_input = x if x.dim() == 2 else _mean_of_positions(x.flatten(1, -2))
        shape = x.shape[-1:]
        # Scale 1 and shift 0 change nothing, but without them torch's CPU kernel is twice as slow.
        normal = F.layer_norm(x, shape, x.new_ones(shape), x.new_zeros(shape), self.eps)
        if self.clusters is None:
            return self.layer(normal, routing_input=routing_input)
        if not self.clusters.led:
            self.clusters.check_width(routing_input.shape[1])
            self.leads = self.clusters.led = True
        if self.leads:
            self.clusters(routing_input)
        return self.layer(normal, routing_input=routing_input, context=self.clusters.chosen)

    @property
    def bank(self) -> AffineBank:
        """The experts, and the norm's own scale and shift."""
        return cast(AffineBank, self.layer.bank)

    @property
    def experts_weight(self) -> nn.Parameter:
        """[E, D] changes of the scale (M rows where the layer can grow)."""
        return self.bank.gamma

    @property
    def experts_bias(self) -> nn.Parameter:
        """[E, D] changes of the shift (M rows where the layer can grow)."""
        return self.bank.beta

    @property
    def router(self) -> Router:
        """The router, with `weight` [E, D] and `bias` [E] (M rows where the layer can grow)."""
        return self.layer.router

    @property
    def balance(self) -> Tensor:
        """The last batch's `E sum_e f_e P_e` over all its samples; 1 when they are spread evenly.

        A scalar; 0 where the model did not use the norm, as that of an auxiliary head.

        Available in training mode.
        """
        self.layer.collect_losses()  # what is collected here is not to be kept for anyone else
        unused = self.experts_weight.new_zeros(())
        return self.layer.last_losses.get(SwitchLoss.name, unused)


def _mean_of_positions(x: Tensor) -> Tensor:
    """[B, D] mean of x [B, T, D] over T.

    As a sum, whose backward pass expands a view; that of torch's mean writes [B, T, D] numbers.
    """
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return (x.sum(dim=1, dtype=wide) / x.shape[1]).to(x.dtype)
