"""No adaptation."""

from __future__ import annotations

import torch
from torch import Tensor

from dynmoe.tta.adapter import Adapter


class NoAdapt(Adapter, name="noadapt"):
    """The source model as it is: the baseline of all baselines."""

    adapts = False

    def prepare(self) -> None:
        """Nothing is trained."""

    @torch.no_grad()
    def adapt(self, images: Tensor) -> Tensor:
        """The model's logits."""
        return self.model(images)
