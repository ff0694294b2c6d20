"""The settings of a reinforcement-learning run, as `python -m dynmoe.rl` takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agents.encoders import Encoder
from agents.ppo import PPOSettings
from dynmoe.growth.budget import Budget
from dynmoe.growth.settings import GrowthSettings
from dynmoe.lab.config import RunConfig, place
from dynmoe.registry import PartConfig, slot


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, PPOSettings, GrowthSettings):
    """Settings of a reinforcement-learning run."""

    env: str = "Craftax-Classic-Pixels-v1"
    """Craftax-Pixels-v1, Craftax-Classic-Pixels-v1, the same with Symbolic, Identity-v0, Stages-v0,
    or a gymnasium id; module:Name-v0 imports the module that registers it"""
    env_args: str = ""
    """keyword arguments of a gymnasium environment as a JSON object, such as '{"gravity": 5}'"""
    normalize_observations: bool = False
    """scale a gymnasium environment's observations to mean 0 and deviation 1, as they come"""
    normalize_rewards: bool = False
    """divide its rewards by the deviation of their discounted sum; logged returns are as given"""
    renderer: Literal["fast", "upstream"] = "fast"
    """who draws Craftax's frames: our renderer from compact codes, or the package's own"""
    method: PartConfig = slot("agent", "dynamicmoe")
    intervention: PartConfig = slot("intervention", "none")
    compare: tuple[str, ...] = place(())
    """methods to run as well, one after the other, for the figure and the table"""
    encoder: Encoder.Config = slot("encoder", "patch")
    granularity: int = 1
    """experts at the start, and experts added by each growth"""
    trigger: PartConfig = slot("trigger", "every")
    budget: Budget = field(default_factory=lambda: Budget(mode="per-growth"))
    probe_every: int = 10
    """updates between two looks at plasticity, routing by floor and the router figure"""
    probe_samples: int = 256
    """observations of the latest rollout for the plasticity metrics"""
    evaluate: Path | None = place(None)
    """a run's folder, or a checkpoint in it: play episodes with that agent instead of training"""
    video: Path | None = place(None)
    """with --evaluate: write the best episode, router weights beneath, to this .mp4 file"""
    max_steps: int = place(2000)
    """with --evaluate: steps after which episodes still running are left out"""

    @property
    def variant(self) -> str:
        """The method, and the intervention if there is one."""
        method, intervention = self.method.part.name, self.intervention.part.name
        return method if intervention == "none" else f"{method}+{intervention}"
