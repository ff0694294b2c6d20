"""What a router decided for a batch: the record that banks, losses and diagnostics read.

Shapes: N samples (or tokens), M most experts the layer can hold, E active experts, S slots.
Everything is M wide; experts that do not exist yet have gate 0 and logit -inf.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class RouterInput:
    """What a router may read. Most read `x` alone."""

    x: Tensor
    """[N, D] samples or tokens"""
    mask: Tensor | None = None
    """[N] bool, False for padding; None: all are real"""
    context: Tensor | None = None
    """[N, ...] side information (labels, token ids, domain or task codes), or None"""
    groups: int = 1
    """the N rows are this many sequences of equal length, for routers whose tokens compete"""
    sizes: Tensor | None = None
    """[M] hidden units of each expert, for routers that ask for them (`uses_sizes`)"""


@dataclass
class Slots:
    """Soft-MoE's exchange of tokens for slots, T tokens and S slots in each of G groups."""

    dispatch: Tensor
    """[G, T, S] weight of each token in each slot's input"""
    combine: Tensor
    """[G, T, S] weight of each slot's output in each token's"""
    owner: Tensor
    """[S] the expert that each slot belongs to"""
    used: Tensor
    """[S] bool, whether that expert exists"""


@dataclass
class Routing:
    """One routing decision.

    Dense routers leave `chosen` empty: every active expert is used, weighted by `gates`. Sparse
    routers fill it; then `gates` is exactly 0 wherever `chosen` is False.
    """

    gates: Tensor
    """[N, M] weight of each expert for each sample, >= 0"""
    logits: Tensor
    """[N, M] scores before normalisation; -inf for experts that do not exist yet"""
    probabilities: Tensor
    """[N, M] scores normalised over the active experts; equals `gates` for dense routers"""
    active: Tensor
    """[M] bool, which experts exist"""
    chosen: Tensor | None = None
    """[N, M] bool, the experts that each sample uses, or None for dense routing"""
    mask: Tensor | None = None
    """[N] bool, False for padding, whose gates are 0; None: all are real"""
    load: Tensor | None = None
    """[N, M] chance that a noisy router picks each expert, differentiable in the logits"""
    slots: Slots | None = None
    """set by slot routers only; `gates` then is for diagnosis, the layer mixes by the slots"""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """the router's own losses by name, weighted; scalars"""

    def picks(self) -> Tensor:
        """[N, M] what counts as assigned, 0 or 1: the chosen experts, or the largest logit's."""
        if self.chosen is not None:
            return self.chosen.to(self.gates.dtype)
        best = self.logits.argmax(dim=1, keepdim=True)
        picks = torch.zeros_like(self.gates).scatter(1, best, 1.0)
        return picks if self.mask is None else picks * self.mask.unsqueeze(1)

    def real(self, values: Tensor) -> Tensor:
        """The rows of values [N, ...] that belong to real samples."""
        return values if self.mask is None else values[self.mask]

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values [N, ...] over the real samples: `[...]`."""
        if self.mask is None:
            return values.mean(dim=0) if len(values) else values.sum(dim=0)
        real = self.mask.view(-1, *[1] * (values.dim() - 1))
        return torch.where(real, values, 0.0).sum(dim=0) / self.mask.sum().clamp(min=1)

    def used(self) -> Tensor:
        """Experts that take part: a scalar for dense routing, [N, 1] for sparse routing."""
        return self.active.sum() if self.chosen is None else self.chosen.sum(dim=1, keepdim=True)

    def without_padding(self, mask: Tensor | None) -> Routing:
        """The same decision with nothing for the padding, and `mask` noted."""
        if mask is None:
            return self
        real = mask.unsqueeze(1)
        return replace(
            self,
            gates=torch.where(real, self.gates, 0.0),
            chosen=None if self.chosen is None else self.chosen & real,
            mask=mask,
        )

    def repeated(self, times: int) -> Routing:
        """One decision per token, from one per sample of `times` tokens each."""

        def each(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, dim=0)

        return replace(
            self,
            gates=each(self.gates),
            logits=each(self.logits),
            probabilities=each(self.probabilities),
            chosen=None if self.chosen is None else each(self.chosen),
            mask=None if self.mask is None else each(self.mask),
            load=None if self.load is None else each(self.load),
        )


def hard_routing(owner: Tensor, used: Tensor, active: Tensor, like: Tensor) -> Routing:
    """Each row goes to one given expert with gate 1, or nowhere.

    Args:
        owner: [N] the expert of each row; used: [N] bool, False for rows that go nowhere.
        active: [M] bool.
        like: gives the dtype of the gates.
    """
    chosen = torch.zeros(len(owner), len(active), dtype=torch.bool, device=owner.device)
    chosen = chosen.scatter(1, owner.unsqueeze(1), used.unsqueeze(1))
    gates = chosen.to(like.dtype)
    logits = torch.where(chosen, 0.0, float("-inf")).to(like.dtype)
    return Routing(gates=gates, logits=logits, probabilities=gates, active=active, chosen=chosen)
