"""Routers whose tokens compete: experts choose them, or see weighted mixtures of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.moe.draws import draw_entries, every
from dynmoe.moe.router import (
    Router,
    RouterInput,
    RouterSize,
    Routing,
    Slots,
    check_option,
    most_samples,
)
from dynmoe.registry import PartConfig


class ExpertChoiceRouter(
    Router,
    name="expert-choice",
    source="Zhou et al. 2022 (arXiv 2202.09368), Section 3.2; "
    "Zhang et al. 2025 (arXiv 2507.11181), Eq. 14",
):
    """Each expert takes its `ceil(T c / E)` most probable tokens; loads are equal by construction.

    T counts the real tokens of a sequence; for x [N, D] the batch is one sequence. A token may be
    taken by several experts or by none; its gates are the probabilities (softmax over experts) of
    those that took it. Tokens compete, so a token's routing depends on the others of its sequence,
    later ones too. Of equal scores the earlier token wins. A selection bias per expert changes
    nothing here.
    """

    competing = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the expert-choice router."""

        capacity: float = 2.0
        """experts that take a token, on average (the paper's c)"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        check_option(config, "capacity", config.capacity > 0, "above 0")
        super().__init__(*size)
        self.capacity = config.capacity

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] in `inputs.groups` sequences of equal length."""
        logits = self.mask(F.linear(inputs.x, self.weight))
        probabilities = logits.softmax(dim=1)
        real = inputs.mask
        if real is None:
            real = torch.ones_like(logits[:, 0], dtype=torch.bool)
        # The logarithm keeps apart what underflows to probability 0.
        scores = logits.detach().log_softmax(dim=1)
        chosen = self._take(scores, real, inputs.groups) & real.unsqueeze(1) & self.active
        return self.sparse(logits, probabilities, chosen, renormalise=False)

    def _take(self, scores: Tensor, real: Tensor, groups: int) -> Tensor:
        """[N, M] bool: the tokens whose rank in their sequence is within the expert's share."""
        scores = scores.masked_fill(~real.unsqueeze(1), float("-inf")).unflatten(0, (groups, -1))
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)  # [G, T, M]
        tokens = real.unflatten(0, (groups, -1)).sum(dim=1)
        share = most_samples(self.capacity, tokens, self.active.sum())  # [G]
        return (rank < share.view(-1, 1, 1)).flatten(0, 1)


class SlotRouter(
    Router, name="slots", source="Puigcerver et al. 2024 (arXiv 2308.00951), Sections 2.1 and 2.3"
):
    """Soft-MoE: each expert has p slots; slots get mixtures of tokens, tokens mixtures of slots.

    Scores are `scale * cos(x, phi)` with a learned scale (Section 2.3), the dispatch weights a
    softmax over the tokens of a sequence, the combine weights a softmax over all slots
    (Section 2.1). Everything is differentiable and no token is dropped. Tokens mix, later ones too;
    for x [N, D] the batch is one sequence, so that samples mix.

    A token's gate for an expert is the sum of its slots' combine weights; gates are never scaled.
    Shifted logits divide the combine weights alone, so copies of an expert see equal slots.

    Attributes:
        weight: Parameter [M, D], phi of each expert's first slot.
        others: Parameter [M, p - 1, D], phi of its other slots; absent for p = 1.
        scale: Parameter, scalar, 1 at the start.
    """

    normalised = False
    competing = True

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the slot router."""

        slots_per_expert: int = 1
        """slots of each expert (the paper's p)"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, _, max_experts, generator = size
        slots = config.slots_per_expert
        check_option(config, "slots_per_expert", slots >= 1, "at least 1")
        super().__init__(*size)
        self.scale = nn.Parameter(torch.ones(()))
        self.slots = slots
        if slots > 1:
            self.others = nn.Parameter(torch.empty(max_experts, slots - 1, dim))
            draw_entries(self.others, 0, every(self.others), dim**-0.5, generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start; the scale is 1 again."""
        super().reset_parameters(generator)
        self.scale.fill_(1.0)

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D] in `inputs.groups` sequences of equal length."""
        phi = self.weight.unsqueeze(1)
        if self.slots > 1:
            phi = torch.cat([phi, self.others], dim=1)
        scores = self.scale * F.linear(
            F.normalize(inputs.x, dim=1), F.normalize(phi.flatten(0, 1), dim=1)
        )  # [N, S]
        owner = torch.arange(scores.shape[1], device=scores.device) // self.slots
        used = self.active[owner]
        masked = (scores + self.logit_shift[owner]).masked_fill(~used, float("-inf"))
        combine = masked.softmax(dim=1)
        real = inputs.mask
        if real is None:
            real = torch.ones_like(scores[:, 0], dtype=torch.bool)
        gates = combine.unflatten(1, (-1, self.slots)).sum(dim=2)
        shape = (inputs.groups, -1)
        return Routing(
            gates=gates,
            logits=self.mask(scores.unflatten(1, (-1, self.slots)).logsumexp(dim=2)),
            probabilities=gates,
            active=self.active,
            slots=Slots(
                dispatch=_dispatch(scores.unflatten(0, shape), real.view(shape), used),
                combine=torch.where(real.unsqueeze(1), combine, 0.0).unflatten(0, shape),
                owner=owner,
                used=used,
            ),
        )


def _dispatch(scores: Tensor, real: Tensor, used: Tensor) -> Tensor:
    """[G, T, S] softmax of scores over the real tokens [G, T]; 0 for padding and unused slots."""
    real = real.unsqueeze(2)
    # The lowest finite number, since sequences of padding alone would make NaN out of -inf.
    low = torch.finfo(scores.dtype).min
    return torch.where(real & used, scores.masked_fill(~real, low).softmax(dim=1), 0.0)
