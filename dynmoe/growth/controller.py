"""The growth controller: asks the trigger, plans each layer's growth, and reports the shock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.errors import UserError
from dynmoe.growth import distributed
from dynmoe.growth.budget import Budget
from dynmoe.growth.initialisation import Init, Plan, RandomInit, Request
from dynmoe.growth.new_experts import NewExperts, WarmUp
from dynmoe.growth.old_experts import OldExperts, slow_down
from dynmoe.growth.optimizer_state import Moments, forget_flat_state
from dynmoe.growth.probe import MeasureShock, Probe, classification_shock, observe
from dynmoe.growth.pruning import PruningCriterion, ReinitUnits
from dynmoe.growth.reshaping import Moved, plan_reshaping
from dynmoe.growth.surgery import (
    Restart,
    Undo,
    check_held,
    check_room,
    grow_layer,
    rolled_back,
)
from dynmoe.growth.triggers.clock import Signals, TaskTrigger, Trigger
from dynmoe.moe import MoELayer, UnitBank, moe_layers, register_step_hook
from dynmoe.moe.experts.bottleneck import BottleneckBank
from dynmoe.ranges import check_value
from dynmoe.registry import PartConfig


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
    """change of the model on the probe batch; by default what `classification_shock` measures;
    with several processes the mean of theirs"""


class GrowthController:
    """Grows every MoE layer of a model by `granularity` experts whenever the trigger fires.

    By default this is the method of `python -m dynmoe.cl`, and needs no probe: at each growth of
    constant budget the layer is re-initialised, as no unit of an expert that shrinks is kept
    (pruning `reinit`), and all router rows are drawn (init `random`, router `all`). What was learnt
    stays in the rest of the network alone. The pruning `utility` keeps the units that contribute
    most.

    A growth succeeds and is recorded, or raises and leaves model, optimizer, generator, trigger and
    events as they were. With torch.distributed it is one growth of all processes, each of which has
    to call `step` or `grow` with them: plans and draws are rank 0's, activations on the probe,
    figures of triggers and the growth shock are means. Under DistributedDataParallel, pass the
    module or the wrapper, and after a growth of budget per-growth renew it by
    `ddp = rewrap(ddp)`. Sharded parameters (FSDP2) are refused.

    Args:
        model: a model with at least one MoELayer.
        optimizer: its state is carried over; None outside training. Any of torch.optim. Its steps
            move what moves once per step (see `dynmoe.moe.finish_step`). What the MoE layers learn
            has to be in this one: another one would lose Parameters that a budget per-growth
            replaces, and keep old moments of fresh entries otherwise.
        granularity: experts added per growth (the paper's g), at least 1.
        trigger: Config of a registered trigger; default: at tasks.
        pruning: Config of a pruning criterion; default: reinit.
        init: Config of an initialisation; default: random.
        budget: constant, or units per growth.
        moments: optimizer state of fresh entries, see `optimizer_state.mean_moments`.
        measure_shock: compares what the model returns on the probe before and after a growth.
        new_experts: how the experts of the latest growth are treated for a while.
        old_experts: how all others are treated.
        copies: models that follow, such as `torch.optim.swa_utils.AveragedModel(model)`: they grow
            by the same plans and get the same fresh weights, and keep their own elsewhere.
        generator: draws fresh weights and random choices; None: torch's global one, whose state
            is not part of `state_dict`.

    Attributes:
        events: every growth so far.
        copies: the list of models that follow; more may be added to it.
        listeners: called after each growth with the old values of the MoE layers' parameters, by
            their names in the model. If one fails, the growth is taken back; what listeners have
            noted for themselves is theirs to take back.

    Raises:
        UserError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        granularity: int = 1,
        trigger: PartConfig | None = None,
        budget: Budget | None = None,
        pruning: PartConfig | None = None,
        init: PartConfig | None = None,
        moments: Moments = "mean",
        measure_shock: MeasureShock = classification_shock,
        new_experts: NewExperts | None = None,
        old_experts: OldExperts | None = None,
        copies: Sequence[nn.Module] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        check_value("moments", moments, Moments)
        if granularity < 1:
            raise UserError(f"growth: granularity={granularity} is too small; use 1 or more")
        self.model = model
        self.optimizer = optimizer
        self.granularity = granularity
        self.budget = budget or Budget()
        self.trigger: Trigger = (trigger or TaskTrigger.Config()).build()
        self.pruning: PruningCriterion = (pruning or ReinitUnits.Config()).build()
        self.init: Init = (init or RandomInit.Config()).build()
        self.moments: Moments = moments
        self.measure_shock = measure_shock
        self.warm_up = WarmUp(new_experts or NewExperts(), model, optimizer)
        slow_down(old_experts or OldExperts(), model, optimizer)
        self.copies = list(copies)
        self.generator = generator
        if optimizer is not None:
            register_step_hook(model, optimizer)
        self.events: list[GrowthEvent] = []
        self.listeners: list[Callable[[dict[str, Tensor]], None]] = []

    def step(
        self, signals: Signals, make_probe: Callable[[], Probe] | None = None
    ) -> GrowthEvent | None:
        """Grow if the trigger says so. Call at each task start and before each optimizer step.

        Pending gradients stay with the weights they belong to: those of units and rows that are
        drawn or copied are set to 0, all others stay, also where a Parameter is replaced.
        `make_probe` gives the probe; it is called only when the layers grow.

        Raises:
            UserError: the trigger needs a figure that is not in `signals`; or see `grow`.
        """
        for name in () if signals.task_starts else sorted(self.trigger.needs):
            if getattr(signals, name) is None:
                raise UserError(
                    f"trigger {self.trigger.name} needs {name}, and this loop does not tell it; "
                    f"use another trigger, or pass Signals(step=..., {name}=...), nan where there "
                    "is no new value"
                )
        signals = distributed.common_signals(signals, self.trigger.needs)
        before = copy.deepcopy(self.trigger.state_dict())
        if not self.trigger.fires(signals):
            return None
        try:
            with distributed.all_or_none():
                probe = make_probe() if make_probe else None
            return self.grow(signals.step, probe)
        except BaseException:
            self.trigger.load_state_dict(before)
            raise

    def grow(self, step: int, probe: Probe | None = None) -> GrowthEvent:
        """Grow now.

        Args:
            step: the loop's clock, for the record.
            probe: batch on the model's device for utilities and the growth shock, or a function
                that runs the model on it: `lambda model: model(input_ids=..., task_labels=...)`.

        Raises:
            UserError: a layer cannot hold more experts, an expert would have no units, a model in
                `copies` is not one of this model or averages its buffers, parameters are sharded,
                tied or not in the optimizer, or the growth failed on another process; nothing has
                been touched.
        """
        layers = dict(moe_layers(self.model))
        copies = [[layer for _, layer in moe_layers(model)] for model in self.copies]
        with self._taken_back(layers):
            with distributed.all_or_none():
                self._check(layers, copies)
                self.warm_up.end()
                before, activations = observe(self.model, probe)
            generator = distributed.common_generator(self._drawing())
            activations = distributed.mean_tensors(activations)
            with distributed.all_or_none():
                plans = [
                    self._plan(layer, activations.get(name), generator)
                    for name, layer in layers.items()
                ]
            plans = distributed.from_first(plans)
            with distributed.all_or_none():
                undo = [Undo(list(layers.values()), plans, self.optimizer)]
                undo += [Undo(theirs, plans, None) for theirs in copies]
                old = self._parameters() if self.listeners else {}
            with rolled_back(undo):
                with distributed.all_or_none():
                    restarts = self._write(layers, copies, plans, generator)
                    after, _ = observe(self.model, probe, activations=False)
                    labels = probe[1] if isinstance(probe, tuple) else None
                    shock = {} if probe is None else self.measure_shock(before, after, labels)
                    for listener in self.listeners:
                        listener(old)
                event = self._event(step, layers, distributed.mean_figures(shock))
        for restart in restarts:
            restart.carry_out(self.optimizer)
        forget_flat_state(self.optimizer)
        self.events.append(event)
        return event

    def _check(self, layers: dict[str, MoELayer], copies: list[list[MoELayer]]) -> None:
        """Refuse what cannot grow, before anything is touched."""
        distributed.check_not_sharded(self.model)
        check_held(self.model, self.optimizer if self.budget.mode == "per-growth" else None)
        for layer in layers.values():
            check_room(layer, layer.num_experts + self.granularity)
        for model in self.copies:
            if getattr(model, "use_buffers", False):
                raise UserError(
                    "growth: a model in copies= averages its buffers, and those of MoE layers say "
                    "which expert owns a unit, which has no mean; make it with use_buffers=False"
                )
        for theirs in copies:
            if [_partition(layer) for layer in theirs] != [_partition(x) for x in layers.values()]:
                raise UserError(
                    "growth: a model in copies= does not have the MoE layers that the grown model "
                    "has; make copies of the model as it is now, and list them from then on"
                )

    def _write(
        self,
        layers: dict[str, MoELayer],
        copies: list[list[MoELayer]],
        plans: list[Plan],
        generator: torch.Generator,
    ) -> list[Restart | Moved]:
        """Carry the plans out, on the model and, with the same draws, on each of its copies."""
        count, start = len(self.events) + 1, generator.get_state()
        restarts: list[Restart | Moved] = []
        for layer, plan in zip(layers.values(), plans, strict=True):
            restarts += grow_layer(layer, plan, count, generator, self.optimizer, self.moments)
            if self.budget.mode == "per-growth" and distributed.several_processes():
                distributed.watch_wrapper(layer.bank)
        for theirs in copies:
            again = torch.Generator()
            again.set_state(start)
            for layer, plan in zip(theirs, plans, strict=True):
                grow_layer(layer, plan, count, again)
        self.warm_up.begin()
        return restarts

    def _event(
        self, step: int, layers: dict[str, MoELayer], shock: dict[str, float]
    ) -> GrowthEvent:
        return GrowthEvent(
            step=step,
            count=len(self.events) + 1,
            experts=max(layer.num_experts for layer in layers.values()),
            hidden_sizes={
                name: layer.bank.hidden_sizes()
                for name, layer in layers.items()
                if isinstance(layer.bank, UnitBank | BottleneckBank)
            },
            parameters=sum(p.numel() for p in self.model.parameters()),
            shock=shock,
        )

    @contextmanager
    def _taken_back(self, layers: dict[str, MoELayer]) -> Iterator[None]:
        """Put generator, new experts' treatment and logit shifts back if the block fails."""
        generator, warm_up = self._drawing().get_state(), self.warm_up.state_dict()
        routers = [layer.router for layer in layers.values()]
        shifts = [router.logit_shift.clone() for router in routers]
        try:
            yield
        except BaseException:
            self._drawing().set_state(generator)
            for router, shift in zip(routers, shifts, strict=True):
                router.logit_shift.copy_(shift)
            self.warm_up.load_state_dict(warm_up)
            raise

    def _plan(
        self, layer: MoELayer, mean_activation: Tensor | None, generator: torch.Generator
    ) -> Plan:
        """What becomes of a layer."""
        plan = self.init.plan(self._request(layer, mean_activation, generator))
        if isinstance(layer.bank, BottleneckBank):
            plan.reshaping = plan_reshaping(
                layer.bank, self.budget, self.granularity, self.pruning, mean_activation, generator
            )
        return plan

    def _request(
        self, layer: MoELayer, mean_activation: Tensor | None, generator: torch.Generator
    ) -> Request:
        bank, experts = layer.bank, layer.num_experts
        target, scores = [0] * (experts + self.granularity), torch.empty(0)
        segment = torch.empty(0, dtype=torch.long)
        if isinstance(bank, UnitBank):
            target = self.budget.sizes_after(bank.hidden_sizes(), self.granularity, bank.spread)
            scores = self.pruning.scores(bank, mean_activation, generator)
            segment = bank.segment.cpu()
        return Request(
            segment=segment,
            experts=experts,
            target=target,
            scores=scores,
            scale=layer.gate_factor(experts) / layer.gate_factor(len(target)),
            generator=generator,
        )

    def _parameters(self) -> dict[str, Tensor]:
        """Copies of the MoE layers' parameters, by name."""
        return {
            f"{name}.{own}" if name else own: parameter.detach().clone()
            for name, layer in moe_layers(self.model)
            for own, parameter in layer.named_parameters()
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values to resume from: events, generator (None: the global one) and trigger."""
        return {
            "events": [asdict(event) for event in self.events],
            "generator": None if self.generator is None else self.generator.get_state(),
            "trigger": self.trigger.state_dict(),
            "warm_up": self.warm_up.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; the layers themselves come back with the model's state."""
        self.events = [GrowthEvent(**event) for event in state["events"]]
        if state["generator"] is None:
            self.generator = None
        else:
            self.generator = self.generator or torch.Generator()
            self.generator.set_state(state["generator"])
        self.trigger.load_state_dict(state["trigger"])
        self.warm_up.load_state_dict(state["warm_up"])

    def _drawing(self) -> torch.Generator:
        """The generator that growth draws from."""
        return torch.default_generator if self.generator is None else self.generator


def _partition(layer: MoELayer) -> list[Any]:
    """What must be equal of two layers that one plan is to fit: shapes, and the units' owners."""
    owners = layer.bank.segment.tolist() if isinstance(layer.bank, UnitBank) else []
    widths = layer.bank.sizes if isinstance(layer.bank, BottleneckBank) else []
    return [
        layer.num_experts,
        owners,
        widths,
        *(parameter.shape for parameter in layer.parameters()),
    ]
