"""A minibatch step of PPO on vectors: as it is, and with the objective compiled by torch.

    pip install -e ".[rl]"     and a C++ compiler
    python -m benchmarks.ppo_step [--rounds 20] [--batch 256]

The network and the settings are those of `benchmarks.rl_peers` on CartPole-v1: layers of 64 units.
A step is the loss, its gradients, clipping and Adam. One torch thread; process time, in turns.
Compiling the objective is counted apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from agents.actor_critic import ActorCritic
from agents.ppo import ppo_loss
from benchmarks.rl_peers import TASKS, WIDTH
from benchmarks.timing import alternate, ratio, spread
from dynmoe.registry import get

Objective = Callable[[dict[str, Tensor]], Tensor]
OBSERVED, ACTIONS, STEPS = 4, 2, 50
"""Of CartPole: numbers in an observation, actions. Steps of a round."""


def samples(count: int) -> dict[str, Tensor]:
    """A minibatch [B, ...] of made-up numbers."""
    return {
        "observations": torch.randn(count, OBSERVED),
        "actions": torch.randint(ACTIONS, (count,)),
        "log_probs": -torch.rand(count),
        **{name: torch.randn(count) for name in ("values", "advantages", "returns")},
    }


def steps(objective: Objective, policy: nn.Module, batch: dict[str, Tensor]) -> None:
    """Some steps of an optimizer of their own."""
    parameters = list(policy.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=True)
    for _ in range(STEPS):
        loss = objective(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = TASKS["CartPole-v1"].settings
    encoder = get("encoder", "mlp").Config(hidden=WIDTH, widths=(WIDTH,))
    policy, batch = ActorCritic(encoder, (OBSERVED,), ACTIONS), samples(args.batch)

    def objective(batch: dict[str, Tensor]) -> Tensor:
        outputs, values = policy(batch["observations"])
        return ppo_loss(outputs, values, batch, settings, policy.distribution)[0]

    compiled = torch.compile(objective)
    began = time.perf_counter()
    steps(compiled, policy, batch)
    print(f"compiling and the first steps: {time.perf_counter() - began:.0f} s")
    calls = {
        name: partial(steps, call, policy, batch)
        for name, call in (("as it is", objective), ("compiled", compiled))
    }
    seconds = alternate(calls, args.rounds, torch.device("cpu"))
    for name, values in seconds.items():
        print(f"{name}: {1e3 * statistics.median(values) / STEPS:.2f} ms a step")
    low, high = spread(seconds, "as it is", "compiled")
    times = ratio(seconds, "as it is", "compiled")
    print(f"as it is / compiled: {times:.2f} ({low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
