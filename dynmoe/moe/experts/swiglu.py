"""Gated experts: two input maps multiplied, one of them through an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.bank import UnitBank
from dynmoe.moe.draws import draw_entries
from dynmoe.moe.mixing import ACTIVATIONS, mix_dense, mix_sparse, outputs_by_expert
from dynmoe.moe.routing import Routing


class GatedPool(UnitBank, name="swiglu", source="Shazeer 2020 (arXiv 2002.05202), Eqs. 5 and 6"):
    """Gated experts, `W_out (silu(W_gate x) * (W_in x))`, as segments of one pool of hidden units.

    The layer's `activation` is not used: the option `gate` takes its place. Weights are drawn as in
    the hidden pool, output weights with all H units as their fan-in (our choice). One unit has
    2 D_in + D_out weights, half as many again as the pool's where D_in = D_out; the paper makes up
    for it with two thirds of the units.

    Attributes:
        w_gate, w_in: Parameters [H, D_in]; b_gate, b_in: Parameters [H] or None.
        w_out: Parameter [D_out, H]; b_out: Parameter [M, D_out] or None.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(UnitBank.Config):
        """Options of the gated pool."""

        gate: Literal["silu", "gelu", "relu"] = "silu"
        """activation of the gating half: silu makes SwiGLU, gelu GEGLU, relu ReGLU"""
        bias: bool = False
        """biases of both input maps and of each expert's output; the paper has none"""

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
        super().__init__(config, hidden, num_experts)
        self.max_experts = max_experts
        self.bias = config.bias
        self.act = ACTIVATIONS[config.gate]()
        self.w_gate = nn.Parameter(torch.empty(hidden, dim_in))
        self.w_in = nn.Parameter(torch.empty(hidden, dim_in))
        self.w_out = nn.Parameter(torch.empty(dim_out, hidden))
        self.b_gate = nn.Parameter(torch.empty(hidden)) if config.bias else None
        self.b_in = nn.Parameter(torch.empty(hidden)) if config.bias else None
        self.b_out = nn.Parameter(torch.empty(max_experts, dim_out)) if config.bias else None
        self.reset_parameters(generator)

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out]."""
        gates = routing.gates * gate_scale
        if routing.chosen is None or torch.compiler.is_compiling():
            return mix_dense(self.hidden(x), gates, self.segment, self.w_out, self.b_out)
        return mix_sparse(
            self._act, x, gates, routing.chosen, self.segment,
            self._inputs(), self.w_out, self.b_out,
        )  # fmt: skip

    def hidden(self, x: Tensor) -> Tensor:
        """Products [N, H] of gate and value of every hidden unit for x [N, D_in]."""
        return self._act(x, *self._inputs())

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, D_out] what each expert alone says to x [N, D_in]."""
        none = self.w_out.new_zeros(self.max_experts, len(self.w_out))
        b_out = none if self.b_out is None else self.b_out
        return outputs_by_expert(self.hidden(x), self.segment, self.w_out, b_out)

    def _inputs(self) -> list[Tensor]:
        """What has one row per hidden unit: w_gate, w_in, and the biases of both if there are."""
        found = (self.w_gate, self.w_in, self.b_gate, self.b_in)
        return [parameter for parameter in found if parameter is not None]

    def _act(
        self,
        x: Tensor,
        w_gate: Tensor,
        w_in: Tensor,
        b_gate: Tensor | None = None,
        b_in: Tensor | None = None,
    ) -> Tensor:
        return self.act(F.linear(x, w_gate, b_gate)) * F.linear(x, w_in, b_in)

    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter with one entry per hidden unit."""
        biases = [("b_gate", 0), ("b_in", 0)] if self.bias else []
        return [("w_gate", 0), ("w_in", 0), ("w_out", 1), *biases]

    def expert_rows(self) -> list[nn.Parameter]:
        """The output biases [M, D_out], if there are."""
        return [] if self.b_out is None else [self.b_out]

    def output_rows(self) -> list[nn.Parameter]:
        """The output biases [M, D_out], if there are."""
        return self.expert_rows()

    def output_weight(self) -> nn.Parameter:
        """`w_out` [D_out, H]."""
        return self.w_out

    def draw_units(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the units `index` [n]: uniform in +-1/sqrt(fan_in)."""
        dim_in, hidden = self.w_in.shape[1], self.w_out.shape[1]
        for name, axis in self.unit_axes():
            fan_in = hidden if name == "w_out" else dim_in
            draw_entries(getattr(self, name), axis, index, fan_in**-0.5, generator)

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the output biases of experts `index` [n]."""
        for rows in self.expert_rows():
            draw_entries(rows, 0, index, self.w_out.shape[1] ** -0.5, generator)
