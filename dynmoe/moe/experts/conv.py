"""Convolutional experts for the trunks of vision networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ACTIVATIONS, UnitBank
from dynmoe.moe.draws import draw_entries
from dynmoe.moe.router import Routing


class ConvPool(
    UnitBank, name="conv", source="ours; the hidden pool with convolutions for matrices"
):
    """Convolutional experts as segments of one pool of hidden channels.

    `y = W2 * (act(W1 * x + b1) g[segment]) + g b2` for images x [N, C_in, h, w]: a k x k
    convolution, the activation, and a 1 x 1 convolution, stride 1, padded so that images keep their
    size. A hidden unit is a channel. Images are routed as a whole, by the means of their channels.

    Attributes:
        w_in: Parameter [H, C_in, k, k]; b_in: Parameter [H].
        w_out: Parameter [C_out, H, 1, 1]; b_out: Parameter [M, C_out].

    Raises:
        UserError: an even kernel or one below 1; in use, an input that is no batch of images.
    """

    per_sample = True
    channel_axis = 1

    @dataclass(frozen=True, kw_only=True)
    class Config(UnitBank.Config):
        """Options of the convolutional experts."""

        kernel: int = 3
        """pixels a side of the first convolution; odd"""

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
        kernel = config.kernel
        if kernel < 1 or kernel % 2 == 0:
            raise UserError(f"bank conv: kernel={kernel} must be odd and at least 1")
        super().__init__(config, hidden, num_experts)
        self.act = ACTIVATIONS[activation]()
        self.w_in = nn.Parameter(torch.empty(hidden, dim_in, kernel, kernel))
        self.b_in = nn.Parameter(torch.empty(hidden))
        self.w_out = nn.Parameter(torch.empty(dim_out, hidden, 1, 1))
        self.b_out = nn.Parameter(torch.empty(max_experts, dim_out))
        self.reset_parameters(generator)

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for images x [N, C_in, h, w] to [N, C_out, h, w]."""
        if x.dim() != 4:
            raise UserError(
                "bank conv takes images [N, C, h, w], and here its input has the shape "
                f"{tuple(x.shape)}; use another bank"
            )
        gates = routing.gates * gate_scale
        if routing.chosen is None or torch.compiler.is_compiling():
            return self._mix_dense(x, gates)
        return self._mix_sparse(x, gates, routing.chosen)

    def _mix_dense(self, x: Tensor, gates: Tensor) -> Tensor:
        """Every channel of every image, scaled by its owner's gate."""
        owner = F.one_hot(self.segment, gates.shape[1]).to(gates.dtype)  # [H, M]
        scaled = self.hidden(x) * _as_image(F.linear(gates, owner))
        return F.conv2d(scaled, self.w_out) + _as_image(gates @ self.b_out)

    def _mix_sparse(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on the images that chose it."""
        y = x.new_zeros(len(x), len(self.w_out), *x.shape[2:])
        used = chosen.any(dim=0).nonzero().flatten().tolist()
        for expert in used or [0]:  # one, so that y has a gradient
            samples = chosen[:, expert].nonzero().flatten()
            units = (self.segment == expert).nonzero().flatten()
            hidden = self._act(x[samples], self.w_in[units], self.b_in[units])
            output = F.conv2d(hidden, self.w_out[:, units], self.b_out[expert])
            weighted = output * _as_image(gates[samples, expert].unsqueeze(1))
            y = y.index_add(0, samples, weighted.to(y.dtype))
        return y

    def hidden(self, x: Tensor) -> Tensor:
        """Activations [N, H, h, w] of every hidden channel for x [N, C_in, h, w]."""
        return self._act(x, self.w_in, self.b_in)

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, C_out, h, w] what each expert alone says to x [N, C_in, h, w]."""
        hidden, outputs = self.hidden(x), []
        for expert, bias in enumerate(self.b_out):
            own = hidden * _as_image((self.segment == expert).to(hidden.dtype).unsqueeze(0))
            outputs.append(F.conv2d(own, self.w_out, bias))
        return torch.stack(outputs)

    def _act(self, x: Tensor, w_in: Tensor, b_in: Tensor) -> Tensor:
        return self.act(F.conv2d(x, w_in, b_in, padding="same"))

    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter with one entry per hidden channel."""
        return [("w_in", 0), ("b_in", 0), ("w_out", 1)]

    def expert_rows(self) -> list[nn.Parameter]:
        """The output biases [M, C_out]."""
        return [self.b_out]

    def output_rows(self) -> list[nn.Parameter]:
        """The output biases [M, C_out]."""
        return [self.b_out]

    def output_weight(self) -> nn.Parameter:
        """`w_out` [C_out, H, 1, 1]."""
        return self.w_out

    def draw_units(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the channels `index` [n]: uniform in +-1/sqrt(fan_in), as the pool."""
        bound_in = self.w_in[0].numel() ** -0.5
        draw_entries(self.w_in, 0, index, bound_in, generator)
        draw_entries(self.b_in, 0, index, bound_in, generator)
        draw_entries(self.w_out, 1, index, self.w_out.shape[1] ** -0.5, generator)

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the output biases of experts `index` [n]."""
        draw_entries(self.b_out, 0, index, self.w_out.shape[1] ** -0.5, generator)


def _as_image(values: Tensor) -> Tensor:
    """Values [N, C] as images of one pixel, [N, C, 1, 1]."""
    return values[:, :, None, None]
