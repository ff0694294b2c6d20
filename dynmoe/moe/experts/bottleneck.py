"""The bank of bottlenecked experts, whose weights stand in one vector of constant length.

Shapes: N samples, E experts that exist, M most experts, P parameters. Expert e has the widths
D_in -> h1_e -> b_e -> h2_e -> D_out; H1, B and H2 are their sums over the experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.bank import ACTIVATIONS, BankArguments, ExpertBank, owners
from dynmoe.moe.draws import draw_entries, home
from dynmoe.moe.router import Routing
from dynmoe.moe.widths import Shape, Widths, fit_widths
from dynmoe.registry import PartConfig

KAIMING = 6**0.5
"""He et al.'s range for weights into ReLU units, times sqrt(fan_in)"""


@dataclass(frozen=True)
class Maps:
    """A vector [P] as the experts' maps: views of its entries, in this order."""

    sizes: list[Widths]
    """[E]"""
    w1: Tensor
    """[H1, D_in]"""
    b1: Tensor
    """[H1]"""
    w2: list[Tensor]
    """[E] of [b_e, h1_e]"""
    b2: list[Tensor]
    """[E] of [b_e]"""
    w3: list[Tensor]
    """[E] of [h2_e, b_e]"""
    b3: list[Tensor]
    """[E] of [h2_e]"""
    w4: Tensor
    """[H2, D_out], transposed: a row is what one unit adds to the output"""

    @classmethod
    def of(cls, vector: Tensor, sizes: list[Widths], dim_in: int, dim_out: int) -> Maps:
        """The maps that a vector [P] holds with those widths; its end may be spare."""
        units, units_out = sum(a for a, _, _ in sizes), sum(c for _, _, c in sizes)
        shapes: list[tuple[int, ...]] = [(units, dim_in), (units,)]
        shapes += [(b, a) for a, b, _ in sizes] + [(b,) for _, b, _ in sizes]
        shapes += [(c, b) for _, b, c in sizes] + [(c,) for _, _, c in sizes]
        shapes.append((units_out, dim_out))
        lengths = [math.prod(shape) for shape in shapes]
        pieces = vector.split([*lengths, len(vector) - sum(lengths)])
        w1, b1, *inner, w4 = [p.view(shape) for p, shape in zip(pieces, shapes, strict=False)]
        n = len(sizes)
        w2, b2, w3, b3 = (inner[k * n : (k + 1) * n] for k in range(4))
        return cls(sizes, w1, b1, w2, b2, w3, b3, w4)

    def by_expert(self) -> list[list[Tensor]]:
        """[E] of w1 [h1_e, D_in], b1, w2, b2, w3, b3 and w4 [h2_e, D_out], views as well."""
        first, last = [a for a, _, _ in self.sizes], [c for _, _, c in self.sizes]
        groups = (self.w1.split(first), self.b1.split(first), self.w2, self.b2, self.w3, self.b3,
                  self.w4.split(last))  # fmt: skip
        return [list(own) for own in zip(*groups, strict=True)]


