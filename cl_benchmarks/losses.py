"""Cross entropy over all classes, over those seen so far, or over those at hand.

In class-incremental streams with one head over all classes, the softmax over all of them pushes the
logits of old classes down while new ones are learnt, and so forgets more than weights need to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError

LossOver = Literal["all", "seen", "present"]


class StreamLoss(nn.Module):
    """Mean cross entropy over some of the classes, nats; the other logits get no gradient.

    - `all`: every output of the head.
    - `seen`: classes of all tasks so far, the present one among them.
    - `present`: classes of the present task, and of what else is in the batch, as with replay
      (separated softmax, after the labels trick of Zeno et al. 2018, arXiv 1803.10123; what it does
      to old features: Caccia et al. 2022, arXiv 2104.05025).

    Args:
        over: which.
    """

    def __init__(self, over: LossOver = "all") -> None:
        super().__init__()
        self.over = over
        self.classes: Tensor = torch.empty(0, dtype=torch.long)  # of the task, or of those so far

    def task_starts(self, tasks: list[Iterable[int]]) -> None:
        """A task starts; `tasks` has the classes of each so far, its own last."""
        known = tasks if self.over == "seen" else tasks[-1:]
        self.classes = torch.tensor(sorted({label for labels in known for label in labels}))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, C] and labels [B] -> scalar. The labels' own classes always count."""
        if self.over != "all":
            left_out = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            left_out[self.classes.to(logits.device)] = False
            left_out[labels] = False
            logits = logits.masked_fill(left_out, float("-inf"))
        return F.cross_entropy(logits, labels)


def check_loss(over: LossOver, tasks: list[Tensor], outputs: int, protocol: str) -> None:
    """Refuse a choice of classes that leaves none out.

    Args:
        tasks: labels of each task's training images, int64 [n].
        outputs: of the head.
        protocol: its name, for the text.

    Raises:
        UserError: names the setting and what works.
    """
    if over == "all":
        return
    counts = [len(labels.unique()) for labels in tasks]
    if (counts[0] if over == "seen" else min(counts)) == outputs:
        which = "the first task" if over == "seen" else "every task"
        raise UserError(
            f"--loss-over {over} has no effect: {which} of protocol {protocol} has all {outputs} "
            "classes; use --loss-over all, or --protocol class --protocol.head full"
        )
