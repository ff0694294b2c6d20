"""PPO end to end from Craftax's pixels, against its network alone and the published JAX agent.

    python -m benchmarks.ppo [--threads 1] [--env Craftax-Pixels-v1] [--rounds 3] [--played 600]

"end to end" is the whole of `agents.ppo.train`: environment, rendering, acting, learning, with
dense blocks shaped like the Craftax baselines' ActorCriticConv (64 environments x 16 steps, 4
epochs, 8 minibatches). "forward" and "update" do that network's passes alone, on frames made
beforehand: one forward per step, and four forward-and-backward ones. "dense" computes the first
convolution from pixels, "tiled" from tile responses (`--encoder.tile`). The variants take turns,
after `--played` random steps, by when the environments are at all times of day: night noise has no
tiles. The JAX agent is not run here: Craftax_Baselines' ppo.py was measured once at 3.3 steps/s on
Craftax-Classic-Pixels-v1 with the same sizes, on two cores of another processor.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

import envs
from agents.actor_critic import ActorCritic
from agents.ppo import PPOSettings, autocast, train
from agents.rollout import Rollout
from agents.tiles import distinct_tiles
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


def make_policy(env: TorchVectorEnv, tile: int = 0) -> ActorCritic:
    """A dense agent with the encoder's default sizes, with tile responses if there is a tile."""
    policy = ActorCritic(get("encoder", "conv").Config(tile=tile), env.input_shape, env.num_actions)
    return policy.to(env.device).to(memory_format=torch.channels_last)


def end_to_end(
    env: TorchVectorEnv, policy: ActorCritic, settings: PPOSettings, observations: Tensor
) -> Callable[[], None]:
    """One update of PPO, going on where the one before stopped."""
    nobody = Nobody()
    nobody.observations, nobody.floors = observations, observations.new_zeros(env.num_envs).long()
    optimizer = torch.optim.Adam(policy.parameters(), settings.lr, eps=settings.adam_eps)

    def call() -> None:
        train(env, policy, optimizer, settings, 0, nobody, nobody.observations, nobody.floors)

    return call


def passes(
    env: TorchVectorEnv, policy: ActorCritic, settings: PPOSettings, batch: Tensor
) -> dict[str, Callable[[], None]]:
    """The same update's passes through the network on frames `batch`, and nothing else."""
    frames = batch[: settings.num_envs]

    def forward() -> None:
        with autocast(env.device, settings.autocast), torch.no_grad():
            for _ in range(settings.rollout_steps):
                policy(frames)

    def update() -> None:
        with autocast(env.device, settings.autocast):
            for _ in range(settings.epochs * settings.minibatches):
                logits, values = policy(batch)
                (logits.logsumexp(1).mean() + values.square().mean()).backward()
                for parameter in policy.parameters():
                    parameter.grad = None

    return {"forward": forward, "update": update}


def play(env: TorchVectorEnv, steps: int, size: int) -> tuple[Tensor, Tensor]:
    """`size` frames of random play, the last after `steps` steps, and the last observations."""
    observations, _ = env.reset()
    env.action_space.seed(0)
    seen = deque([observations], maxlen=math.ceil(size / env.num_envs))
    for _ in range(steps):
        seen.append(env.step(env.action_space.sample())[0])
    batch = env.unpack(torch.cat(tuple(seen)))
    return batch.repeat(math.ceil(size / len(batch)), 1, 1, 1)[:size], seen[-1]


def report(seconds: dict[str, list[float]], modes: list[str], size: int) -> None:
    """Rates, and ratios within the same rounds."""
    for name, taken in seconds.items():
        print(f"  {name:24s} {size / statistics.median(taken):8.1f} steps/s")
    for mode in modes:
        parts = [seconds[f"{part} dense, {mode}"] for part in ("forward", "update")]
        seconds["network"] = [sum(both) for both in zip(*parts, strict=True)]
        for kind in ("dense", "tiled"):
            share = ratio(seconds, "network", f"end to end {kind}, {mode}")
            print(f"  end to end {kind} over the dense network alone, {mode}: {share:.2f}")
        for part in ("forward", "update", "end to end"):
            gain = ratio(seconds, f"{part} dense, {mode}", f"{part} tiled, {mode}")
            print(f"  {part}, tiled over dense, {mode}: {gain:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env", default="Craftax-Pixels-v1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--rollout-steps", type=int, default=16)
    parser.add_argument("--played", type=int, default=600)
    parser.add_argument("--modes", nargs="+", default=["none", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", choices=("keep", "default"), default="keep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory == "keep":
        keep_freed_memory()
    device = torch.device(args.device)
    env = envs.make(args.env, args.num_envs, 0, device)
    size = args.num_envs * args.rollout_steps
    tile = 7 if "Classic" in args.env else 10
    variants: dict[str, Callable[[], None]] = {}
    for mode in args.modes:
        settings = PPOSettings(
            total_steps=size, num_envs=args.num_envs, rollout_steps=args.rollout_steps,
            autocast=mode,
        )  # fmt: skip
        batch, observations = play(env, args.played, size // settings.minibatches)
        for kind, side in (("dense", 0), ("tiled", tile)):
            policy = make_policy(env, side)
            for part, call in passes(env, policy, settings, batch).items():
                variants[f"{part} {kind}, {mode}"] = call
            whole = end_to_end(env, policy, settings, observations)
            variants[f"end to end {kind}, {mode}"] = whole
    noisy = 1 - float(distinct_tiles(batch.cpu(), tile)[2].float().mean())
    seconds = alternate(variants, args.rounds, device)
    print(f"{args.env}, conv, {args.threads} thread(s), {args.device}, played {args.played}")
    print(f"  frames with night noise: {100 * noisy:.0f} %")
    report(seconds, args.modes, size)


if __name__ == "__main__":
    main()
