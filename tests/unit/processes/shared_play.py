"""What each of two processes that share a run of rl does in the tests, and what one does alone."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shared_runs import in_float64, weights

from agents.actor_critic import ActorCritic
from agents.experiment import ReinforcementLearning
from agents.rollout import collect, of_all
from dynmoe import seeding
from dynmoe.errors import DynmoeError, Interrupted, UserError
from dynmoe.lab import checkpoint, processes
from dynmoe.lab.run import Run
from dynmoe.registry import get
from dynmoe.rl import presets
from envs.debug import Stages


def stages(folder: Path, name: str, **changes: Any) -> Any:
    """Three updates with a growth on Stages-v0, in minibatches of 15 steps, and evaluations."""
    config = replace(
        presets()["smoke"], runs_dir=folder / f"runs-{processes.rank()}", name=name,
        device="cpu", num_envs=6, rollout_steps=5, minibatches=2, epochs=2, total_steps=90,
        env_args='{"need": 1, "longest": 7}', encoder=get("encoder", "mlp").Config(hidden=16),
        probe_samples=16, phase_returns=True, eval_every=60, eval_steps=8,
        trigger=get("trigger", "every").Config(steps=60), router=get("router", "topk").Config(),
        balance=get("loss", "switch").Config(weight=0.1), resume=True,
    )  # fmt: skip
    return replace(config, **changes)


def craftax(folder: Path, name: str, codes: bool = True) -> Any:
    """Four updates on Craftax Classic with a growth after the second."""
    patch = get("encoder", "patch").Config(hidden=16, channels=8, mixed=4)
    return stages(
        folder, name, env=f"Craftax-Classic-{'Pixels' if codes else 'Symbolic'}-v1", env_args="",
        encoder=patch if codes else get("encoder", "mlp").Config(hidden=16), num_envs=4,
        rollout_steps=8, total_steps=128, trigger=get("trigger", "every").Config(steps=64),
        probe_every=2, phase_returns=False, eval_every=0, eval_steps=2000,
    )  # fmt: skip


def train(config: Any, stop_at: int = -1, spoil: bool = False) -> dict[str, Any]:
    """A run of rl in double precision: its weights, its summary and its last checkpoint.

    Args:
        stop_at: the update after which the last process gets SIGTERM.
        spoil: the last process begins with weights that are not finite.
    """
    experiment, last = ReinforcementLearning(), processes.rank() == processes.size() - 1
    with Run("rl", "smoke", config) as run, closing(experiment.prepare(run, config, None)) as one:
        in_float64(one)
        if spoil and last:
            next(one.model.parameters()).data.fill_(torch.inf)
        told = one.recorder.update_done

        def update_done(update: int, *found: Any) -> None:
            if last and update == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            told(update, *found)

        one.recorder.update_done = update_done
        if run.restored is not None:
            one.restore(run.restored)
        one.work()
        run.finish(one.summary())
        saved = checkpoint.load_latest(run.checkpoints) if processes.rank() == 0 else None
        return {
            "weights": weights(one), "summary": one.summary(), "saved": saved and saved["state"],
            "played": one.env.num_envs,
        }  # fmt: skip


def stopped(config: Any, stop_at: int) -> str:
    """Where a run stops after a signal to the last process."""
    try:
        train(config, stop_at)
    except Interrupted as error:
        return str(error).split(";")[0]
    return "not stopped"


def plays_stages(folder: Path) -> dict[str, Any]:
    """What three updates end with."""
    return train(stages(folder, "stages"))


def plays_codes(folder: Path) -> dict[str, Any]:
    """What four updates on frames end with."""
    return train(craftax(folder, "codes"))


def plays_symbolic(folder: Path) -> dict[str, Any]:
    """The same on vectors."""
    return train(craftax(folder, "symbolic", codes=False))


def goes_on(folder: Path) -> dict[str, Any]:
    """That on frames, stopped and resumed by as many processes."""
    config = craftax(folder, "stopped")
    return {"stopped": stopped(config, 2), **train(config)}


def leaves(folder: Path) -> str:
    """The same, stopped."""
    return stopped(craftax(folder, "left"), 2)


def takes_over(folder: Path) -> dict[str, Any]:
    """The rest of what another number of processes has begun, which is in this folder."""
    return train(craftax(folder, "left"))


def takes_over_from_one(folder: Path) -> dict[str, Any]:
    """The rest of what one process has begun in the folder `one`."""
    return takes_over(folder / "one")


def acts_at_random(folder: Path) -> str:
    """Where an agent that learns nothing stops."""
    random = get("agent", "random").Config()
    return stopped(stages(folder, "random", method=random), 1)


def fails_on_one(folder: Path) -> tuple[str, int]:
    """What all say where one's policy is not finite."""
    try:
        train(stages(folder, "spoilt"), spoil=True)
    except DynmoeError as error:
        return str(error), error.exit_code
    return "", 0


def divides(folder: Path) -> str:
    """Why five environments cannot be divided."""
    try:
        train(stages(folder, "odd", num_envs=5, rollout_steps=6))
    except UserError as error:
        return str(error)
    except DynmoeError as error:  # as the first process has told the others
        return str(error)
    return ""


def shares_a_rollout(folder: Path) -> dict[str, Any]:
    """A rollout of Stages-v0 that ends episodes by steps and by floors, acting and at random."""
    found = {}
    for uniform in (False, True):
        part = (processes.rank(), processes.size())
        env = Stages("Stages-v0", 6, seed=1, part=part, need=1, floors=2, longest=5)
        with seeding.seeded(0):
            encoder = get("encoder", "mlp").Config(hidden=16)
            policy = ActorCritic(encoder, env.input_shape, env.num_actions).double()
        policy.trunk.register_forward_pre_hook(lambda _, given: (given[0].double(),))
        seen, info = env.reset(seed=3)
        generator = torch.Generator().manual_seed(5)
        rollout = of_all(
            env, collect(env, policy, seen, info["floor"], 12, 0.9, generator, uniform)
        )
        episodes = [vars(episode) for episode in rollout.episodes]
        found[str(uniform)] = vars(rollout) | {"episodes": episodes}
    return found
