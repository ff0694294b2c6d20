"""The default bank: every expert is a two-layer MLP on its own part of one pool of hidden units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.bank import ExpertBank, even_sizes
from dynmoe.moe.routing import Routing
from dynmoe.registry import PartConfig

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class HiddenPool(ExpertBank, name="pool"):
    """Experts as segments of one pool of H hidden units, `W2 (act(W1 x + b1) * g[segment]) + g b2`.

    Dense routing is one MLP whose hidden activations are scaled by their owner's gate, at the cost
    of a dense MLP of the same size. Sparse routing sorts samples by expert and runs each expert's
    slice of the same parameters.

    Attributes:
        w_in: Parameter [H, D_in]; b_in: Parameter [H].
        w_out: Parameter [D_out, H]; b_out: Parameter [M, D_out].
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
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
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.output_init = config.output_init
        self.w_in = nn.Parameter(torch.empty(hidden, dim_in))
        self.b_in = nn.Parameter(torch.empty(hidden))
        self.w_out = nn.Parameter(torch.empty(dim_out, hidden))
        self.b_out = nn.Parameter(torch.empty(max_experts, dim_out))
        self.act = ACTIVATIONS[activation]()
        self.register_buffer("segment", torch.zeros(hidden, dtype=torch.long))
        self.set_hidden_sizes(even_sizes(hidden, num_experts))
        self.draw_units(torch.arange(hidden), generator)
        self.draw_experts(torch.arange(max_experts), generator)

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out]."""
        if routing.indices is None:
            return self._dense(x, routing.gates * gate_scale)
        return self._sorted(x, routing.indices, routing.weights * gate_scale)

    def hidden(self, x: Tensor) -> Tensor:
        """Activations [N, H] of every hidden unit for x [N, D_in]."""
        return self.act(F.linear(x, self.w_in, self.b_in))

    def _dense(self, x: Tensor, gates: Tensor) -> Tensor:
        """All experts at once; gates [N, M]. `segment` is data, so growth recompiles nothing."""
        owner = F.one_hot(self.segment, gates.shape[1]).to(gates.dtype)  # [H, M]
        scaled = self.hidden(x) * F.linear(gates, owner)
        return torch.addmm(gates @ self.b_out, scaled, self.w_out.T)

    def _sorted(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Only the chosen experts, indices and weights [N, K]: sort, slice, un-sort.

        Slices come from `split`, whose backward writes each gradient once; indexing an expert's
        rows in the loop would make a full-size zero gradient per expert.
        """
        n, k = indices.shape
        expert = indices.reshape(-1)
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=self.b_out.shape[0]).tolist()
        rows = x[order // k].split(counts)
        w_in, b_in, w_out, b_out = self._by_expert()
        outputs = [
            F.linear(self.act(F.linear(rows[e], w_in[e], b_in[e])), w_out[e], b_out[e])
            for e, count in enumerate(counts)
            if count
        ]
        unsort = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=x.device))
        chosen = torch.cat(outputs)[unsort].view(n, k, -1)
        return (chosen * weights.unsqueeze(2)).sum(dim=1)

    def _by_expert(self) -> tuple[Sequence[Tensor], ...]:
        """Each expert's slices of w_in [H_e, D_in], b_in [H_e], w_out [D_out, H_e], b_out [D_out].

        Units are gathered first where growth has left an expert's units scattered.
        """
        sizes = torch.bincount(self.segment, minlength=self.b_out.shape[0]).tolist()
        w_in: Tensor = self.w_in
        b_in: Tensor = self.b_in
        w_out: Tensor = self.w_out
        if bool((self.segment.diff() < 0).any()):
            order = self.segment.argsort(stable=True)
            w_in, b_in, w_out = w_in[order], b_in[order], w_out[:, order]
        return w_in.split(sizes), b_in.split(sizes), w_out.split(sizes, dim=1), self.b_out.unbind()

    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter with one entry per hidden unit."""
        return [("w_in", 0), ("b_in", 0), ("w_out", 1)]

    def expert_rows(self) -> list[nn.Parameter]:
        """The output biases [M, D_out]."""
        return [self.b_out]

    def output_weight(self) -> nn.Parameter:
        """`w_out` [D_out, H]."""
        return self.w_out

    @torch.no_grad()
    def draw_units(self, index: Tensor, generator: torch.Generator) -> None:
        """Draw the units `index` [n] afresh: uniform in +-1/sqrt(fan_in), as torch's linear layers.

        Kaiming's range for ReLU is 2.4 times as wide; with it the shock of each growth kills units
        in the ReLU behind the layer, and a growing network loses its trainability.
        """
        dim_in, (dim_out, hidden), n = self.w_in.shape[1], self.w_out.shape, len(index)
        fan_in = hidden if self.output_init == "pool" else hidden / self._num_experts()
        bound_in, bound_out = dim_in**-0.5, fan_in**-0.5
        w_in = torch.empty(n, dim_in).uniform_(-bound_in, bound_in, generator=generator)
        b_in = torch.empty(n).uniform_(-bound_in, bound_in, generator=generator)
        w_out = torch.empty(dim_out, n).uniform_(-bound_out, bound_out, generator=generator)
        index = index.to(self.w_in.device)
        self.w_in.index_copy_(0, index, w_in.to(self.w_in))
        self.b_in.index_copy_(0, index, b_in.to(self.b_in))
        self.w_out.index_copy_(1, index, w_out.to(self.w_out))

    @torch.no_grad()
    def draw_experts(self, index: Tensor, generator: torch.Generator) -> None:
        """Draw the output biases of experts `index` [n] afresh."""
        bound = self.w_out.shape[1] ** -0.5
        fresh = torch.empty(len(index), self.b_out.shape[1])
        fresh.uniform_(-bound, bound, generator=generator)
        self.b_out[index] = fresh.to(self.b_out)

    def _num_experts(self) -> int:
        return int(self.segment.max()) + 1
