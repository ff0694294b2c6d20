"""Multi-head mixtures: tokens are split into sub-tokens, which are routed one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_linear, seeded_linear
from dynmoe.moe.layer import MoELayer
from dynmoe.moe.padding import Padding

MakeLayer = Callable[[int, int], MoELayer]
"""(width in, width out) -> the layer that the sub-tokens go through"""


class MultiHead(nn.Module):
    """An MoE layer on sub-tokens, `[..., D_in] -> [..., D_out]`.

    A linear map, a split of every token into h sub-tokens of D_in/h channels, an MoE layer from
    D_in/h to D_out/h, and a linear map of what they add up to (MH-MoE, Wu et al. 2024,
    arXiv 2404.15045, Section 2.2). Sub-tokens of a token stand side by side in its sequence, and
    compete there in routers whose tokens do.

    Args:
        dim_in: input width of the whole.
        dim_out: output width of the whole.
        heads: h; divides both.
        make_layer: makes the layer, called once with (D_in/h, D_out/h).
        generator: draws the weights of the two linear maps; None: torch's global one.

    Raises:
        UserError: heads do not divide a width.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        heads: int,
        make_layer: MakeLayer,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim_in % heads or dim_out % heads:
            raise UserError(
                f"multi-head layer: heads={heads} must be at least 1 and divide the widths "
                f"{dim_in} and {dim_out}"
            )
        self.heads = heads
        self.split = seeded_linear(dim_in, dim_in, generator)
        self.layer = make_layer(dim_in // heads, dim_out // heads)
        self.merge = seeded_linear(dim_out, dim_out, generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, as `MoELayer.reset_parameters`; both linear maps are drawn again."""
        draw_linear(self.split, generator)
        self.layer.reset_parameters(generator)
        draw_linear(self.merge, generator)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Split, route, mix and merge x [..., D_in] to [..., D_out].

        Args:
            mask: False for padding, one entry per position (or per sample, as the layer has it). A
                sub-token is padding if its token is. Padding gets output 0.
            context: what the router may look at, one entry per position or per sample.

        Both fall back on what `routing_inputs` gives.

        Raises:
            UserError: the mask's shape is not that of x.
        """
        mask = self.layer.routing_context[0] if mask is None else mask
        context = self.layer.routing_context[1] if context is None else context
        padding = None
        if mask is not None:
            padding = Padding.of(mask, x, -1, self.layer.route_per == "sample")
            x = padding.blank(x)
        parts = self.split(x).unflatten(-1, (self.heads, -1)).flatten(-3, -2)
        real = None if padding is None else self._per_part(padding.positions, x)
        y = self.layer(parts, real, self._per_part(context, x))
        y = self.merge(y.unflatten(-2, (-1, self.heads)).flatten(-2))
        return y if padding is None else padding.blank(y)

    def _per_part(self, given: Tensor | None, x: Tensor) -> Tensor | None:
        """What is given per position, repeated for its sub-tokens; per sample, as it is."""
        positions = x.shape[:-1]
        if given is None or given.shape[: len(positions)] != positions:
            return given
        return given.repeat_interleave(self.heads, dim=len(positions) - 1)
