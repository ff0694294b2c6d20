"""The router contract: samples in, a `Routing` record out, and rows for experts to come.

A router owns one row of parameters per expert the layer may ever hold (M rows), so that growth
writes into existing tensors. Rows of experts that do not exist yet are masked.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from dynmoe.moe.routing import Routing
from dynmoe.registry import Part


class Router(nn.Module, Part, kind="router"):
    """Base of all routers. Subclasses define `forward` and, if they add any, `expert_rows`.

    Attributes:
        weight: Parameter [M, D], one row per expert.
        alive: buffer [M] bool, which experts exist.
        logit_shift: buffer [M], added to the logits; function-preserving growth splits an expert's
            gate among its copies with it (log 2 each for two).
        k: most experts that a sample uses; None for all.
    """

    alive: Tensor
    logit_shift: Tensor
    k: int | None = None

    def __init__(
        self, dim: int, num_experts: int, max_experts: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_experts, dim))
        self.register_buffer("alive", torch.arange(max_experts) < num_experts)
        self.register_buffer("logit_shift", torch.zeros(max_experts))
        self.draw_rows(torch.arange(max_experts), generator)

    @abstractmethod
    def forward(self, x: Tensor) -> Routing:
        """Route samples x [N, D]."""

    def expert_rows(self) -> list[nn.Parameter]:
        """Parameters whose first axis is the expert axis M; growth resets and copies their rows."""
        return [p for p in self.parameters(recurse=False) if p.shape[0] == self.alive.shape[0]]

    @torch.no_grad()
    def draw_rows(self, index: Tensor, generator: torch.Generator) -> None:
        """Draw the rows `index` [n] afresh: uniform in +-1/sqrt(D), as torch's linear layers."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.expert_rows():
            shape = (len(index), *parameter.shape[1:])
            fresh = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            parameter[index] = fresh.to(parameter)
        self.logit_shift[index] = 0.0

    def mask(self, logits: Tensor) -> Tensor:
        """Shift logits [N, M] and set those of experts that do not exist yet to -inf."""
        return (logits + self.logit_shift).masked_fill(~self.alive, float("-inf"))

    def dense(self, logits: Tensor) -> Routing:
        """Routing over all living experts: softmax of the masked logits [N, M]."""
        masked = self.mask(logits)
        gates = masked.softmax(dim=1)
        return Routing(gates=gates, logits=masked, probabilities=gates, alive=self.alive)
