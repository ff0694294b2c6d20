"""The kind of part that learns a stream, `--method NAME`, and the methods of dense or MoE layers.

A method says what stands in the hidden blocks, and what happens to the network between tasks. Those
of dense networks that become wider are in `cl_benchmarks.methods.expanding`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cl_benchmarks.growth_plugin import GrowthPlugin
from cl_benchmarks.networks import dense_block, for_images
from cl_benchmarks.trunks import MakeBlock
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.growth.optimizer_state import mean_moments, neutral_state
from dynmoe.growth.settings import GROWTH, LAYER, PLAN, GrowthSettings
from dynmoe.interventions.architecture import Injected
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.weights import fresh_draw, linear_outputs
from dynmoe.moe import UnitBank, moe_layers
from dynmoe.moe.experts.pool import ConvPool
from dynmoe.registry import Part, PartConfig


@dataclass(frozen=True)
class Horizon:
    """How long a run is; layers that grow are made for it."""

    steps: int
    """optimizer steps in all"""
    tasks: int
    batch: int = 64
    """rows in a step"""


@dataclass(frozen=True)
class Training:
    """What a method's plugins may work with."""

    model: nn.Module
    optimizer: Optimizer
    generator: torch.Generator
    """for the method's own random choices"""
    new_model: Callable[[int], nn.Module]
    """a freshly drawn network of the same make, by task number"""
    intervention: Intervention
    """acts on the network; not attached yet"""


class Method(Part, ABC, kind="method"):
    """Base of all methods.

    A plugin is any object with Avalanche callbacks (`before_training_exp(self, strategy)`, ...)
    and `state_dict` / `load_state_dict`, so it works with any Avalanche strategy and can resume.
    """

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    def reads(self) -> tuple[str, ...]:
        """The growth settings that it uses; giving others is refused. By default all."""
        return (*LAYER, *GROWTH)

    def without_tasks(self) -> str | None:
        """Why it cannot work where no task start is told, with the way out; None if it can.

        By default it can: no plugin of the method is a `TaskPlugin`.
        """
        return None

    @abstractmethod
    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """The maker of the blocks at `--network.place`.

        Raises:
            UserError: the settings cannot work, found before any training.
        """

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """Avalanche plugins, in the order they act; by default none: plain training."""
        return []


class Dense(Method, name="dense"):
    """The same network with a dense block of as many hidden units; trained on without a break."""

    def reads(self) -> tuple[str, ...]:
        """None."""
        return ()

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """A dense block of the same size as the MoE layer: a two-layer MLP."""
        return dense_block


class RenewedBlock(nn.Sequential):
    """A dense block that `reset-block` re-initialises: [B, W] -> [B, W]."""


