"""Dense networks that get more hidden units at every task: copies of old ones, or a new column."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_benchmarks.method import Horizon, Method, TaskPlugin, Training, acts_at_task_starts
from cl_benchmarks.trunks import MakeBlock
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.growth.optimizer_state import Moments, mean_moments, neutral_state
from dynmoe.growth.settings import PLAN, GrowthSettings
from dynmoe.growth.surgery import append_entries
from dynmoe.moe.bank import even_sizes
from dynmoe.registry import PartConfig

LARGEST_SCALE = 0.1
"""Scales of old columns are drawn between 0 and this; the paper says "random small values"."""


def _refuse_images(method: str, images: bool) -> None:
    """Raise a UserError where a block of convolutions is asked for."""
    if images:
        raise UserError(
            f"method {method} expands hidden blocks of vectors and has none for a trunk; use "
            "--network.place last, all or head"
        )


class Net2Wider(
    Method, name="net2wider", source="Chen et al. 2016 (arXiv 1511.05641), Section 2.2"
):
    """The dense block is widened at each task by copies of its units, without changing its outputs.

    Its width grows in equal steps, from a share 1 / tasks of the last one (our choice; with
    `--budget.mode per-growth` that is where DynamicMoE begins, too).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of Net2Wider."""

        factor: float = 0.0
        """hidden units in the last task, as a multiple of the other methods'; 0 for as many as
        DynamicMoE ends with under `--budget`"""
        noise: float = 0.01
        """deviation of the noise on what feeds a copy, as a multiple of that of the weights there;
        0 preserves the function exactly, but then copies stay alike for ever"""

    def __init__(self, config: Config) -> None:
        for name in ("factor", "noise"):
            value = getattr(config, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"method net2wider: {name}={value} must be at least 0")
        super().__init__(config)
        self.factor, self.noise = config.factor, config.noise

    def reads(self) -> tuple[str, ...]:
        """Adam's moments, and with factor 0 what DynamicMoE's size follows from."""
        return ("moments",) if self.factor else ("moments", "bank", *PLAN)

    def make_block(self, growth: GrowthSettings, horizon: Horizon, seed: int) -> MakeBlock:
        """A block that knows how wide it is to be in each task."""
        most = growth.most_experts(horizon.steps, horizon.tasks, horizon.batch)

        def make(dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
            _refuse_images(self.name, images)
            if self.factor:
                last = round(self.factor * hidden)
            else:
                growth.check_budget(hidden, most)
                last = growth.final_hidden(hidden, most)
            if last < horizon.tasks:
                raise UserError(
                    f"method net2wider: {last} hidden units in the end are too few for a growth at "
                    f"each of {horizon.tasks} tasks; use a larger --network.hidden or "
                    "--method.factor"
                )
            widths = [round(last * task / horizon.tasks) for task in range(1, horizon.tasks + 1)]
            return WideningBlock(dim_in, widths, dim_out)

        return make

    def without_tasks(self) -> str | None:
        """It widens at task starts."""
        return acts_at_task_starts(self)

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that widens the blocks."""
        return [WidenPlugin(training, self.noise, growth.moments)]


class WideningBlock(nn.Sequential):
    """A two-layer ReLU MLP, [B, D_in] -> [B, D_out], of `widths[k]` hidden units in task k."""

    def __init__(self, dim_in: int, widths: list[int], dim_out: int) -> None:
        super().__init__(nn.Linear(dim_in, widths[0]), nn.ReLU(), nn.Linear(widths[0], dim_out))
        self.widths = widths

    @property
    def hidden(self) -> int:
        """Hidden units now."""
        return self.layers[0].out_features

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        """What feeds the hidden units, and what reads them.

        Raises:
            UserError: an intervention has put something else in their place.
        """
        first, second = self[0], self[2]
        if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
            raise UserError(
                "method net2wider cannot widen a block that an intervention has rebuilt "
                "(layernorm, crelu, nap); use another --intervention"
            )
        return first, second

    def append(self, count: int, optimizer: Optimizer | None) -> None:  # type: ignore[override]
        """Add `count` hidden units with weights 0."""
        first, second = self.layers
        append_entries(first, "weight", 0, count, optimizer)
        append_entries(first, "bias", 0, count, optimizer)
        append_entries(second, "weight", 1, count, optimizer)
        first.out_features = second.in_features = len(first.bias)


@torch.no_grad()
def widen(
    block: WideningBlock,
    hidden: int,
    noise: float,
    generator: torch.Generator,
    optimizer: Optimizer | None = None,
    moments: Moments = "mean",
) -> None:
    """Widen a block to `hidden` units by copies of random units (Eqs. 4 and 5 of the paper).

    All copies of a unit share its outgoing weights equally. Old units keep their optimizer state;
    that of copies begins as `optimizer_state.neutral_state` says.
    """
    old = block.hidden
    parent = torch.randint(old, (hidden - old,), generator=generator)
    first, second = block.layers
    slots = [(first, "weight", 0), (first, "bias", 0), (second, "weight", 1)]
    means = [mean_moments(optimizer, getattr(m, name), moments) for m, name, _ in slots]
    spread = float(first.weight.detach().std())
    block.append(hidden - old, optimizer)
    source = torch.cat([torch.arange(old), parent])
    copies = torch.bincount(source, minlength=old)[source].to(second.weight)
    new = torch.arange(old, hidden, device=first.weight.device)
    source = source.to(new.device)
    for (module, name, axis), mean in zip(slots, means, strict=True):
        parameter = getattr(module, name)
        parameter.copy_(parameter.index_select(axis, source))
        neutral_state(optimizer, parameter, axis, new, mean)
    second.weight.div_(copies)
    for parameter in (first.weight, first.bias):
        draw = torch.randn((len(new), *parameter.shape[1:]), generator=generator)
        parameter[new] += noise * spread * draw.to(parameter)


