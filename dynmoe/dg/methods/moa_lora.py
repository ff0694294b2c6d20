"""MoA with LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dynmoe.dg.family import MoASets
from dynmoe.dg.moa import MoAConfig


class MoALoRA(MoASets, name="moa-lora", source="Lee et al. 2025 (WACV), LoRA-MoA"):
    """Frozen backbone; a token gate picks a LoRA adapter of rank 1, 2, 4 or 8 beside qkv."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of MoA with LoRA; `terms` has no say."""

    def __init__(
        self, config: Config, backbone: nn.Module, classes: int, generator: torch.Generator | None
    ) -> None:
        super().__init__(config, backbone, classes, generator, "lora")
