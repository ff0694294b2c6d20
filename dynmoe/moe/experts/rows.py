"""Banks whose experts are rows of parameters: whole networks, and scales and shifts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dynmoe.errors import UserError
from dynmoe.moe.bank import ACTIVATIONS, BankArguments, ExpertBank
from dynmoe.moe.draws import draw_entries, draw_normal
from dynmoe.moe.router import Routing
from dynmoe.registry import PartConfig


class NetworkBank(
    ExpertBank, name="networks", source="Willi et al. 2024 (arXiv 2406.18420), Big; batching ours"
):
    """Whole networks: every expert is an MLP of its own, with any number of hidden layers.

    Obando-Ceron et al. 2024 (arXiv 2402.08609) have experts of one hidden layer; Willi et al.'s Big
    makes each expert an entire network. Every hidden layer is `hidden // num_experts` units wide,
    with the layer's `hidden` and its number of experts at the start. New experts are networks of
    the same width, whatever the growth budget says, and the room for all that may come (M of them)
    is reserved and counted from the start.

    Attributes:
        weights: Parameters [M, width out, width in], one per linear layer of a network.
        biases: Parameters [M, width out], one per linear layer.

    Raises:
        UserError: less than one hidden layer, or fewer hidden units than experts.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the whole networks."""

        layers: int = 2
        """hidden layers of each network"""

    def __init__(self, config: Config, *arguments: *BankArguments) -> None:
        dim_in, dim_out, hidden, num_experts, max_experts, activation, generator = arguments
        if config.layers < 1:
            raise UserError(f"bank networks: layers={config.layers} must be at least 1")
        if hidden < num_experts:
            raise UserError(
                f"bank networks: {num_experts} experts cannot share {hidden} hidden units a layer; "
                "use fewer experts or more units"
            )
        super().__init__()
        widths = [dim_in, *[hidden // num_experts] * config.layers, dim_out]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in pairwise(widths):
            self.weights.append(torch.empty(max_experts, after, before))
            self.biases.append(torch.empty(max_experts, after))
        self.act = ACTIVATIONS[activation]()
        self.reset_parameters(generator)

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out]."""
        gates = routing.gates * gate_scale
        if torch.compiler.is_compiling():  # all M: growth changes no shape
            return _mix(self.expert_outputs(x), gates)
        if routing.chosen is None:
            living = int(routing.active.sum())
            return _mix(self._layer(-1, self.last_hidden(x, living)), gates[:, :living])
        return self._mix_sparse(x, gates, routing.chosen)

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, D_out] what each expert alone says to x [N, D_in]."""
        return self._layer(-1, self.last_hidden(x))

    def last_hidden(self, x: Tensor, experts: int | None = None) -> Tensor:
        """[E, N, width] activations of the last hidden layers of the first E networks, or all M.

        x is [N, D_in]; each layer is one batched product.
        """
        h = x.expand(experts or len(self.biases[0]), *x.shape)
        for depth in range(len(self.weights) - 1):
            h = self.act(self._layer(depth, h))
        return h

    def _layer(self, depth: int, h: Tensor) -> Tensor:
        """One linear layer of the first E networks on h [E, N, width in], before activation."""
        weight, bias = self.weights[depth][: len(h)], self.biases[depth][: len(h)]
        return torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))

    def _mix_sparse(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Each network on the samples that chose it; `unbind` writes each gradient once."""
        weights = [weight.unbind() for weight in self.weights]
        biases = [bias.unbind() for bias in self.biases]
        y = x.new_zeros(len(x), biases[-1][0].shape[0])
        used = chosen.any(dim=0).nonzero().flatten().tolist()
        for expert in used or [0]:  # one, so that y has a gradient
            samples = chosen[:, expert].nonzero().flatten()
            h, last = x[samples], len(weights) - 1
            for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                h = F.linear(h, weight[expert], bias[expert])
                h = h if depth == last else self.act(h)
            output = h * gates[samples, expert].unsqueeze(1)
            y = y.index_add(0, samples, output.to(y.dtype))
        return y

    def expert_rows(self) -> list[nn.Parameter]:
        """All weights and biases."""
        return [*self.weights, *self.biases]

    def output_rows(self) -> list[nn.Parameter]:
        """Weights and biases of the networks' last layer."""
        return [self.weights[-1], self.biases[-1]]

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the networks `index` [n]: uniform in +-1/sqrt(fan_in), as linear layers."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[2] ** -0.5
            draw_entries(weight, 0, index, bound, generator)
            draw_entries(bias, 0, index, bound, generator)


def _mix(outputs: Tensor, gates: Tensor) -> Tensor:
    """Outputs [E, N, D_out] added up by gates [N, E]: [N, D_out]."""
    return torch.einsum("ne,eno->no", gates, outputs)


class ScaleShift(torch.autograd.Function):
    """`x gamma + beta` of x [B, T, D] with gamma and beta [B, D] of each sample.

    As `torch.addcmul` to the bit, with its gradients. Of the two products [B, T, D] of the backward
    pass the second takes the memory of the first: fresh memory costs more than the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """[B, T, D]."""
        ctx.save_for_backward(x, gamma)
        return torch.addcmul(beta.unsqueeze(1), x, gamma.unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x [B, T, D], and of gamma and beta [B, D]; the gradient is [B, T, D]."""
        x, gamma = ctx.saved_tensors
        product = x * gradient
        of_gamma = product.sum(dim=1)
        torch.mul(gradient, gamma.unsqueeze(1), out=product)  # its memory is at hand
        return product, of_gamma, gradient.sum(dim=1)


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

    def __init__(self, config: Config, *arguments: *BankArguments) -> None:
        dim_in, dim_out, _, _, max_experts, _, generator = arguments
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
        gates = routing.gates
        if isinstance(gate_scale, Tensor) or gate_scale != 1:
            gates = gates * gate_scale
        gamma, beta = gates @ self.gamma, gates @ self.beta
        one_position = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
        if self.base_gamma is None or self.base_beta is None:
            return torch.addcmul(beta.view(one_position), x, gamma.view(one_position))
        gamma, beta = self.base_gamma + gamma, self.base_beta + beta
        if x.dim() != 3:
            return torch.addcmul(beta.view(one_position), x, gamma.view(one_position))
        return ScaleShift.apply(x, gamma, beta)

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
