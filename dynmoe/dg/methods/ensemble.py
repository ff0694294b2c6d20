"""MoAs whose predictions are averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dynmoe.dg.family import MoASets
from dynmoe.dg.moa import MoAConfig
from dynmoe.errors import UserError


class Ensemble(
    MoASets, name="ensemble", source="KAdaptation-MoA ensemble of Lee et al. 2025 (WACV)"
):
    """Mean of the class probabilities of independent MoAs, which share the frozen backbone.

    Each member has a set of MoA layers and a head of its own and learns from its own loss; a pass
    costs as many adapted passes as there are members. The paper's members also differ in their
    data order and have backbones of their own; sharing the frozen one changes no prediction.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of the ensemble."""

        members: int = 3
        """MoAs (261.3M parameters in the paper's Table 2 are three whole models)"""

    def __init__(
        self, config: Config, backbone: nn.Module, classes: int, generator: torch.Generator | None
    ) -> None:
        if config.members < 1:
            raise UserError(f"ensemble: members={config.members} must be at least 1")
        super().__init__(
            config, backbone, classes, generator, "kadaptation", members=config.members
        )
