"""Reinforcement learning: an agent, and those it is compared with, in one environment."""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

import envs
from agents.evaluate import print_achievements
from agents.evaluator import Evaluator
from agents.exporting import PolicyExporter
from agents.figures import learning_figure
from agents.growth import policy_shock
from agents.making import growing_steps, make_env, make_policy
from agents.methods import Agent
from agents.phases import METRICS, figure
from agents.ppo import train
from agents.recorder import UpdateRecorder
from agents.settings import Config
from agents.statistics import learning_curve, tenths
from agents.video import check_video_name
from dynmoe import registry, seeding
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention, Periodic
from dynmoe.lab import processes
from dynmoe.lab.device import keep_freed_memory
from dynmoe.lab.experiment import (
    At,
    Column,
    Curve,
    Details,
    Experiment,
    Results,
    Session,
)
from dynmoe.lab.export import Exporter
from dynmoe.lab.figures import band, looks, new_figure, save
from dynmoe.lab.run import Run
from dynmoe.lab.statistics import confidence_interval, three
from dynmoe.moe.passes import share_batch
from envs.vector import TorchVectorEnv


@dataclass(frozen=True)
class ReinforcementLearning(Experiment):
    """What `dynmoe.rl` does. The metric is the mean return over the last tenth of training."""

    command = "rl"
    on_processes = True
    smoke_is_small = False
    least: ClassVar[dict[str, float]] = {
        "probe_every": 1, "probe_samples": 1, "eval_every": 0, "eval_steps": 1,
    }  # fmt: skip
    metric = "final_return"
    columns: ClassVar[tuple[Column, ...]] = (
        ("final return", "final_return", "last"),
        ("of the most, %", "of_the_most", "last"),
        ("growths", "growths", "last"),
        ("parameters", "parameters", "last"),
    )
    references = ("dense",)
    missing = "no episode ended"
    about = ("env", "env_args")

    def check(self, config: Config) -> None:
        """Also what the intervention and the method say of the settings."""
        super().check(config)
        config.check()
        _check_video(config)
        if not config.encoder.place:
            raise UserError("--encoder.place names no block; use trunk, actor or critic")
        intervention: Intervention = config.intervention.build()
        reason = intervention.without_tasks()
        told = envs.has_floors(config.env) and isinstance(intervention, Periodic)
        if reason is not None and not told:  # arrivals on floors stand for task starts
            raise UserError(reason)
        steps = config.updates * config.epochs * config.minibatches
        if (reason := intervention.too_late(math.inf, steps)) is not None:
            raise UserError(f"intervention {intervention.name} would do nothing: {reason}")
        agent: Agent = config.method.build()
        agent.make_block(config, growing_steps(config), config.seed)(
            config.encoder.hidden, config.encoder.hidden, 1
        )

    def variants(self, config: Config, shared: None) -> dict[str, dict[str, Config]]:
        """The method of the settings, then each of `config.compare`.

        Raises:
            UserError: a method is named twice.
        """
        names = [config.method.part.name, *config.compare]
        if len(set(names)) < len(names):
            raise UserError(
                f"--compare {' '.join(config.compare)}: name each method once, others only"
            )
        found = {config.variant: config}
        for name in config.compare:
            own_name = f"{config.name}-{name}" if config.name else None
            one = replace(config, method=registry.get("agent", name).Config(), name=own_name)
            self.check(one)
            found[one.variant] = one
        return {"": found}

    def label(self, config: Config, shared: None) -> str:
        """Method and environment: ids such as module:Space/Name-v0 hold what names should not."""
        return f"{config.variant}-{config.env}".replace(":", "-").replace("/", "-")

    def load(self, config: Config) -> None:
        """Runs share nothing; each has environments of its own."""

    def prepare(self, run: Run, config: Config, shared: None) -> AgentSession:
        """Environments, network, optimizer and growth."""
        kept = keep_freed_memory()
        if run.restored is None:
            run.log.event(0, "memory", {"freed_memory_is_kept": kept})
        with seeding.kept():
            part = (processes.rank(), processes.size())
            env = processes.in_turn(lambda: make_env(config, run.device, part))
        try:
            if config.video is not None:
                from agents.playing import check_pictures

                check_pictures(env, config)
            return AgentSession(run, config, env)
        except BaseException:
            env.close()
            raise

    def finished(self, run: Run, config: Config, shared: None, now: bool) -> None:
        """The run's learning curve, and its video if it is wanted and not there."""
        assert run.summary is not None
        if now and run.summary.get("achievements"):
            steps = f"{run.summary['env_steps']:,}"
            print_achievements(run.summary["achievements"], f"{config.env} after {steps} steps")
        own = Results({"": {config.variant: [run.summary]}}, {}, self)
        self.draw(run.folder / "learning.png", own, self.title(config, shared))
        if config.video is not None and (now or not (run.folder / config.video).is_file()):
            from agents.playing import film_run

            film_run(run.folder, config)

    def value(self, summary: dict[str, Any], metric: str, at: At) -> float:
        """A number of the summary; there are no tasks."""
        if metric == "growths":
            return len(summary["growth"])
        if metric == "of_the_most":
            final, most = summary["final_return"], summary["max_return"]
            return 100 * final / most if final is not None and most else math.nan
        if metric in ("best_return", "decline"):
            means = tenths(summary["curve"])
            best = max(means, default=math.nan)
            return best if metric == "best_return" or not means else best - means[-1]
        if metric in METRICS:
            return figure(summary, metric) if "shifts" in summary else math.nan
        found = summary[metric]
        return math.nan if found is None else float(found)

    def unit(self, metric: str) -> tuple[float, str, int]:
        """Returns are no shares."""
        whole = ("growths", "parameters", "recovery", "last_stage")
        return 1.0, "", 0 if metric in whole else 1 if metric == "of_the_most" else 2

    def describe(self, metric: str, at: At) -> str:
        """What is told of phases in full."""
        return METRICS.get(metric) or super().describe(metric, at)

    def details(self, summary: dict[str, Any]) -> Details:
        """The learning curve, growths, and what was trained for how long."""
        points = [(step, float(value)) for step, value in summary["curve"] if value is not None]
        return Details(
            {"episodic_return": Curve("environment steps", points)},
            growths=summary["growth"],
            cost={name: summary[name] for name in ("parameters", "env_steps")},
        )

    def entry(self, results: Results, stream: str, variant: str) -> dict[str, Any]:
        """Every seed's return and learning curve, and intervals."""
        runs = results.runs[stream][variant]
        returns = [run["final_return"] for run in runs]
        intervals = {}
        if None not in returns:
            for kind in ("mean", "iqm"):
                intervals[f"final_return_{kind}"] = three(confidence_interval(returns, kind))
        return {
            "final_return": returns,
            **intervals,
            "parameters": runs[0]["parameters"],
            "curves": [run["curve"] for run in runs],
        }

    def draw(self, path: Path, results: Results, title: str) -> None:
        """Mean episodic return over the environment steps; of several streams a panel each."""
        if len(results.streams) == 1:
            (variants,) = results.runs.values()
            most = {run["max_return"] for runs in variants.values() for run in runs}
            curves = {name: learning_curve(runs) for name, runs in variants.items()}
            learning_figure(path, curves, title, most.pop() if len(most) == 1 else None)
            return
        figure = new_figure(title, 4.2)
        grid = figure.subplots(1, len(results.streams), squeeze=False)
        for stream, axes in zip(results.streams, grid[0], strict=True):
            own = looks(results.runs[stream])
            for variant, runs in results.runs[stream].items():
                steps = [step for step, _ in runs[0]["curve"]]
                points = zip(*([value for _, value in r["curve"]] for r in runs), strict=True)
                whole = [(s, p) for s, p in zip(steps, points, strict=True) if None not in p]
                intervals = [confidence_interval(list(p), "mean") for _, p in whole]
                band(axes, [s for s, _ in whole], intervals, own[variant], variant, 1)
            axes.set(title=stream, xlabel="environment steps", ylabel="episodic return")
        save(figure, path)

    def exporter(self) -> Exporter:
        """The policy after the latest update that was saved."""
        return PolicyExporter()

    def title(self, config: Config, shared: None) -> str:
        """Environment and network."""
        return f"{config.env}, {config.encoder.part.name}, {config.num_envs} environments"


