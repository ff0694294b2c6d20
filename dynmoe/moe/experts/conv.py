"""Convolutional experts for the trunks of vision networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ACTIVATIONS, BankArguments, UnitBank
from dynmoe.moe.experts.pool import Pool
from dynmoe.moe.router import Routing


class ConvPool(Pool, name="conv", source="ours; the hidden pool with convolutions for matrices"):
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

    b_out: nn.Parameter
    per_sample = True
    channel_axis = 1

    @dataclass(frozen=True, kw_only=True)
    class Config(UnitBank.Config):
        """Options of the convolutional experts."""

        kernel: int = 3
        """pixels a side of the first convolution; odd"""

    def __init__(self, config: Config, *arguments: *BankArguments) -> None:
        dim_in, dim_out, hidden, num_experts, max_experts, activation, generator = arguments
        kernel = config.kernel
        if kernel < 1 or kernel % 2 == 0:
            raise UserError(f"bank conv: kernel={kernel} must be odd and at least 1")
        super().__init__(config, hidden, num_experts, max_experts)
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
        return super().forward(x, routing, gate_scale)

    def mix_dense(self, x: Tensor, gates: Tensor) -> Tensor:
        """Every channel of every image, scaled by its owner's gate."""
        owner = F.one_hot(self.segment, gates.shape[1]).to(gates.dtype)  # [H, M]
        scaled = self.hidden(x) * _as_image(F.linear(gates, owner))
        return F.conv2d(scaled, self.w_out) + _as_image(gates @ self.b_out)

    def mix_sparse(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on the images that chose it."""
        y = x.new_zeros(len(x), len(self.w_out), *x.shape[2:])
        used = chosen.any(dim=0).nonzero().flatten().tolist()
        for expert in used or [0]:  # one, so that y has a gradient
            samples = chosen[:, expert].nonzero().flatten()
            units = (self.segment == expert).nonzero().flatten()
            hidden = self.activations(x[samples], self.w_in[units], self.b_in[units])
            output = F.conv2d(hidden, self.w_out[:, units], self.b_out[expert])
            weighted = output * _as_image(gates[samples, expert].unsqueeze(1))
            y = y.index_add(0, samples, weighted.to(y.dtype))
        return y

    def activations(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """[N, H', h, w] `act(W1 * x + b1)`."""
        w_in, b_in = inputs
        return self.act(F.conv2d(x, w_in, b_in, padding="same"))

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, C_out, h, w] what each expert alone says to x [N, C_in, h, w]."""
        hidden, outputs = self.hidden(x), []
        for expert, bias in enumerate(self.b_out):
            own = hidden * _as_image((self.segment == expert).to(hidden.dtype).unsqueeze(0))
            outputs.append(F.conv2d(own, self.w_out, bias))
        return torch.stack(outputs)


def _as_image(values: Tensor) -> Tensor:
    """Values [N, C] as images of one pixel, [N, C, 1, 1]."""
    return values[:, :, None, None]
