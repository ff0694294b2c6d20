"""One reinforcement-learning run: environments, agent, training, and what is left of it."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import envs
from agents.actor_critic import ActorCritic
from agents.figures import learning_figure
from agents.growth import policy_shock
from agents.methods import Agent
from agents.ppo import train
from agents.recorder import Recorder
from agents.settings import Config
from agents.statistics import learning_curve
from dynmoe import registry, seeding
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.interventions.intervention import Intervention
from dynmoe.lab.memory import keep_freed_memory
from dynmoe.lab.progress import ProgressLine
from dynmoe.lab.results import Result, read_run
from dynmoe.lab.run import Run
from envs.vector import TorchVectorEnv


def run_all(preset: str, config: Config) -> Result:
    """Train `config.method`, then each of `config.compare`; print a table and draw the curves."""
    names = [config.method.part.name, *config.compare]
    if len(set(names)) < len(names):
        raise UserError(f"--compare {' '.join(config.compare)}: name each method once, others only")
    others = [registry.get("agent", name).Config() for name in config.compare]
    summaries: dict[str, dict[str, Any]] = {}
    folders: list[Path] = []
    policy = None
    for name, method in zip(names, (config.method, *others), strict=True):
        own_name = f"{config.name}-{name}" if config.name and folders else config.name
        one = replace(config, method=method, name=own_name)
        folder, summary, trained = _run_one(preset, one)
        policy = policy if folders else trained
        folders.append(folder)
        summaries[one.variant] = summary
        learning_figure(
            folder / "learning.png", {one.variant: learning_curve([summary])}, _title(config),
            summary["max_return"],
        )  # fmt: skip
    if others:
        curves = {name: learning_curve([summary]) for name, summary in summaries.items()}
        most = summaries[config.variant]["max_return"]
        learning_figure(folders[0] / "comparison.png", curves, _title(config), most)
    print_agents(summaries, _title(config))
    print(f"results: {folders[0]}")
    return Result(folders[0], tuple(map(read_run, folders)), policy)


def run_training(preset: str, config: Config) -> tuple[Path, dict[str, Any]]:
    """Train one agent, or read what an earlier run of the same settings found.

    Returns:
        the run's folder and its summary.
    """
    return _run_one(preset, config)[:2]


def _run_one(preset: str, config: Config) -> tuple[Path, dict[str, Any], ActorCritic | None]:
    """As `run_training`, and the network if it is trained now."""
    check(config)
    kept, policy = keep_freed_memory(), None
    with Run("rl", preset, config, label=_label(config)) as run:
        if run.summary is None:
            if run.restored is None:
                run.log.event(0, "memory", {"freed_memory_is_kept": kept})
            with seeding.kept():
                env = make_env(config, run.device)
            try:
                summary, policy = _train(run, config, env)
                run.finish(summary)
            finally:
                env.close()
        assert run.summary is not None  # finished just now, or earlier
        return run.folder, run.summary, policy


def check(config: Config) -> None:
    """Refuse settings that cannot work before any work is done.

    Raises:
        UserError: names the setting.
    """
    config.check()
    for name in ("probe_every", "probe_samples"):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(config, name)} is too small; use 1 or more")
    intervention: Intervention = config.intervention.build()
    reason = intervention.without_tasks()
    if reason is not None:
        raise UserError(reason)
    agent: Agent = config.method.build()
    agent.make_block(config, _growing_steps(config), config.seed)(
        config.encoder.hidden, config.encoder.hidden, 1
    )


def _growing_steps(config: Config) -> int:
    """The run's length for plans, which count what falls due before it.

    The last chance to grow comes one update before the end.
    """
    return (config.updates - 1) * config.batch_size + 1


def make_env(config: Config, device: torch.device) -> TorchVectorEnv:
    """The environments of a run.

    Raises:
        UserError: settings that cannot be.
    """
    return envs.make(
        config.env, config.num_envs, config.seed, device, renderer=config.renderer,
        observation="pixels" if config.renderer == "upstream" else None,
        env_args=_env_args(config.env_args),
        normalize_observations=config.normalize_observations,
        normalize_rewards=config.normalize_rewards, gamma=config.gamma,
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
    config: Config, env: TorchVectorEnv, device: torch.device, intervention: Intervention
) -> ActorCritic:
    """The network of a run, as drawn from its seed and made over by the intervention."""
    agent: Agent = config.method.build()
    steps = _growing_steps(config)
    make_block = agent.make_block(config, steps, seeding.derive(config.seed, "blocks"))
    with seeding.seeded(config.seed, "policy"):
        policy = ActorCritic(config.encoder, env.input_shape, env.single_action_space, make_block)
    config.join_routers(policy)
    intervention.transform(policy, seeding.generator(config.seed, "transform"))
    if len(env.input_shape) == 3:  # frames come with channels last, and convolutions keep them so
        policy.to(memory_format=torch.channels_last)
    return policy.to(device)


def _train(run: Run, config: Config, env: TorchVectorEnv) -> tuple[dict[str, Any], ActorCritic]:
    """All updates, from the start or from the run's checkpoint; the summary and the network."""
    agent: Agent = config.method.build()
    intervention: Intervention = config.intervention.build()
    policy = make_policy(config, env, run.device, intervention)
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, eps=config.adam_eps, fused=True)
    intervention.attach(policy, optimizer, seeding.generator(config.seed, "strategy"))
    controller = None
    if agent.grows:
        generator = seeding.generator(config.seed, "growth")
        controller = config.make_controller(
            policy, optimizer, generator,
            functools.partial(policy_shock, distribution=policy.distribution),
        )  # fmt: skip
        controller.listeners.append(intervention.grown)
    observations, info = env.reset(seed=config.seed)
    floors, start = info["floor"], 0
    with ProgressLine(config.env, config.updates * config.batch_size) as progress:
        recorder = Recorder(run, config, env, policy, optimizer, controller, progress, intervention)
        if run.restored is not None:
            state, start = run.restored, run.restored["update"]
            intervention.rebuild_from(state["intervention"])
            policy.load_state_dict(state["policy"])
            optimizer.load_state_dict(state["optimizer"])
            intervention.load_state_dict(state["intervention"])
            if controller is not None:
                controller.load_state_dict(state["controller"])
            recorder.load_state_dict(state["recorder"])
            observations = env.load_state_dict(state["env"])
            floors = state["floors"].to(run.device)
            progress.start_at(start * config.batch_size)
        train(env, policy, optimizer, config, config.seed, recorder, observations, floors,
              start, agent.learns, agent.acts, intervention)  # fmt: skip
    return _summary(config, env, policy, recorder, controller), policy


