"""Linear maps whose initial weights come from a generator, and distances to rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.moe.draws import draw_uniform


def seeded_linear(
    dim_in: int, dim_out: int, generator: torch.Generator | None, bias: bool = True
) -> nn.Linear:
    """A linear map `[..., dim_in] -> [..., dim_out]`, uniform in +-1/sqrt(dim_in) as torch's own.

    With a generator torch's global one is neither read nor moved.
    """
    device = torch.get_default_device()
    linear = nn.utils.skip_init(nn.Linear, dim_in, dim_out, bias=bias, device=device)
    draw_linear(linear, generator)
    return linear


def draw_linear(linear: nn.Linear, generator: torch.Generator | None) -> None:
    """Draw the weights of a linear map as `seeded_linear` does."""
    for parameter in linear.parameters():
        draw_uniform(parameter, linear.in_features**-0.5, generator)


def distances(x: Tensor, rows: Tensor) -> Tensor:
    """[N, M] Euclidean distances of x [N, D] to rows [M, D], at least in float32.

    By differences, not by the expansion into dot products, which cancels where rows are near.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.to(wide), rows.to(wide), compute_mode=mode)
