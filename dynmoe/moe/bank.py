"""The expert-bank contracts: all experts of one layer, as one module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.draws import every
from dynmoe.moe.router import Routing
from dynmoe.registry import Part, PartConfig

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


BankArguments = tuple[int, int, int, int, int, str, torch.Generator | None]
"""What a layer gives its bank after the Config: D_in, D_out, hidden units of all experts, experts
at the start, most experts, the name of the activation, and what draws the weights."""


class ExpertBank(nn.Module, Part, kind="bank"):
    """Base of all banks. Experts are rows of parameters, or (`UnitBank`) parts of a pool of units.

    Growth (`dynmoe.growth.surgery`) is the only code that writes to a bank besides the optimizer.

    Attributes:
        per_sample: samples keep their shape ([N, C, H, W] images, [N, T, D] sequences) and are
            routed as a whole, by the mean over their positions; else every position is a sample
            [N, D].
        channel_axis: where such a sample holds its D_in channels.
    """

    per_sample: ClassVar[bool] = False
    channel_axis: ClassVar[int] = -1

    @abstractmethod
    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out], gates times `gate_scale`.

        `gate_scale` is a scalar or [N, 1].
        """

    @abstractmethod
    def expert_outputs(self, x: Tensor) -> Tensor:
        """[M, N, ...] what each expert alone says to x; reserved experts' entries mean nothing."""

    @abstractmethod
    def expert_rows(self) -> list[nn.Parameter]:
        """Parameters whose first axis is the expert axis M."""

    @abstractmethod
    def output_rows(self) -> list[nn.Parameter]:
        """Those of `expert_rows` in which, taken together, the experts' output is linear."""

    @abstractmethod
    def draw_experts(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the per-expert rows `index` [n], as at initialisation."""

    def entries(self, experts: Tensor) -> list[tuple[nn.Parameter, int, Tensor]]:
        """(parameter, axis, index) of all that belongs to the experts `experts` [n] alone."""
        return [(rows, 0, experts) for rows in self.expert_rows()]

    def check_resettable(self) -> None:
        """Raise a UserError where `reset_parameters` would; by default it never does."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: weights as construction draws them.

        A bank that has more than rows of experts and hidden units resets that, too, in the order in
        which it was constructed.
        """
        rows = self.expert_rows()
        if rows and not rows[0].is_meta:
            self.draw_experts(every(rows[0]), generator)


class UnitBank(ExpertBank):
    """Base of banks whose experts' hidden units form one pool, re-partitioned in place by growth.

    Attributes:
        segment: buffer [H] int64, the expert that owns each hidden unit. At first each expert's
            units are one run; growth relabels units where they stand.
        spread: the option; growth at a constant budget divides the units with it again.
        initial_sizes: hidden units of each expert at the start.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of every bank with hidden units."""

        spread: float = 1.0
        """hidden units of the widest expert over those of the narrowest; widths fall geometrically
        (HMoE, Wang et al. 2024, arXiv 2408.10681), and 1 shares evenly"""

    segment: Tensor

    def __init__(self, config: Config, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.spread = config.spread
        self.register_buffer("segment", torch.zeros(hidden, dtype=torch.long))
        self.initial_sizes = spread_sizes(hidden, num_experts, config.spread)
        self.set_hidden_sizes(self.initial_sizes)

    @abstractmethod
    def hidden(self, x: Tensor) -> Tensor:
        """Activations [N, H] of every hidden unit for x [N, D_in], whatever the routing."""

    @abstractmethod
    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter that has one entry per hidden unit."""

    @abstractmethod
    def output_weight(self) -> nn.Parameter:
        """The parameter [D_out, H, ...] through which hidden units reach the output."""

    @abstractmethod
    def draw_units(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise all weights of the hidden units `index` [n], as at initialisation."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: the initial hidden sizes, all weights drawn again.

        Raises:
            UserError: the pool has another size than at the start.
        """
        self.check_resettable()
        if self.segment.is_meta:
            return
        self.set_hidden_sizes(self.initial_sizes)
        self.draw_units(every(self.segment), generator)
        super().reset_parameters(generator)

    def check_resettable(self) -> None:
        """Refuse a reset that would have to replace Parameters.

        Raises:
            UserError: the pool has gained units since it was made.
        """
        units, first = len(self.segment), sum(self.initial_sizes)
        if units != first:
            raise UserError(
                f"reset_parameters: the pool has grown from {first} to {units} hidden units, and a "
                "reset changes no shape; make a new layer instead"
            )

    def entries(self, experts: Tensor) -> list[tuple[nn.Parameter, int, Tensor]]:
        """(parameter, axis, index) of all that belongs to the experts `experts` [n] alone."""
        units = torch.isin(self.segment, experts.to(self.segment.device)).nonzero().flatten()
        own = [(getattr(self, name), axis, units) for name, axis in self.unit_axes()]
        return [*super().entries(experts), *own]

    def hidden_sizes(self) -> list[int]:
        """Hidden units of each active expert, in order."""
        return torch.bincount(self.segment).tolist()

    @torch.no_grad()
    def set_hidden_sizes(self, sizes: list[int]) -> None:
        """Re-partition the pool into contiguous runs of the given lengths (they add up to H)."""
        owner = owners(sizes)
        assert len(owner) == len(self.segment), (sizes, len(self.segment))
        self.segment.copy_(owner)

    @torch.no_grad()
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take on the size of the saved pool, then load; Parameters stay the same objects."""
        saved = state.get(f"{prefix}segment")
        if saved is not None and len(saved) != len(self.segment):
            for name, axis in self.unit_axes():
                parameter = getattr(self, name)
                shape = list(parameter.shape)
                shape[axis] = len(saved)
                parameter.grad, parameter.data = None, parameter.new_zeros(shape)
            self.segment = self.segment.new_zeros(len(saved))
        super()._load_from_state_dict(state, prefix, *args)


def owners(sizes: Sequence[int]) -> Tensor:
    """[sum of sizes] int64 on the CPU: 0 as often as the first size says, then 1, and so on."""
    counts = torch.tensor(sizes, device="cpu")
    return torch.arange(len(sizes), device="cpu").repeat_interleave(counts)


def even_sizes(units: int, experts: int) -> list[int]:
    """`units` hidden units divided evenly: sizes differ by one at most, larger ones first."""
    base, extra = divmod(units, experts)
    return [base + (i < extra) for i in range(experts)]


def spread_sizes(units: int, experts: int, spread: float) -> list[int]:
    """`units` hidden units divided geometrically: the first expert gets `spread` times the last.

    Expert i of E would get a share in proportion to spread^(-i / (E - 1)); shares are rounded so
    that they add up to `units` and none is below 1 (the rounding is our choice). With a spread of
    1 these are `even_sizes`. Needs at least one unit per expert.

    Raises:
        UserError: spread below 1.
    """
    if not 1 <= spread < float("inf"):
        raise UserError(f"bank: spread={spread} must be a number of at least 1")
    if spread == 1:
        return even_sizes(units, experts)
    weights = [spread ** (-i / max(experts - 1, 1)) for i in range(experts)]
    shares = [units * weight / sum(weights) for weight in weights]
    sizes = [max(1, int(share)) for share in shares]
    while sum(sizes) < units:
        sizes[max(range(experts), key=lambda i: shares[i] - sizes[i])] += 1
    while sum(sizes) > units:
        wide = [i for i in range(experts) if sizes[i] > 1]
        sizes[min(wide, key=lambda i: shares[i] - sizes[i])] -= 1
    return sizes
