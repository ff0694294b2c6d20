"""The settings of a reinforcement-learning run, as `python -m dynmoe.rl` takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import envs
from agents.encoders import Encoder
from agents.ppo import PPOSettings
from dynmoe import registry
from dynmoe.growth import Budget
from dynmoe.growth.settings import GROWTH, LAYER, GrowthSettings
from dynmoe.lab.config import KEEPING, RUNNING, RunConfig, place
from dynmoe.registry import PartConfig, slot

LEARNING = ("lr", "anneal_lr", "adam_eps", "epochs", "minibatches", "gae_lambda", "clip",
            "clip_value", "entropy", "value_weight", "max_grad_norm", "normalise_advantage",
            "intervention")  # fmt: skip
"""Settings of nothing but the updates of the network."""
PLAYING = ("evaluate", "video", "max_steps", "seed", "device", "debug", "allow_unused")
"""Settings that `--evaluate` uses; all others are those of the run."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, PPOSettings, GrowthSettings):
    """Settings of a reinforcement-learning run."""

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "What to run": (
            "env", "method", "intervention", "compare", "encoder", "total_steps", "seed", "seeds",
        ),
        "Play with a trained agent": ("evaluate", "video", "max_steps"),
        "MoE layers": LAYER,
        "Growth": GROWTH,
        "PPO": (
            "num_envs", "rollout_steps", "minibatches", "epochs", "lr", "anneal_lr", "gamma",
            "entropy", "autocast",
        ),
        "More of PPO, and measurements": (
            "gae_lambda", "clip", "clip_value", "value_weight", "max_grad_norm",
            "normalise_advantage", "adam_eps", "probe_every", "probe_samples", "phase_returns",
            "eval_every", "eval_steps",
        ),
        "Environment": (
            "env_args", "normalize_observations", "normalize_rewards", "renderer",
        ),
        "Runs": (*KEEPING, *RUNNING),
    }  # fmt: skip
    BRIEF: ClassVar[tuple[str, ...]] = ("More of PPO, and measurements",)

    env: str = "Craftax-Classic-Pixels-v1"
    """such as CartPole-v1; see docs/rl.md"""
    env_args: str = ""
    """options of the environment, such as '{"gravity": 5}' (docs/rl.md)"""
    normalize_observations: bool = False
    """scale gymnasium's observations to mean 0 and deviation 1"""
    normalize_rewards: bool = False
    """divide gymnasium's rewards by the deviation of their discounted sum"""
    renderer: Literal["fast", "upstream"] = "fast"
    """who draws Craftax's frames: we, or the package (upstream)"""
    method: PartConfig = slot("agent", "dynamicmoe")
    intervention: PartConfig = slot("intervention", "none")
    compare: tuple[str, ...] = place(())
    """methods to run as well, for the figure and the table"""
    encoder: Encoder.Config = slot("encoder", "patch")
    granularity: int = 1
    """experts at the start, and experts added by each growth"""
    trigger: PartConfig = slot("trigger", "every")
    budget: Budget = field(default_factory=lambda: Budget(mode="per-growth"))
    probe_every: int = 10
    """updates between two measurements of plasticity and routing"""
    probe_samples: int = 256
    """observations of the latest rollout for the plasticity metrics"""
    phase_returns: bool = False
    """play the phases so far at each shift, and all at the end (Stages-v0, Craftax-Phases-v1)"""
    eval_every: int = 0
    """environment steps between evaluations in environments of their own; the best agent is kept
    in the run's folder best; 0 for none"""
    eval_steps: int = 2000
    """steps of such an evaluation after which episodes still running are left out"""
    evaluate: Path | None = place(None)
    """a run's folder or checkpoint: play with that agent, train nothing"""
    video: Path | None = place(None)
    """an episode as .mp4, router beneath; of a run: a name in its folder"""
    max_steps: int = place(2000)
    """steps after which episodes still running are left out"""

    @property
    def variant(self) -> str:
        """The method, and the intervention if there is one."""
        method, intervention = self.method.part.name, self.intervention.part.name
        return method if intervention == "none" else f"{method}+{intervention}"

    def unused(self) -> dict[str, str]:
        """Setting -> why it has no effect, and what to do."""
        if self.evaluate is not None:
            every = ["preset", *(name for group in self.GROUPS.values() for name in group)]
            reason = "--evaluate takes the settings of the run; leave it out"
            return {name: reason for name in every if name not in PLAYING}
        known = registry.names("agent")
        agents = [self.method.part, *(registry.get("agent", n) for n in self.compare if n in known)]
        names = "--method " + " ".join(dict.fromkeys(agent.name for agent in agents))
        reasons = self.unused_growth(names, {o for agent in agents for o in agent.reads})
        if not envs.has_phases(self.env):
            reasons["phase_returns"] = f"{self.env} has no phases; leave it out"
        if not self.eval_every:
            reasons["eval_steps"] = "nothing is evaluated; set --eval-every"
        reasons["trigger.rows"] = "updates of rl are values as they are, not joined; leave it out"
        reasons |= {f"intervention.{o}": r for o, r in self.intervention.build().unused().items()}
        if not any(agent.learns for agent in agents):
            reasons |= {n: f"{names} does not learn; use one that does" for n in LEARNING}
        if self.video is None:
            reasons["max_steps"] = "it is for --evaluate FOLDER and --video NAME.mp4; leave it out"
        return reasons