def print_agents(summaries: dict[str, dict[str, Any]], title: str) -> None:
    """One row per method of finished runs."""
    table = Table(title=title, caption="mean return over the last tenth of training; one seed")
    for column in ("method", "return", "of the most", "growths", "parameters"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, summary in summaries.items():
        final, most = summary["final_return"], summary["max_return"]
        share = f"{100 * final / most:.1f} %" if final is not None and most else ""
        shown = "no episode ended" if final is None else f"{final:.2f}"
        growths, parameters = str(len(summary["growth"])), f"{summary['parameters']:,}"
        table.add_row(name, shown, share, growths, parameters)
    Console().print(table)


def _label(config: Config) -> str:
    """Part of a folder's name: ids such as module:Space/Name-v0 hold what names should not."""
    return f"{config.variant}-{config.env}".replace(":", "-").replace("/", "-")


def _title(config: Config) -> str:
    return f"{config.env}, {config.encoder.part.name}, {config.num_envs} environments"


def _summary(
    config: Config,
    env: TorchVectorEnv,
    policy: ActorCritic,
    recorder: Recorder,
    controller: GrowthController | None,
) -> dict[str, Any]:
    """What summary.json holds: figures of the whole run, nothing that changes from run to run."""
    known = [value for _, value in recorder.curve if value is not None]
    tail = known[-max(1, math.ceil(len(known) / 10)) :]
    return {
        "method": config.variant,
        "env": config.env,
        "seed": config.seed,
        "env_steps": config.updates * config.batch_size,
        "max_return": env.max_return,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "curve": recorder.curve,
        "final_return": sum(tail) / len(tail) if tail else None,
        "growth": [asdict(event) for event in controller.events] if controller else [],
    }
