"""One run on several processes, which `torchrun` starts: one for each GPU, or for each core.

    torchrun --nproc-per-node 2 -m dynmoe.cl ...

All processes do the same, from the same seed, on the same data, so that weights, growths and
measurements are equal everywhere; only the rows of each batch are dealt out, and environments. So
there are few places where they must meet: after each backward pass their gradients are averaged
(`average_gradients`), parts of what was played are joined (`joined_parts`), and what rank 0 alone
reads from disk is told to all (`by_first`). Rank 0 alone writes and prints. No
DistributedDataParallel: growth replaces parameters, and one sum of one flat tensor after the
backward pass needs to know nothing about them.

A loss of process r on its n_r rows of a batch of n is `P n_r / n` times their mean: the mean over
P processes is then the mean over the batch, however uneven its parts. With one process, and
without torchrun, nothing here does anything.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe.errors import DynmoeError, UserError
from dynmoe.lab.torchrun import first, started

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others, which may be measuring, before it gives up."""
LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting",
        "Read error", "Socket Timeout", "NCCL", "Connection refused")  # fmt: skip
"""Parts of torch's messages when another process is gone or does not answer."""
_stop: dict[str, int | None] = {"asked": None, "agreed": None}
"""Signal number that asks this process to stop, and the one that all have agreed on."""


def joined() -> bool:
    """Whether several processes work together now."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def size() -> int:
    """Processes, P."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    """The number of this process, 0 .. P - 1."""
    return dist.get_rank() if joined() else 0


def join(device: str) -> None:
    """Meet the other processes that torchrun has started, by gloo on CPUs and NCCL on GPUs.

    Args:
        device: the setting; with CUDA each process takes the GPU of its number on its machine.

    Raises:
        UserError: there are fewer GPUs than processes, or one GPU is asked for.
    """
    if not started() or dist.is_initialized():
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if ":" in device:
            raise UserError(
                f"--device {device} is one GPU, and torchrun has started {here} processes here; "
                "use --device cuda, of which each takes its own"
            )
        if here > gpus:
            raise UserError(
                f"torchrun has started {here} processes here, and there are {gpus} GPUs; use "
                f"--nproc-per-node {max(gpus, 1)}, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        warnings.simplefilter("ignore")


def by_first(work: Callable[[], T]) -> T:
    """What `work()` gives on rank 0, on all processes; if it fails there, it fails on all.

    Raises:
        DynmoeError: as raised there.
    """
    if not joined():
        return work()
    told: list[Any] = [None, None]
    found: list[T] = []
    failure = None
    if rank() == 0:
        try:
            found.append(work())
            told[0] = _packed(found[0])
        except DynmoeError as error:
            failure, told[1] = error, (str(error), error.exit_code)
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise _told_of(*told[1])
    return found[0] if found else _unpacked(told[0])


def in_turn(work: Callable[[], T]) -> T:
    """What `work()` gives on each process, on rank 0 before the others: it may write a cache."""
    kept: list[T] = []
    by_first(lambda: kept.append(work()))
    return kept[0] if kept else work()


def all_succeed(work: Callable[[], T]) -> T:
    """What `work()` gives on each process; if it fails on one, it fails on all.

    Signals to stop travel along, see `average_gradients`.

    Raises:
        DynmoeError: as raised here, or by the first that failed.
    """
    if not joined():
        return work()
    found: list[T] = []
    failure: DynmoeError | None = None
    try:
        found.append(work())
    except DynmoeError as error:
        failure = error
    told = of_all((failure and (str(failure), failure.exit_code), _stop["asked"]))
    if any(asked is not None for _, asked in told):
        _stop["agreed"] = _stop["asked"] or signal.SIGTERM
    if failure is not None:
        raise failure
    for failed, _ in told:
        if failed:
            raise _told_of(*failed)
    return found[0]


def _told_of(message: str, exit_code: int) -> DynmoeError:
    """The error that another process has told of."""
    error = DynmoeError(message)
    error.exit_code = exit_code
    return error


def own_rows(rows: Tensor) -> Tensor:
    """The rows of a batch [n, ...] that are this process's: every P-th one."""
    return rows[rank() :: size()] if joined() else rows


def all_rows(own: Tensor) -> Tensor:
    """The rows [n, ...] of which each process has its own, in their order; by way of the CPU."""
    if not joined():
        return own
    parts = of_all(own.cpu())
    rows = torch.empty(sum(map(len, parts)), *own.shape[1:], dtype=parts[0].dtype)
    for number, part in enumerate(parts):
        rows[number :: size()] = part
    return rows.to(own.device)


