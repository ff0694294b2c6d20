"""`python -m dynmoe.rl --evaluate FOLDER --video x.mp4`: playing with a trained agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from agents.actor_critic import ActorCritic
from agents.evaluate import evaluation_summary, play, print_evaluation
from agents.evaluator import BEST
from agents.figures import router_figure, shown_steps, write_figure
from agents.making import make_env, make_policy
from agents.settings import Config
from agents.statistics import Trace
from agents.video import as_pixels, check_video_name, write_video
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.lab import checkpoint
from dynmoe.lab.config import from_dict
from dynmoe.lab.device import keep_freed_memory, resolve
from dynmoe.lab.files import write_json
from dynmoe.lab.progress import ProgressLine
from envs.vector import TorchVectorEnv


def run_evaluation(config: Config) -> None:
    """Play with a trained agent (`config.evaluate`); print a table, draw, and write the video.

    Raises:
        UserError: there is no run, or nothing to film.
        ResourceError: the checkpoint is damaged.
    """
    assert config.evaluate is not None
    folder, trained, state = _find(config.evaluate)
    keep_freed_memory()
    env, policy = _restored(trained, state, resolve(config.device))
    if config.video is not None:
        check_video_name(config.video)
        check_pictures(env, trained)
    filming = config.video is not None or (env.pictured and env.num_floors > 1)
    drawing = env.filmed() if filming else env
    phase = env.phase_in(state["env"])
    world = env if phase is None else env.on_phase(phase)  # where no phase ends the episodes
    apart = drawing is not env or env.phase is not None  # pictures are of other episodes
    with ProgressLine("evaluation", config.max_steps) as progress:
        episodes, unfinished, trace = play(
            world, policy, config.seed, config.max_steps, uniform=not trained.method.build().acts,
            autocast=trained.autocast, observations=filming and not apart, progress=progress,
        )  # fmt: skip
    if world is not env:
        world.close()
    summary = evaluation_summary(env, episodes, unfinished)
    steps = state["update"] * trained.batch_size
    title = f"{trained.variant} on {trained.env} after {steps:,} steps"
    print_evaluation(summary, title)
    name = f"evaluation-{steps}-seed-{config.seed}"
    write_json(folder / f"{name}.json", summary)
    if filming and apart:
        env.close()
        env, trace = _filmed(drawing, policy, trained, config)
    if trace is not None and trace.gates:
        write_figure(folder / f"{name}-router.png", _figure(env, trace, title))
        print(f"router: {folder / name}-router.png")
    if config.video is not None:
        _write_video(config.video, env, trace, config)
    env.close()
    print(f"results: {folder / name}.json")


def film_run(folder: Path, config: Config) -> None:
    """Write the video of a run that has been trained (`config.video`) into its folder.

    Raises:
        UserError: no episode ended.
    """
    assert config.video is not None
    saved = checkpoint.load_latest(folder / "checkpoints")
    assert saved is not None  # the run is over
    env, policy = _restored(config, saved["state"], resolve(config.device))
    env, trace = _filmed(env.filmed(), policy, config, config)
    _write_video(folder / config.video, env, trace, config)
    env.close()


def check_pictures(env: TorchVectorEnv, config: Config) -> None:
    """Refuse to film what cannot be seen.

    Raises:
        UserError: observations are no images, and there is no rgb_array.
    """
    if not env.pictured:
        raise UserError(
            f"--video has no effect: {config.env} shows vectors of shape {env.input_shape}, no "
            "images, and has no rgb_array; leave it out"
        )


def _restored(
    config: Config, state: dict[str, Any], device: torch.device
) -> tuple[TorchVectorEnv, ActorCritic]:
    """New environments of a run, and its agent."""
    env = make_env(config, device)
    env.normalise_as(state["env"])
    intervention: Intervention = config.intervention.build()
    policy = make_policy(config, env, device, intervention)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)  # for what the intervention rebuilds
    intervention.attach(policy, optimizer, torch.Generator())
    intervention.rebuild_from(state["intervention"])
    policy.load_state_dict(state["policy"])
    return env, policy


def _filmed(
    drawing: TorchVectorEnv, policy: ActorCritic, trained: Config, config: Config
) -> tuple[TorchVectorEnv, Trace | None]:
    """The best episode with its pictures, and environments that know how to draw them.

    Where there are phases, of episodes on all of them: the one that saw most floors.
    """
    phases = range(drawing.num_phases) if drawing.phase is not None else []
    worlds = [drawing.on_phase(phase) for phase in phases] or [drawing]
    traces = [
        play(
            world, policy, config.seed, config.max_steps, not trained.method.build().acts,
            trained.autocast, observations=True,
        )[2] for world in worlds
    ]  # fmt: skip
    ended = [trace for trace in traces if trace is not None]
    best = max(ended, key=lambda trace: (len(trace.floors.unique()), trace.deepest), default=None)
    for world in worlds[1:]:
        world.close()
    return worlds[0], best


def _figure(env: TorchVectorEnv, trace: Trace, title: str) -> Any:
    """The router over the episode, with pictures where its floor changes, if there are any."""
    if trace.observations is None:
        return router_figure(trace, title)
    steps = shown_steps(trace.floors.tolist())
    pictures = as_pixels(env.images(trace.observations[steps].to(env.device)))
    return router_figure(trace, title, dict(zip(steps, pictures, strict=True)))


def _write_video(path: Path, env: TorchVectorEnv, trace: Trace | None, config: Config) -> None:
    if trace is None:
        raise UserError(f"no episode ended within --max-steps {config.max_steps}: no video")
    write_video(path, env, trace)
    print(f"video: {path}")


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
