"""Mixtures of adapters, and their ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
        for member in range(self.members):
            logits.append(self.member_logits(member, images))
            penalties += balance(self.layers, self.balance).values()
        mean = {"balance": torch.stack(penalties).mean()} if penalties else {}
        return torch.stack(logits), mean

    def member_logits(self, member: int, images: Tensor) -> Tensor:
        """[B, C] of one set and its head."""
        bank, head = self.sets[member], [self.head, *self.heads][member]
        assert isinstance(bank, AdapterBank)
        return head(adapted_features(self.backbone, self.layers, whole_set(bank), images))


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

    def expert_logits(self, images: Tensor, embedding: Tensor | None) -> Tensor:
        """[S, B, C] of each member."""
        return self.outputs(images, embedding)[0]


class DomainExperts(
    MoASets, name="domain-experts", source="ours; the experts of Zhong et al. 2022, Section 3.1"
):
    """One MoA per source domain, which sees no other domain; mean of their probabilities.

    With `--headroom` the oracle that takes, for each image, an expert that is right bounds what any
    router over such experts could reach.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of the experts."""

        experts: int = 3
        """as many as there are source domains"""

    @staticmethod
    def unfit(config: Any, sources: int) -> str:
        """The number of experts, if it is not that of the source domains."""
        return "" if config.experts == sources else "experts"

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Make the experts."""
        if config.experts < 2:
            raise UserError(f"domain-experts: experts={config.experts} must be at least 2")
        self.members = config.experts
        super().prepare(config, generator)

    def expert_logits(self, images: Tensor, embedding: Tensor | None) -> Tensor:
        """[S, B, C] of each expert."""
        return self.outputs(images, embedding)[0]

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        embedding: Tensor | None = None,
        domains: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over experts of the cross-entropy on the images of their own domains.

        Where no domains are given, every expert learns from all images, as an ensemble's member.

        Raises:
            UserError: the batch has not as many domains as there are experts.
        """
        if domains is None:
            return super().loss(images, labels, embedding)
        found = int(domains.max()) + 1
        if found != self.members:
            raise UserError(
                f"domain-experts: there are {found} source domains, and experts={self.members}; "
                f"use --method.experts {found}"
            )
        losses: list[Tensor] = []
        penalties: list[Tensor] = []
        for member in range(self.members):
            own = domains == member
            losses.append(F.cross_entropy(self.member_logits(member, images[own]), labels[own]))
            penalties += balance(self.layers, self.balance).values()
        parts = {"classification": torch.stack(losses).mean()}
        if penalties:
            parts["balance"] = torch.stack(penalties).mean()
        return torch.stack(list(parts.values())).sum(), parts
