"""Mixtures of adapters, and their ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynmoe.dg.bank import AdapterBank, adapted_features, balance, bank_for, whole_set
from dynmoe.dg.method import DGMethod
from dynmoe.dg.moa import Adapter, MoAConfig, insert_moa
from dynmoe.errors import UserError
from dynmoe.moe.draws import seeded_linear


class MoASets(DGMethod):
    """A frozen backbone that runs once with each of some independent sets of MoA layers.

    Attributes:
        members: how many sets.
        sets: one bank of a single row per set.
        heads: one linear head per set; the first is `head`.
    """

    adapter: ClassVar[Adapter] = "kadaptation"
    members = 1

    def prepare(self, config: Any, generator: torch.Generator | None) -> None:
        """Make the sets and their heads."""
        self.balance = config.balance
        bank = bank_for(self.backbone, config, self.adapter)
        self.sets = nn.ModuleList(
            bank.build(self.dim, 0, 0, 1, 1, "relu", generator) for _ in range(self.members)
        )
        self.heads = nn.ModuleList(
            seeded_linear(self.dim, self.classes, generator) for _ in range(self.members - 1)
        )
        self.layers = insert_moa(self.backbone, config, generator)

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [S, B, C] of the S sets; penalty "balance", the sets' mean."""
        logits: list[Tensor] = []
        penalties: list[Tensor] = []
        for bank, head in zip(self.sets, [self.head, *self.heads], strict=True):
            assert isinstance(bank, AdapterBank)
            z = adapted_features(self.backbone, self.layers, whole_set(bank), images)
            logits.append(head(z))
            penalties += balance(self.layers, self.balance).values()
        mean = {"balance": torch.stack(penalties).mean()} if penalties else {}
        return torch.stack(logits), mean


class MoA(MoASets, name="moa", source="Lee et al. 2025 (WACV), KAdaptation-MoA"):
    """Frozen backbone; a token gate picks a Kronecker adapter of rank 1, 2, 4 or 8 beside qkv."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of MoA."""


class MoALoRA(MoASets, name="moa-lora", source="Lee et al. 2025 (WACV), LoRA-MoA"):
    """Frozen backbone; a token gate picks a LoRA adapter of rank 1, 2, 4 or 8 beside qkv."""

    adapter = "lora"

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of MoA with LoRA; `terms` has no say."""


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

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Make the members."""
        if config.members < 1:
            raise UserError(f"ensemble: members={config.members} must be at least 1")
        self.members = config.members
        super().prepare(config, generator)
