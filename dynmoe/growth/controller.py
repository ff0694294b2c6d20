"""The growth controller: asks the trigger, plans each layer's growth, and reports the shock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.growth.budget import Budget
from dynmoe.growth.cut import Cut
from dynmoe.growth.cuts.utility import UtilityCut
from dynmoe.growth.init import Init, Request
from dynmoe.growth.inits.random import RandomInit
from dynmoe.growth.newborn import Newborn, Nursery
from dynmoe.growth.surgery import Moments, check_room, grow_layer
from dynmoe.growth.trigger import Signals, Trigger
from dynmoe.growth.triggers.task import TaskTrigger
from dynmoe.moe.bank import UnitBank
from dynmoe.moe.evaluation import undisturbed
from dynmoe.moe.layer import MoELayer, moe_layers
from dynmoe.registry import PartConfig

Probe = tuple[Tensor, Tensor | None]
"""Inputs [N, ...] and class labels [N] (or None) on which a growth is measured."""
MeasureShock = Callable[[Any, Any, Tensor | None], dict[str, float]]
"""(model outputs before, after, labels or None) -> named figures"""


def classification_shock(before: Tensor, after: Tensor, labels: Tensor | None) -> dict[str, float]:
    """How logits [N, C] changed: `output_change` (norm of the difference over norm before).

    With labels also `loss_before`, `loss_after` (nats), `accuracy_before`, `accuracy_after`.
    """
    shock = {"output_change": float((after - before).norm() / before.norm())}
    if labels is not None:
        for when, outputs in (("before", before), ("after", after)):
            shock[f"loss_{when}"] = float(F.cross_entropy(outputs, labels))
            shock[f"accuracy_{when}"] = float((outputs.argmax(1) == labels).float().mean())
    return shock


@dataclass(frozen=True)
class GrowthEvent:
    """What one growth did."""

    step: int
    """the loop's clock (see `Signals.step`) when it happened"""
    count: int
    """1 for the first growth"""
    experts: int
    """experts per layer after it"""
    hidden_sizes: dict[str, list[int]]
    """layer name -> hidden units of each expert after it"""
    parameters: int
    """parameters of the model after it"""
    shock: dict[str, float]
    """change of the model on the probe batch; by default what `classification_shock` measures"""


