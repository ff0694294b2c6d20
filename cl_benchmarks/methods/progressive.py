"""A new column of hidden units for every task; the old ones are frozen."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_benchmarks.method import Horizon, Method, Training
from cl_benchmarks.networks import MakeBlock
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.growth.settings import PLAN, GrowthSettings
from dynmoe.moe.bank import even_sizes
from dynmoe.registry import PartConfig

LARGEST_SCALE = 0.1
"""Scales of old columns are drawn between 0 and this; the paper says "random small values"."""


class Progressive(
    Method, name="progressive", source="Rusu et al. 2016 (arXiv 1606.04671), Section 2, Eq. 2"
):
    """Progressive networks in the hidden block: a new column per task reads the frozen old ones.

    A column is a two-layer ReLU MLP. Its output adds an adapter, as in the paper, that reads the
    hidden units of all columns before it. The newest column's output is used, in training and in
    tests, so no task id is needed; that of the old columns is not. Only the block is progressive
    (our choice): trunk, neck and classifier are those of the other methods and go on learning, so
    what old columns read, and with it what they say, moves on.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of progressive networks."""

        units: int = 0
        """hidden units of each column; 0 for an equal part of what DynamicMoE ends with under
        `--budget`"""

    def __init__(self, config: Config) -> None:
        if config.units < 0:
            raise UserError(f"method progressive: units={config.units} must be at least 0")
        super().__init__(config)
        self.units = config.units

    def reads(self) -> tuple[str, ...]:
        """With 0 units, what DynamicMoE's size follows from."""
        return () if self.units else ("bank", *PLAN)

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """A block with its first column."""
        most, blocks = growth.most_experts(horizon.steps, horizon.tasks), itertools.count()

        def make(width: int, hidden: int) -> nn.Module:
            if self.units:
                sizes = [self.units] * horizon.tasks
            else:
                growth.check_budget(hidden, most)
                sizes = even_sizes(growth.final_hidden(hidden, most), horizon.tasks)
            if min(sizes) < 1:
                raise UserError(
                    f"method progressive: {sum(sizes)} hidden units are too few for columns for "
                    f"{horizon.tasks} tasks; use a larger --network.hidden or --method.units"
                )
            return ProgressiveBlock(width, sizes, seeding.derive(seed, "columns", next(blocks)))

        return make

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that adds columns."""
        return [ColumnPlugin(training)]


class Column(nn.Module):
    """One column: hidden units of its own, and an adapter to those of the columns before it.

    Args:
        width: W, in and out.
        units: its hidden units.
        before: hidden units of each column before it.
    """

    def __init__(self, width: int, units: int, before: list[int]) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, units), nn.ReLU())
        self.output = nn.Linear(units, width)
        if before:
            self.scale = nn.Parameter(torch.empty(len(before)).uniform_(0, LARGEST_SCALE))
            self.reduce = nn.Sequential(nn.Linear(sum(before), units), nn.ReLU())
            self.adapt = nn.Linear(units, width, bias=False)

    def forward(self, own: Tensor, others: list[Tensor]) -> Tensor:
        """Output [B, W] from its own hidden units [B, u] and those of the columns before it."""
        output = self.output(own)
        if others:
            scaled = [scale * h for scale, h in zip(self.scale, others, strict=True)]
            output = output + self.adapt(self.reduce(torch.cat(scaled, dim=1)))
        return output


class ProgressiveBlock(nn.Module):
    """Columns, [B, W] -> [B, W]; the newest one speaks and learns.

    Args:
        width: W.
        sizes: hidden units of the columns to come, by task.
        seed: decides their first weights; the first column draws from torch's global generator.
    """

    def __init__(self, width: int, sizes: list[int], seed: int) -> None:
        super().__init__()
        self.width, self.sizes, self.seed = width, sizes, seed
        self.columns = nn.ModuleList([Column(width, sizes[0], [])])

    def forward(self, x: Tensor) -> Tensor:
        """The newest column's output [B, W] for x [B, W]."""
        columns = [column for column in self.columns if isinstance(column, Column)]
        hidden = [column.hidden(x) for column in columns]
        return columns[-1](hidden[-1], hidden[:-1])

    def add_column(self) -> Column:
        """Freeze all columns and add the next one; the last size serves when no more are left."""
        self.columns.requires_grad_(False)
        for parameter in self.columns.parameters():
            parameter.grad = None  # optimizers pass over it from now on
        count = len(self.columns)
        sizes = [self.sizes[min(k, len(self.sizes) - 1)] for k in range(count + 1)]
        with seeding.seeded(self.seed, count):
            column = Column(self.width, sizes[-1], sizes[:-1])
        self.columns.append(column.to(next(self.columns.parameters()).device))
        return column


class ColumnPlugin:
    """Avalanche plugin: adds a column to each `ProgressiveBlock` as each later task starts."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.blocks = [m for m in training.model.modules() if isinstance(m, ProgressiveBlock)]

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Add columns, unless this is the first task or a resumed one."""
        if strategy.clock.train_exp_counter == 0 or getattr(strategy, "resuming", False):
            return
        self._add()
        strategy.optimized_param_id = dict(strategy.model.named_parameters())
        self.training.intervention.grown({})

    def state_dict(self) -> dict[str, Any]:
        """How many columns there are."""
        return {"columns": len(self.blocks[0].columns)}

    def rebuild_from(self, state: dict[str, Any]) -> None:
        """Add the saved columns, before weights and optimizer state are loaded."""
        while len(self.blocks[0].columns) < state["columns"]:
            self._add()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing but the columns, which are there already."""

    def _add(self) -> None:
        """A column for each block, and its parameters for the optimizer."""
        for block in self.blocks:
            column = block.add_column()
            self.training.optimizer.param_groups[0]["params"].extend(column.parameters())
