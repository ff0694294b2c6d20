"""Fine-tuning of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.dg.backbone import features
from dynmoe.dg.method import DGMethod
from dynmoe.registry import PartConfig


class AttentionOnly(
    DGMethod, name="attention-only", source="Touvron et al. 2022 (arXiv 2203.09795), Section 4"
):
    """Only the attention layers of the backbone and the head learn (28.4M in a ViT-B)."""

    def __init__(
        self,
        config: PartConfig,
        backbone: nn.Module,
        classes: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(config, backbone, classes, generator)
        self.backbone.requires_grad_(False)
        for block in backbone.blocks:  # type: ignore[union-attr]
            block.attn.requires_grad_(True)

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]."""
        return self.head(features(self.backbone, images)).unsqueeze(0), {}
