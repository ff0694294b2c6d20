"""LoRA and mixtures of adapters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynmoe.dg.backbone import beside, features
from dynmoe.dg.family import MoASets
from dynmoe.dg.kadaptation import KroneckerAdapter, SharedFactors, check_terms, default_terms
from dynmoe.dg.lora import LoRAAdapter
from dynmoe.dg.method import DGMethod
from dynmoe.dg.moa import MoAConfig
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


class KAdaptation(
    DGMethod, name="kadaptation", source="He et al. 2023 (arXiv 2203.16329), as in MoA"
):
    """Frozen backbone; Kronecker updates beside the qkv and output maps of every block's attention.

    Which maps and which rank the published 0.14M of trainable parameters have is not known: with
    rank 2 beside both maps it is 0.12M for a ViT-B (our choice).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of KAdaptation."""

        rank: int = 2
        """rank of each slice"""
        terms: int = 0
        """Kronecker terms; 0 picks 64 for a width of 768, see MoA"""

    def __init__(
        self, config: Config, backbone: nn.Module, classes: int, generator: torch.Generator | None
    ) -> None:
        if config.rank < 1:
            raise UserError(f"kadaptation: rank={config.rank} must be at least 1")
        super().__init__(config, backbone, classes, generator)
        terms = config.terms or default_terms(self.dim)
        check_terms(terms, self.dim)
        backbone.requires_grad_(False)
        self.shared = SharedFactors(terms, generator)

        def make(base: nn.Linear) -> KroneckerAdapter:
            return KroneckerAdapter(base, self.shared, config.rank, generator)

        for block in range(len(backbone.blocks)):  # type: ignore[arg-type]
            for name in ("qkv", "proj"):
                beside(backbone, block, name, make)

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]."""
        return self.head(features(self.backbone, images)).unsqueeze(0), {}


class MoA(MoASets, name="moa", source="Lee et al. 2025 (WACV), KAdaptation-MoA"):
    """Frozen backbone; a token gate picks a Kronecker adapter of rank 1, 2, 4 or 8 beside qkv."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of MoA."""

    def __init__(
        self, config: Config, backbone: nn.Module, classes: int, generator: torch.Generator | None
    ) -> None:
        super().__init__(config, backbone, classes, generator, "kadaptation")


class MoALoRA(MoASets, name="moa-lora", source="Lee et al. 2025 (WACV), LoRA-MoA"):
    """Frozen backbone; a token gate picks a LoRA adapter of rank 1, 2, 4 or 8 beside qkv."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of MoA with LoRA; `terms` has no say."""

    def __init__(
        self, config: Config, backbone: nn.Module, classes: int, generator: torch.Generator | None
    ) -> None:
        super().__init__(config, backbone, classes, generator, "lora")
