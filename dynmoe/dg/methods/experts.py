"""GMoE and HMOE: mixtures of the core's experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dynmoe.dg.backbone import features
from dynmoe.dg.method import DGMethod
from dynmoe.errors import UserError
from dynmoe.moe.bank import ExpertBank
from dynmoe.moe.draws import draw_linear, draw_normal, seeded_linear
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.losses.balance import ImportanceLoss, LoadLoss
from dynmoe.moe.model import collect_aux_losses, moe_layers
from dynmoe.moe.router import Routing
from dynmoe.moe.routers.soft import CosineRouter
from dynmoe.moe.routers.top1 import TokenRouter
from dynmoe.moe.upcycle import upcycle_vit
from dynmoe.registry import PartConfig

Start = Literal["copy", "fresh"]
"""Where GMoE's experts start."""


class GMoE(DGMethod, name="gmoe", source="Li et al. 2023 (arXiv 2206.04046), GMoE"):
    """The MLPs of two late blocks become six experts each; tokens pick one; everything learns.

    The core's MoE layers with its `token` router: cosine in a space of width 256, top-1, noise of
    1/E on the logits, importance and load losses. Every expert starts as a copy of the block's MLP
    (Komatsuzaki et al. 2023). Blocks 8 and 10 of 12, as in the authors' code; in shallower
    transformers the last block but one and the one two before it, where they exist. There is no
    capacity limit and no dropout in the experts (our choice).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of GMoE."""

        experts: int = 6
        """experts per layer"""
        gate_dim: int = 256
        """width of the space in which tokens and experts are compared"""
        balance: float = 0.01
        """weight of the mean of the importance and load losses, summed over layers"""
        start: Start = "copy"
        """where experts start. copy: each is the block's MLP (sparse upcycling); fresh: each is
        re-initialised, an ablation of it"""

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Make the MLPs experts."""
        if config.experts < 1:
            raise UserError(f"gmoe: experts={config.experts} must be at least 1")
        if config.start not in get_args(Start):
            raise UserError(f"gmoe: start={config.start!r} must be one of copy, fresh")
        depth = len(self.backbone.blocks)  # type: ignore[arg-type]
        weight = config.balance / 2
        upcycle_vit(
            self.backbone,
            config.experts,
            blocks=sorted({max(depth - 4, 0), max(depth - 2, 0)}),
            how="copy",
            router=TokenRouter.Config(dim=config.gate_dim),
            losses=[ImportanceLoss.Config(weight=weight), LoadLoss.Config(weight=weight)],
            generator=generator,
        )
        if config.start == "fresh":
            for _, layer in moe_layers(self.backbone):
                layer.bank.reset_parameters(generator)

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]; penalty "balance"."""
        return super().outputs(images, embedding)[0], collected_balance(self)


def collected_balance(method: DGMethod) -> dict[str, Tensor]:
    """The losses of a method's MoE layers, summed to a scalar; none outside training mode."""
    losses = list(collect_aux_losses(method).values())
    return {"balance": torch.stack(losses).sum()} if losses else {}


class HMOE(DGMethod, name="hmoe", source="after Qu et al. 2022 (arXiv 2211.08253), HMOE"):
    """Classifiers made by one hypernetwork from learned codes, mixed per image; everything learns.

    Expert k is a linear classifier whose weights are `hyper(e_k)`, an MLP of its code e_k; a core
    MoE layer mixes the experts' logits by the cosines of the image's feature to K prototypes. The
    paper's idea of generated experts is kept; sizes, the cosine gate and the importance loss are
    ours. The linear head that all methods have is a common part, the experts' logits are added.

    Attributes:
        experts: MoELayer [B, D] -> [B, C].
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of HMOE."""

        experts: int = 3
        """classifiers; the number of source domains is a natural choice"""
        code_dim: int = 32
        """width of the codes"""
        hidden: int = 64
        """hidden units of the hypernetwork"""
        temperature: float = 0.5
        """divides the gate's cosines"""
        balance: float = 0.01
        """weight of the gates' importance loss"""

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Make the experts."""
        sizes = {"experts": config.experts, "code_dim": config.code_dim, "hidden": config.hidden}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"hmoe: {name}={value} must be at least 1")
        self.experts = MoELayer(
            self.dim,
            self.classes,
            config.hidden,
            num_experts=config.experts,
            router=CosineRouter.Config(temperature=config.temperature),
            bank=HyperBank.Config(code_dim=config.code_dim),
            losses=[ImportanceLoss.Config(weight=config.balance)],
            gate_scale="one",
            generator=generator,
        )

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]; penalty "balance"."""
        z = features(self.backbone, images)
        logits = self.head(z) + self.experts(z)
        return logits.unsqueeze(0), collected_balance(self)


class HyperBank(ExpertBank):
    """Linear experts whose weights a hypernetwork makes from their codes.

    Attributes:
        codes: Parameter [M, c].
        hyper: codes [.., c] -> weights and bias [.., D_out * (D_in + 1)].
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the generated experts."""

        code_dim: int
        """width of the codes"""

    def __init__(
        self,
        config: Config,
        dim_in: int,
        dim_out: int,
        hidden: int,
        num_experts: int,
        max_experts: int,
        activation: str,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.dim_out = dim_out
        self.codes = nn.Parameter(torch.empty(max_experts, config.code_dim))
        self.hyper = nn.Sequential(
            seeded_linear(config.code_dim, hidden, generator),
            nn.ReLU(),
            seeded_linear(hidden, dim_out * (dim_in + 1), generator),
        )
        super().reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the hypernetwork and the codes again."""
        for module in self.hyper:
            if isinstance(module, nn.Linear):
                draw_linear(module, generator)
        super().reset_parameters(generator)

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out]."""
        return torch.einsum("nm,mno->no", routing.gates * gate_scale, self.expert_outputs(x))

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, D_out] what each expert alone says to x [N, D_in]."""
        made = self.hyper(self.codes).unflatten(1, (self.dim_out, -1))
        return x @ made[:, :, :-1].transpose(1, 2) + made[:, :, -1].unsqueeze(1)

    def expert_rows(self) -> list[nn.Parameter]:
        """The codes [M, c]."""
        return [self.codes]

    def output_rows(self) -> list[nn.Parameter]:
        """None: outputs are not linear in the codes."""
        return []

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the codes `index` [n]: standard normal."""
        draw_normal(self.codes, index, 1.0, generator)


HyperBank.Config.part = HyperBank  # registered nowhere: it has no sense outside HMOE