class GrowthController:
    """Grows every MoE layer of a model by `granularity` experts whenever the trigger fires.

    Args:
        model: a model with at least one MoELayer.
        optimizer: its state is carried over; None outside training.
        granularity: experts added per growth (the paper's g).
        trigger, cut, init: Configs of registered parts; defaults: at tasks, utility, random.
        budget: constant, or units per growth.
        moments: optimizer state of fresh entries, see `surgery.mean_moments`.
        measure_shock: compares what the model returns on the probe before and after a growth.
        newborn: how the experts of the latest growth are treated for a while.
        generator: draws fresh weights and random choices; None: torch's global one, whose state
            is not part of `state_dict`.

    Attributes:
        events: every growth so far.
        listeners: called after each growth with the old values of the MoE layers' parameters, by
            their names in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        granularity: int = 1,
        trigger: PartConfig | None = None,
        budget: Budget | None = None,
        cut: PartConfig | None = None,
        init: PartConfig | None = None,
        moments: Moments = "mean",
        measure_shock: MeasureShock = classification_shock,
        newborn: Newborn | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.granularity = granularity
        self.budget = budget or Budget()
        self.trigger: Trigger = (trigger or TaskTrigger.Config()).build()
        self.cut: Cut = (cut or UtilityCut.Config()).build()
        self.init: Init = (init or RandomInit.Config()).build()
        self.moments: Moments = moments
        self.measure_shock = measure_shock
        self.nursery = Nursery(newborn or Newborn(), model, optimizer)
        self.generator = generator
        self.events: list[GrowthEvent] = []
        self.listeners: list[Callable[[dict[str, Tensor]], None]] = []

    def step(
        self, signals: Signals, make_probe: Callable[[], Probe] | None = None
    ) -> GrowthEvent | None:
        """Grow if the trigger says so. Call at each task start and before each optimizer step.

        `make_probe` gives the probe batch; it is called only when the layers grow.
        """
        if not self.trigger.fires(signals):
            return None
        return self.grow(signals.step, make_probe() if make_probe else None)

    def grow(self, step: int, probe: Probe | None = None) -> GrowthEvent:
        """Grow now.

        Args:
            step: the loop's clock, for the record.
            probe: batch on the model's device for utilities and the growth shock.

        Raises:
            UserError: a layer cannot hold more experts, or an expert would have no units; no layer
                has been touched.
        """
        count, layers = len(self.events) + 1, dict(moe_layers(self.model))
        for layer in layers.values():
            check_room(layer, layer.num_experts + self.granularity)
        self.nursery.end()
        before, activations = self._observe(probe)
        plans = {
            name: self.init.plan(self._request(layer, activations.get(name)))
            for name, layer in layers.items()
        }
        old = self._parameters() if self.listeners else {}
        for name, layer in layers.items():
            grow_layer(layer, plans[name], count, self.generator, self.optimizer, self.moments)
        self.nursery.begin()
        for listener in self.listeners:
            listener(old)
        after, _ = self._observe(probe)
        event = GrowthEvent(
            step=step,
            count=count,
            experts=max(layer.num_experts for layer in layers.values()),
            hidden_sizes={
                name: layer.bank.hidden_sizes()
                for name, layer in layers.items()
                if isinstance(layer.bank, UnitBank)
            },
            parameters=sum(p.numel() for p in self.model.parameters()),
            shock={} if probe is None else self.measure_shock(before, after, probe[1]),
        )
        self.events.append(event)
        return event

    def _request(self, layer: MoELayer, mean_activation: Tensor | None) -> Request:
        bank, experts = layer.bank, layer.num_experts
        target, scores = [0] * (experts + self.granularity), torch.empty(0)
        segment = torch.empty(0, dtype=torch.long)
        if isinstance(bank, UnitBank):
            target = self.budget.sizes_after(bank.hidden_sizes(), self.granularity, bank.spread)
            scores = self.cut.scores(bank, mean_activation, self.generator)
            segment = bank.segment.cpu()
        return Request(
            segment=segment,
            experts=experts,
            target=target,
            scores=scores,
            scale=layer.gate_factor(experts) / layer.gate_factor(len(target)),
            generator=self.generator,
        )

    def _parameters(self) -> dict[str, Tensor]:
        """Copies of the MoE layers' parameters, by name."""
        return {
            f"{name}.{own}" if name else own: parameter.detach().clone()
            for name, layer in moe_layers(self.model)
            for own, parameter in layer.named_parameters()
        }

    @torch.no_grad()
    def _observe(self, probe: Probe | None) -> tuple[Any, dict[str, Tensor]]:
        """Outputs on the probe, and mean |activation| [H] of each MoE layer's units there."""
        if probe is None:
            return None, {}
        activations: dict[str, Tensor] = {}

        def watch(name: str, layer: MoELayer, bank: UnitBank) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor]) -> None:
                x = args[0] if bank.whole else args[0].reshape(-1, args[0].shape[-1])
                hidden = bank.hidden(x).abs()
                activations[name] = hidden.transpose(0, 1).flatten(1).mean(dim=1)

            return layer.register_forward_pre_hook(hook)

        handles = [
            watch(name, layer, layer.bank)
            for name, layer in moe_layers(self.model)
            if isinstance(layer.bank, UnitBank)
        ]
        try:
            with undisturbed(self.model):
                return self.model(probe[0]), activations
        finally:
            for handle in handles:
                handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Plain values to resume from: events, generator (None: the global one) and trigger."""
        return {
            "events": [asdict(event) for event in self.events],
            "generator": None if self.generator is None else self.generator.get_state(),
            "trigger": self.trigger.state_dict(),
            "nursery": self.nursery.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; the layers themselves come back with the model's state."""
        self.events = [GrowthEvent(**event) for event in state["events"]]
        self._load_generator(state["generator"])
        self.trigger.load_state_dict(state["trigger"])
        self.nursery.load_state_dict(state["nursery"])

    def _load_generator(self, state: Tensor | None) -> None:
        """Draw on as the controller that was saved: from its generator, or the global one."""
        if state is None:
            self.generator = None
            return
        self.generator = self.generator or torch.Generator()
        self.generator.set_state(state)
