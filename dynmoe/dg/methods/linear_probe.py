"""A linear head on frozen features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.dg.backbone import features
from dynmoe.dg.method import DGMethod
from dynmoe.registry import PartConfig


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
