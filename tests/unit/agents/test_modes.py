"""A policy acts as it is evaluated, and learns as it acted: for every router, loss and encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from agents.actor_critic import ActorCritic, acting, learning
from agents.making import make_env, make_policy
from agents.ppo import learn
from agents.rollout import Rollout, collect
from agents.settings import Config
from dynmoe import registry, seeding
from dynmoe.errors import UserError
from dynmoe.moe import collect_aux_losses
from dynmoe.moe.draws import Noise
from envs.vector import TorchVectorEnv

CONTEXT = ("oracle",)
"""Routers that want to be told what an agent does not know."""
ROUTERS = [name for name in registry.names("router") if name not in CONTEXT]
LOSSES = registry.names("loss")


def made(router: str, loss: str = "none", **options: Any) -> tuple[TorchVectorEnv, ActorCritic]:
    """A small agent of 4 experts."""
    config = Config(
        env="Stages-v0", num_envs=8, rollout_steps=16, total_steps=2560, minibatches=4,
        granularity=4, method=registry.get("agent", "dynamicmoe").Config(),
        router=replace(registry.get("router", router).Config(), **options),
        balance=registry.get("loss", loss).Config(),
        encoder=registry.get("encoder", "mlp").Config(hidden=16, widths=(16,)),
    )  # fmt: skip
    env = make_env(config, torch.device("cpu"))
    return env, make_policy(config, env, torch.device("cpu"), config.intervention.build())


def played(env: TorchVectorEnv, policy: ActorCritic, steps: int = 16) -> Rollout:
    observations, info = env.reset(seed=0)
    generator = seeding.generator(0, "rollout")
    return collect(env, policy, observations, info["floor"], steps, 0.99, generator)


def check(env: TorchVectorEnv, policy: ActorCritic) -> None:
    """Acting moves nothing; in learning mode any part of a rollout has the ratios 1."""
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    random = torch.get_rng_state()
    rollout = played(env, policy)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(module.training for module in policy.modules())
    index = torch.randperm(rollout.rewards.numel(), generator=torch.Generator().manual_seed(0))[:50]
    inputs = env.unpack(rollout.observations.flatten(0, 1)[index])
    with learning(policy):
        parameters, values = policy(inputs)
    actions = rollout.actions.flatten(0, 1)[index]
    log_probs, _ = policy.distribution.evaluate(parameters, actions)
    ratio = (log_probs - rollout.log_probs.flatten()[index]).exp()
    torch.testing.assert_close(ratio, torch.ones(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(values, rollout.values.flatten()[index], atol=1e-5, rtol=1e-5)
    assert all(module.training for module in policy.modules())


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router(router: str) -> None:
    check(*made(router))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_balancing_loss(loss: str) -> None:
    for router in ("topk", "cosine", "noisy-topk"):
        try:
            env, policy = made(router, loss)
            played(env, policy, 1)
            with learning(policy):
                policy(env.unpack(env.reset()[0]))
        except UserError:  # not every loss suits every router
            continue
        check(*made(router, loss))
        return
    pytest.fail("it suits none of these routers")


def test_a_capacity_and_noise() -> None:
    """Experts that would be full in a large batch, and a noisy router, act alike in any batch."""
    check(*made("switch", capacity_factor=1.0, jitter=0.5))
    check(*made("expert-choice", capacity=1.0))


@pytest.mark.parametrize("name", registry.names("encoder"))
def test_every_encoder(name: str) -> None:
    config = registry.get("encoder", name).Config()
    policy = ActorCritic(config, (3, 70, 70), 4)
    x = torch.randint(0, 256, (3, 3, 70, 70), dtype=torch.uint8)
    with acting(policy):
        acted = policy(x)
    with learning(policy):
        learned = policy(x)
    torch.testing.assert_close(acted, learned, rtol=0, atol=0)


@pytest.mark.parametrize("part", [nn.Dropout(0.5), nn.BatchNorm1d(16)], ids=["dropout", "norm"])
def test_what_else_would_make_a_difference(part: nn.Module) -> None:
    env, policy = made("cosine")
    policy.trunk.append(part)
    check(env, policy)


def test_only_what_would_act_differently_is_off() -> None:
    _, policy = made("noisy-topk", "switch")
    with learning(policy):
        policy(torch.rand(8, 7))
        losses = collect_aux_losses(policy)
        assert len(losses) == 2 and all(value > 0 for value in losses.values())
        off = [module for module in policy.modules() if not module.training]
        assert len(off) == 2 and all(isinstance(module, Noise) for module in off)
    with acting(policy):
        policy(torch.rand(8, 7))
        assert not collect_aux_losses(policy)
    policy.eval()
    with learning(policy):
        pass
    assert not any(module.training for module in policy.modules())


def test_modes_are_put_back_after_an_error() -> None:
    _, policy = made("cosine")
    with pytest.raises(ZeroDivisionError), acting(policy):
        raise ZeroDivisionError
    assert all(module.training for module in policy.modules())


@pytest.mark.parametrize(("router", "loss"), [("topk", "loss-free"), ("relu", "none"),
                                              ("prototypes", "none")])  # fmt: skip
def test_learning_moves_the_statistics(router: str, loss: str) -> None:
    env, policy = made(router, loss)
    rollout = played(env, policy)
    kept = ("selection_bias", "strength", "router.weight")
    before = {n: v.clone() for n, v in policy.state_dict().items() if n.endswith(kept)}
    config = Config(num_envs=8, rollout_steps=16, total_steps=2560, minibatches=4, epochs=1, lr=0.0)
    optimizer = torch.optim.Adam(policy.parameters(), 0.0)
    learn(policy, optimizer, rollout, config, env, torch.Generator())
    state = policy.state_dict()
    assert any(not torch.equal(state[name], value) for name, value in before.items())


def test_before_any_step_nothing_is_clipped() -> None:
    """One minibatch, no noise in the ratio: KL 0, no clipped share."""
    env, policy = made("noisy-topk", "switch")
    rollout = played(env, policy)
    config = Config(num_envs=8, rollout_steps=16, total_steps=2560, minibatches=1, epochs=1)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    stats = learn(policy, optimizer, rollout, config, env, torch.Generator())
    assert stats.clip_share == 0 and abs(stats.approx_kl) < 1e-6


def test_an_environment_does_not_hear_of_the_others() -> None:
    """What the policy does in one environment is the same beside any others."""
    for router in ("expert-choice", "slots", "switch"):
        env, policy = made(router)
        inputs = env.unpack(env.reset()[0])
        with acting(policy):
            together, alone = policy(inputs)[0], policy(inputs[:1])[0]
        torch.testing.assert_close(together[:1], alone)
