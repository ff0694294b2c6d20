"""A router of two levels: over groups of experts, and over the experts within them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.draws import draw_linear, every, seeded_linear
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option
from dynmoe.registry import PartConfig


class HierarchicalRouter(
    Router, name="hierarchical", source="Zhang et al. 2025 (arXiv 2507.11181), Eq. 10"
):
    """A coarse gate picks or weighs groups of experts, a fine gate the experts within a group.

    In Eq. 10 each sample uses the experts of its best group, with the fine gate alone. Then the
    coarse gate has no gradient from the task (its choice is an argmax), and an expert alone in its
    group has gate 1 and no gradient either; auxiliary losses train both levels, since logits and
    probabilities are coarse times fine. `gate=product` multiplies the gate by the coarse
    probability and so trains both.

    Our choices: both levels are a softmax of a linear map; a new expert joins the smallest group,
    of equals the first, which is group e mod `num_groups` unless experts were pruned; soft groups
    are always weighted by the product. Groups without active experts have probability 0. Logits
    are logarithms of probabilities: a shift counts within its group. A selection bias has no
    effect.

    Attributes:
        coarse: submodule, linear map from x [N, D] to group scores.
        group: buffer [M] int64, the group of each expert, also of those to come.
    """

    group: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the hierarchical router."""

        num_groups: int = 2
        """groups of experts; between 1 and the most experts the layer can hold"""
        coarse: Literal["top1", "soft"] = "top1"
        """top1: each sample uses all experts of its best group; soft: those of all groups"""
        gate: Literal["fine", "product"] = "fine"
        """gates with top1: the probability within the group (Eq. 10), or that times the group's;
        soft groups always have the product"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, _, most, generator = size
        groups = config.num_groups
        check_option(config, "num_groups", 1 <= groups <= most, f"between 1 and {most}")
        check_option(config, "coarse", config.coarse in ("top1", "soft"), "top1 or soft")
        check_option(config, "gate", config.gate in ("fine", "product"), "fine or product")
        super().__init__(*size)
        self.num_groups = groups
        self.pick = config.coarse == "top1"
        self.fine_alone = config.gate == "fine"
        self.coarse = seeded_linear(dim, groups, generator, bias=False)
        self.register_buffer("group", torch.arange(most) % groups)
        self.register_load_state_dict_pre_hook(_add_groups)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start, both levels."""
        super().reset_parameters(generator)
        draw_linear(self.coarse, generator)
        self.group.copy_(every(self.group) % self.num_groups)

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]; probabilities are `softmax(coarse)[group of e] * softmax in group[e]`."""
        coarse = self._log_coarse(inputs.x)
        fine = self._log_fine(F.linear(inputs.x, self.weight) + self.logit_shift)
        logits = (coarse[:, self.group] + fine).masked_fill(~self.active, float("-inf"))
        probabilities = logits.exp()
        if self.pick:
            best = coarse.argmax(dim=1, keepdim=True)
            chosen = (self.group == best) & self.active
            gates = fine.exp() if self.fine_alone else probabilities
            routing = self.sparse(logits, gates, chosen, renormalise=False)
            routing.probabilities = probabilities
            return routing
        return Routing(
            gates=probabilities, logits=logits, probabilities=probabilities, active=self.active
        )

    def _log_coarse(self, x: Tensor) -> Tensor:
        """[N, G] log probability of each group; -inf where nobody lives."""
        inhabited = self._members().any(dim=0)
        return self.coarse(x).masked_fill(~inhabited, float("-inf")).log_softmax(dim=1)

    def _log_fine(self, scores: Tensor) -> Tensor:
        """[N, M] log probability of each active expert within its group; else without meaning."""
        # The lowest finite number, since groups without experts would make NaN out of -inf.
        low = torch.finfo(scores.dtype).min
        by_group = scores.unsqueeze(2).masked_fill(~self._members(), low).log_softmax(dim=1)
        own = self.group.view(1, -1, 1).expand(len(scores), -1, 1)
        return by_group.gather(2, own).squeeze(2)

    def _members(self) -> Tensor:
        """[M, G] bool, the active experts of each group."""
        return F.one_hot(self.group, self.num_groups).bool() & self.active.unsqueeze(1)

    @torch.no_grad()
    def keep_experts(self, order: Tensor, count: int) -> None:
        """Kept experts stay in their groups; those to come fill up the smallest ones."""
        super().keep_experts(order, count)
        groups = self.group[:count].tolist()
        sizes = [groups.count(group) for group in range(self.num_groups)]
        for expert in range(count, len(self.group)):
            smallest = sizes.index(min(sizes))
            self.group[expert] = smallest
            sizes[smallest] += 1


def _add_groups(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the groups to a state of earlier versions, which did not save them: e mod G."""
    assert isinstance(module, HierarchicalRouter)
    if f"{prefix}active" in state:  # else the state is of other modules
        groups = torch.arange(len(module.group)) % module.num_groups
        state.setdefault(f"{prefix}group", groups)
