"""Methods without experts: fine-tuning, a linear probe, attention alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.dg.backbone import features
from dynmoe.dg.method import DGMethod
from dynmoe.registry import PartConfig


class ERM(DGMethod, name="erm", source="Gulrajani and Lopez-Paz 2021 (arXiv 2007.01434), ERM"):
    """Empirical risk minimisation: the whole backbone and the head learn from all domains."""

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]."""
        return self.head(features(self.backbone, images)).unsqueeze(0), {}


class LinearProbe(DGMethod, name="linear-probe"):
    """Only the linear head learns; the backbone is frozen.

    The frozen features are the embedding, so kept embeddings spare the backbone's pass.
    """

    embeds = True

    def __init__(
        self,
        config: PartConfig,
        backbone: nn.Module,
        classes: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(config, backbone, classes, generator)
        self.backbone.requires_grad_(False)

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]."""
        z = features(self.backbone, images) if embedding is None else embedding
        return self.head(z).unsqueeze(0), {}


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
