"""Compacter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.dg.backbone import beside, features, submodule
from dynmoe.dg.kadaptation import draw_xavier
from dynmoe.dg.method import DGMethod
from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_uniform
from dynmoe.registry import PartConfig


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

    def __init__(
        self, config: Config, backbone: nn.Module, classes: int, generator: torch.Generator | None
    ) -> None:
        super().__init__(config, backbone, classes, generator)
        n = config.terms
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

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]."""
        return self.head(features(self.backbone, images)).unsqueeze(0), {}


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
        dim, width: D and m, both multiples of n.
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
        self.rules = (Shared(rules[0]), Shared(rules[1]))
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
        down, up = (rule.value for rule in self.rules)
        inner = F.gelu(hypercomplex(h, down, self.down_s, self.down_t) + self.down_bias)
        return h + hypercomplex(inner, up, self.up_s, self.up_t) + self.up_bias


@dataclass
class Shared:
    """A parameter that another module lists; a plain attribute would list it here, too."""

    value: nn.Parameter


def hypercomplex(x: Tensor, rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """`x sum_i A_i (x) (s_i t_i)`: [..., D] -> [..., E], A [n, n, n], s [n, D/n, 1], t [n, 1, E/n].

    (x) is the Kronecker product; the large matrix is not formed.
    """
    n = len(rule)
    columns = x.unflatten(-1, (n, -1))  # [..., n, D/n]
    inner = torch.einsum("...ad,id->...ia", columns, s.squeeze(2))
    outer = torch.einsum("...ia,iac->...ic", inner, rule)
    return torch.einsum("...ic,ie->...ce", outer, t.squeeze(1)).flatten(-2)