class WidenPlugin(TaskPlugin):
    """Avalanche plugin: widens each `WideningBlock` at the start of each later task.

    Args:
        training: the model, its optimizer, and the generator that chooses and disturbs copies.
        noise: see `Net2Wider.Config`.
        moments: optimizer state of the copies.
    """

    def __init__(self, training: Training, noise: float, moments: Moments) -> None:
        super().__init__(training)
        self.noise, self.moments = noise, moments
        blocks = training.model.named_modules()
        self.blocks = {name: m for name, m in blocks if isinstance(m, WideningBlock)}

    def task_starts(self, strategy: Any, task: int) -> None:
        """Widen."""
        training, before = self.training, dict[str, Tensor]()
        for name, block in self.blocks.items():
            before |= {f"{name}.{own}": p.detach().clone() for own, p in block.named_parameters()}
            hidden = block.widths[min(task, len(block.widths) - 1)]
            widen(block, hidden, self.noise, training.generator, training.optimizer, self.moments)
        strategy.optimized_param_id = dict(strategy.model.named_parameters())
        training.intervention.grown(before)

    def state_dict(self) -> dict[str, Any]:
        """Widths, and the generator."""
        hidden = [block.hidden for block in self.blocks.values()]
        return {"hidden": hidden, "generator": self.training.generator.get_state()}

    def rebuild_from(self, state: dict[str, Any]) -> None:
        """Give the blocks their saved widths, before weights and optimizer state are loaded."""
        for block, hidden in zip(self.blocks.values(), state["hidden"], strict=True):
            block.append(hidden - block.hidden, self.training.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.training.generator.set_state(state["generator"].cpu())


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
        most, blocks = (
            growth.most_experts(horizon.steps, horizon.tasks, horizon.batch),
            itertools.count(),
        )

        def make(dim_in: int, hidden: int, dim_out: int, images: bool = False) -> nn.Module:
            _refuse_images(self.name, images)
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
            own_seed = seeding.derive(seed, "columns", next(blocks))
            return ProgressiveBlock(dim_in, sizes, dim_out, own_seed)

        return make

    def without_tasks(self) -> str | None:
        """It adds a column at task starts."""
        return acts_at_task_starts(self)

    def plugins(self, growth: GrowthSettings, training: Training) -> list[Any]:
        """The plugin that adds columns."""
        return [ColumnPlugin(training)]


class Column(nn.Module):
    """One column: hidden units of its own, and an adapter to those of the columns before it.

    Args:
        dim_in, dim_out: D_in and D_out.
        units: its hidden units.
        before: hidden units of each column before it.
    """

    def __init__(self, dim_in: int, units: int, dim_out: int, before: list[int]) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(dim_in, units), nn.ReLU())
        self.output = nn.Linear(units, dim_out)
        if before:
            self.scale = nn.Parameter(torch.empty(len(before)).uniform_(0, LARGEST_SCALE))
            self.reduce = nn.Sequential(nn.Linear(sum(before), units), nn.ReLU())
            self.adapt = nn.Linear(units, dim_out, bias=False)

    def forward(self, own: Tensor, others: list[Tensor]) -> Tensor:
        """Output [B, D_out] from its own hidden units [B, u] and those of the columns before it."""
        output = self.output(own)
        if others:
            scaled = [scale * h for scale, h in zip(self.scale, others, strict=True)]
            output = output + self.adapt(self.reduce(torch.cat(scaled, dim=1)))
        return output


class ProgressiveBlock(nn.Module):
    """Columns, [B, D_in] -> [B, D_out]; the newest one speaks and learns.

    Args:
        dim_in, dim_out: D_in and D_out.
        sizes: hidden units of the columns to come, by task.
        seed: decides their first weights; the first column draws from torch's global generator.
    """

    def __init__(self, dim_in: int, sizes: list[int], dim_out: int, seed: int) -> None:
        super().__init__()
        self.dim_in, self.sizes, self.dim_out, self.seed = dim_in, sizes, dim_out, seed
        self.columns = nn.ModuleList([Column(dim_in, sizes[0], dim_out, [])])

    def output_layers(self) -> list[nn.Module]:
        """The newest column's layers that give the output: its own, then its adapter."""
        newest: Any = self.columns[-1]
        return [m for m in (newest.output, getattr(newest, "adapt", None)) if m is not None]

    def forward(self, x: Tensor) -> Tensor:
        """The newest column's output [B, D_out] for x [B, D_in]."""
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
            column = Column(self.dim_in, sizes[-1], self.dim_out, sizes[:-1])
        self.columns.append(column.to(next(self.columns.parameters()).device))
        return column


class ColumnPlugin(TaskPlugin):
    """Avalanche plugin: adds a column to each `ProgressiveBlock` as each later task starts."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.blocks = [m for m in training.model.modules() if isinstance(m, ProgressiveBlock)]

    def task_starts(self, strategy: Any, task: int) -> None:
        """Add columns."""
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

    def _add(self) -> None:
        """A column for each block, and its parameters for the optimizer."""
        for block in self.blocks:
            column = block.add_column()
            self.training.optimizer.param_groups[0]["params"].extend(column.parameters())
