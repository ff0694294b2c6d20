"""Low-rank experts: small updates of a frozen linear layer, one set of ranks per expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import UnitBank
from dynmoe.moe.draws import draw_entries
from dynmoe.moe.mixing import mix_dense, mix_sparse, outputs_by_expert
from dynmoe.moe.routing import Routing


class LoRAPool(UnitBank, name="lora", source="Hu et al. 2021 (arXiv 2106.09685), Section 4.1"):
    """Low-rank experts, `alpha/r * sum_e g_e B_e A_e x`; the hidden units are the ranks.

    `r` is the layer's `hidden`, the ranks of all experts together. It stays as it was at the start
    when growth adds ranks, so that the old experts' outputs keep their scale (our choice). B starts
    at 0: a fresh expert is silent. A starts uniform in +-1/sqrt(D_in), Kaiming's range with
    a = sqrt(5), as in the authors' code. There are no biases, and the layer's `activation` is not
    used. `dynmoe.moe.adapt` puts such a layer beside a frozen linear one.

    Attributes:
        w_in: Parameter [R, D_in], the rows of every A_e.
        w_out: Parameter [D_out, R], the columns of every B_e.
        scale: alpha / r.

    Raises:
        UserError: alpha not above 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(UnitBank.Config):
        """Options of the low-rank experts."""

        alpha: float = 16.0
        """the experts' outputs are multiplied by alpha over the ranks at the start"""

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
        if not 0 < config.alpha < float("inf"):
            raise UserError(f"bank lora: alpha={config.alpha} must be a number above 0")
        super().__init__(config, hidden, num_experts)
        self.max_experts = max_experts
        self.alpha = config.alpha
        self.scale = config.alpha / hidden
        self.w_in = nn.Parameter(torch.empty(hidden, dim_in))
        self.w_out = nn.Parameter(torch.empty(dim_out, hidden))
        self.reset_parameters(generator)

    @torch.no_grad()
    def start_from(self, ranks: int) -> None:
        """Count `ranks` as those at the start; B makes up for the new scale, the function stays."""
        scale = self.alpha / ranks
        self.w_out.mul_(self.scale / scale)
        self.scale = scale

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out]."""
        gates = routing.gates * gate_scale * self.scale
        if routing.chosen is None or torch.compiler.is_compiling():
            return mix_dense(self.hidden(x), gates, self.segment, self.w_out, None)
        return mix_sparse(
            F.linear, x, gates, routing.chosen, self.segment, (self.w_in,), self.w_out, None
        )

    def hidden(self, x: Tensor) -> Tensor:
        """Coordinates [N, R] of x [N, D_in] in every rank."""
        return F.linear(x, self.w_in)

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, D_out] what each expert alone says to x [N, D_in]."""
        none = self.w_out.new_zeros(self.max_experts, len(self.w_out))
        return self.scale * outputs_by_expert(self.hidden(x), self.segment, self.w_out, none)

    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter with one entry per rank."""
        return [("w_in", 0), ("w_out", 1)]

    def expert_rows(self) -> list[nn.Parameter]:
        """None."""
        return []

    def output_rows(self) -> list[nn.Parameter]:
        """None."""
        return []

    def output_weight(self) -> nn.Parameter:
        """`w_out` [D_out, R]."""
        return self.w_out

    @torch.no_grad()
    def draw_units(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the ranks `index` [n]: input weights uniform, output weights 0."""
        draw_entries(self.w_in, 0, index, self.w_in.shape[1] ** -0.5, generator)
        self.w_out.index_fill_(1, index.to(self.w_out.device), 0.0)

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Nothing to draw: an expert is its ranks."""
