"""Recycling of dormant units."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import UnitLayer, find_units, watch
from dynmoe.registry import PartConfig


class ReDo(Intervention, name="redo", source="Sokar et al. 2023 (arXiv 2302.12902), Algorithm 1"):
    """Draws dormant units afresh, silent at first.

    A unit's score is its mean |activation| over the mean of its layer (Eq. 1), on the latest
    training batch; feature maps are averaged over their positions. Units with a score of at most
    tau get fresh incoming weights and outgoing weights 0, and restart their optimizer moments.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of ReDo."""

        tau: float = 0.1
        """largest score of a dormant unit; 0 for units that never fire"""
        period: int = 100
        """optimizer steps between two recyclings"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= config.tau < 1:
            raise UserError(f"redo: tau={config.tau} must be in 0 .. 1")
        if config.period < 1:
            raise UserError(f"redo: period={config.period} must be at least 1")

    def begin(self) -> None:
        """Find the units, and look on as they act."""
        self.layers = find_units(self.model)
        self.activity: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers):
            watch(layer, number, self._see, self._due)

    def after_step(self) -> None:
        """Recycle when it is time."""
        if self.steps % self.config.period == 0:  # after the step that `_due` announced
            for number, activity in self.activity.items():
                self.recycle(self.layers[number], activity)
            self.activity.clear()

    def recycle(self, layer: UnitLayer, activity: Tensor) -> Tensor:
        """Draw the dormant units of a layer afresh; returns their numbers [n].

        Args:
            activity: [U] mean |activation| of each unit.
        """
        score = activity / (activity.mean() + 1e-9)
        dormant = (score <= self.config.tau).nonzero().flatten()
        if len(dormant):
            layer.draw_incoming(dormant, self.generator)
            layer.silence(dormant)
            layer.restart_moments(dormant, self.optimizer)
        return dormant

    def _due(self) -> bool:
        """Whether the step that comes is one after which units are recycled."""
        return (self.steps + 1) % self.config.period == 0

    def _see(self, number: int, activations: Tensor) -> None:
        self.activity[number] = activations.abs().mean(dim=0)
