"""PPO end to end from Craftax's pixels, against its network alone and the published JAX agent.

    python -m benchmarks.ppo [--threads 1] [--env Craftax-Pixels-v1] [--rounds 3] [--device cpu]

"end to end" is the whole of `agents.ppo.train`: environment, rendering, acting, learning, with
dense blocks shaped like the Craftax baselines' ActorCriticConv (64 environments x 16 steps, 4
epochs, 8 minibatches). "network" does that network's passes alone, on frames made beforehand: one
forward per step and four forward-and-backward ones. The variants take turns. The JAX agent is not
run here: Craftax_Baselines' ppo.py was measured once at 3.3 steps/s on Craftax-Classic-Pixels-v1
with the same sizes, on two cores of another processor.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import envs
from agents.actor_critic import ActorCritic
from agents.ppo import PPOSettings, autocast, train
from agents.rollout import Rollout
from benchmarks.timing import alternate, ratio
from dynmoe.lab.device import keep_freed_memory
from dynmoe.registry import get
from envs.vector import TorchVectorEnv


class Nobody:
    """An observer that keeps where the environments are, and else does nothing."""

    observations: Tensor
    floors: Tensor

    def update_done(self, update: int, rollout: Rollout, stats: object) -> None:
        """Remember the next observations."""
        self.observations, self.floors = rollout.next_observations, rollout.next_floors


def make_policy(env: TorchVectorEnv, encoder: str) -> ActorCritic:
    """A dense agent with the encoder's default sizes."""
    policy = ActorCritic(get("encoder", encoder).Config(), env.input_shape, env.num_actions)
    return policy.to(env.device).to(memory_format=torch.channels_last)


def end_to_end(
    env: TorchVectorEnv, policy: ActorCritic, settings: PPOSettings
) -> Callable[[], None]:
    """One update of PPO, going on where the one before stopped."""
    nobody = Nobody()
    observations, info = env.reset()
    nobody.observations, nobody.floors = observations, info["floor"]
    optimizer = torch.optim.Adam(policy.parameters(), settings.lr, eps=settings.adam_eps)

    def call() -> None:
        train(env, policy, optimizer, settings, 0, nobody, nobody.observations, nobody.floors)

    return call


def network(env: TorchVectorEnv, policy: ActorCritic, settings: PPOSettings) -> Callable[[], None]:
    """The same update's passes through the network, and nothing else."""
    frames = env.unpack(env.reset()[0])
    size = settings.batch_size // settings.minibatches
    batch = frames.repeat(-(-size // len(frames)), 1, 1, 1)[:size]
    batch = batch.contiguous(memory_format=torch.channels_last)

    def call() -> None:
        with autocast(env.device, settings.autocast):
            with torch.no_grad():
                for _ in range(settings.rollout_steps):
                    policy(frames)
            for _ in range(settings.epochs * settings.minibatches):
                logits, values = policy(batch)
                (logits.logsumexp(1).mean() + values.square().mean()).backward()
                for parameter in policy.parameters():
                    parameter.grad = None

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env", default="Craftax-Pixels-v1")
    parser.add_argument("--encoder", default="conv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--rollout-steps", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", choices=("keep", "default"), default="keep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory == "keep":
        keep_freed_memory()
    device = torch.device(args.device)
    env = envs.make(args.env, args.num_envs, 0, device)
    size = args.num_envs * args.rollout_steps
    variants = {}
    for mode in ("none", "bf16"):
        settings = PPOSettings(
            total_steps=size, num_envs=args.num_envs, rollout_steps=args.rollout_steps,
            autocast=mode,
        )  # fmt: skip
        policy = make_policy(env, args.encoder)
        variants[f"end to end, {mode}"] = end_to_end(env, policy, settings)
        variants[f"network, {mode}"] = network(env, policy, settings)
    seconds = alternate(variants, args.rounds, device)
    print(f"{args.env}, {args.encoder}, {args.threads} thread(s), {args.device}")
    for name, taken in seconds.items():
        print(f"  {name:20s} {size / statistics.median(taken):8.1f} steps/s")
    for mode in ("none", "bf16"):
        share = ratio(seconds, f"network, {mode}", f"end to end, {mode}")
        print(f"  end to end over the network alone, {mode}: {share:.2f}")


if __name__ == "__main__":
    main()
