"""PPO against stable-baselines3's, side by side: return at equal steps, and steps per second.

    pip install -e ".[rl,peers]"
    python -m benchmarks.rl_peers [--tasks CartPole-v1 Catch] [--seeds 5] [--share 1.0]

Both have the hyperparameters of rl-baselines3-zoo (ppo.yml) for the task, with a constant clip
range, and the same network: a tanh layer (the convolutions of Mnih et al. 2015 for images) that
actor and critic share, then a ReLU layer each; all are orthogonal, the actor's output 100 times
smaller. One torch thread; the two take turns, seed by seed. Return is the mean over the episodes
that ended in the last tenth of training, or over the last of each environment where fewer ended;
rates are steps per second of process time, the whole loop included. `--share` shortens every task.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from agents.actor_critic import ActorCritic
from agents.encoders import orthogonal
from agents.ppo import PPOSettings, train
from agents.rollout import Rollout
from dynmoe import seeding
from dynmoe.lab.statistics import confidence_interval, paired_difference
from dynmoe.registry import get
from envs.gym import GymEnv

WIDTH = 64
"""units of each layer"""
Ended = list[tuple[int, float]]
"""(environment steps done, return) of each episode"""


class Catch(gymnasium.Env[np.ndarray, int]):
    """A ball falls through 9 rows; a paddle moves left, stays or moves right: 1 if it is caught.

    Images [36, 36, 1] of 4-pixel cells. Source: bsuite's catch (Osband et al. 2020).
    """

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """A new ball."""
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, int(self.np_random.integers(9)), 4
        return self._picture(), {}

    def step(self, action: int) -> Any:
        """One row down."""
        self.paddle = min(max(self.paddle + int(action) - 1, 0), 8)
        self.row += 1
        over = self.row == 8
        return self._picture(), float(over and self.paddle == self.ball), over, False, {}

    def _picture(self) -> np.ndarray:
        cells = np.zeros((9, 9), np.uint8)
        cells[self.row, self.ball] = cells[8, self.paddle] = 255
        return cells.repeat(4, 0).repeat(4, 1)[..., None]


gymnasium.register("Catch-v0", Catch)


@dataclass(frozen=True)
class Task:
    """An environment and how PPO is set there."""

    settings: PPOSettings
    normalised: bool = False
    """observations and rewards, by running statistics"""
    image: bool = False


def _task(
    steps: int, envs: int, length: int, batch: int, normalised: bool = False, image: bool = False,
    **settings: Any,
) -> Task:  # fmt: skip
    """A task in the zoo's terms; what it does not name is stable-baselines3's default."""
    usual = {"lr": 3e-4, "anneal_lr": False, "gamma": 0.99, "gae_lambda": 0.95, "entropy": 0.0}
    ppo = PPOSettings(
        total_steps=steps, num_envs=envs, rollout_steps=length, minibatches=envs * length // batch,
        clip_value=False, max_grad_norm=0.5,
        value_weight=1.0,  # of half the squared error: stable-baselines3's 0.5 of the whole
        **(usual | settings),
    )  # fmt: skip
    return Task(ppo, normalised, image)


TASKS = {
    "CartPole-v1": _task(
        100_000, 8, 32, 256, gae_lambda=0.8, gamma=0.98, epochs=20, lr=1e-3, anneal_lr=True
    ),
    "Acrobot-v1": _task(200_000, 16, 256, 64, normalised=True, gae_lambda=0.94, epochs=4),
    "LunarLander-v3": _task(
        500_000, 16, 1024, 64, gae_lambda=0.98, gamma=0.999, epochs=4, entropy=0.01
    ),
    "Catch-v0": _task(32_768, 8, 128, 256, image=True, epochs=4, lr=2.5e-4, entropy=0.01),
}


class Episodes:
    """Remembers the episodes of a run of ours."""

    def __init__(self, settings: PPOSettings) -> None:
        self.settings, self.ended = settings, Ended()

    def update_done(self, update: int, rollout: Rollout, stats: object) -> None:
        """Note when each ended."""
        before = (update - 1) * self.settings.batch_size
        for episode in rollout.episodes:
            steps = before + (episode.step + 1) * self.settings.num_envs
            self.ended.append((steps, episode.episode_return))


def ours(name: str, task: Task, settings: PPOSettings, seed: int) -> Ended:
    """One run of this project's PPO."""
    env = GymEnv(
        name, settings.num_envs, seed, normalize_observations=task.normalised,
        normalize_rewards=task.normalised, gamma=settings.gamma,
    )  # fmt: skip
    encoder = get("encoder", "nature" if task.image else "mlp")
    widths = {} if task.image else {"widths": (WIDTH,)}
    with seeding.seeded(seed, "policy"):
        policy = ActorCritic(
            encoder.Config(hidden=WIDTH, **widths), env.input_shape, env.single_action_space
        )
        _start_as_theirs(policy)
    optimizer = torch.optim.Adam(
        policy.parameters(), settings.lr, eps=settings.adam_eps, fused=True
    )
    episodes = Episodes(settings)
    observations, info = env.reset(seed=seed)
    train(env, policy, optimizer, settings, seed, episodes, observations, info["floor"])
    env.close()
    return episodes.ended


