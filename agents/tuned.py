"""Settings of PPO that are tuned for one environment each: presets of `python -m dynmoe.rl`.

docs/rl.md says how each was found, and what it reaches by seed.
"""

from __future__ import annotations

from typing import Any

from agents.settings import Config
from dynmoe.registry import get

ZOO: dict[str, Any] = {
    "anneal_lr": False,
    "lr": 3e-4,
    "entropy": 0.0,
    "clip_value": False,
    "max_grad_norm": 0.5,
    "value_weight": 1.0,  # of half the squared error: stable-baselines3's 0.5 of the whole
}
"""What rl-baselines3-zoo (ppo.yml) and stable-baselines3 set for these environments."""
SCALED: dict[str, Any] = {"normalize_observations": True, "normalize_rewards": True}


def tuned() -> dict[str, Config]:
    """A preset for each environment; that of CartPole-v1 is the best of 20 trials of a search."""
    cartpole = {"num_envs": 8, "rollout_steps": 32, "minibatches": 8, "epochs": 10, "lr": 1.4e-3,
                "gae_lambda": 0.95, "probe_every": 50}  # fmt: skip
    acrobot = {"num_envs": 16, "rollout_steps": 256, "minibatches": 64, "epochs": 4,
               "gae_lambda": 0.94, "probe_every": 20}  # fmt: skip
    car = {"num_envs": 16, "rollout_steps": 16, "minibatches": 4, "epochs": 4,
           "gae_lambda": 0.98, "probe_every": 500}  # fmt: skip
    pendulum = {"num_envs": 4, "rollout_steps": 1024, "minibatches": 64, "epochs": 10, "lr": 1e-3,
                "anneal_lr": True, "gae_lambda": 0.95, "gamma": 0.9, "probe_every": 4}  # fmt: skip
    return {
        "cartpole": _config("CartPole-v1", 65_536, cartpole),
        "acrobot": _config("Acrobot-v1", 524_288, ZOO | SCALED | acrobot, tail=True),
        "mountaincar": _config("MountainCar-v0", 1_048_576, ZOO | SCALED | car),
        "pendulum": _config("Pendulum-v1", 131_072, ZOO | pendulum),
    }


def _config(env: str, steps: int, settings: dict[str, Any], tail: bool = False) -> Config:
    """An agent of two small layers, which grows at half of the time.

    Args:
        env: the environment.
        steps: of it, in all.
        settings: of the agent.
        tail: `actor_tail` of the encoder.
    """
    return Config(
        env=env,
        total_steps=steps,
        trigger=get("trigger", "every").Config(steps=steps // 2),
        encoder=get("encoder", "mlp").Config(widths=(64,), hidden=64, actor_tail=tail),
        threads=1,
        **settings,
    )