class BottleneckBank(
    ExpertBank,
    name="bottleneck",
    source="Kim 2025 (arXiv 2511.18987), its components; widths and vector ours",
):
    """Bottlenecked experts: input -> expanded -> bottleneck -> expanded -> output.

    `y_e = W4 act(W3 act(W2 act(W1 x + b1) + b2) + b3) + c_e`. At first all experts together have
    the parameters that a pool of `hidden` units has, or a few less: as many as `widths.fit_widths`
    finds integer widths for; that number is the budget. A growth at a constant budget rescales all
    widths of all experts, so that again their sum is the budget (the paper: all hidden dimensions
    are rescaled so that the number of parameters stays). Output biases are left out, as room for
    those of all M experts is reserved from the start.

    Weights into hidden units are drawn uniform in +-sqrt(6/fan_in) (He et al. 2015, arXiv
    1502.01852): smaller ones lose the signal on its way through three layers. Biases are drawn in
    +-1/sqrt(fan_in), and output weights, with all H2 units as their fan-in, as in the hidden pool.

    A unit of the last expanded layer counts as the expert's hidden unit where a bank's units are
    asked for: its features, its load, the diagnostics.

    Attributes:
        weights: Parameter [P], all weights and biases of the hidden units; `maps` shows them as
            matrices. Should no widths spend the whole budget, the last entries are not used.
        b_out: Parameter [M, D_out], output biases.
        sizes: [E] widths (h1, b, h2).
        widths: buffer [M, 3] int64, the same; 0 for experts to come.

    Raises:
        UserError: an expansion that is no number of at least 1.
    """

    widths: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the bottlenecked experts."""

        expansion: float = 4.0
        """width of the expanded layers over that of the bottleneck, as nearly as whole units and
        the budget allow; the paper does not give its own"""

    def __init__(self, config: Config, *arguments: *BankArguments) -> None:
        dim_in, dim_out, hidden, num_experts, max_experts, activation, generator = arguments
        if not 1 <= config.expansion < float("inf"):
            raise UserError(
                f"bank bottleneck: expansion={config.expansion} must be a number of at least 1"
            )
        super().__init__()
        self.shape = Shape(dim_in, dim_out, config.expansion)
        least: list[Widths] = [(1, 1, 1)] * num_experts
        self.initial_sizes = fit_widths(self.shape, hidden * self.unit_cost, num_experts) or least
        self.act = ACTIVATIONS[activation]()
        self.weights = nn.Parameter(torch.empty(self.shape.total(self.initial_sizes)))
        self.b_out = nn.Parameter(torch.empty(max_experts, dim_out))
        self.register_buffer("widths", torch.zeros(max_experts, 3, dtype=torch.long))
        self.set_widths(self.initial_sizes)
        self.reset_parameters(generator)

    @property
    def unit_cost(self) -> int:
        """Parameters of a unit of the hidden pool, in which budgets are given."""
        return self.shape.dim_in + 1 + self.shape.dim_out

    @property
    def live(self) -> int:
        """Parameters in use: P, or less where widths do not spend all of it."""
        return self.shape.total(self.sizes)

    @torch.no_grad()
    def set_widths(self, sizes: list[Widths]) -> None:
        """Give the experts these widths; what stands in the vector is read anew."""
        self.sizes = list(sizes)
        self.widths.zero_()
        self.widths[: len(sizes)] = torch.tensor(sizes, dtype=torch.long, device="cpu")

    def read_widths(self) -> None:
        """Take the widths from the buffer, which something else has written."""
        self.sizes = [(a, b, c) for a, b, c in self.widths.tolist() if a]

    def maps(self, vector: Tensor) -> Maps:
        """A vector [P], of weights or whatever belongs to them, as matrices."""
        return Maps.of(vector, self.sizes, self.shape.dim_in, self.shape.dim_out)

    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out]."""
        gates = routing.gates * gate_scale
        maps = self.maps(self.weights)
        if routing.chosen is None or torch.compiler.is_compiling():
            hidden = self._last_hidden(x, maps)
            scaled = torch.cat([h * gates[:, e : e + 1] for e, h in enumerate(hidden)], dim=1)
            return torch.addmm(gates @ self.b_out, scaled, maps.w4)
        return self._mix_sparse(x, gates, routing.chosen, maps)

    def _last_hidden(self, x: Tensor, maps: Maps) -> list[Tensor]:
        """[E] of [N, h2_e], the last expanded layers; the first ones are one product."""
        first = self.act(F.linear(x, maps.w1, maps.b1)).split([a for a, _, _ in self.sizes], dim=1)
        inner = zip(first, maps.w2, maps.b2, maps.w3, maps.b3, strict=True)
        return [self._behind(h, *weights)[1] for h, *weights in inner]

    def _behind(
        self, first: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bottleneck [N, b_e] and last expanded layer [N, h2_e], of the first one [N, h1_e]."""
        middle = self.act(F.linear(first, w2, b2))
        return middle, self.act(F.linear(middle, w3, b3))

    def _mix_sparse(self, x: Tensor, gates: Tensor, chosen: Tensor, maps: Maps) -> Tensor:
        """Each expert on the samples that chose it."""
        y, experts = gates @ self.b_out, maps.by_expert()
        used = chosen.any(dim=0).nonzero().flatten().tolist()
        for expert in used or [0]:  # one, so that y has a gradient
            w1, b1, *inner, w4 = experts[expert]
            samples = chosen[:, expert].nonzero().flatten()
            _, last = self._behind(self.act(F.linear(x[samples], w1, b1)), *inner)
            weighted = last * gates[samples, expert].unsqueeze(1)
            y = y.index_add(0, samples, (weighted @ w4).to(y.dtype))
        return y

    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, D_out] what each expert alone says to x [N, D_in]; 0 for those to come."""
        maps = self.maps(self.weights)
        weights = maps.w4.split(self.hidden_sizes())
        hidden = self._last_hidden(x, maps)
        own = [F.linear(h, w.T, b) for h, w, b in zip(hidden, weights, self.b_out, strict=False)]
        return torch.stack(own + [torch.zeros_like(own[0])] * (len(self.b_out) - len(own)))

    @property
    def segment(self) -> Tensor:
        """[H2] int64, the expert that owns each unit of the last expanded layers."""
        return owners(self.hidden_sizes()).to(self.weights.device)

    @property
    def first_segment(self) -> Tensor:
        """[H1] int64, the expert that owns each unit of the first expanded layers."""
        return owners([a for a, _, _ in self.sizes]).to(self.weights.device)

    def hidden_sizes(self) -> list[int]:
        """[E] units of each expert's last expanded layer."""
        return [c for _, _, c in self.sizes]

    def hidden(self, x: Tensor) -> Tensor:
        """[N, H2] activations of the last expanded layers for x [N, D_in]."""
        return torch.cat(self._last_hidden(x, self.maps(self.weights)), dim=1)

    def all_hidden(self, x: Tensor) -> Tensor:
        """[N, H1 + B + H2] activations of all hidden units, layer by layer, for x [N, D_in]."""
        maps = self.maps(self.weights)
        first = self.act(F.linear(x, maps.w1, maps.b1))
        parts = first.split([a for a, _, _ in self.sizes], dim=1)
        inner = zip(parts, maps.w2, maps.b2, maps.w3, maps.b3, strict=True)
        middles, lasts = zip(*(self._behind(h, *weights) for h, *weights in inner), strict=True)
        return torch.cat([first, *middles, *lasts], dim=1)

    def outgoing(self) -> Tensor:
        """[H1 + B + H2] sums of the magnitudes of the weights that read each hidden unit."""
        maps = self.maps(self.weights.detach().abs())
        return torch.cat([w.sum(dim=0) for w in (*maps.w2, *maps.w3)] + [maps.w4.sum(dim=1)])

    def output_weight(self, vector: Tensor | None = None) -> Tensor:
        """[D_out, H2] the weights through which the last layers reach the output: a view.

        Args:
            vector: [P] to read instead of the weights, such as their gradient.
        """
        return self.maps(self.weights if vector is None else vector).w4.T

    def expert_rows(self) -> list[nn.Parameter]:
        """The output biases [M, D_out]."""
        return [self.b_out]

    def output_rows(self) -> list[nn.Parameter]:
        """The output biases; growth scales the output weights by itself."""
        return [self.b_out]

    def entries(self, experts: Tensor) -> list[tuple[nn.Parameter, int, Tensor]]:
        """(parameter, axis, index) of everything that belongs to the experts `experts` [n]."""
        every = torch.arange(len(self.weights), device=experts.device)
        owned = self.maps(every).by_expert()
        mine = [e for e in experts.tolist() if e < len(owned)]
        index = [piece.flatten() for e in mine for piece in owned[e]]
        own = torch.cat(index) if index else every[:0]
        return [*super().entries(experts), (self.weights, 0, own)]

    @torch.no_grad()
    def keep_experts(self, kept: list[int]) -> None:
        """Leave the experts `kept` only, in that order; a new Parameter takes the weights' place.

        Output biases stay where they are.
        """
        owned = self.maps(self.weights.detach()).by_expert()
        groups = zip(*(owned[e] for e in kept), strict=True)
        vector = torch.cat([piece.flatten() for group in groups for piece in group])
        self.weights = nn.Parameter(vector, requires_grad=self.weights.requires_grad)
        self.initial_sizes = [self.sizes[e] for e in kept]
        self.set_widths(self.initial_sizes)

    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the experts `index` [n]: their weights, and their output biases."""
        draw_entries(self.b_out, 0, index, sum(self.hidden_sizes()) ** -0.5, generator)
        if not self.weights.is_meta:
            self.draw_weights(self.entries(index)[-1][2], generator)

    @torch.no_grad()
    def draw_weights(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise entries `index` [n] of the vector, from the ranges that the class names."""
        bounds = torch.zeros(len(self.weights))
        units, dim_in = sum(self.hidden_sizes()), self.shape.dim_in
        experts = self.maps(bounds).by_expert()
        for pieces, (first, middle, _) in zip(experts, self.sizes, strict=True):
            inputs = (dim_in, dim_in, first, first, middle, middle, units)
            for piece, fan_in in zip(pieces, inputs, strict=True):
                piece.fill_(fan_in**-0.5)
            for matrix in pieces[:6:2]:
                matrix.mul_(KAIMING)
        draws = torch.empty(len(index), device=home(generator))
        draws.uniform_(-1, 1, generator=generator)
        values = draws.cpu() * bounds[index.cpu()]
        self.weights.index_copy_(0, index.to(self.weights.device), values.to(self.weights))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: the initial widths, all weights drawn again.

        Raises:
            UserError: the vector has another length than at the start.
        """
        self.check_resettable()
        if not self.weights.is_meta:
            self.set_widths(self.initial_sizes)
        super().reset_parameters(generator)

    def check_resettable(self) -> None:
        """Refuse a reset that would have to replace Parameters.

        Raises:
            UserError: the experts have gained parameters since they were made.
        """
        now, first = len(self.weights), self.shape.total(self.initial_sizes)
        if now != first:
            raise UserError(
                f"reset_parameters: the experts have grown from {first} to {now} parameters, and a "
                "reset changes no shape; make a new layer instead"
            )

    @torch.no_grad()
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take on the length of the saved vector, and its widths; Parameters stay the same."""
        saved = state.get(f"{prefix}weights")
        if saved is not None and saved.dim() == 1 and len(saved) != len(self.weights):
            self.weights.grad, self.weights.data = None, self.weights.new_zeros(len(saved))
        super()._load_from_state_dict(state, prefix, *args)
        if not self.widths.is_meta:
            self.read_widths()