def own_items(items: Sequence[T]) -> Sequence[T]:
    """The items that are this process's work: every P-th one."""
    return items[rank() :: size()]


def all_items(own: list[T]) -> list[T]:
    """What each process has found of its own items, in the order of all; tensors of the CPU."""
    if not joined():
        return own
    parts = of_all(own)
    count = sum(map(len, parts))
    return [parts[place % size()][place // size()] for place in range(count)]


def of_all(own: T) -> list[T]:
    """What each process has, in order of rank; tensors of the CPU."""
    if not joined():
        return [own]
    parts: list[Any] = [None] * size()
    dist.all_gather_object(parts, own)
    return parts


def told_to_first(own: T) -> list[T] | None:
    """On rank 0 what each process has, in order of rank, tensors of the CPU; None on the others."""
    if not joined():
        return [own]
    parts: list[Any] | None = [None] * size() if rank() == 0 else None
    dist.gather_object(_packed(own), parts)
    return parts and [_unpacked(part) for part in parts]


def _packed(value: Any) -> bytes:
    """As in a file: torch pickles no tensors of uint32, such as Craftax has."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    """The value again; another process of this run has packed it."""
    return torch.load(io.BytesIO(data), weights_only=False)


def joined_parts(own: Tensor, axis: int) -> Tensor:
    """Tensors of equal shapes, one of each process in order of rank, joined along an axis."""
    if not joined():
        return own
    own = own.contiguous()
    parts = [torch.empty_like(own) for _ in range(size())]
    dist.all_gather(parts, own)
    return torch.cat(parts, dim=axis)


def own_share(rows: int, whole: int) -> float:
    """What a mean over this process's rows of a batch of `whole` rows is multiplied by."""
    return size() * rows / whole


def summed(values: Tensor) -> Tensor:
    """Values of any shape, without gradient, added up over all processes."""
    if joined():
        values = values.clone()
        dist.all_reduce(values)
    return values


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], figures: Tensor) -> Tensor:
    """Replace all gradients by their means over the processes, and add up figures [K].

    One sum of one flat tensor. A gradient that some lack is 0 there; one that all lack stays None.
    Signals to stop travel along, so that all processes stop after the same step.

    Args:
        parameters: of the same shapes and in the same order everywhere.
        figures: what else is to be added up; in the precision of the gradients at least.

    Returns:
        the sums, [K].
    """
    if not joined():
        return figures
    learnt = [p for p in parameters if p.requires_grad]
    has = [p.grad is not None for p in learnt]
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in learnt]
    more = figures.new_tensor([*map(float, has), float(_stop["asked"] is not None)])
    flat = torch.cat([g.reshape(-1) for g in own] + [more, figures])
    dist.all_reduce(flat)
    *sums, known, asked, found = flat.split([*(g.numel() for g in own), len(has), 1, len(figures)])
    for parameter, mean, count in zip(learnt, sums, known.tolist(), strict=True):
        if count:
            # in the parameter's layout: fused optimizers read both in the order of their memory
            parameter.grad = torch.empty_like(parameter).copy_(mean.div_(size()).view_as(parameter))
    if float(asked):
        _stop["agreed"] = _stop["asked"] or signal.SIGTERM
    return found


def ask_to_stop(number: int) -> None:
    """A signal has come to this process: tell the others with the next gradients."""
    _stop["asked"] = number


def forget_signals() -> None:
    """A run begins."""
    _stop.update(asked=None, agreed=None)


def agreed_to_stop() -> int | None:
    """The signal that one process or more had got by the latest step, or None."""
    return _stop["agreed"]


def check_alike(model: nn.Module, step: int) -> None:
    """Refuse to go on with processes that have drifted apart.

    Raises:
        DynmoeError: a weight differs; it is a fault of this program.
    """
    if not joined():
        return
    mine = torch.stack([_trace(p) for p in model.parameters()])
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for (name, _), same in zip(model.named_parameters(), (least == most).tolist(), strict=True):
        if not same:
            raise DynmoeError(
                f"at step {step} the processes have different values of {name}, which is a fault "
                "of dynmoe; the last checkpoint is kept, go on with one process"
            )


def _trace(parameter: Tensor) -> Tensor:
    """A number of a tensor's bits, int64; another one if any of them differs, but for chance."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = parameter.detach().contiguous().view(-1).view(sizes[parameter.element_size()]).long()
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    return ((bits + 1) * (place * 0x9E3779B97F4A7C1)).sum()


def lost(error: BaseException) -> bool:
    """Whether an error of torch says that another process is gone or does not answer."""
    return joined() and any(part in str(error) for part in LOST)
