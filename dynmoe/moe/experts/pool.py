"""Banks of one pool of hidden units, whose parts are the experts: matrices, gates, images.

Shapes: N samples, H hidden units of all experts, M most experts.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ACTIVATIONS, BankArguments, UnitBank
from dynmoe.moe.draws import draw_entries
from dynmoe.moe.router import Routing


class Pool(UnitBank):
    """Base of the pools with weights into and out of each unit, and an output bias per expert.

    Attributes:
        w_in: Parameter [H, D_in, ...]. w_out: Parameter [D_out, H, ...].
        b_out: Parameter [M, D_out], or None.
        max_experts: M.
    """

    w_in: nn.Parameter
    w_out: nn.Parameter
    b_out: nn.Parameter | None

    def __init__(
        self, config: UnitBank.Config, hidden: int, num_experts: int, max_experts: int
    ) -> None:
        super().__init__(config, hidden, num_experts)
        self.max_experts = max_experts

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in, ...] to [N, D_out, ...]."""
        gates = self.scaled(routing.gates * gate_scale)
        if routing.chosen is None or torch.compiler.is_compiling():
            return self.mix_dense(x, gates)
        return self.mix_sparse(x, gates, routing.chosen)

    @abstractmethod
    def mix_dense(self, x: Tensor, gates: Tensor) -> Tensor:
        """All experts at once, whatever the gates [N, M]."""

    @abstractmethod
    def mix_sparse(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on the samples that chose it, gates [N, M], chosen [N, M] bool."""

    @abstractmethod
    def activations(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """[N, H', ...] what H' units say to x, from their entries of `input_weights`."""

    def scaled(self, gates: Tensor) -> Tensor:
        """Gates [N, M] times a factor of the bank's own; here none."""
        return gates

    def input_weights(self) -> list[nn.Parameter]:
        """What has one row per hidden unit."""
        return [getattr(self, name) for name, _ in self.unit_axes() if name != "w_out"]

    def hidden(self, x: Tensor) -> Tensor:
        """Activations [N, H, ...] of every hidden unit for x [N, D_in, ...]."""
        return self.activations(x, *self.input_weights())

    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter with one entry per hidden unit."""
        return [("w_in", 0), ("b_in", 0), ("w_out", 1)]

    def expert_rows(self) -> list[nn.Parameter]:
        """The output biases [M, D_out], if there are."""
        return [] if self.b_out is None else [self.b_out]

    def output_rows(self) -> list[nn.Parameter]:
        """The output biases [M, D_out], if there are."""
        return self.expert_rows()

    def output_weight(self) -> nn.Parameter:
        """`w_out` [D_out, H, ...]."""
        return self.w_out

    def output_fan_in(self) -> float:
        """What the output weights' initial range depends on: all H units."""
        return self.w_out.shape[1]

    def draw_units(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the units `index` [n]: uniform in +-1/sqrt(fan_in), as linear layers.

        Kaiming's range for ReLU is 2.4 times as wide; with it the shock of each growth kills units
        in the ReLU behind the layer, and a growing network loses its trainability.
        """
        output_fan_in = self.output_fan_in()
        for name, axis in self.unit_axes():
            fan_in = output_fan_in if name == "w_out" else self.w_in[0].numel()
            draw_entries(getattr(self, name), axis, index, fan_in**-0.5, generator)

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the output biases of experts `index` [n]."""
        for rows in self.expert_rows():
            draw_entries(rows, 0, index, self.w_out.shape[1] ** -0.5, generator)


class MatrixPool(Pool):
    """Base of the pools whose units are rows of matrices: x [N, D_in] to [N, D_out]."""

    def mix_dense(self, x: Tensor, gates: Tensor) -> Tensor:
        """All experts at once, as one MLP whose hidden units are scaled by their owner's gate.

        `segment` is data, so growth recompiles nothing. Sparse gates work too, at the dense cost.
        """
        hidden = self.hidden(x)
        owner = F.one_hot(self.segment, gates.shape[1]).to(gates.dtype)  # [H, M]
        scale = F.linear(gates, owner)
        # A [N, H] less to allocate: a tenth of the forward pass.
        scaled = hidden * scale if torch.is_grad_enabled() else scale.mul_(hidden)
        if self.b_out is None:
            return F.linear(scaled, self.w_out)
        return torch.addmm(gates @ self.b_out, scaled, self.w_out.T)

    def mix_sparse(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Only the chosen experts: gather each one's samples, run its slice, add up by gate.

        Slices come from `split`, whose backward writes each gradient once; indexing an expert's
        rows in the loop would make a full-size zero gradient per expert.
        """
        inputs: list[Tensor] = [*self.input_weights()]
        w_out: Tensor = self.w_out
        expert, sample = chosen.t().nonzero(as_tuple=True)  # sorted by expert
        counts = chosen.sum(dim=0).tolist()
        sizes = torch.bincount(self.segment, minlength=len(counts)).tolist()
        if bool((self.segment.diff() < 0).any()):  # growth has left an expert's units scattered
            order = self.segment.argsort(stable=True)
            inputs, w_out = [p[order] for p in inputs], w_out[:, order]
        slices = list(zip(*(p.split(sizes) for p in inputs), strict=True))
        w_outs = w_out.split(sizes, dim=1)
        rows = x.index_select(0, sample).split(counts)
        weights = gates[sample, expert].unsqueeze(1).split(counts)
        y = x.new_zeros(len(x), len(w_out)) if self.b_out is None else gates @ self.b_out
        used = [e for e, n in enumerate(counts) if n] or [0]  # one, so that y has a gradient
        outputs = [
            F.linear(self.activations(rows[e], *slices[e]) * weights[e], w_outs[e]) for e in used
        ]
        return y.index_add_(0, sample, torch.cat(outputs).to(y.dtype))

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, D_out] what each expert alone says to x [N, D_in]."""
        hidden = self.hidden(x)
        owner = F.one_hot(self.segment, self.max_experts).to(hidden.dtype)  # [H, M]
        y = self.scaled(torch.einsum("nh,hm,oh->mno", hidden, owner, self.w_out))
        return y if self.b_out is None else y + self.b_out.unsqueeze(1)


class HiddenPool(MatrixPool, name="pool", source="ours; experts as in Kim 2025 (arXiv 2511.18987)"):
    """Experts as segments of one pool of H hidden units, `W2 (act(W1 x + b1) * g[segment]) + g b2`.

    Dense routing is one MLP whose hidden activations are scaled by their owner's gate, at the cost
    of a dense MLP of the same size. Sparse routing sorts samples by expert and runs each expert's
    slice of the same parameters.

    Attributes:
        w_in: Parameter [H, D_in]; b_in: Parameter [H].
        w_out: Parameter [D_out, H]; b_out: Parameter [M, D_out].
    """

    b_out: nn.Parameter

    @dataclass(frozen=True, kw_only=True)
    class Config(UnitBank.Config):
        """Options of the hidden pool."""

        output_init: Literal["pool", "expert"] = "pool"
        """fan-in for the output weights' initial range: all H units, as in the dense layer this
        replaces, or the expert's own H/E, as in a free-standing expert"""

    def __init__(self, config: Config, *arguments: *BankArguments) -> None:
        dim_in, dim_out, hidden, num_experts, max_experts, activation, generator = arguments
        super().__init__(config, hidden, num_experts, max_experts)
        self.output_init = config.output_init
        self.w_in = nn.Parameter(torch.empty(hidden, dim_in))
        self.b_in = nn.Parameter(torch.empty(hidden))
        self.w_out = nn.Parameter(torch.empty(dim_out, hidden))
        self.b_out = nn.Parameter(torch.empty(max_experts, dim_out))
        self.act = ACTIVATIONS[activation]()
        self.reset_parameters(generator)

    def activations(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """[N, H'] `act(W1 x + b1)`."""
        return self.act(F.linear(x, *inputs))

    def output_fan_in(self) -> float:
        """All H units, or H/E."""
        hidden = self.w_out.shape[1]
        return hidden if self.output_init == "pool" else hidden / (int(self.segment.max()) + 1)


class GatedPool(MatrixPool, name="swiglu", source="Shazeer 2020 (arXiv 2002.05202), Eqs. 5 and 6"):
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

    def __init__(self, config: Config, *arguments: *BankArguments) -> None:
        dim_in, dim_out, hidden, num_experts, max_experts, _, generator = arguments
        super().__init__(config, hidden, num_experts, max_experts)
        self.bias = config.bias
        self.act = ACTIVATIONS[config.gate]()
        self.w_gate = nn.Parameter(torch.empty(hidden, dim_in))
        self.w_in = nn.Parameter(torch.empty(hidden, dim_in))
        self.w_out = nn.Parameter(torch.empty(dim_out, hidden))
        self.b_gate = nn.Parameter(torch.empty(hidden)) if config.bias else None
        self.b_in = nn.Parameter(torch.empty(hidden)) if config.bias else None
        self.b_out = nn.Parameter(torch.empty(max_experts, dim_out)) if config.bias else None
        self.reset_parameters(generator)

    def activations(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """[N, H'] products of gate and value."""
        w_gate, w_in, *biases = inputs
        b_gate, b_in = biases or (None, None)
        return self.act(F.linear(x, w_gate, b_gate)) * F.linear(x, w_in, b_in)

    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter with one entry per hidden unit."""
        biases = [("b_gate", 0), ("b_in", 0)] if self.bias else []
        return [("w_gate", 0), ("w_in", 0), ("w_out", 1), *biases]


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
        """Mix the experts' outputs for images x [N, C_in, h, w] to [N, C_out, h, w].

        Raises:
            UserError: x has another number of axes.
        """
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
