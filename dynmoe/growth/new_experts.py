"""How the experts of the latest growth are treated for a while: their pace and their share.

Both work by hooks on the optimizer, so that any training loop has them. Clock: optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.pace import Entries, Pace
from dynmoe.moe import MoELayer, Router, moe_layers
from dynmoe.ranges import Signed


@dataclass(frozen=True, kw_only=True)
class NewExperts:
    """Options for the experts of the latest growth; the defaults treat them as all others."""

    lr: float = 1.0
    """multiplies each step that their weights and router rows take (the step and not the gradient,
    whose scale Adam ignores)"""
    lr_steps: int = 100
    """optimizer steps after a growth for which that holds"""
    logit: Signed = 0.0
    """added to their router logits at a growth: negative for a small share of the gate at first,
    positive for a large one; has no effect on routers that do not use `logit_shift`"""
    logit_steps: int = 100
    """optimizer steps in which that fades linearly to 0"""

    def __post_init__(self) -> None:
        if not 0 <= self.lr < float("inf") or not abs(self.logit) < float("inf"):
            raise UserError(
                f"new_experts: lr={self.lr} must be finite and at least 0, logit={self.logit} "
                "finite"
            )
        if self.lr_steps < 1 or self.logit_steps < 1:
            raise UserError(
                f"new_experts: lr_steps={self.lr_steps} and logit_steps={self.logit_steps} must "
                "be at least 1"
            )

    @property
    def plain(self) -> bool:
        """Whether nothing is special about them."""
        return self.lr == 1 and self.logit == 0


class WarmUp:
    """Carries out `NewExperts` on a model's MoE layers, by hooks unless the options are plain.

    The new experts of a layer are those with its latest creation step; theirs are their hidden
    units, bank rows and router rows, whether drawn or copied.
    """

    def __init__(self, options: NewExperts, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.options, self.model = options, model
        self.age: int | None = None  # optimizer steps since the latest growth
        self.base: list[Tensor] = []  # [M] of each router, the logit shifts that are to remain
        if optimizer is not None and not options.plain:
            Pace(optimizer, options.lr, self._entries)
            optimizer.register_step_post_hook(lambda *_: self._step_done())

    def end(self) -> None:
        """A growth is about to come: let the logit shifts of the one before be as they shall."""
        for router, base in zip(self._routers(), self.base, strict=False):
            router.logit_shift.copy_(base)
        self.age, self.base = None, []

    def begin(self) -> None:
        """A growth has happened."""
        if self.options.plain:
            return
        self.age = 0
        if self.options.logit != 0:
            self.base = [router.logit_shift.clone() for router in self._routers()]
        self._set_logits()

    def state_dict(self) -> dict[str, Any]:
        """The age and the logit shifts that are to remain."""
        return {"age": self.age, "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        routers = self._routers()
        self.age = state["age"]
        self.base = [b.to(r.logit_shift) for b, r in zip(state["base"], routers, strict=False)]

    def _entries(self) -> Entries:
        """What belongs to the new experts, as long as their pace is another."""
        if self.age is None or self.age >= self.options.lr_steps or self.options.lr == 1:
            return []
        return [entry for _, layer in moe_layers(self.model) for entry in latest_entries(layer)]

    def _step_done(self) -> None:
        """Let the logits fade."""
        if self.age is not None:
            self.age += 1
            self._set_logits()

    @torch.no_grad()
    def _set_logits(self) -> None:
        assert self.age is not None
        left = max(0.0, 1 - self.age / self.options.logit_steps)
        if self.options.logit == 0 or self.age > self.options.logit_steps:
            return
        layers = {layer.router: layer for _, layer in moe_layers(self.model)}
        for (router, layer), base in zip(layers.items(), self.base, strict=True):
            router.logit_shift.copy_(base)
            router.logit_shift[latest_experts(layer)] += left * self.options.logit

    def _routers(self) -> list[Router]:
        """Each router once: layers may share one."""
        return list(dict.fromkeys(layer.router for _, layer in moe_layers(self.model)))


def latest_experts(layer: MoELayer) -> Tensor:
    """[n] the experts that a layer's latest growth brought; none before its first."""
    latest = layer.created.max()
    return ((layer.created == latest) & (latest > 0)).nonzero().flatten()


def latest_entries(layer: MoELayer) -> Entries:
    """(parameter, axis, index) of all entries that belong to a layer's new experts alone."""
    experts = latest_experts(layer)
    rows: Entries = [(parameter, 0, experts) for parameter in layer.router.expert_rows()]
    return rows + layer.bank.entries(experts)