class ResetBlock(
    Dense, name="reset-block", source="after Nikishin et al. 2022 (arXiv 2205.07802), Section 4"
):
    """The dense network whose block is re-initialised at each task: the control for DynamicMoE.

    Those blocks that are MoE layers in other methods start anew, with neutral optimizer state;
    trunk, neck, other blocks and classifier learn on. A growth that re-initialises its layer does
    the same to one with experts, so what is left between the two is the experts.
    """

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """A dense block of the usual size, marked as one to be re-initialised."""
        return lambda *sizes: RenewedBlock(*dense_block(*sizes).children())

    def without_tasks(self) -> str | None:
        """It draws at task starts."""
        return acts_at_task_starts(self)

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that re-initialises the blocks."""
        return [ResetBlocks(training)]


class Wide(Dense, name="wide"):
    """A dense block several times as wide, from the start: does more capacity alone help?"""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the wide network."""

        factor: int = 4
        """hidden units, as a multiple of the other methods'"""

    def __init__(self, config: Config) -> None:
        if config.factor < 1:
            raise UserError(f"method wide: factor={config.factor} must be at least 1")
        super().__init__(config)
        self.factor = config.factor

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """A dense block of `factor` times the hidden units."""

        def make(dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
            return dense_block(dim_in, hidden * self.factor, dim_out, images)

        return make


def _moe_blocks(growth: GrowthSettings, experts: int, most: int, seed: int) -> MakeBlock:
    """The maker of MoE layers of `experts` experts, with room for `most`.

    Where images go through, and the settings' bank is for vectors, the bank is `conv`
    (`networks.check_bank` refuses settings that do not mean that).
    """
    generator = seeding.generator(seed, "moe-layers")
    image_bank = growth.bank if for_images(growth.bank) else ConvPool.Config()

    def make(dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
        growth.check_budget(hidden, most)
        bank = image_bank if images else growth.bank
        hidden = growth.budget.first_hidden(hidden, experts, most)
        return growth.make_layer(dim_in, dim_out, hidden, experts, most, generator, bank)

    return make


class StaticMoE(Method, name="moe-static"):
    """All experts from the start, as many as DynamicMoE ends with: is it growth that helps?"""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of a mixture that does not grow."""

        experts: int = 0
        """number of experts; 0 for as many as DynamicMoE ends with"""

    config: Config

    def reads(self) -> tuple[str, ...]:
        """Those of layers, and with 0 experts those of how many DynamicMoE ends with."""
        return (*LAYER, "budget") if self.config.experts else (*LAYER, *PLAN)

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """An MoE layer with its final number of experts."""
        experts = self.config.experts or growth.most_experts(
            horizon.steps, horizon.tasks, horizon.batch
        )
        return _moe_blocks(growth, experts, experts, seed)


class RenewedMoE(StaticMoE, name="moe-renewed", source="ours"):
    """A constant number of experts, all re-initialised at each task: is it growth, or renewal?

    With the pruning `reinit`, growth re-initialises every expert and router row, too; what is left
    between the two is that experts become more. The rest of the network learns on as it does there.
    """

    def without_tasks(self) -> str | None:
        """It draws at task starts."""
        return acts_at_task_starts(self)

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that draws the experts."""
        return [RenewExperts(training)]


def acts_at_task_starts(method: Method) -> str:
    """The `without_tasks` of a method that has a `TaskPlugin`."""
    return (
        f"method {method.name} acts at task starts, and none is told here; use dense, wide, "
        "moe-static, or dynamicmoe with a trigger of its own (--trigger drift, plateau, ...)"
    )


class TaskPlugin(ABC):
    """Base of the Avalanche plugins that act as each later task starts, unless it is resumed."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """A task starts."""
        task = strategy.clock.train_exp_counter
        if task and not getattr(strategy, "resuming", False):
            self.task_starts(strategy, task)

    @abstractmethod
    def task_starts(self, strategy: Any, task: int) -> None:
        """Change the network; `task` counts from 0, and is 1 or more."""

    def state_dict(self) -> dict[str, Any]:
        """By default nothing is to be kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore `state_dict()`."""


class DrawingPlugin(TaskPlugin):
    """Base of those that draw from the training's generator; it resumes."""

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands."""
        return {"generator": self.training.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.training.generator.set_state(state["generator"])


class ResetBlocks(DrawingPlugin):
    """Avalanche plugin: the marked blocks are re-initialised at the start of each later task."""

    @torch.no_grad()
    def task_starts(self, strategy: Any, task: int) -> None:
        """Draw the blocks, in place, with neutral optimizer state, as a growth would."""
        optimizer = self.training.optimizer
        for block in strategy.model.modules():
            if not isinstance(block, RenewedBlock):
                continue
            drawn = fresh_draw(block, self.training.generator)
            for name, parameter in block.named_parameters():
                parameter.copy_(drawn[name])
                means = mean_moments(optimizer, parameter, "mean")
                every = torch.arange(len(parameter), device=parameter.device)
                neutral_state(optimizer, parameter, 0, every, means)


class ZeroHead(TaskPlugin):
    """Avalanche plugin: the output layer is zero at the start of every task, the first as well.

    As Dohare et al. 2024 (Nature 632) do with Continual ImageNet; its optimizer state is dropped.
    """

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        linear_outputs(training.model, "head-reset")  # raises before any training

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """A task starts."""
        if not getattr(strategy, "resuming", False):
            self.task_starts(strategy, strategy.clock.train_exp_counter)

    @torch.no_grad()
    def task_starts(self, strategy: Any, task: int) -> None:
        """Set to zero."""
        for layer in linear_outputs(strategy.model, "head-reset"):
            for parameter in layer.parameters():
                parameter.zero_()
                self.training.optimizer.state.pop(parameter, None)
        for module in strategy.model.modules():
            if isinstance(module, Injected):  # what it has frozen is of earlier tasks
                module.zero()


class RenewExperts(DrawingPlugin):
    """Avalanche plugin: fresh experts and router rows at the start of each later task."""

    @torch.no_grad()
    def task_starts(self, strategy: Any, task: int) -> None:
        """Draw all experts, in place, with neutral optimizer state, as a growth would."""
        generator, optimizer = self.training.generator, self.training.optimizer
        for layer in dict(moe_layers(strategy.model)).values():
            every = torch.arange(layer.num_experts, device=layer.created.device)
            layer.router.draw_rows(every, generator)
            layer.bank.draw_experts(every, generator)
            if isinstance(layer.bank, UnitBank):
                units = torch.arange(len(layer.bank.segment), device=every.device)
                layer.bank.draw_units(units, generator)
            slots = layer.bank.entries(every)
            slots += [(rows, 0, every) for rows in layer.router.expert_rows()]
            for parameter, axis, index in slots:
                means = mean_moments(optimizer, parameter, "mean")
                neutral_state(optimizer, parameter, axis, index, means)


class Fresh(Dense, name="fresh"):
    """The dense network and optimizer re-initialised at every task: full plasticity."""

    def without_tasks(self) -> str | None:
        """It draws at task starts."""
        return acts_at_task_starts(self)

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that renews the network.

        Raises:
            UserError: the intervention changes the network's make on the way.
        """
        if training.intervention.reshapes:
            raise UserError(
                f"method fresh draws a new network for each task, so intervention "
                f"{training.intervention.name} has nothing to work on; use --method dense"
            )
        return [RenewPlugin(training)]


class RenewPlugin(TaskPlugin):
    """Avalanche plugin: fresh weights and optimizer state at the start of each later task."""

    @torch.no_grad()
    def task_starts(self, strategy: Any, task: int) -> None:
        """Renew everything, in place."""
        fresh = self.training.new_model(task).to(strategy.device)
        strategy.model.load_state_dict(fresh.state_dict())
        self.training.optimizer.state.clear()


class DynamicMoE(Method, name="dynamicmoe", source="Kim 2025 (arXiv 2511.18987)"):
    """Grows by `--granularity` experts whenever `--trigger` fires (Kim, arXiv 2511.18987)."""

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """An MoE layer of g experts with room for all that will come.

        Raises:
            UserError: it would never grow, or the budget is too small.
        """
        most = growth.most_experts(horizon.steps, horizon.tasks, horizon.batch)
        if most == growth.granularity:
            raise UserError(
                f"trigger {growth.trigger.part.name} never fires in {horizon.steps} steps and "
                f"{horizon.tasks} task(s); use another --trigger or its options "
                "(--trigger.steps, cooldown, patience ...), more --chunks, or --method moe-static"
            )
        return _moe_blocks(growth, growth.granularity, most, seed)

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The growth plugin."""
        controller = growth.make_controller(training.model, training.optimizer, training.generator)
        return [GrowthPlugin(controller)]
