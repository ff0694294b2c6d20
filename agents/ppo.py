"""Proximal policy optimisation, top to bottom.

Source: Schulman et al. 2017 (arXiv 1707.06347), with the customary details (value clipping,
advantage normalisation per minibatch, annealed learning rate; Engstrom et al. 2020, 2005.12729).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.actions import ActionDistribution, Categorical
from agents.actor_critic import ActorCritic, learning
from agents.rollout import Rollout, collect, estimate_advantages, of_all
from dynmoe import seeding
from dynmoe.errors import NumericError, UserError
from dynmoe.interventions.intervention import Intervention, NoIntervention
from dynmoe.lab import processes
from dynmoe.moe import MoELayer
from dynmoe.moe.model import stepped
from envs.vector import TorchVectorEnv


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Hyperparameters of PPO; the defaults are those of the Craftax baselines but for the sizes."""

    total_steps: int = 500_000
    """environment steps in all, over all environments"""
    num_envs: int = 64
    """environments side by side"""
    rollout_steps: int = 64
    """steps of each environment between two updates"""
    lr: float = 2e-4
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0"""
    adam_eps: float = 1e-5
    """added to the denominator of Adam's steps"""
    epochs: int = 4
    """passes over each rollout"""
    minibatches: int = 8
    """parts that each pass is split into, one optimizer step each"""
    gamma: float = 0.99
    """discount per step"""
    gae_lambda: float = 0.8
    """lambda of the generalised advantage estimate"""
    clip: float = 0.2
    """largest rewarded change of the probability ratio, and of the value"""
    clip_value: bool = True
    """clip the value's change as well"""
    entropy: float = 0.01
    """factor of the entropy bonus"""
    value_weight: float = 0.5
    """factor of the value loss"""
    max_grad_norm: float = 1.0
    """largest global gradient norm; 0 for none"""
    normalise_advantage: bool = True
    """scale each minibatch's advantages to mean 0 and deviation 1"""
    autocast: Literal["none", "bf16"] = "none"
    """run the network in bfloat16; weights and losses stay float32"""

    @property
    def batch_size(self) -> int:
        """Environment steps per update."""
        return self.num_envs * self.rollout_steps

    @property
    def updates(self) -> int:
        """Updates in all; the last steps that fill no rollout are left out."""
        return self.total_steps // self.batch_size

    def check(self) -> None:
        """Refuse numbers that cannot work.

        Raises:
            UserError: names the setting.
        """
        least = {"num_envs": 1, "rollout_steps": 1, "epochs": 1, "minibatches": 1, "lr": 0,
                 "gamma": 0, "gae_lambda": 0, "clip": 0, "entropy": 0, "value_weight": 0,
                 "max_grad_norm": 0}  # fmt: skip
        for name, smallest in least.items():
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if not value >= smallest:  # also refuses nan
                raise UserError(f"{flag} {value} is too small; use {smallest} or more")
            if name in ("gamma", "gae_lambda") and value > 1:
                raise UserError(f"{flag} {value} is too large; use 1 or less")
        if not self.adam_eps > 0:  # 0 / 0 for weights that have had no gradient
            raise UserError(f"--adam-eps {self.adam_eps} is too small; use a number above 0")
        if self.batch_size % self.minibatches:
            raise UserError(
                f"--num-envs {self.num_envs} x --rollout-steps {self.rollout_steps} = "
                f"{self.batch_size} steps do not divide into --minibatches {self.minibatches}"
            )
        if self.updates < 1:
            raise UserError(
                f"--total-steps {self.total_steps} is less than one rollout of {self.batch_size} "
                "(--num-envs times --rollout-steps)"
            )


@dataclass(frozen=True)
class UpdateStats:
    """What an update did, as means over its optimizer steps."""

    policy_loss: float
    value_loss: float
    entropy: float
    """of the policy, nats"""
    approx_kl: float
    """of the policy before the update to the one after, nats (Schulman's k3 estimator)"""
    clip_share: float
    """share of samples whose ratio was clipped"""
    grad_norm: float
    """before clipping"""
    explained_variance: float
    """of the returns by the values: 1 is perfect, 0 no better than their mean"""


MEANS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_share", "grad_norm")
"""Fields of UpdateStats that are means over optimizer steps, in the order they are summed."""


