"""Tent: minimise the entropy of every prediction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import entropy
from dynmoe.tta.params import affine_parameters


class Tent(Adapter, name="tent", source="Wang et al. 2021 (arXiv 2006.10726), Section 3"):
    """Entropy minimisation: `L = mean_b H(logits_b)`, by the normalisation layers' affines."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of Tent."""

        lr: float = 5e-4
        """learning rate of SGD; MoETTA's code, for batches of 64 (the ViT of SAR's and DeYO's
        code: 1e-3)"""
        momentum: float = 0.9
        """momentum of SGD; MoETTA's code, as upstream"""

    config: Config

    def prepare(self) -> None:
        """All scales and shifts."""
        parameters = affine_parameters(self.model, self.name)
        self.use_sgd(parameters, self.config.lr, self.config.momentum)

    def adapt(self, images: Tensor) -> Tensor:
        """One step down the mean entropy."""
        logits = self.model(images)
        self.learn(entropy(logits).mean(), logits)
        return logits
