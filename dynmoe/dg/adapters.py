"""Adapters of frozen linear layers: LoRA, and updates that are sums of small Kronecker products.

    H = sum_t (u_t v_t^T) (x) (L_t R_t)      x [D_in] -> x H [D_out]

He et al. 2023 (KAdaptation, arXiv 2203.16329), as MoA uses it (Lee et al. 2025, WACV). u, v belong
to all layers that share them, L and R to one. A LoRA update is the case of one term with u = v = 1.
H is never formed: x is multiplied by one factor after the other.

Shapes: B samples, N tokens, T terms, n entries of u_t and v_t, R ranks, p = D_in / n and
q = D_out / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_uniform

SLICE = 12
"""Least p that `default_terms` leaves: MoA's 768 / 64."""


@dataclass
class Factors:
    """One update per sample of a batch, or one for all (batch 1)."""

    left: Tensor
    """[B, T, p, R]"""
    right: Tensor
    """[B, T, R, q]"""
    u: Tensor
    """[B, T, n]"""
    v: Tensor
    """[B, T, n]"""


def update(x: Tensor, factors: Factors, gates: Tensor | None = None) -> Tensor:
    """[B, N, D_out] = x H for tokens x [B, N, D_in], H of each sample's factors.

    Args:
        x: tokens, or [1, N, D_in] all tokens where one update serves them.
        factors: of the same batch size.
        gates: [B, T or 1, N, R] (or what broadcasts to it), weights of the ranks of each token.
    """
    batch, tokens, _ = x.shape
    n = factors.u.shape[2]
    columns = x.view(batch, tokens, n, -1).transpose(1, 2).reshape(batch, n, -1)
    inner = (factors.u @ columns).view(batch, -1, tokens, columns.shape[2] // tokens)
    hidden = inner @ factors.left
    if gates is not None:
        hidden = hidden * gates
    outer = (hidden @ factors.right).flatten(2)
    y = factors.v.transpose(1, 2) @ outer
    return y.view(batch, n, tokens, -1).transpose(1, 2).reshape(batch, tokens, -1)


def default_terms(dim: int) -> int:
    """The largest power of two n that divides `dim` with dim / n >= 12; 64 for a width of 768."""
    n = 1
    while dim % (2 * n) == 0 and dim // (2 * n) >= SLICE:
        n *= 2
    return n


def check_terms(terms: int, *widths: int) -> None:
    """Refuse a number of terms by which a width cannot be divided.

    Raises:
        UserError: the line names the width.
    """
    for width in widths:
        if terms < 1 or width % terms:
            raise UserError(
                f"terms={terms} must divide the layers' widths, and {width} is one; 0 picks a "
                f"number, here {default_terms(width)}"
            )


def draw_xavier(slices: Tensor, generator: torch.Generator | None) -> None:
    """Fill matrices [..., a, b] with Xavier's uniform draws of gain sqrt 2 (MoA's start)."""
    bound = math.sqrt(2.0) * math.sqrt(6.0 / (slices.shape[-2] + slices.shape[-1]))
    draw_uniform(slices, bound, generator)


class SharedFactors(nn.Module):
    """u and v [n, n] of all layers of a model, uniform in +-0.01 at the start."""

    def __init__(self, terms: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(terms, terms))
        self.v = nn.Parameter(torch.empty(terms, terms))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw u and v again."""
        for parameter in (self.u, self.v):
            draw_uniform(parameter, 0.01, generator)


class KroneckerAdapter(nn.Module):
    """A frozen linear layer and a Kronecker update, `y = base(x) + x H`.

    Args:
        base: [..., D_in] -> [..., D_out]; frozen.
        shared: u and v; registered with whoever owns them, not here.
        rank: R.
        generator: draws L and R.
    """

    def __init__(
        self, base: nn.Linear, shared: SharedFactors, rank: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        terms = len(shared.u)
        check_terms(terms, base.in_features, base.out_features)
        self.base = base.requires_grad_(False)
        self.shared = (shared,)  # a tuple hides it: else it would be listed once per layer
        self.left = nn.Parameter(torch.empty(terms, base.in_features // terms, rank))
        self.right = nn.Parameter(torch.empty(terms, rank, base.out_features // terms))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw L and R again; the base and what is shared keep their weights."""
        for parameter in (self.left, self.right):
            draw_xavier(parameter, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]."""
        shared = self.shared[0]
        own = (self.left, self.right, shared.u, shared.v)
        rows = x.reshape(1, -1, x.shape[-1])
        delta = update(rows, Factors(*(factor.unsqueeze(0) for factor in own)))
        return self.base(x) + delta.view(*x.shape[:-1], -1)


class LoRAAdapter(nn.Module):
    """A frozen linear layer and a low-rank update, `y = base(x) + (alpha / r) B A x`.

    Hu et al. 2021 (arXiv 2106.09685), Section 4.1. A starts uniform in +-1/sqrt(D_in), B at 0.

    Args:
        base: [..., D_in] -> [..., D_out]; frozen.
        rank: r.
        alpha: scale of the update.
        generator: draws A.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.empty(base.out_features, rank))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw A again, B is 0; the base keeps its weights."""
        draw_uniform(self.down, self.base.in_features**-0.5, generator)
        self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]."""
        return self.base(x) + self.scale * F.linear(F.linear(x, self.down), self.up)
