"""What torchrun tells the processes that it starts, by environment variables; without torch.

How they then work together is in `processes.py`.
"""

from __future__ import annotations

import os

from dynmoe.errors import UserError

LOST_ONE = (
    "another process of this run has ended or does not answer; checkpoints are kept: start it "
    "again with --resume"
)


def started() -> bool:
    """Whether torchrun has started this process beside others; they may not be joined yet."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return not started() or os.environ.get("RANK", "0") == "0"


def refuse(what: str, instead: str) -> None:
    """End what several processes cannot share, if torchrun has started them.

    Raises:
        UserError: it has.
    """
    if started():
        raise UserError(f"torchrun is for one run on several processes, not for {what}; {instead}")
