"""LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynmoe.dg.backbone import beside, features
from dynmoe.dg.lora import LoRAAdapter
from dynmoe.dg.method import DGMethod
from dynmoe.errors import UserError
from dynmoe.registry import PartConfig


class LoRA(DGMethod, name="lora", source="Hu et al. 2021 (arXiv 2106.09685)"):
    """Frozen backbone; low-rank updates beside the qkv and output maps of every block's attention.

    With rank 2 that is the 0.11M of MoE²'s Table 1 for a ViT-B.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of LoRA."""

        rank: int = 2
        """rank of each update"""
        alpha: float = 2.0
        """updates are multiplied by alpha / rank"""

    def __init__(
        self, config: Config, backbone: nn.Module, classes: int, generator: torch.Generator | None
    ) -> None:
        if config.rank < 1 or not 0 < config.alpha < float("inf"):
            raise UserError(
                f"lora: rank={config.rank} must be at least 1 and alpha={config.alpha} above 0"
            )
        super().__init__(config, backbone, classes, generator)
        backbone.requires_grad_(False)

        def make(base: nn.Linear) -> LoRAAdapter:
            return LoRAAdapter(base, config.rank, config.alpha, generator)

        for block in range(len(backbone.blocks)):  # type: ignore[arg-type]
            for name in ("qkv", "proj"):
                beside(backbone, block, name, make)

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]."""
        return self.head(features(self.backbone, images)).unsqueeze(0), {}