class Observer(Protocol):
    """What `train` reports to; it grows the network, logs and saves."""

    def update_done(self, update: int, rollout: Rollout, stats: UpdateStats | None) -> None:
        """`update` updates are done; stats are None for an agent that does not learn."""


def train(
    env: TorchVectorEnv,
    policy: ActorCritic,
    optimizer: Optimizer,
    settings: PPOSettings,
    seed: int,
    observer: Observer,
    observations: Tensor,
    floors: Tensor,
    start: int = 0,
    learns: bool = True,
    acts: bool = True,
    intervention: Intervention | None = None,
) -> None:
    """Train from update `start` to the last; everything drawn depends on seed and update alone.

    Args:
        env: the environments; where it is a part of them, processes share the play, and all learn
            from and report the rollouts of all.
        observations, floors: [N, ...] and [N], where these environments are.
        learns, acts: whether the network is trained, and followed.
        intervention: keeps it plastic; attached to the policy and the optimizer. None for none.

    Raises:
        NumericError: the loss is not finite.
    """
    for update in range(start, settings.updates):
        generator = seeding.generator(seed, "rollout", update, device=env.device)
        if settings.anneal_lr:
            set_learning_rate(optimizer, settings.lr * (1 - update / settings.updates))
        play = functools.partial(
            collect, env, policy, observations, floors, settings.rollout_steps, settings.gamma,
            generator, uniform=not acts,
        )  # fmt: skip
        with autocast(env.device, settings.autocast):
            own = processes.all_succeed(play)
        observations, floors = own.next_observations, own.next_floors
        rollout = of_all(env, own)
        stats = None
        if learns:
            order = seeding.generator(seed, "minibatches", update)
            stats = learn(policy, optimizer, rollout, settings, env, order, intervention)
        observer.update_done(update + 1, rollout, stats)


def learn(
    policy: ActorCritic,
    optimizer: Optimizer,
    rollout: Rollout,
    settings: PPOSettings,
    env: TorchVectorEnv,
    generator: torch.Generator,
    intervention: Intervention | None = None,
) -> UpdateStats:
    """One update: several epochs of minibatch steps on a rollout.

    The policy that learns is the one that acted (see `agents.actor_critic`): ratios start at 1.
    Processes that share a run (see `dynmoe.lab.processes`) have the same rollout, and each learns
    from its rows of every minibatch, for the step that one would take on all of it.

    Raises:
        NumericError: the loss is not finite.
    """
    advantages = estimate_advantages(rollout, settings.gamma, settings.gae_lambda)
    returns = advantages + rollout.values
    flat = _samples(rollout) | {
        "advantages": advantages.flatten(0, 1), "returns": returns.flatten(0, 1)
    }  # fmt: skip
    sums = torch.zeros(len(MEANS), device=env.device)
    limit = settings.max_grad_norm or float("inf")
    steady = intervention is None or isinstance(intervention, NoIntervention)
    parameters, moving = list(policy.parameters()), stepped(policy)
    with learning(policy):
        for index in minibatches(settings, generator):
            if not steady:  # it may have replaced any of them
                parameters, moving = list(policy.parameters()), stepped(policy)
            here = processes.own_rows(index).to(env.device)
            batch = {name: tensor[here] for name, tensor in flat.items()}
            whole = flat["advantages"][index.to(env.device)] if processes.joined() else None
            with autocast(env.device, settings.autocast):
                outputs, values = policy(env.unpack(batch["observations"]))
            loss, figures = ppo_loss(outputs, values, batch, settings, policy.distribution, whole)
            if whole is not None:
                loss = loss * processes.own_share(len(here), len(index))
            others = _other_losses(moving, intervention)
            loss = loss + others if isinstance(others, Tensor) else loss
            optimizer.zero_grad(set_to_none=True)
            figures = _backward(parameters, loss, figures, len(here) / len(index))
            if intervention is not None:
                intervention.gradients_ready()
            norm = nn.utils.clip_grad_norm_(parameters, limit)
            if not math.isfinite(norm.item()):
                raise NumericError(f"the gradient's norm is {norm.item()}: a smaller --lr may help")
            optimizer.step()
            for module in moving:
                module.finish_step()
            if intervention is not None:
                intervention.step_done()
            sums += torch.stack([*figures, norm.detach()])
    means = (sums / (settings.epochs * settings.minibatches)).tolist()
    spread, left = float(returns.var()), float((returns - rollout.values).var())
    explained = 1 - left / spread if spread > 0 else 0.0
    return UpdateStats(**dict(zip(MEANS, means, strict=True)), explained_variance=explained)


