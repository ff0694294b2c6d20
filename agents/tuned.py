"""Settings of PPO that are tuned for one environment each, as presets of `python -m dynmoe.rl`.

docs/rl.md says how each was found, and what it reaches on seeds that had no part in the choice.
"""

from __future__ import annotations

from dataclasses import replace

from agents.settings import Config
from dynmoe.registry import get


def tuned() -> dict[str, Config]:
    """A preset for each environment; the agent grows at half of the time."""
    every = get("trigger", "every").Config
    common = Config(
        encoder=get("encoder", "mlp").Config(widths=(64,), hidden=64), gamma=0.99, threads=1
    )
    zoo = replace(  # what rl-baselines3-zoo (ppo.yml) and stable-baselines3 set for both
        common,
        normalize_observations=True,
        normalize_rewards=True,
        num_envs=16,
        epochs=4,
        entropy=0.0,
        clip_value=False,
        max_grad_norm=0.5,
        value_weight=1.0,  # of half the squared error: stable-baselines3's 0.5 of the whole
    )
    return {
        "cartpole": replace(  # the best of 20 trials of a search
            common,
            env="CartPole-v1",
            total_steps=65_536,
            trigger=every(steps=32_768),
            probe_every=50,
            num_envs=8,
            rollout_steps=32,
            minibatches=8,
            epochs=10,
            lr=1.4e-3,
            gae_lambda=0.95,
        ),
        "acrobot": replace(  # the zoo's, but for a learning rate of 1e-3 that falls
            zoo,
            env="Acrobot-v1",
            total_steps=262_144,
            trigger=every(steps=131_072),
            probe_every=10,
            rollout_steps=256,
            minibatches=64,
            lr=1e-3,
            gae_lambda=0.94,
        ),
        "mountaincar": replace(  # the zoo's
            zoo,
            env="MountainCar-v0",
            total_steps=1_048_576,
            trigger=every(steps=524_288),
            probe_every=500,
            rollout_steps=16,
            minibatches=4,
            lr=3e-4,
            anneal_lr=False,
            gae_lambda=0.98,
        ),
    }
