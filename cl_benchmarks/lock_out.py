"""The newest experts' share of the gates at a task's end, and lock-out: that they get almost none.

A row of a task is what `asdict` makes of a `TaskRow`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cl_benchmarks.settings import Config
from dynmoe.growth.new_experts import latest_experts
from dynmoe.moe import moe_layers
from dynmoe.moe.diagnostics import gate_shares

LOCK_OUT = 0.25
"""The newest experts are locked out where their share of the current task is below this much of an
even share; the number is ours"""


def newest_shares(
    model: nn.Module, gates: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, float | None]:
    """What a row tells of the experts of the latest growth, each a mean over the MoE layers.

    Args:
        model: at the end of a task.
        gates: by task, of its probe in this model, by layer name, [N, E]; the latest task's last.

    Returns:
        The fields `newest_share`, `newest_share_old` and `newest_even`; {} where no layer has grown
        yet, or no gates were taken.
    """
    if not gates:
        return {}
    *past, now = gates.values()
    newest = {name: latest_experts(layer).cpu() for name, layer in moe_layers(model)}
    grown = [name for name in now if len(newest[name])]
    if not grown:
        return {}

    def share(task: Mapping[str, Tensor]) -> float:
        loads = [gate_shares(task[name]).mean(dim=0)[newest[name]].sum() for name in grown]
        return float(sum(loads)) / len(grown)

    even = sum(len(newest[name]) / now[name].shape[1] for name in grown) / len(grown)
    old = sum(map(share, past)) / len(past) if past else None
    return {"newest_share": share(now), "newest_share_old": old, "newest_even": even}


def locked_out(row: Mapping[str, Any]) -> bool:
    """Whether the newest experts were locked out at the end of a task; not where it is unknown."""
    share = row.get("newest_share")
    return share is not None and share < LOCK_OUT * row["newest_even"]


def tasks_with_lock_out(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers, from 1, of the tasks at whose ends the newest experts were locked out."""
    return [number for number, row in enumerate(rows, start=1) if locked_out(row)]


def lock_out_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's shares by TensorBoard tag, and whether it is a lock-out (1) or not (0)."""
    if row["newest_share"] is None:
        return {}
    values = {"router/newest_share_now": row["newest_share"]}
    if row["newest_share_old"] is not None:
        values["router/newest_share_old"] = row["newest_share_old"]
    return values | {"router/lock_out": float(locked_out(row))}


def warn_of_lock_out(rows: Sequence[Mapping[str, Any]], config: Config, label: str) -> None:
    """One line at the end of a run in which newest experts were locked out: where, what to try."""
    tasks = tasks_with_lock_out(rows)
    if not tasks:
        return
    way = " or ".join(_what_to_try(config))
    advice = f"; try {way}" if way else ""
    print(
        f"warning: {label}: lock-out at the end of task{'s' * (len(tasks) > 1)} "
        f"{', '.join(map(str, tasks))}: the newest experts got less than {100 * LOCK_OUT:.0f} % of "
        f"an even share of the samples{advice}",
        file=sys.stderr,
    )


def _what_to_try(config: Config) -> list[str]:
    """Flags that make a lock-out less likely, of those that are not given."""
    rows = getattr(config.init, "router", None)  # which ones a growth draws; see `RandomInit`
    if config.router.part.name == "gaussian":  # it keeps old experts apart only by their old rows
        return ["--init.router new"] if rows == "all" else []
    gaussian = "--router gaussian" + (" --init.router new" if rows == "all" else "")
    return [gaussian, "--init.router all"] if rows == "new" else [gaussian]
