"""GMoE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynmoe.dg.backbone import features
from dynmoe.dg.method import DGMethod
from dynmoe.errors import UserError
from dynmoe.moe import collect_aux_losses
from dynmoe.moe.losses.balance import ImportanceLoss, LoadLoss
from dynmoe.moe.routers.top1 import TokenRouter
from dynmoe.moe.upcycle import upcycle_vit
from dynmoe.registry import PartConfig


class GMoE(DGMethod, name="gmoe", source="Li et al. 2023 (arXiv 2206.04046), GMoE"):
    """The MLPs of two late blocks become six experts each; tokens pick one; everything learns.

    The core's MoE layers with its `token` router: cosine in a space of width 256, top-1, noise of
    1/E on the logits, importance and load losses. Every expert starts as a copy of the block's MLP
    (Komatsuzaki et al. 2023). Blocks 8 and 10 of 12, as in the authors' code; in shallower
    transformers the last block but one and the one two before it, where they exist. There is no
    capacity limit and no dropout in the experts (our choice).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of GMoE."""

        experts: int = 6
        """experts per layer"""
        gate_dim: int = 256
        """width of the space in which tokens and experts are compared"""
        balance: float = 0.01
        """weight of the mean of the importance and load losses, summed over layers"""

    def __init__(
        self, config: Config, backbone: nn.Module, classes: int, generator: torch.Generator | None
    ) -> None:
        if config.experts < 1:
            raise UserError(f"gmoe: experts={config.experts} must be at least 1")
        super().__init__(config, backbone, classes, generator)
        depth = len(backbone.blocks)  # type: ignore[arg-type]
        weight = config.balance / 2
        upcycle_vit(
            backbone,
            config.experts,
            blocks=sorted({max(depth - 4, 0), max(depth - 2, 0)}),
            how="copy",
            router=TokenRouter.Config(dim=config.gate_dim),
            losses=[ImportanceLoss.Config(weight=weight), LoadLoss.Config(weight=weight)],
            generator=generator,
        )

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]; penalty "balance"."""
        logits = self.head(features(self.backbone, images)).unsqueeze(0)
        losses = list(collect_aux_losses(self).values())
        return logits, {"balance": torch.stack(losses).sum()} if losses else {}
