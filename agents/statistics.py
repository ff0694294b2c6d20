"""What is kept of rollouts: sums over episodes and routing, and the routing of whole episodes.

Shapes: T steps of a rollout, N environments, L steps of an episode, F floors, V of them visited, M
experts a layer can hold, E living ones.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.rollout import Episode, Rollout
from dynmoe.moe.diagnostics import gate_shares
from dynmoe.plasticity.tasks import expert_task_information, information_by_expert
from envs.vector import TorchVectorEnv

RECENT = 100
"""Episodes in the running mean."""


class EpisodeStats:
    """Returns, floors and achievements of the episodes that ended since `restart`."""

    def __init__(self, env: TorchVectorEnv) -> None:
        self.achievements, self.max_return = env.achievements, env.max_return
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.restart()

    def restart(self) -> None:
        """Begin a new stretch; the running mean goes on."""
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self.deepest: list[int] = []
        self.unlocked = [0] * len(self.achievements)

    def add(self, rollout: Rollout) -> None:
        """Count the episodes that ended in a rollout."""
        for episode in rollout.episodes:
            self.recent.append(episode.episode_return)
            self.returns.append(episode.episode_return)
            self.lengths.append(episode.length)
            self.deepest.append(episode.deepest)
            for index in episode.achievements:
                self.unlocked[index] += 1

    @property
    def score(self) -> float:
        """Mean return of the latest 100 episodes; nan before the first has ended."""
        return sum(self.recent) / len(self.recent) if self.recent else float("nan")

    def values(self) -> dict[str, float]:
        """Means over the stretch by TensorBoard tag; nothing where no episode ended."""
        count = len(self.returns)
        if not count:
            return {}
        values = {
            "episode/return": sum(self.returns) / count,
            "episode/return_recent": self.score,
            "episode/length": sum(self.lengths) / count,
            "episode/count": float(count),
            "episode/deepest_floor": float(max(self.deepest)),
            "episode/mean_deepest_floor": sum(self.deepest) / count,
        }
        if self.max_return:
            values["episode/return_percent"] = 100 * values["episode/return"] / self.max_return
        for name, unlocked in zip(self.achievements, self.unlocked, strict=True):
            values[f"achievement/{name}"] = unlocked / count
        return values

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        names = ("returns", "lengths", "deepest", "unlocked")
        return {name: getattr(self, name) for name in names} | {"recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.recent = deque(state["recent"], maxlen=RECENT)
        for name in state.keys() - {"recent"}:
            setattr(self, name, state[name])


class FloorRouting:
    """Mean gate shares on each floor, per MoE layer."""

    def __init__(self, num_floors: int) -> None:
        self.num_floors = num_floors
        self.restart()

    def restart(self) -> None:
        """Begin a new stretch."""
        self.sums: dict[str, Tensor] = {}
        self.counts = torch.zeros(self.num_floors, dtype=torch.double)

    def add(self, rollout: Rollout) -> None:
        """Count a rollout's gates under the floors they were made on."""
        floors = rollout.floors.flatten().cpu()
        self.counts += torch.bincount(floors, minlength=self.num_floors)
        for name, gates in rollout.gates.items():
            shares = gate_shares(gates.flatten(0, 1)).cpu()
            sums = self.sums.setdefault(
                name, torch.zeros(self.num_floors, shares.shape[1], dtype=torch.double)
            )
            sums.index_add_(0, floors, shares)

    def visited(self) -> list[int]:
        """The V floors that the agents have been on."""
        return self.counts.nonzero().flatten().tolist()

    def loads(self, num_experts: int) -> dict[str, Tensor]:
        """[V, E] load of each expert on each visited floor, by layer."""
        visited = self.counts > 0
        return {
            name: sums[visited, :num_experts] / self.counts[visited].unsqueeze(1)
            for name, sums in self.sums.items()
        }

    def values(self, num_experts: int) -> dict[str, float]:
        """Load of each expert on each visited floor, and what experts tell of the floor.

        The information is in nats, of all experts and of each; its share is of the most it could
        be. Floors weigh alike, however long the agents stayed on each.
        """
        floors = self.visited()
        values: dict[str, float] = {}
        for name, load in self.loads(num_experts).items():
            for floor, shares in zip(floors, load, strict=True):
                for expert, share in enumerate(shares.tolist()):
                    values[f"router/floor_{floor}/{name}/expert_{expert}"] = share
            nats, share = expert_task_information(load)
            values[f"router/floor_information/{name}"] = nats
            values[f"router/floor_information_share/{name}"] = share
            for expert, own in information_by_expert(load).items():
                values[f"router/floor_information/{name}/expert_{expert}"] = own
        return values

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.sums, self.counts = state["sums"], state["counts"]


def learning_curve(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Curve of one variant over its seeds, from the summaries of its runs.

    Returns:
        steps [K] (environment steps), returns [seeds][K] (nan where no episode ended since the
        point before), and growths, the steps at which any seed grew.
    """
    returns = [
        [math.nan if value is None else value for _, value in run["curve"]] for run in summaries
    ]
    return {
        "steps": [step for step, _ in summaries[0]["curve"]],
        "returns": returns,
        "growths": sorted({event["step"] for run in summaries for event in run["growth"]}),
    }


def tenths(curve: list[list[float | None]]) -> list[float]:
    """Mean returns over each tenth of a run's points that begins at one of them, in their order.

    Points [steps, return] in whose stretch no episode ended are left out; [] if all are.
    """
    known = [value for _, value in curve if value is not None]
    size = max(1, math.ceil(len(known) / 10))
    return [sum(known[i : i + size]) / size for i in range(len(known) - size + 1 if known else 0)]


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
    """[L, ...] packed pictures, where they were kept: see `TorchVectorEnv.pictures`"""


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
        rank = (self.best.deepest, len(self.best.floors)) if self.best else (-1, -1)
        return (episode.deepest, episode.length) > rank

    def _cut(self, episode: Episode, end: int) -> Trace:
        """The steps [end - length, end) of the episode's environment."""
        start, env = end - episode.length, episode.env

        def whole(parts: list[Tensor]) -> Tensor:
            return torch.cat([part[:, env] for part in parts])[start:end]

        names = self.chunks[-1]["gates"]
        gates = {name: whole([c["gates"][name] for c in self.chunks]).float() for name in names}
        seen = [c["observations"] for c in self.chunks]
        return Trace(
            episode.episode_return, episode.deepest, whole([c["floors"] for c in self.chunks]),
            gates, whole(seen) if self.with_observations else None,
        )  # fmt: skip
