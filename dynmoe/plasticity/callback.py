"""Plasticity in a training loop of one's own, written to TensorBoard every so many steps."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from torch import Tensor, nn

from dynmoe.errors import UserError, unknown
from dynmoe.plasticity.measuring import measure

SUMMARY = (
    "dormant/0", "dormant/0.025", "dead_units", "rank/effective_rank", "rank/stable_rank_fro",
    "rank/srank99", "weight_norm/l2", "grad_norm/l2", "grad_norm/zero_share",
)  # fmt: skip
"""The tags of `measure` that are written by default."""


class Writer(Protocol):
    """What is needed of TensorBoard's `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number of one step."""


class PlasticityCallback:
    """Measures a network every so many optimizer steps, and writes the numbers.

        callback = PlasticityCallback(SummaryWriter("runs/mine"), images, labels, every=100)
        for step, batch in enumerate(batches):
            ...
            optimizer.step()
            callback(model, step)

    Take a fixed batch, so that the numbers compare over time. A measurement costs a forward and a
    backward pass of it, and two decompositions of at most [N, N].

    Args:
        writer: `SummaryWriter`, or what else has its `add_scalar`.
        inputs: [N, ...], on the model's device.
        labels: [N] int class indices; None: no norms of gradients.
        every: optimizer steps from one measurement to the next.
        tags: those of `measure` that are written; None: `SUMMARY`, as far as the network has them.
        prefix: of the tags.
        classifier: the module whose inputs are the features, see `measure`.

    Raises:
        UserError: `every` below 1.
    """

    def __init__(
        self,
        writer: Writer,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        every: int = 100,
        tags: Collection[str] | None = None,
        prefix: str = "plasticity/",
        classifier: nn.Module | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"every {every} must be at least 1, in optimizer steps")
        self.writer, self.inputs, self.labels = writer, inputs, labels
        self.every, self.tags, self.prefix, self.classifier = every, tags, prefix, classifier

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure if `step` is a multiple of `every`; returns what was written, or nothing.

        Raises:
            UserError: a tag that was asked for and that this network does not have.
        """
        if step % self.every:
            return {}
        values = measure(model, self.inputs, self.labels, classifier=self.classifier)
        for tag in self.tags or ():
            if tag not in values:
                raise unknown("plasticity tag", tag, values)
        wanted = SUMMARY if self.tags is None else self.tags
        written = {tag: values[tag] for tag in wanted if tag in values}
        for tag, value in written.items():
            self.writer.add_scalar(self.prefix + tag, value, step)
        return written
