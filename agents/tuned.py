"""Settings of PPO that are tuned for one environment each: presets of `python -m dynmoe.rl`.

docs/rl.md says how each was found, and what it reaches on seeds that had no part in the choice.
"""

from __future__ import annotations

from dataclasses import replace

from agents.settings import Config
from dynmoe.registry import get


def tuned() -> dict[str, Config]:
    """A preset for each environment; each agent grows at half of the time."""
    every, encoder = get("trigger", "every").Config, get("encoder", "mlp").Config
    common = Config(encoder=encoder(widths=(64,), hidden=64), threads=1)
    zoo = replace(  # what rl-baselines3-zoo (ppo.yml) and stable-baselines3 set for all of these
        common,
        anneal_lr=False,
        lr=3e-4,
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
        "acrobot": replace(
            zoo,
            env="Acrobot-v1",
            encoder=encoder(widths=(64,), hidden=64, actor_tail=True),
            total_steps=524_288,
            trigger=every(steps=262_144),
            probe_every=20,
            normalize_observations=True,
            normalize_rewards=True,
            num_envs=16,
            rollout_steps=256,
            minibatches=64,
            epochs=4,
            gae_lambda=0.94,
        ),
        "mountaincar": replace(
            zoo,
            env="MountainCar-v0",
            total_steps=1_048_576,
            trigger=every(steps=524_288),
            probe_every=500,
            normalize_observations=True,
            normalize_rewards=True,
            num_envs=16,
            rollout_steps=16,
            minibatches=4,
            epochs=4,
            gae_lambda=0.98,
        ),
        "pendulum": replace(
            zoo,
            env="Pendulum-v1",
            total_steps=131_072,
            trigger=every(steps=65_536),
            probe_every=4,
            num_envs=4,
            rollout_steps=1024,
            minibatches=64,
            epochs=10,
            lr=1e-3,
            gamma=0.9,
            gae_lambda=0.95,
        ),
    }
