"""Two-level routing: a group of experts first, then experts within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.draws import every
from dynmoe.moe.linear import draw_linear, seeded_linear
from dynmoe.moe.router import Router
from dynmoe.moe.routing import RouterInput, Routing
from dynmoe.registry import PartConfig


class HierarchicalRouter(
    Router, name="hierarchical", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 10"
):
    """A coarse gate picks or weighs groups of experts, a fine gate the experts within a group.

    Two-level gating as in Zhang et al. 2025 (arXiv 2507.11181), Eq. 10. Our choices: expert e is in
    group e mod `num_groups`, so that growth fills groups evenly; both levels are a softmax of a
    linear map; the gate is coarse times fine probability in both modes, so that the coarse gate has
    a gradient where only one group is used. Groups without living experts have probability 0.
    Logits are logarithms of probabilities: a shift counts within its group. A selection bias has no
    effect.

    Attributes:
        coarse: submodule, linear map from x [N, D] to group scores.
        group: buffer [M] int64, the group of each expert.
    """

    group: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the hierarchical router."""

        num_groups: int = 2
        """groups of experts; between 1 and the most experts the layer can hold"""
        coarse: Literal["top1", "soft"] = "top1"
        """top1: each sample uses all experts of its best group; soft: those of all groups"""

    def __init__(
        self,
        config: Config,
        dim: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
    ) -> None:
        if not 1 <= config.num_groups <= max_experts:
            raise UserError(
                f"hierarchical router: num_groups={config.num_groups} must be between 1 and "
                f"{max_experts}"
            )
        if config.coarse not in ("top1", "soft"):
            raise UserError(f"hierarchical router: coarse={config.coarse!r} must be top1 or soft")
        super().__init__(dim, num_experts, max_experts, generator)
        self.num_groups = config.num_groups
        self.pick = config.coarse == "top1"
        self.coarse = seeded_linear(dim, config.num_groups, generator, bias=False)
        group = torch.arange(max_experts) % config.num_groups
        self.register_buffer("group", group, persistent=False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, both levels."""
        super().reset_parameters(generator)
        draw_linear(self.coarse, generator)
        self.group.copy_(every(self.group) % self.num_groups)

    def route(self, given: RouterInput) -> Routing:
        """Route x [N, D]: `softmax(coarse)[group of e] * softmax within the group[e]`."""
        coarse = self._log_coarse(given.x)
        fine = self._log_fine(F.linear(given.x, self.weight) + self.logit_shift)
        logits = (coarse[:, self.group] + fine).masked_fill(~self.alive, float("-inf"))
        probabilities = logits.exp()
        if self.pick:
            best = coarse.argmax(dim=1, keepdim=True)
            chosen = (self.group == best) & self.alive
            return self.sparse(logits, probabilities, chosen, renormalise=False)
        return Routing(
            gates=probabilities, logits=logits, probabilities=probabilities, alive=self.alive
        )

    def _log_coarse(self, x: Tensor) -> Tensor:
        """[N, G] log probability of each group; -inf where nobody lives."""
        members = F.one_hot(self.group, self.num_groups).bool() & self.alive.unsqueeze(1)
        return self.coarse(x).masked_fill(~members.any(dim=0), float("-inf")).log_softmax(dim=1)

    def _log_fine(self, scores: Tensor) -> Tensor:
        """[N, M] log probability of each living expert within its group; else without meaning.

        As a matrix of G columns, expert e stands in column e mod G.
        """
        count = len(self.alive)
        # The lowest finite number, since groups without experts would make NaN out of -inf.
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~self.alive, low)
        padded = F.pad(scores, (0, -count % self.num_groups), value=low)
        return padded.unflatten(1, (-1, self.num_groups)).log_softmax(dim=1).flatten(1)[:, :count]
