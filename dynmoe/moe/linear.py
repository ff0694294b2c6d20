"""Linear maps whose initial weights come from a generator, and distances to rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def seeded_linear(
    dim_in: int, dim_out: int, generator: torch.Generator, bias: bool = True
) -> nn.Linear:
    """A linear map `[..., dim_in] -> [..., dim_out]`, uniform in +-1/sqrt(dim_in) as torch's own.

    torch's global generator is neither read nor moved.
    """
    linear = nn.utils.skip_init(nn.Linear, dim_in, dim_out, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.uniform_(-(dim_in**-0.5), dim_in**-0.5, generator=generator)
    return linear


def distances(x: Tensor, rows: Tensor) -> Tensor:
    """[N, M] Euclidean distances of x [N, D] to rows [M, D], at least in float32.

    By differences, not by the expansion into dot products, which cancels where rows are near.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.to(wide), rows.to(wide), compute_mode=mode)