def _samples(rollout: Rollout) -> dict[str, Tensor]:
    """What a rollout of T steps in N environments holds, [T N, ...] each."""
    names = ["observations", "actions", "log_probs", "values"]
    if rollout.masks is not None:
        names.append("masks")
    return {name: getattr(rollout, name).flatten(0, 1) for name in names}


def _check(loss: Tensor) -> None:
    """Refuse a loss, a scalar, that is not finite."""
    if not math.isfinite(loss.item()):
        raise NumericError(f"the loss is {loss.item()}: a smaller --lr or --max-grad-norm may help")


def _backward(
    parameters: list[nn.Parameter], loss: Tensor, figures: tuple[Tensor, ...], share: float
) -> tuple[Tensor, ...]:
    """Gradients of the loss, and the figures; those of all processes, each with a share of rows."""
    if not processes.joined():
        _check(loss)
        loss.backward()
        return figures
    loss.backward()
    known = torch.stack([loss.detach() / processes.size(), *(share * f for f in figures)])
    joined, *found = processes.average_gradients(parameters, known)
    _check(joined)
    return tuple(found)


def _other_losses(moving: list[Any], intervention: Intervention | None) -> Tensor | float:
    """Auxiliary losses of the MoE layers, and the intervention's penalty."""
    layers = [module for module in moving if isinstance(module, MoELayer)]
    losses = sum((v for layer in layers for v in layer.collect_losses().values()), 0.0)
    return losses if intervention is None else losses + intervention.penalty()


def ppo_loss(
    parameters: Tensor,
    values: Tensor,
    batch: dict[str, Tensor],
    settings: PPOSettings,
    distribution: ActionDistribution | None = None,
    whole: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """PPO's loss on a minibatch of B samples.

    Args:
        parameters, values: [B, ...] of the distribution and [B], of the network now.
        batch: actions [B, ...], log_probs, values, advantages, returns, [B] each, from the rollout;
            masks, bool [B, P], the options that were allowed, where there are any.
        distribution: over actions; default one choice among A with logits [B, A].
        whole: advantages [W] of the minibatch that these samples are a part of; default theirs.

    Returns:
        the loss, and (policy loss, value loss, entropy, approximate KL, clipped share).

    Source: Schulman et al. 2017 (arXiv 1707.06347), Eqs. 7 and 9; the KL estimate is
    mean(ratio - 1 - log ratio), Schulman's "k3".
    """
    distribution = distribution or Categorical([parameters.shape[1]])
    parameters = distribution.masked(parameters, batch.get("masks"))
    log_probs, entropies = distribution.evaluate(parameters, batch["actions"])
    change = log_probs - batch["log_probs"]
    ratio = change.exp()
    advantages = batch["advantages"]
    whole = advantages if whole is None else whole
    if settings.normalise_advantage and len(whole) > 1:
        advantages = (advantages - whole.mean()) / (whole.std() + 1e-8)
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    policy_loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()
    error = (values - batch["returns"]).square()
    if settings.clip_value:
        near = (values - batch["values"]).clamp(-settings.clip, settings.clip)
        error = torch.maximum(error, (batch["values"] + near - batch["returns"]).square())
    value_loss = 0.5 * error.mean()
    entropy = entropies.mean()
    loss = policy_loss + settings.value_weight * value_loss - settings.entropy * entropy
    with torch.no_grad():
        away = ratio - 1
        kl, share = (away - change).mean(), (away.abs() > settings.clip).float().mean()
        parts = (policy_loss.detach(), value_loss.detach(), entropy.detach(), kl, share)
    return loss, parts


def minibatches(settings: PPOSettings, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices [B] of each minibatch: every epoch deals out the whole rollout again."""
    for _ in range(settings.epochs):
        order = torch.randperm(settings.batch_size, generator=generator)
        yield from order.chunk(settings.minibatches)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def autocast(device: torch.device, mode: str) -> torch.autocast:
    """bfloat16 for the network's matrix work, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16")
