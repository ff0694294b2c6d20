"""The expert-bank contract: all experts of one layer, as one module."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from dynmoe.moe.routing import Routing
from dynmoe.registry import Part


class ExpertBank(nn.Module, Part, kind="bank"):
    """Base of all banks: experts whose hidden units form one pool.

    Growth (`dynmoe.growth.surgery`) re-partitions the pool in place through `unit_axes` and
    `expert_rows`; it is the only code that writes to them besides the optimizer.

    Attributes:
        segment: buffer [H] int64, the expert that owns each hidden unit. At first each expert's
            units are one run; growth relabels units where they stand.
    """

    segment: Tensor

    @abstractmethod
    def forward(self, x: Tensor, routing: Routing, gate_scale: Tensor | float = 1.0) -> Tensor:
        """Mix the experts' outputs for x [N, D_in] to [N, D_out], gates times `gate_scale`."""

    @abstractmethod
    def hidden(self, x: Tensor) -> Tensor:
        """Activations [N, H] of every hidden unit for x [N, D_in], whatever the routing."""

    @abstractmethod
    def unit_axes(self) -> list[tuple[str, int]]:
        """(parameter name, axis) of each parameter that has one entry per hidden unit."""

    @abstractmethod
    def expert_rows(self) -> list[nn.Parameter]:
        """Parameters whose first axis is the expert axis M (output biases)."""

    @abstractmethod
    def output_weight(self) -> nn.Parameter:
        """The parameter [D_out, H] through which hidden units reach the output."""

    @abstractmethod
    def draw_units(self, index: Tensor, generator: torch.Generator) -> None:
        """Draw all weights of the hidden units `index` [n] afresh, as at initialisation."""

    @abstractmethod
    def draw_experts(self, index: Tensor, generator: torch.Generator) -> None:
        """Draw the per-expert rows `index` [n] afresh, as at initialisation."""

    def hidden_sizes(self) -> list[int]:
        """Hidden units of each living expert, in order."""
        return torch.bincount(self.segment).tolist()

    @torch.no_grad()
    def set_hidden_sizes(self, sizes: list[int]) -> None:
        """Re-partition the pool into contiguous runs of the given lengths (they add up to H)."""
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        assert len(owner) == len(self.segment), (sizes, len(self.segment))
        self.segment.copy_(owner)


def even_sizes(units: int, experts: int) -> list[int]:
    """`units` hidden units shared out evenly: sizes differ by one at most, larger ones first."""
    base, extra = divmod(units, experts)
    return [base + (i < extra) for i in range(experts)]
