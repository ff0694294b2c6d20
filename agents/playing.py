"""`python -m dynmoe.rl --evaluate FOLDER --video x.mp4`: playing with a trained agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from agents.evaluate import evaluation_summary, play, print_evaluation
from agents.evaluator import BEST
from agents.figures import router_figure, write_figure
from agents.making import make_env, make_policy
from agents.settings import Config
from agents.video import write_video
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.lab import checkpoint
from dynmoe.lab.config import from_dict
from dynmoe.lab.device import keep_freed_memory, resolve
from dynmoe.lab.files import write_json
from dynmoe.lab.progress import ProgressLine


def run_evaluation(config: Config) -> None:
    """Play with a trained agent (`config.evaluate`); print a table, draw, and write the video.

    Raises:
        UserError: there is no run, or nothing to film.
        ResourceError: the checkpoint is damaged.
    """
    assert config.evaluate is not None
    folder, trained, state = _find(config.evaluate)
    keep_freed_memory()
    device = resolve(config.device)
    env = make_env(trained, device)
    if config.video is not None and len(env.input_shape) != 3:
        raise UserError(
            f"--video has no effect: {trained.env} shows vectors of shape {env.input_shape} and no "
            "images; leave it out"
        )
    env.normalise_as(state["env"])
    intervention: Intervention = trained.intervention.build()
    policy = make_policy(trained, env, device, intervention)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)  # for what the intervention rebuilds
    intervention.attach(policy, optimizer, torch.Generator())
    intervention.rebuild_from(state["intervention"])
    policy.load_state_dict(state["policy"])
    with ProgressLine("evaluation", config.max_steps) as progress:
        episodes, unfinished, trace = play(
            env, policy, config.seed, config.max_steps, uniform=not trained.method.build().acts,
            autocast=trained.autocast, observations=config.video is not None, progress=progress,
        )  # fmt: skip
    summary = evaluation_summary(env, episodes, unfinished)
    steps = state["update"] * trained.batch_size
    title = f"{trained.variant} on {trained.env} after {steps:,} steps"
    print_evaluation(summary, title)
    name = f"evaluation-{steps}-seed-{config.seed}"
    write_json(folder / f"{name}.json", summary)
    if trace is not None and trace.gates:
        write_figure(folder / f"{name}-router.png", router_figure(trace, title))
    if config.video is not None:
        if trace is None:
            raise UserError(f"no episode ended within --max-steps {config.max_steps}: no video")
        write_video(config.video, env, trace)
        print(f"video: {config.video}")
    env.close()
    print(f"results: {folder / name}.json")


def _find(path: Path) -> tuple[Path, Config, dict[str, Any]]:
    """A run's folder, its settings, and the state in one of its checkpoints."""
    folder = path.parent.parent if path.is_file() else path
    checkpoints = folder / "checkpoints"
    if path.name == BEST:
        folder, checkpoints = path.parent, path
    settings = folder / "config.json"
    if not settings.is_file():
        raise UserError(
            f"--evaluate {path}: no run of this command there; give a folder such as "
            "runs/rl/NAME/seed-0, or a checkpoint in it"
        )
    one = path.is_file()
    saved = checkpoint.load(path) if one else checkpoint.load_latest(checkpoints)
    if saved is None:
        raise UserError(f"--evaluate {path}: that run has saved no checkpoint yet")
    return folder, from_dict(Config, json.loads(settings.read_text())), saved["state"]
