"""Experts that are no more than the scales and shifts of a normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ExpertBank
from dynmoe.moe.draws import draw_normal
from dynmoe.moe.routing import Routing
from dynmoe.registry import PartConfig


class AffineBank(
    ExpertBank,
    name="affine",
    source="after Fan et al. 2025 (arXiv 2511.13760), MoE-LayerNorm; rows that start at 0, ours",
):
    """Scales and shifts of normalised samples, `y = x * sum_e g_e gamma_e + sum_e g_e beta_e`.

    x is normalised already and keeps its shape, [N, ..., D] with D_in = D_out = D; a sample is
    routed as a whole, and all its positions get one scale and shift. Rows start at 0: they are
    changes of a normalisation's own scale and shift, which `stand_on` adds to them, or which are
    left to be added to its output. The layer's `hidden` and `activation` are not used.

    Attributes:
        gamma, beta: Parameters [M, D].
        base_gamma, base_beta: buffers [D], frozen scale and shift that every sample gets; or None.
            `reset_parameters` leaves them.

    Raises:
        UserError: D_in is not D_out, or init_scale below 0.
    """

    per_sample = True
    base_gamma: Tensor | None
    base_beta: Tensor | None

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the affine experts."""

        init_scale: float = 0.0
        """standard deviation of fresh rows; 0 for experts that change nothing at first"""

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
        if dim_in != dim_out:
            raise UserError(
                f"bank affine scales its input and needs an output as wide: {dim_in} is not "
                f"{dim_out}; use another bank"
            )
        if not 0 <= config.init_scale < float("inf"):
            raise UserError(f"bank affine: init_scale={config.init_scale} must be at least 0")
        super().__init__()
        self.init_scale = config.init_scale
        self.gamma = nn.Parameter(torch.empty(max_experts, dim_in))
        self.beta = nn.Parameter(torch.empty(max_experts, dim_in))
        self.register_buffer("base_gamma", None)
        self.register_buffer("base_beta", None)
        self.reset_parameters(generator)

    def stand_on(self, gamma: Tensor, beta: Tensor) -> None:
        """Let the experts be changes of this frozen scale and shift [D] (copied)."""
        self.base_gamma, self.base_beta = gamma.detach().clone(), beta.detach().clone()

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Scale and shift x [N, ..., D] by the mixed rows of each sample."""
        gates = routing.gates * gate_scale
        gamma, beta = gates @ self.gamma, gates @ self.beta
        if self.base_gamma is not None and self.base_beta is not None:
            gamma, beta = self.base_gamma + gamma, self.base_beta + beta
        one_position = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
        return torch.addcmul(beta.view(one_position), x, gamma.view(one_position))

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, ..., D] what each expert alone says to x [N, ..., D], the base left out."""
        rows = (len(self.gamma), *[1] * (x.dim() - 1), x.shape[-1])
        return x * self.gamma.view(rows) + self.beta.view(rows)

    def expert_rows(self) -> list[nn.Parameter]:
        """Scales and shifts [M, D]."""
        return [self.gamma, self.beta]

    def output_rows(self) -> list[nn.Parameter]:
        """Scales and shifts [M, D]: the output is linear in both."""
        return [self.gamma, self.beta]

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the rows `index` [n]: normal, of standard deviation `init_scale`."""
        for rows in self.expert_rows():
            draw_normal(rows, index, self.init_scale, generator)
