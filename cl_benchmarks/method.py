"""The kind of part that learns a stream: `--method NAME`.

A method says what stands in the hidden blocks, and what happens to the network between tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cl_benchmarks.networks import MakeBlock, dense_block
from dynmoe import seeding
from dynmoe.growth.settings import GROWTH, LAYER, PLAN, GrowthSettings
from dynmoe.interventions.intervention import Intervention
from dynmoe.registry import Part, PartConfig


@dataclass(frozen=True)
class Horizon:
    """How long a run is; layers that grow are made for it."""

    steps: int
    """optimizer steps in all"""
    tasks: int


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

    @abstractmethod
    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """The maker of the hidden blocks, (width, hidden) -> module.

        Raises:
            UserError: the settings cannot work, found before any training.
        """

    @abstractmethod
    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """Avalanche plugins, in the order they act."""


class DenseMethod(Method):
    """Base of the methods on a dense network: its blocks are two-layer MLPs."""

    def reads(self) -> tuple[str, ...]:
        """None."""
        return ()

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """A dense block of the same size as the MoE layer."""
        return dense_block


class ConstantMoE(Method):
    """Base of the methods on a mixture that has all its experts from the start."""

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
        experts = self.config.experts or growth.most_experts(horizon.steps, horizon.tasks)
        generator = seeding.generator(seed, "moe-layers")

        def make(width: int, hidden: int) -> nn.Module:
            growth.check_budget(hidden, experts)
            return growth.make_layer(width, width, hidden, experts, experts, generator)

        return make
