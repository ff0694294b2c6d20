"""Plasticity as an Avalanche plugin, for any Avalanche strategy that trains by gradient steps."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cl_benchmarks.growth_plugin import evenly_spaced
from dynmoe.plasticity.callback import PlasticityCallback, Writer


class PlasticityPlugin:
    """Writes the plasticity of `strategy.model` every so many steps, on images of the present task.

    Before a step, so that the first number of a task is that of the network it starts with. For
    models that take images alone; heads that ask for task labels cannot be measured this way.

    Args:
        writer: TensorBoard's `SummaryWriter`, or what else has its `add_scalar`.
        every: optimizer steps from one measurement to the next, counted over all tasks.
        samples: most images in the batch, evenly spaced in the task's training data.
        tags: see `PlasticityCallback`.

    Raises:
        UserError: `every` below 1, with the first task.
    """

    def __init__(
        self,
        writer: Writer,
        every: int = 100,
        samples: int = 256,
        tags: Collection[str] | None = None,
    ) -> None:
        self.writer, self.every, self.samples, self.tags = writer, every, samples, tags

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """A task starts: take the batch."""
        images, labels, _tasks = evenly_spaced(
            strategy.experience.dataset, self.samples, strategy.device
        )
        self._callback = PlasticityCallback(
            self.writer, images, labels, every=self.every, tags=self.tags
        )

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        """An optimizer step comes, after those that the clock has counted."""
        self._callback(strategy.model, strategy.clock.train_iterations)
