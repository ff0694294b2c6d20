"""The routing of whole episodes, cut out of rollouts as they go by.

Shapes: T steps of a rollout, N environments, L steps of an episode, M experts a layer can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.rollout import Episode, Rollout


@dataclass(frozen=True)
class Trace:
    """One episode, step by step."""

    episode_return: float
    deepest: int
    """deepest floor reached"""
    floors: Tensor
    """[L] int64, floor at each step"""
    gates: dict[str, Tensor]
    """MoE layer name -> [L, M] float32 gates at each step, those of experts to come 0; empty for a
    dense network"""
    observations: Tensor | None = None
    """[L, ...] packed observations, where they were kept"""


class Traces:
    """Remembers the last steps of all environments, and of the episodes that end the best one.

    The best is the one that got deepest, and of those the longest: it shows most of the router.

    Args:
        keep: steps remembered; longer episodes are passed over.
        observations: keep these as well (for videos).

    Attributes:
        best: the best episode since `forget`, or None.
    """

    def __init__(self, keep: int = 2048, observations: bool = False) -> None:
        self.keep, self.with_observations = keep, observations
        self.chunks: list[dict[str, Any]] = []
        self.best: Trace | None = None

    def add(self, rollout: Rollout) -> None:
        """Remember a rollout, and look at the episodes that ended in it."""
        chunk: dict[str, Any] = {
            "floors": rollout.floors.cpu(),
            "gates": {name: gates.half().cpu() for name, gates in rollout.gates.items()},
            "observations": rollout.observations.cpu() if self.with_observations else None,
        }
        self.chunks.append(chunk)
        new = len(chunk["floors"])
        while sum(len(c["floors"]) for c in self.chunks) - len(self.chunks[0]["floors"]) >= (
            self.keep + new
        ):
            del self.chunks[0]
        before = sum(len(c["floors"]) for c in self.chunks[:-1])
        for episode in rollout.episodes:
            end = before + episode.step + 1
            if episode.length <= min(end, self.keep) and self._better(episode):
                self.best = self._cut(episode, end)

    def forget(self) -> None:
        """Look for a new best."""
        self.best = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"chunks": self.chunks, "best": None if self.best is None else vars(self.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.chunks = state["chunks"]
        self.best = None if state["best"] is None else Trace(**state["best"])

    def _better(self, episode: Episode) -> bool:
        best = self.best
        if best is None:
            return True
        return (episode.deepest, episode.length) > (best.deepest, len(best.floors))

    def _cut(self, episode: Episode, end: int) -> Trace:
        """The steps [end - length, end) of the episode's environment."""
        start, env = end - episode.length, episode.env

        def whole(parts: list[Tensor]) -> Tensor:
            return torch.cat([part[:, env] for part in parts])[start:end]

        seen = [c["observations"] for c in self.chunks]
        return Trace(
            episode_return=episode.episode_return,
            deepest=episode.deepest,
            floors=whole([c["floors"] for c in self.chunks]),
            gates={
                name: whole([c["gates"][name] for c in self.chunks]).float()
                for name in self.chunks[-1]["gates"]
            },
            observations=whole(seen) if self.with_observations else None,
        )
