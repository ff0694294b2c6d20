"""Interventions by name: those for any network, and replay, which needs the batches of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import dynmoe.interventions as for_any_network
from cl_benchmarks.stream import Position, crop_flip
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention, one_task
from dynmoe.registry import PartConfig

__all__ = ["Replay", "for_any_network"]


class Replay(Intervention, name="replay", source="Avalanche (Lomonaco et al. 2021), ReplayPlugin"):
    """Adds images of earlier tasks to every batch (Avalanche's ReplayPlugin).

    The memory holds equally many random images of each earlier task. From the second task on, as
    many of them as a batch has images are appended to each batch, so that batches are twice as
    large; an epoch has as many steps as without. Online accuracy then counts these images, too.
    It is against forgetting rather than for plasticity.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of replay."""

        size: int = 500
        """images in the memory"""
        batch: int = 0
        """images of the memory in each batch; 0 for as many as there are new ones"""

    by_batch = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.size < 1 or config.batch < 0:
            raise UserError(
                f"replay: size={config.size} must be at least 1 and batch={config.batch} at least 0"
            )

    def plugin(self) -> Any:
        """Avalanche's plugin, made resumable."""
        from avalanche.training.plugins import ReplayPlugin

        return ResumableReplay(
            ReplayPlugin(self.config.size, batch_size_mem=self.config.batch or None)
        )

    def penalty(self) -> Tensor:
        """Refused: where it is called nothing is replayed.

        Raises:
            UserError: always; Avalanche's loop does not call it.
        """
        raise UserError(
            "intervention replay acts in the loop of python -m dynmoe.cl alone; in a loop of your "
            "own mix the images of earlier tasks into the batches"
        )

    def without_tasks(self) -> str | None:
        """It keeps labelled images of tasks."""
        return "intervention replay keeps images of earlier tasks; there are none here; use l2-init"

    def too_late(self, tasks: float, steps: int) -> str | None:
        """There must be earlier tasks."""
        return one_task(tasks)


class ResumableReplay:
    """Avalanche plugin around its ReplayPlugin, for our `StreamTrainer`.

    What Avalanche draws, what is kept of a task and in which order it comes, is seeded by the run's
    seed, the task and the epoch. So the memory is filled again upon a resume, and nothing is saved.
    """

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin
        self.filled = 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """A task starts: put the batches with the memory in the place of our own."""
        task = strategy.position.task
        for earlier in range(self.filled, task):
            self._fill(strategy, earlier)
        if task > 0:
            self.plugin.before_training_exp(strategy, **kwargs)
            strategy.dataloader = ResumableLoader(
                strategy.dataloader, strategy.seed, strategy.position, strategy.augment
            )

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _fill(self, strategy: Any, task: int) -> None:
        """Take a finished task into the memory."""
        experience = strategy.experience.origin_stream[task]
        with seeding.seeded(strategy.seed, "replay", "memory", task):
            self.plugin.storage_policy.post_adapt(strategy, experience)
        self.filled = task + 1


class ResumableLoader:
    """Avalanche's loader in an order that depends on (seed, task, epoch), from any batch on.

    Args:
        loader: gives batches (images [B, C, H, W], labels [B], ...) in an order of torch's global
            generator.
        seed: the run's seed.
        position: read at the start of an iteration, and moved on before each batch is handed out.
        augment: as in `Batches`.
    """

    def __init__(self, loader: Any, seed: int, position: Position, augment: str) -> None:
        self.loader, self.seed, self.position, self.augment = loader, seed, position, augment

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        """Batches of the position's epoch, from the first that is not done yet."""
        key = ("replay", self.position.task, self.position.epoch)
        done, batches = self.position.batch, None
        for batch in range(len(self.loader)):
            with seeding.seeded(self.seed, *key, batch):
                batches = iter(self.loader) if batches is None else batches
                images, *rest = next(batches)
            if batch < done:
                continue
            self.position.batch = batch + 1
            if self.augment == "crop-flip":
                images = crop_flip(images, seeding.generator(self.seed, *key, batch))
            yield [images, *rest]
