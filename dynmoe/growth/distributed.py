"""Growth on several processes: one plan, decided once, and carried out alike by all of them.

Every process must ask for a growth at the same moment. With one process all of this does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynmoe.errors import UserError
from dynmoe.growth.triggers.clock import Signals
from dynmoe.moe import ExpertBank, UnitBank
from dynmoe.moe.passes import several_processes

WRAPPER_OPTIONS = (
    "device_ids", "output_device", "dim", "process_group", "find_unused_parameters",
    "gradient_as_bucket_view", "static_graph", "mixed_precision",
)  # fmt: skip
"""Settings of a wrapper that its successor gets."""


def gathered(value: Any) -> list[Any]:
    """A picklable value of every process, in the order of their ranks."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def all_or_none() -> Iterator[None]:
    """Let a block of work fail on every process if it fails on one.

    Raises:
        UserError: it failed on another process.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    failures = gathered(None if mine is None else f"{type(mine).__name__}: {mine}")
    if mine is not None:
        raise mine
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise UserError(
                f"growth failed on process {rank}, so that no process has grown: {failure}"
            )


def from_first(value: Any) -> Any:
    """The value that the process of rank 0 has."""
    if not several_processes():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def common_generator(generator: torch.Generator) -> torch.Generator:
    """A generator that draws on every process what rank 0's is about to draw.

    It is the process's own where both stand alike, and else a copy of rank 0's: a process whose
    generator differs, such as torch's own with a seed for each rank, keeps its place in it.
    """
    if not several_processes():
        return generator
    state = from_first(generator.get_state())
    if torch.equal(state, generator.get_state()):
        return generator
    common = torch.Generator()
    common.set_state(state)
    return common


def mean_tensors(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means of equally named tensors, of the same shape, over the processes that have them."""
    if not several_processes():
        return dict(own)
    every = gathered({name: tensor.cpu() for name, tensor in own.items()})
    names = sorted({name for one in every for name in one})
    means = {n: torch.stack([one[n] for one in every if n in one]).mean(dim=0) for n in names}
    return {n: m.to(own[n].device) if n in own else m for n, m in means.items()}


def mean_figures(own: Mapping[str, float]) -> dict[str, float]:
    """Means of equally named figures over the processes that have them."""
    every = gathered(dict(own))
    means = {}
    for name in dict.fromkeys(name for one in every for name in one):
        values = [one[name] for one in every if name in one]
        means[name] = sum(values) / len(values)
    return means


def common_signals(signals: Signals, needs: frozenset[str]) -> Signals:
    """Signals whose figures, those in `needs`, are means over the processes.

    A figure is nan where it is nan on one of them. Shares in `reached` are averaged, too.
    """
    if not several_processes() or not (needs or signals.reached):
        return signals
    every = gathered(signals)
    figures: dict[str, Any] = {}
    for name in needs:
        values = [getattr(one, name) for one in every]
        figures[name] = None if None in values else math.fsum(values) / len(values)
    reached = zip(*(one.reached for one in every), strict=True)
    return replace(signals, reached=tuple(sum(s) / len(every) for s in reached), **figures)


def check_not_sharded(model: nn.Module) -> None:
    """Refuse parameters of which each process holds a part.

    Raises:
        UserError: the model has some (FSDP2's `fully_shard`, tensor parallelism).
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):  # a DTensor; its module is slow to import
            raise UserError(
                f"growth cannot write to {name}, which is sharded over processes; grow the model "
                "before fully_shard, or load its full state_dict into an unsharded model, grow "
                "that, and shard it again"
            )


def rewrap(wrapped: DistributedDataParallel) -> DistributedDataParallel:
    """A new DistributedDataParallel around the same module, with the settings of the old one.

    Needed after each growth of budget per-growth, which replaces the Parameters that the wrapper
    has noted. The old wrapper is of no more use. Communication hooks must be registered again.
    """
    wrapped._remove_autograd_hooks()
    options: dict[str, Any] = {name: getattr(wrapped, name) for name in WRAPPER_OPTIONS}
    if not wrapped.broadcast_buffers:
        options["broadcast_buffers"] = False
    if not wrapped.bucket_bytes_cap_default:
        options["bucket_cap_mb"] = wrapped.bucket_bytes_cap // 2**20
    return DistributedDataParallel(wrapped.module, **options)


def watch_wrapper(bank: ExpertBank) -> None:
    """From now on refuse passes through a DistributedDataParallel without the bank's Parameters."""
    if isinstance(bank, UnitBank) and _check_wrapper not in bank._forward_pre_hooks.values():
        bank.register_forward_pre_hook(_check_wrapper)


def _check_wrapper(bank: UnitBank, _: Any) -> None:
    """Refuse a wrapper that would leave a new Parameter's gradient as each process has it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    wrapper = DistributedDataParallel._get_active_ddp_module()
    parameter = getattr(bank, bank.unit_axes()[0][0])
    if wrapper is None or any(known is parameter for known in wrapper._module_parameters):
        return
    raise UserError(
        "the model has new Parameters that its DistributedDataParallel does not know; after each "
        "growth of budget per-growth call ddp = rewrap(ddp), from dynmoe.growth"
    )
