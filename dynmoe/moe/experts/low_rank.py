"""A bank of low-rank experts, as LoRA's, whose ranks are one pool.

Shapes: N samples, R ranks of all experts, M most experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import BankArguments, UnitBank
from dynmoe.moe.draws import draw_entries
from dynmoe.moe.experts.pool import MatrixPool


class LoRAPool(MatrixPool, name="lora", source="Hu et al. 2021 (arXiv 2106.09685), Section 4.1"):
    """Low-rank experts, `alpha/r * sum_e g_e B_e A_e x`; the hidden units are the ranks.

    `r` is the layer's `hidden`, the ranks of all experts together. It stays as it was at the start
    when growth adds ranks, so that the old experts' outputs keep their scale (our choice). B starts
    at 0: a fresh expert is silent. A starts uniform in +-1/sqrt(D_in), Kaiming's range with
    a = sqrt(5), as in the authors' code. There are no biases, and the layer's `activation` is not
    used. `dynmoe.moe.upcycle.adapt_linears` puts such a layer beside a frozen linear one.

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

    def __init__(self, config: Config, *arguments: *BankArguments) -> None:
        if not 0 < config.alpha < float("inf"):
            raise UserError(f"bank lora: alpha={config.alpha} must be a number above 0")
        dim_in, dim_out, hidden, num_experts, max_experts, _, generator = arguments
        super().__init__(config, hidden, num_experts, max_experts)
        self.alpha = config.alpha
        self.scale = config.alpha / hidden
        self.w_in = nn.Parameter(torch.empty(hidden, dim_in))
        self.w_out = nn.Parameter(torch.empty(dim_out, hidden))
        self.b_out = None
        self.reset_parameters(generator)

    @torch.no_grad()
    def start_from(self, ranks: int) -> None:
        """Count `ranks` as those at the start; B makes up for the new scale, the function stays."""
        scale = self.alpha / ranks
        self.w_out.mul_(self.scale / scale)
        self.scale = scale

    def get_extra_state(self) -> Tensor:
        """`scale` as a scalar [], which growth leaves as it is, for the state of the module."""
        return torch.tensor(self.scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take on the scale [] of a saved state."""
        self.scale = float(state)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, also what earlier versions saved: without the scale, which stays then."""
        state.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state, prefix, *args)

    def scaled(self, gates: Tensor) -> Tensor:
        """Gates [N, M] times `scale`."""
        return gates * self.scale

    def activations(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """[N, R'] coordinates of x in the ranks."""
        return F.linear(x, *inputs)

    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter with one entry per rank."""
        return [("w_in", 0), ("w_out", 1)]

    @torch.no_grad()
    def draw_units(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the ranks `index` [n]: input weights uniform, output weights 0."""
        draw_entries(self.w_in, 0, index, self.w_in.shape[1] ** -0.5, generator)
        self.w_out.index_fill_(1, index.to(self.w_out.device), 0.0)
