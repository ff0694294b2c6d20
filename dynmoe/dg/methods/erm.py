"""Fine-tuning of everything."""

from __future__ import annotations

from torch import Tensor

from dynmoe.dg.backbone import features
from dynmoe.dg.method import DGMethod


class ERM(DGMethod, name="erm", source="Gulrajani and Lopez-Paz 2021 (arXiv 2007.01434), ERM"):
    """Empirical risk minimisation: the whole backbone and the head learn from all domains."""

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]."""
        return self.head(features(self.backbone, images)).unsqueeze(0), {}
