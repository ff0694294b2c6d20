"""From settings to where an agent plays, and what plays: environments and policy."""

from __future__ import annotations

import json
from typing import Any

import torch

import envs
from agents.actor_critic import ActorCritic, Spaces
from agents.methods import Agent
from agents.settings import Config
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from envs.vector import TorchVectorEnv


def growing_steps(config: Config) -> int:
    """The run's length for plans, which count what falls due before it.

    The last chance to grow comes one update before the end.
    """
    return (config.updates - 1) * config.batch_size + 1


def make_env(
    config: Config, device: torch.device, part: tuple[int, int] = (0, 1)
) -> TorchVectorEnv:
    """The environments of a run, or a part (r, P) of them where that can be.

    Raises:
        UserError: settings that cannot be.
    """
    return envs.make(
        config.env, config.num_envs, config.seed, device, renderer=config.renderer,
        observation="pixels" if config.renderer == "upstream" else None,
        env_args=_env_args(config.env_args),
        normalize_observations=config.normalize_observations,
        normalize_rewards=config.normalize_rewards, gamma=config.gamma, part=part,
    )  # fmt: skip


def _env_args(text: str) -> dict[str, Any]:
    """The JSON object of `--env-args`; {} for an empty text.

    Raises:
        UserError: it is none.
    """
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        values = str(error)
    if not isinstance(values, dict):
        raise UserError(
            f"--env-args {text} is no JSON object ({values}); write it as '{{\"gravity\": 5}}'"
        )
    return values


def make_policy(
    config: Config,
    env: TorchVectorEnv | Spaces,
    device: torch.device,
    intervention: Intervention,
) -> ActorCritic:
    """The network of a run, as drawn from its seed and made over by the intervention."""
    agent: Agent = config.method.build()
    steps = growing_steps(config)
    make_block = agent.make_block(config, steps, seeding.derive(config.seed, "blocks"))
    with seeding.seeded(config.seed, "policy"):
        policy = ActorCritic(config.encoder, env.input_shape, env.single_action_space, make_block)
    config.join_routers(policy)
    intervention.transform(policy, seeding.generator(config.seed, "transform"))
    if len(env.input_shape) == 3:  # frames come with channels last, and convolutions keep them so
        policy.to(memory_format=torch.channels_last)
    return policy.to(device)
