"""The LoRA adapter: a low-rank update of a frozen linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.draws import draw_uniform


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
