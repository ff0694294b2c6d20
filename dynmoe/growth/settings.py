"""The growth settings that every experiment shares, as flags of its command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth.budget import Budget
from dynmoe.growth.controller import GrowthController
from dynmoe.growth.new_experts import NewExperts
from dynmoe.growth.old_experts import OldExperts
from dynmoe.growth.optimizer_state import Moments
from dynmoe.growth.probe import MeasureShock, classification_shock
from dynmoe.growth.triggers.clock import Trigger
from dynmoe.moe import MoELayer, UnitBank, moe_layers, share_router
from dynmoe.moe.bank import spread_sizes
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.moe.layer import GateScale
from dynmoe.registry import PartConfig, slot

LAYER = ("router", "bank", "gate_scale", "balance", "regularizer", "shared_hidden", "share_router")
"""Settings of what an MoE layer looks like."""
PLAN = ("granularity", "trigger", "budget")
"""Settings of how many experts and units there will be."""
GROWTH = (*PLAN, "pruning", "init", "moments", "new_experts", "old_experts")
"""Settings of how layers grow."""


@dataclass(frozen=True, kw_only=True)
class GrowthSettings:
    """What MoE layers look like and how they grow. Commands' settings inherit these."""

    granularity: int = 2
    """experts at the start, and added by each growth (the paper's g)"""
    router: PartConfig = slot("router", "cosine")
    bank: PartConfig = slot("bank", "pool")
    gate_scale: GateScale = "experts"
    """experts: gates times their number; one: as in the paper"""
    balance: PartConfig = slot("loss", "none")
    regularizer: PartConfig = slot("loss", "none")
    shared_hidden: int = 0
    """hidden units of one more expert, which every sample uses"""
    share_router: bool = False
    """one router for all MoE layers of one shape (Omni-router)"""
    trigger: PartConfig = slot("trigger", "task")
    budget: Budget = field(default_factory=Budget)
    pruning: PartConfig = slot("pruning", "reinit")
    init: PartConfig = slot("init", "random")
    moments: Moments = "mean"
    """Adam's second moments of new entries: the tensor's mean, or 0"""
    new_experts: NewExperts = field(default_factory=NewExperts)
    old_experts: OldExperts = field(default_factory=OldExperts)

    def unused_growth(self, methods: str, read: Iterable[str]) -> dict[str, str]:
        """Setting -> why it has no effect, of those here.

        Args:
            methods: names what is run, for the text.
            read: the settings here that it reads.
        """
        read = set(read)
        reasons = {
            name: f"{methods} does not use it; leave it out, or add a method that does"
            for name in (*LAYER, *GROWTH)
            if name not in read
        }
        if self.budget.mode == "constant":
            reasons.setdefault("budget.units", "it is for --budget.mode per-growth")
            reasons.setdefault("budget.start", "it is for --budget.mode per-growth")
        elif "pruning" in read:
            reasons["pruning"] = "no expert shrinks with --budget.mode per-growth; use constant"
        if self.new_experts.lr == 1:
            reasons.setdefault(
                "new_experts.lr_steps", "--new-experts.lr is 1; give it another value"
            )
        if self.new_experts.logit == 0:
            reasons.setdefault(
                "new_experts.logit_steps", "--new-experts.logit is 0; give it another value"
            )
        return reasons

    def most_experts(self, steps: int, tasks: int, batch: int = 0) -> int:
        """Experts at the end of a run of that many steps of its clock, and tasks.

        Args:
            batch: rows in a step, where the loop tells its trigger; else 0.

        Raises:
            UserError: granularity below 1.
        """
        if self.granularity < 1:
            raise UserError(f"granularity {self.granularity} must be at least 1")
        trigger: Trigger = self.trigger.build()
        if batch:
            trigger.count_rows(batch)
        return self.granularity * (1 + trigger.planned(steps, tasks))

    def final_hidden(self, hidden: int, experts: int) -> int:
        """Hidden units of a layer that has grown to `experts`; `hidden` are a dense block's."""
        spread = self.bank.spread if isinstance(self.bank, UnitBank.Config) else 1.0
        hidden = self.budget.first_hidden(hidden, self.granularity, experts)
        sizes = spread_sizes(hidden, self.granularity, spread)
        while len(sizes) < experts:
            sizes = self.budget.sizes_after(sizes, self.granularity, spread)
        return sum(sizes)

    def check_budget(self, hidden: int, experts: int) -> None:
        """Refuse a plan that ends with experts without units.

        Raises:
            UserError: the constant budget of `hidden` units cannot feed `experts` experts.
        """
        least = 2 if issubclass(self.bank.part, BottleneckBank) else 1
        kept = self.budget.mode == "constant" or self.budget.start == "share"
        if kept and least * experts > hidden:
            what = "constant budget" if self.budget.mode == "constant" else "budget"
            raise UserError(
                f"granularity {self.granularity} grows to {experts} experts, but the {what} holds "
                f"{hidden} hidden units and each expert needs at least {least}; use a smaller "
                "--granularity, fewer growths or more hidden units"
            )

    def make_layer(
        self,
        dim_in: int,
        dim_out: int,
        hidden: int,
        num_experts: int,
        max_experts: int,
        generator: torch.Generator | None,
        bank: PartConfig | None = None,
    ) -> MoELayer:
        """An MoE layer with these settings, [..., dim_in] -> [..., dim_out]; or another bank."""
        return MoELayer(
            dim_in,
            dim_out,
            hidden,
            num_experts=num_experts,
            max_experts=max_experts,
            router=self.router,
            bank=bank or self.bank,
            gate_scale=self.gate_scale,
            losses=(self.balance, self.regularizer),
            shared_hidden=self.shared_hidden,
            generator=generator,
        )

    def join_routers(self, model: nn.Module) -> None:
        """With `share_router`, let the MoE layers of a model share; dense models stay as they are.

        Raises:
            UserError: the model has MoE layers, but no two that are alike.
        """
        if self.share_router and next(moe_layers(model), None) is not None:
            share_router(model)

    def make_controller(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        generator: torch.Generator | None,
        measure_shock: MeasureShock = classification_shock,
    ) -> GrowthController:
        """A controller that grows the model's MoE layers with these settings."""
        how = {name: getattr(self, name) for name in GROWTH}
        return GrowthController(
            model, optimizer, measure_shock=measure_shock, generator=generator, **how
        )
