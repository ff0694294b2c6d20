"""Experts that are whole networks, independent of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ExpertBank
from dynmoe.moe.draws import draw_entries
from dynmoe.moe.mixing import ACTIVATIONS
from dynmoe.moe.routing import Routing
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
            return _mix(self._outputs(x, living), gates[:, :living])
        return self._mix_sparse(x, gates, routing.chosen)

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, D_out] what each expert alone says to x [N, D_in]."""
        return self._outputs(x, len(self.biases[0]))

    def last_hidden(self, x: Tensor) -> Tensor:
        """[M, N, width] activations of each network's last hidden layer for x [N, D_in]."""
        return self._last_hidden(x, len(self.biases[0]))

    def _outputs(self, x: Tensor, experts: int) -> Tensor:
        """[E, N, D_out] outputs of the first `experts`."""
        return self._layer(-1, self._last_hidden(x, experts))

    def _last_hidden(self, x: Tensor, experts: int) -> Tensor:
        """[E, N, width] activations of the first `experts`: a batched product for each layer."""
        h = x.expand(experts, *x.shape)
        for depth in range(len(self.weights) - 1):
            h = self.act(self._layer(depth, h))
        return h

    def _layer(self, depth: int, h: Tensor) -> Tensor:
        """One linear layer of the first E networks on h [E, N, width in], before activation."""
        weight, bias = self.weights[depth][: len(h)], self.biases[depth][: len(h)]
        return torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))

    def _mix_sparse(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """Each network on the samples that chose it.

        Rows come from `unbind`, whose backward writes each gradient once.
        """
        weights = [weight.unbind() for weight in self.weights]
        biases = [bias.unbind() for bias in self.biases]
        y = x.new_zeros(len(x), biases[-1][0].shape[0])
        used = chosen.any(dim=0).nonzero().flatten().tolist()
        for expert in used or [0]:  # one, so that y has a gradient
            samples = chosen[:, expert].nonzero().flatten()
            own = [(w[expert], b[expert]) for w, b in zip(weights, biases, strict=True)]
            output = self._network(x[samples], own) * gates[samples, expert].unsqueeze(1)
            y = y.index_add(0, samples, output.to(y.dtype))
        return y

    def _network(self, x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One network on x [n, D_in]."""
        for weight, bias in layers[:-1]:
            x = self.act(F.linear(x, weight, bias))
        return F.linear(x, *layers[-1])

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