def _start_as_theirs(policy: ActorCritic) -> None:
    """Orthogonal heads, the actor's output 100 times smaller: stable-baselines3's `ortho_init`.

    Our own heads start as torch's linear layers do. The encoder is orthogonal in both.
    """
    for head, gain in ((policy.actor, 0.01), (policy.critic, 1.0)):
        first, last = (layer for layer in head.modules() if isinstance(layer, torch.nn.Linear))
        orthogonal(first)
        orthogonal(last, gain)


def theirs(name: str, task: Task, settings: PPOSettings, seed: int) -> Ended:
    """One run of stable-baselines3's."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import VecNormalize

    class Shared(BaseFeaturesExtractor):
        """The layers that actor and critic share; its own NatureCNN has one linear layer more."""

        def __init__(self, space: spaces.Box) -> None:
            layers = _convolutions(space.shape[0]) if task.image else [
                torch.nn.Flatten(), torch.nn.Linear(math.prod(space.shape), WIDTH), torch.nn.Tanh()
            ]  # fmt: skip
            features = torch.nn.Sequential(*layers)(torch.zeros(1, *space.shape)).shape[1]
            super().__init__(space, features)
            self.layers = torch.nn.Sequential(*layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    ended: Ended = []

    class Watch(BaseCallback):
        """Notes when each episode ended."""

        def _on_step(self) -> bool:
            seen = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            ended.extend((self.num_timesteps, float(score)) for score in seen)
            return True

    env = make_vec_env(name, settings.num_envs, seed)
    if task.normalised:
        env = VecNormalize(env, gamma=settings.gamma)
    lr = settings.lr
    network: dict[str, Any] = {
        "net_arch": {"pi": [WIDTH], "vf": [WIDTH]}, "activation_fn": torch.nn.ReLU,
        "features_extractor_class": Shared,
    }  # fmt: skip
    agent = PPO(
        "CnnPolicy" if task.image else "MlpPolicy", env,
        learning_rate=(lambda left: lr * left) if settings.anneal_lr else lr,
        n_steps=settings.rollout_steps, batch_size=settings.batch_size // settings.minibatches,
        n_epochs=settings.epochs, gamma=settings.gamma, gae_lambda=settings.gae_lambda,
        clip_range=settings.clip, ent_coef=settings.entropy, vf_coef=0.5 * settings.value_weight,
        max_grad_norm=settings.max_grad_norm, seed=seed, device="cpu", policy_kwargs=network,
    )  # fmt: skip
    agent.learn(settings.updates * settings.batch_size, Watch())
    env.close()
    return ended


def _convolutions(channels: int) -> list[torch.nn.Module]:
    """Those of our encoder `nature` (Mnih et al. 2015)."""
    sizes = ((channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))
    layers = [[torch.nn.Conv2d(*size), torch.nn.ReLU()] for size in sizes]
    return [*(part for pair in layers for part in pair), torch.nn.Flatten()]


def final(ended: Ended, steps: int, least: int) -> float:
    """Mean return of the episodes that ended in the last tenth of the steps, of at least so many.

    The `least` last ones where fewer ended: long ones may outlast a tenth of a short training.
    """
    late = [score for step, score in ended if step > 0.9 * steps]
    return float(np.mean(late if len(late) >= least else [score for _, score in ended[-least:]]))


def compare(name: str, seeds: int, share: float) -> None:
    """Print one task's returns and rates."""
    task = TASKS[name]
    settings = replace(task.settings, total_steps=int(task.settings.total_steps * share))
    steps = settings.updates * settings.batch_size
    returns: dict[str, list[float]] = {"ours": [], "sb3": []}
    seconds: dict[str, list[float]] = {"ours": [], "sb3": []}
    for seed in range(seeds):
        for who, run in (("ours", ours), ("sb3", theirs)):
            began = time.process_time()
            ended = run(name, task, settings, seed)
            returns[who].append(final(ended, steps, settings.num_envs))
            seconds[who].append(time.process_time() - began)
    print(f"{name}, {steps:,} steps, {seeds} seeds")
    for who, values in returns.items():
        rate = steps / float(np.median(seconds[who]))
        print(f"  {who:5s} return {_interval(values)}, {rate:,.0f} steps/s", flush=True)
    gap = paired_difference(returns["ours"], returns["sb3"])
    times = np.array(seconds["sb3"]) / np.array(seconds["ours"])
    print(f"  ours - sb3: {gap.point:.2f} [{gap.low:.2f}, {gap.high:.2f}]", end="")
    print(f", {np.median(times):.2f} ({times.min():.2f} .. {times.max():.2f}) x its steps/s")


def _interval(values: list[float]) -> str:
    found = confidence_interval(values, "mean")
    return f"{found.point:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.tasks:
        compare(name, args.seeds, args.share)


if __name__ == "__main__":
    main()
