"""The router contract: samples in, a `Routing` record out, and rows for experts to come.

A router owns one row of parameters per expert the layer may ever hold (M rows), so that growth
writes into existing tensors. Rows of experts that do not exist yet are masked.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynmoe.moe.draws import draw_entries, every
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import Part


class Router(nn.Module, Part, kind="router"):
    """Base of all routers. Subclasses define `route`, and `reset_parameters` if they hold more.

    Parameters and buffers of a router's own with first axis M are rows of experts; what belongs to
    no expert (a projection, a noise source) stands in a submodule.

    Attributes:
        weight: Parameter [M, D], one row per expert.
        active: buffer [M] bool, which experts exist.
        logit_shift: buffer [M], added to the logits; function-preserving growth splits an expert's
            gate among its copies with it (log 2 each for two).
        selection_bias: buffer [M], added to the scores where experts are chosen, never to gates;
            loss-free balancing steers with it.
        k: most experts that a sample uses; None for all.
        normalised: the gates of a sample that is routed anywhere sum to 1, or to the chosen
            experts' share of 1; else they have a scale of their own, which layers leave alone.
        uses_sizes: `RouterInput.sizes` is wanted.
        steerable: the selection bias has a say in which experts are chosen.
        initial_experts: how many experts there are at the start.
        independent: every sample is a sequence of its own, so that samples do not compete; set it
            where a sample's routing must not depend on its batch, as in policies.
    """

    active: Tensor
    logit_shift: Tensor
    selection_bias: Tensor
    k: int | None = None
    normalised: bool = True
    uses_sizes: ClassVar[bool] = False
    steerable: ClassVar[bool] = False
    independent: bool = False

    def __init__(
        self, dim: int, num_experts: int, max_experts: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.initial_experts = num_experts
        self.weight = nn.Parameter(torch.empty(max_experts, dim))
        self.register_buffer("active", torch.arange(max_experts) < num_experts)
        self.register_buffer("logit_shift", torch.zeros(max_experts))
        self.register_buffer("selection_bias", torch.zeros(max_experts))
        self.draw_rows(every(self.weight), generator)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, also what earlier versions saved: they called `active` alive."""
        if f"{prefix}alive" in state:
            state[f"{prefix}active"] = state.pop(f"{prefix}alive")
        super()._load_from_state_dict(state, prefix, *args)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: the initial number of experts, all weights drawn again.

        Under equal generators it gives what construction gives. A router that has more than rows of
        experts (a submodule, a buffer) resets that, too, in the order in which it was constructed.
        """
        self.reset_buffers()
        self.draw_rows(every(self.weight), generator)

    def reset_buffers(self) -> None:
        """The initial number of experts, without shifts and biases."""
        self.active.copy_(every(self.active) < self.initial_experts)
        self.logit_shift.zero_()
        self.selection_bias.zero_()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        groups: int = 1,
        sizes: Tensor | None = None,
    ) -> Routing:
        """Route samples x [N, D]; the other arguments are described in `RouterInput`."""
        groups = len(x) if self.independent else groups
        routing = self.route(RouterInput(x, mask, context, groups, sizes))
        return routing.without_padding(mask)

    @abstractmethod
    def route(self, inputs: RouterInput) -> Routing:
        """Route the samples `inputs.x` [N, D].

        Padding is silenced afterwards; only routers whose samples compete look at `inputs.mask`.
        """

    def finish_step(self) -> None:
        """Move what the training passes since the last optimizer step ask for; here nothing.

        Routers with such state note it in `route`, once per pass (`Passes.learns`), and sum it over
        all processes here.
        """

    def expert_rows(self) -> list[nn.Parameter]:
        """Parameters whose first axis is the expert axis M; growth resets and copies their rows."""
        return [p for p in self.parameters(recurse=False) if p.shape[:1] == self.active.shape]

    def expert_buffers(self) -> list[Tensor]:
        """Buffers whose first axis is the expert axis M; pruning reorders their entries."""
        return [b for b in self.buffers(recurse=False) if b.shape[:1] == self.active.shape]

    @torch.no_grad()
    def keep_experts(self, order: Tensor, count: int) -> None:
        """Number the experts by `order` [M] int64, their old numbers; the first `count` exist.

        The others' entries in buffers become 0, as they are before an expert exists.
        """
        for rows in (*self.expert_rows(), *self.expert_buffers()):
            rows.copy_(rows[order])
        for buffer in self.expert_buffers():
            buffer[count:] = 0

    @torch.no_grad()
    def draw_rows(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the rows `index` [n]: uniform in +-1/sqrt(D), as torch's linear layers."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.expert_rows():
            draw_entries(parameter, 0, index, bound, generator)
        self.logit_shift[index] = 0.0
        self.selection_bias[index] = 0.0

    def mask(self, logits: Tensor) -> Tensor:
        """Shift logits [N, M] and set those of experts that do not exist yet to -inf."""
        return (logits + self.logit_shift).masked_fill(~self.active, float("-inf"))

    def dense(self, logits: Tensor) -> Routing:
        """Routing over all active experts: softmax of the masked logits [N, M]."""
        masked = self.mask(logits)
        gates = masked.softmax(dim=1)
        return Routing(gates=gates, logits=masked, probabilities=gates, active=self.active)

    def choose(self, scores: Tensor, k: int) -> Tensor:
        """[N, M] bool: the min(k, E) active experts of largest score [N, M] + selection bias."""
        scores = (scores.detach() + self.selection_bias).masked_fill(~self.active, float("-inf"))
        best = scores.topk(k, dim=1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        return chosen & self.active

    def sparse(
        self, logits: Tensor, probabilities: Tensor, chosen: Tensor, renormalise: bool
    ) -> Routing:
        """Routing to the chosen experts [N, M] with their probabilities as gates.

        Renormalised gates sum to 1. With one expert per sample that would be 1 whatever the
        logits, and the router's gradient exactly zero: pass False there.
        """
        gates = torch.where(chosen, probabilities, 0.0)
        if renormalise:
            tiny = torch.finfo(gates.dtype).tiny
            gates = gates / gates.sum(dim=1, keepdim=True).clamp_min(tiny)
        return Routing(
            gates=gates,
            logits=logits,
            probabilities=probabilities,
            active=self.active,
            chosen=chosen,
        )