@dataclass(frozen=True)
class PhasedLearning(ReinforcementLearning):
    """The same, with what is known of phases and floors in its tables (see `agents.phases`)."""

    columns: ClassVar[tuple[Column, ...]] = (
        ("final return", "final_return", "last"),
        ("return of phases", "phase_return", "last"),
        ("recovery, steps", "recovery", "last"),
        ("last stage after", "last_stage", "last"),
        ("earlier phases", "earlier_return", "last"),
        ("lost of them", "forgetting", "last"),
        ("newest on new floor, first", "newest_at_first", "last"),
        ("at the end", "newest_on_new", "last"),
        ("on older floors", "newest_on_old", "last"),
        ("floor information", "floor_information", "last"),
        ("SRP", "segment_routing", "last"),
        ("SCH", "segment_cache", "last"),
        ("parameters", "parameters", "last"),
    )


@dataclass(frozen=True)
class LongLearning(ReinforcementLearning):
    """The same, with the best tenth of training and the decline from it."""

    columns: ClassVar[tuple[Column, ...]] = (
        ("final return", "final_return", "last"),
        ("best tenth", "best_return", "last"),
        ("decline from it", "decline", "last"),
        ("growths", "growths", "last"),
        ("parameters", "parameters", "last"),
    )


class AgentSession(Session):
    """One agent at all its updates."""

    def __init__(self, run: Run, config: Config, env: TorchVectorEnv) -> None:
        self.config, self.env = config, env
        _check_shared(config)
        share_batch(processes.joined())
        self.agent: Agent = config.method.build()
        self.intervention: Intervention = config.intervention.build()
        self.model = self.policy = make_policy(config, env, run.device, self.intervention)
        self.optimizer = torch.optim.Adam(
            self.policy.parameters(), config.lr, eps=config.adam_eps, fused=True
        )
        self.intervention.attach(
            self.policy, self.optimizer, seeding.generator(config.seed, "strategy")
        )
        self.controller = None
        if self.agent.grows:
            self.controller = config.make_controller(
                self.policy, self.optimizer, seeding.generator(config.seed, "growth"),
                functools.partial(policy_shock, distribution=self.policy.distribution),
            )  # fmt: skip
            self.controller.listeners.append(self.intervention.grown)
        self.observations, info = env.reset(seed=config.seed)
        self.floors, self.start = info["floor"], 0
        self.recorder: UpdateRecorder = UpdateRecorder(
            run, config, self.state, env, self.policy, self.controller
        )
        if config.eval_every:
            self.recorder.evaluator = Evaluator(run, config, self.policy, env, self.state)
        self.recorder.arrived.append(lambda stage: self.intervention.task_starts(stage, None))

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after an update."""
        self.start = state["update"]
        self.intervention.rebuild_from(state["intervention"])
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.intervention.load_state_dict(state["intervention"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self.recorder.load_state_dict(state["recorder"])
        self.observations = self.env.load_state_dict(state["env"])
        self.floors = state["floors"][self.env.rows].to(self.observations.device)
        self.recorder.progress.start_at(self.start * self.config.batch_size)

    def work(self) -> None:
        """All updates that are left."""
        train(
            self.env, self.policy, self.optimizer, self.config, self.config.seed, self.recorder,
            self.observations, self.floors, self.start, self.agent.learns, self.agent.acts,
            self.intervention,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """After the latest update; of several processes the first has all environments' states."""
        env = self.env.state_dict()
        parts = processes.told_to_first(env) if self.env.part[1] > 1 else None
        return {
            "update": self.recorder.update,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict() if self.controller else None,
            "intervention": self.intervention.state_dict(),
            "env": self.env.joined_state(parts) if parts else env,
            "floors": self.recorder.floors,
            "recorder": self.recorder.state_dict(),
        }

    def summary(self) -> dict[str, Any]:
        """The learning curve, and the mean return over its last tenth."""
        config, curve = self.config, self.recorder.curve
        means = tenths(curve)
        events = self.controller.events if self.controller else []
        more: dict[str, Any] = {}
        if self.env.num_floors > 1:
            more = {"shifts": self.recorder.shifts.begun, **self.recorder.phases}
            more["stage_floors"] = self.env.stage_floors
        if self.recorder.achievements:
            more["achievements"] = self.recorder.achievements
        if self.recorder.evaluator is not None:
            more["evaluations"] = self.recorder.evaluator.scores
            more["best_evaluation"] = self.recorder.evaluator.best
        return {
            "method": config.variant,
            "env": config.env,
            "seed": config.seed,
            "env_steps": config.updates * config.batch_size,
            "max_return": self.env.max_return,
            "parameters": sum(p.numel() for p in self.policy.parameters()),
            "curve": curve,
            "final_return": means[-1] if means else None,
            "growth": [asdict(event) for event in events],
            **more,
        }

    def close(self) -> None:
        """The environments."""
        self.env.close()


def _check_shared(config: Config) -> None:
    """Refuse what several processes that share a run would do otherwise than one.

    Raises:
        UserError: names the setting and what works.
    """
    count, rows = processes.size(), config.batch_size // config.minibatches
    intervention = config.intervention.part
    reason = None
    if rows < count:
        reason = f"--minibatches {config.minibatches} leave {rows} steps for each of them"
    elif count > 1 and intervention.by_batch:  # type: ignore[attr-defined]
        reason = f"--intervention {intervention.name} looks at whole batches"
    if reason is not None:
        raise UserError(
            f"{count} processes cannot share this run: {reason}; use one process, or another choice"
        )


def _check_video(config: Config) -> None:
    """Refuse a video that could not be written when the run is over.

    Raises:
        UserError: its name holds folders or is none of a video, or the package for videos is
            missing.
    """
    if config.video is None:
        return
    if config.video.name != str(config.video):
        raise UserError(
            f"--video {config.video}: each run writes it into its own folder; give a name alone, "
            "such as episode.mp4"
        )
    check_video_name(config.video)
    if importlib.util.find_spec("av") is None:
        raise UserError("--video needs the package av; install it with: pip install av")
