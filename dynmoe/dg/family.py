"""Base of MoA and its ensemble: sets of MoA layers that are each used alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.dg.adapted import adapted_features, balance, whole_set
from dynmoe.dg.bank import AdapterBank
from dynmoe.dg.method import DGMethod
from dynmoe.dg.moa import Adapter, MoAConfig, insert_moa
from dynmoe.moe.draws import seeded_linear


class MoASets(DGMethod):
    """A frozen backbone that runs once with each of some independent sets of MoA layers.

    Attributes:
        sets: one bank of a single row per set.
        heads: one linear head per set; the first is `head`.
    """

    def __init__(
        self,
        config: MoAConfig,
        backbone: nn.Module,
        classes: int,
        generator: torch.Generator | None,
        adapter: Adapter,
        members: int = 1,
    ) -> None:
        super().__init__(config, backbone, classes, generator)
        self.balance = config.balance
        base: nn.Linear = backbone.blocks[0].attn.qkv  # type: ignore[index,union-attr]
        bank = AdapterBank.Config(
            options=config,
            adapter=adapter,
            synthesis="factors",
            init_noise=0.0,
            layers=len(range(0, len(backbone.blocks), config.every)),  # type: ignore[arg-type]
            width_in=base.in_features,
            width_out=base.out_features,
        )
        self.sets = nn.ModuleList(
            bank.build(self.dim, 0, 0, 1, 1, "relu", generator) for _ in range(members)
        )
        more = [seeded_linear(self.dim, classes, generator) for _ in range(members - 1)]
        self.heads = nn.ModuleList(more)
        self.layers = insert_moa(backbone, config, generator)

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
