"""`python -m dynmoe.rl`: a PPO agent whose experts grow, or what it is compared with.

This file holds the presets; the settings are in `agents.settings`, the work is in
`agents.experiment`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dynmoe.commands import begin
from dynmoe.errors import UserError
from dynmoe.lab.config import parse, run_command
from dynmoe.lab.names import preset_and_changes
from dynmoe.lab.results import Result
from dynmoe.registry import get

begin("rl", __name__)  # before imports that may fail

from agents.settings import Config  # noqa: E402
from agents.tuned import tuned  # noqa: E402

if TYPE_CHECKING:
    from dynmoe.lab.experiment import Experiment

__all__ = ["Config", "experiment", "main", "presets", "run"]

DESCRIPTION = """Reinforcement learning: train a PPO agent whose MoE layers grow experts, on the
pixels of Craftax. Results and figures go to runs/rl/NAME/seed-N. `--evaluate FOLDER` plays with a
trained agent.

Cost: laptop (Craftax Classic, 131,072 steps), 4 to 5 minutes on a core; mountaincar and acrobot, 2
to 3; craftax (a million steps), an hour; paper (1e9 steps), 130 core days; all others, one."""


def presets() -> dict[str, Config]:
    """Ready settings by name; the first is the default."""
    every = get("trigger", "every").Config
    laptop = Config(
        total_steps=131_072,
        num_envs=32,
        lr=5e-4,
        trigger=every(steps=65_536),
        probe_every=4,
    )
    smoke = replace(
        laptop,
        env="Stages-v0",
        encoder=get("encoder", "mlp").Config(hidden=64),
        total_steps=40_960,
        num_envs=16,
        rollout_steps=32,
        minibatches=4,
        lr=1e-3,
        threads=1,
        trigger=get("trigger", "stage").Config(share=0.5),
        probe_every=10,
    )
    craftax = replace(
        laptop,
        env="Craftax-Pixels-v1",
        total_steps=1_048_576,
        trigger=every(steps=524_288),
        probe_every=20,
    )
    paper = replace(
        craftax,
        total_steps=1_000_000_000,
        num_envs=1024,
        lr=2e-4,
        encoder=get("encoder", "conv").Config(),
        trigger=every(steps=500_000_000),
        autocast="bf16",
        probe_every=100,
        checkpoint_every_s=600,
    )
    ready = {"laptop": laptop, "minute": smoke, "smoke": smoke, **tuned()}
    return ready | {"craftax": craftax, "paper": paper}


def experiment() -> Experiment:
    """What this command does."""
    from agents.experiment import ReinforcementLearning

    return ReinforcementLearning()


def run(config: Config, preset: str = "own") -> Result:
    """Run these settings from Python: the method and its comparisons.

    Args:
        config: the settings, such as `replace(presets()["smoke"], epochs=1)`.
        preset: begins the names of run folders where `config.name` is None.

    Raises:
        UserError: the settings are to play with a trained agent, which `main` does.
    """
    if config.evaluate is not None:
        raise UserError("evaluate plays with a trained agent: use agents.playing.run_evaluation")
    from dynmoe.lab.report import run_all

    return run_all(experiment(), preset, config)


def main(argv: list[str]) -> None:
    """Read the command line; train, or play with what was trained."""
    preset, config = parse(presets(), argv, "python -m dynmoe.rl", DESCRIPTION)
    if config.evaluate is not None:
        from agents.playing import run_evaluation

        run_evaluation(config)
    else:
        run(config, preset_and_changes(preset, presets()[preset], config))


if __name__ == "__main__":
    run_command(main)
