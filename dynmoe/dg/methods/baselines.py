"""Methods without experts: the backbone or parts of it, LoRA, KAdaptation and Compacter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.dg.adapters import (
    KroneckerAdapter,
    LoRAAdapter,
    SharedFactors,
    check_terms,
    default_terms,
    draw_xavier,
)
from dynmoe.dg.backbone import beside, features, submodule
from dynmoe.dg.method import DGMethod
from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_uniform
from dynmoe.registry import PartConfig


class ERM(DGMethod, name="erm", source="Gulrajani and Lopez-Paz 2021 (arXiv 2007.01434), ERM"):
    """Empirical risk minimisation: the whole backbone and the head learn from all domains."""


class LinearProbe(DGMethod, name="linear-probe"):
    """Only the linear head learns; the backbone is frozen.

    The frozen features are the embedding, so kept embeddings spare the backbone's pass.
    """

    embeds = True

    def prepare(self, config: PartConfig, generator: torch.Generator | None) -> None:
        """Freeze the backbone."""
        self.backbone.requires_grad_(False)

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]."""
        z = features(self.backbone, images) if embedding is None else embedding
        return self.head(z).unsqueeze(0), {}


class AttentionOnly(
    DGMethod, name="attention-only", source="Touvron et al. 2022 (arXiv 2203.09795), Section 4"
):
    """Only the attention layers of the backbone and the head learn (28.4M in a ViT-B)."""

    def prepare(self, config: PartConfig, generator: torch.Generator | None) -> None:
        """Freeze all but the attention layers."""
        self.backbone.requires_grad_(False)
        for block in self.backbone.blocks:  # type: ignore[union-attr]
            block.attn.requires_grad_(True)


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

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Put the adapters beside the maps."""
        if config.rank < 1 or not 0 < config.alpha < float("inf"):
            raise UserError(
                f"lora: rank={config.rank} must be at least 1 and alpha={config.alpha} above 0"
            )
        beside_attention(
            self.backbone, lambda base: LoRAAdapter(base, config.rank, config.alpha, generator)
        )


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

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Put the adapters beside the maps."""
        if config.rank < 1:
            raise UserError(f"kadaptation: rank={config.rank} must be at least 1")
        terms = config.terms or default_terms(self.dim)
        check_terms(terms, self.dim)
        self.shared = SharedFactors(terms, generator)
        beside_attention(
            self.backbone, lambda base: KroneckerAdapter(base, self.shared, config.rank, generator)
        )


class Compacter(DGMethod, name="compacter", source="Mahabadi et al. 2021 (arXiv 2106.04647)"):
    """Frozen backbone; bottleneck adapters of low-rank hypercomplex maps after attention and MLP.

    `h + up(gelu(down(h)))`, where each of both maps is `sum_i A_i (x) (s_i t_i)`: A [n, n, n] is
    shared by all adapters, s and t are each one's own (Section 3). MoE²'s Table 1 does not say with
    which sizes; n = 4 and a bottleneck of D / 32 are Compacter's for T5. The up map starts at 0
    (our choice), so that the network starts as it was.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of Compacter."""

        terms: int = 4
        """n, Kronecker terms"""
        reduction: int = 32
        """the bottleneck's width is the largest multiple of n up to D / reduction, at least n"""

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Put the adapters behind attention and MLP."""
        n, backbone = config.terms, self.backbone
        if n < 1 or self.dim % n or config.reduction < 1:
            raise UserError(
                f"compacter: terms={n} must divide the width {self.dim} and reduction="
                f"{config.reduction} be at least 1"
            )
        width = max(n, self.dim // config.reduction // n * n)
        backbone.requires_grad_(False)
        self.rules = nn.ParameterList(torch.empty(n, n, n) for _ in range(2))
        for rule in self.rules:
            draw_uniform(rule, 0.5, generator)
        shared = (self.rules[0], self.rules[1])

        def make(base: nn.Module) -> nn.Module:
            return After(base, Bottleneck(self.dim, width, shared, generator))

        for number, block in enumerate(backbone.blocks):  # type: ignore[arg-type]
            beside(backbone, number, "proj", make)
            if not isinstance(submodule(block, "mlp"), nn.Module):
                raise UserError(f"compacter: blocks.{number} has no mlp")
            block.mlp = make(block.mlp)


class After(nn.Module):
    """A module and an adapter of its output."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.adapter(self.base(x))


class Bottleneck(nn.Module):
    """`h + up(gelu(down(h)))` with hypercomplex maps D -> m -> D.

    Args:
        dim: D, a multiple of n.
        width: m, a multiple of n.
        rules: A of the down and of the up maps, [n, n, n]; registered elsewhere.
        generator: draws s and t.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        rules: tuple[nn.Parameter, nn.Parameter],
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        n = len(rules[0])
        self.rules = rules  # a tuple hides them: else they would be listed once per adapter
        self.down_s = nn.Parameter(torch.empty(n, dim // n, 1))
        self.down_t = nn.Parameter(torch.empty(n, 1, width // n))
        self.up_s = nn.Parameter(torch.empty(n, width // n, 1))
        self.up_t = nn.Parameter(torch.empty(n, 1, dim // n))
        self.down_bias = nn.Parameter(torch.empty(width))
        self.up_bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw s and t again but for the up map's t, which is 0 as the biases are."""
        for parameter in (self.down_s, self.down_t, self.up_s):
            draw_xavier(parameter, generator)
        for parameter in (self.up_t, self.down_bias, self.up_bias):
            parameter.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        down, up = self.rules
        inner = F.gelu(hypercomplex(h, down, self.down_s, self.down_t) + self.down_bias)
        return h + hypercomplex(inner, up, self.up_s, self.up_t) + self.up_bias


def hypercomplex(x: Tensor, rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """`x sum_i A_i (x) (s_i t_i)`: [..., D] -> [..., E], A [n, n, n], s [n, D/n, 1], t [n, 1, E/n].

    (x) is the Kronecker product; the large matrix is not formed.
    """
    n = len(rule)
    columns = x.unflatten(-1, (n, -1))  # [..., n, D/n]
    inner = torch.einsum("...ad,id->...ia", columns, s.squeeze(2))
    outer = torch.einsum("...ia,iac->...ic", inner, rule)
    return torch.einsum("...ic,ie->...ce", outer, t.squeeze(1)).flatten(-2)


def beside_attention(backbone: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Freeze the backbone; replace the qkv and output maps of every block's attention by `make`."""
    backbone.requires_grad_(False)
    for block in range(len(backbone.blocks)):  # type: ignore[arg-type]
        for name in ("qkv", "proj"):
            beside(backbone, block, name, make)
