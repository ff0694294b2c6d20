"""The kind of part that acts: `--method NAME`. It says what stands in the network's blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from agents.actor_critic import MakeBlock
from dynmoe.growth.settings import GrowthSettings
from dynmoe.registry import Part, PartConfig


class Agent(Part, ABC, kind="agent"):
    """Base of all agents. They differ in the blocks of their network, and in what they do at all.

    Attributes:
        grows: experts are added while it learns.
        learns: its network is trained.
        acts: it follows its network; else it takes every action equally often.
    """

    grows: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    acts: ClassVar[bool] = True

    def __init__(self, config: PartConfig) -> None:
        self.config = config

    @abstractmethod
    def make_block(self, growth: GrowthSettings, steps: int, seed: int) -> MakeBlock:
        """The maker of the blocks, (input width, hidden units, output width) -> module.

        Args:
            growth: what the layers look like and how they grow.
            steps: environment steps of the run.
            seed: of the blocks' own random numbers.

        Raises:
            UserError: the settings cannot work, found before any training.
        """
