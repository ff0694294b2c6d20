"""The default bank: every expert is a two-layer MLP on its own part of one pool of hidden units."""

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


class HiddenPool(UnitBank, name="pool", source="ours; experts as in Kim 2025 (arXiv 2511.18987)"):
    """Experts as segments of one pool of H hidden units, `W2 (act(W1 x + b1) * g[segment]) + g b2`.

    Dense routing is one MLP whose hidden activations are scaled by their owner's gate, at the cost
    of a dense MLP of the same size. Sparse routing sorts samples by expert and runs each expert's
    slice of the same parameters.

    Attributes:
        w_in: Parameter [H, D_in]; b_in: Parameter [H].
        w_out: Parameter [D_out, H]; b_out: Parameter [M, D_out].
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(UnitBank.Config):
        """Options of the hidden pool."""

        output_init: Literal["pool", "expert"] = "pool"
        """fan-in for the output weights' initial range: all H units, as in the dense layer this
        replaces, or the expert's own H/E, as in a free-standing expert"""

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
        self.output_init = config.output_init
        self.w_in = nn.Parameter(torch.empty(hidden, dim_in))
        self.b_in = nn.Parameter(torch.empty(hidden))
        self.w_out = nn.Parameter(torch.empty(dim_out, hidden))
        self.b_out = nn.Parameter(torch.empty(max_experts, dim_out))
        self.act = ACTIVATIONS[activation]()
        self.reset_parameters(generator)

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out]."""
        gates = routing.gates * gate_scale
        if routing.chosen is None or torch.compiler.is_compiling():
            return mix_dense(self.hidden(x), gates, self.segment, self.w_out, self.b_out)
        return mix_sparse(
            self._act, x, gates, routing.chosen, self.segment,
            (self.w_in, self.b_in), self.w_out, self.b_out,
        )  # fmt: skip

    def hidden(self, x: Tensor) -> Tensor:
        """Activations [N, H] of every hidden unit for x [N, D_in]."""
        return self._act(x, self.w_in, self.b_in)

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, D_out] what each expert alone says to x [N, D_in]."""
        return outputs_by_expert(self.hidden(x), self.segment, self.w_out, self.b_out)

    def _act(self, x: Tensor, w_in: Tensor, b_in: Tensor) -> Tensor:
        return self.act(F.linear(x, w_in, b_in))

    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter with one entry per hidden unit."""
        return [("w_in", 0), ("b_in", 0), ("w_out", 1)]

    def expert_rows(self) -> list[nn.Parameter]:
        """The output biases [M, D_out]."""
        return [self.b_out]

    def output_rows(self) -> list[nn.Parameter]:
        """The output biases [M, D_out]."""
        return [self.b_out]

    def output_weight(self) -> nn.Parameter:
        """`w_out` [D_out, H]."""
        return self.w_out

    def draw_units(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the units `index` [n]: uniform in +-1/sqrt(fan_in), as linear layers.

        Kaiming's range for ReLU is 2.4 times as wide; with it the shock of each growth kills units
        in the ReLU behind the layer, and a growing network loses its trainability.
        """
        dim_in, hidden = self.w_in.shape[1], self.w_out.shape[1]
        fan_in = hidden if self.output_init == "pool" else hidden / self._num_experts()
        draw_entries(self.w_in, 0, index, dim_in**-0.5, generator)
        draw_entries(self.b_in, 0, index, dim_in**-0.5, generator)
        draw_entries(self.w_out, 1, index, fan_in**-0.5, generator)

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the output biases of experts `index` [n]."""
        draw_entries(self.b_out, 0, index, self.w_out.shape[1] ** -0.5, generator)

    def _num_experts(self) -> int:
        return int(self.segment.max()) + 1
