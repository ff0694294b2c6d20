"""Writes a run down, asks the growth controller, and saves: what `ppo.train` reports to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.actor_critic import ActorCritic, as_input
from agents.board import ROUTER_STRIP, STEPS_PER_S, board
from agents.evaluator import Evaluator
from agents.figures import THUMBNAIL, router_figure, write_figure
from agents.growth import sample, signals
from agents.phases import Shifts, consistency, returns_on_phases
from agents.ppo import UpdateStats, estimate_advantages
from agents.rollout import Rollout
from agents.settings import Config
from agents.statistics import EpisodeStats, FloorRouting, Traces
from dynmoe.growth.controller import GrowthController
from dynmoe.lab import processes
from dynmoe.lab.board import EXPERTS
from dynmoe.lab.figures import as_image
from dynmoe.lab.heat_maps import heat_map
from dynmoe.lab.recorder import Recorder, check_finite
from dynmoe.lab.run import Run
from dynmoe.moe.diagnostics import most_experts, routing_stats
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.probes import outside_experts, take_probe
from envs.vector import TorchVectorEnv

ACHIEVEMENT = "achievement/"


class UpdateRecorder(Recorder):
    """The observer of one training run.

    Attributes:
        curve: (environment steps, mean return since the point before or None), one per look.
        update: how many are done.
        floors: where the agents stand after the latest one.
        arrived: told the number of each new stage, before any growth.
        evaluator: plays now and then; None for never.
        achievements: share of episodes that unlocked each, over the latest stretch with episodes.
        phases: what is known of shifts and floors, for the summary.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        state: Callable[[], dict[str, Any]],
        env: TorchVectorEnv,
        policy: ActorCritic,
        controller: GrowthController | None,
    ) -> None:
        steps = config.updates * config.batch_size
        super().__init__(run, config.env, steps, state, "environment steps")
        self.config, self.env, self.policy, self.controller = config, env, policy, controller
        self.initial = outside_experts(policy)
        self.episodes = EpisodeStats(env)
        self.routing = FloorRouting(env.num_floors)
        self.traces = Traces()
        self.curve: list[list[float | None]] = []
        self.shifts = Shifts(env.first_floor if env.phase is None else 0)
        self.arrived: list[Callable[[int], None]] = []
        self.phases: dict[str, Any] = {
            "phase_returns": [], "played_shares": [], "newest_shares": [], "routing": {},
        }  # fmt: skip
        self.evaluator: Evaluator | None = None
        self.achievements: dict[str, float] = {}
        self.began = (time.monotonic(), 0)
        self.measured: dict[str, float] = {}  # of the actor's and critic's network, this update
        self.update, self.floors = 0, torch.empty(0)
        run.log.use(board(len(env.achievements)))

    def update_done(self, update: int, rollout: Rollout, stats: UpdateStats | None) -> None:
        """Count, log, grow, save."""
        config, steps = self.config, update * self.config.batch_size
        last = update == config.updates
        self.update, self.floors = update, rollout.next_floors
        self.episodes.add(rollout)
        self.routing.add(rollout)
        self.traces.add(rollout)
        if stats is not None:
            self.run.log.scalars(steps, {f"ppo/{k}": v for k, v in asdict(stats).items()})
        if last or update % config.probe_every == 0:
            self._look(steps, rollout)
        if not last:
            self._see_shift(steps, rollout)
            self._grow(steps, rollout, stats)
        elif config.phase_returns:
            self._play(steps, self.env.num_phases)
        if self.evaluator is not None:
            self.evaluator.update_done(update)
        self.measured = {}
        if self.progress.due(steps) or last:
            self.progress.update(steps, ret=self.episodes.score, experts=self._experts())
        if last or processes.by_first(self.run.checkpoint_due):  # the state is of all of them
            check_finite(self.policy, steps, "a smaller --lr may help")
            if last:
                processes.check_alike(self.policy, steps)
            self.save(update, logged=steps)

    def state_dict(self) -> dict[str, Any]:
        """What was counted and kept so far."""
        return {
            "steps": self.update * self.config.batch_size,
            "curve": self.curve,
            "episodes": self.episodes.state_dict(),
            "routing": self.routing.state_dict(),
            "traces": self.traces.state_dict(),
            "shifts": self.shifts.begun,
            "phases": self.phases,
            "achievements": self.achievements,
            "evaluations": self.evaluator.scores if self.evaluator else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        self.curve = state["curve"]
        self.began = (time.monotonic(), state["steps"])
        for part in ("episodes", "routing", "traces"):
            getattr(self, part).load_state_dict(state[part])
        self.shifts.begun = state.get("shifts", self.shifts.begun)  # older runs lack them
        self.phases = state.get("phases", self.phases)
        self.achievements = state.get("achievements", {})
        if self.evaluator is not None:
            self.evaluator.scores = state.get("evaluations", [])

    def _look(self, steps: int, rollout: Rollout) -> None:
        """Log episodes, routing and plasticity, and draw the best episode's routing."""
        values = self.episodes.values() | self.routing.values(self._experts())
        rates = {k: v for k, v in values.items() if k.startswith(ACHIEVEMENT)}
        if rates:
            self.achievements = {k.removeprefix(ACHIEVEMENT): v for k, v in rates.items()}
        for layer, use in routing_stats(self.policy).items():
            values |= {f"router/{name}/{layer}": value for name, value in use.items()}
        if self.traces.best is not None:
            values |= consistency(self.traces.best.gates, self._experts())
        self._keep_routing(steps, values)
        self.measured = self._plasticity(rollout)
        values |= self.measured
        self.run.log.scalars(steps, values)
        self.curve.append([steps, values.get("episode/return")])
        now, (then, done) = time.monotonic(), self.began
        speed = (steps - done) / (now - then)  # log.jsonl holds no times
        self.run.log.show(steps, {STEPS_PER_S: speed, EXPERTS: float(self._experts())})
        self.began = (now, steps)
        if self.traces.best is not None and self.traces.best.gates:
            title = f"{self.config.env}, {steps:,} steps"
            figure = router_figure(self.traces.best, title)
            small = as_image(router_figure(self.traces.best, title, width=THUMBNAIL))
            self.run.log.image(steps, ROUTER_STRIP, torch.from_numpy(small).permute(2, 0, 1))
            if processes.rank() == 0:
                write_figure(self.run.folder / "router.png", figure)
        self._draw_loads(steps)
        self.episodes.restart()
        self.routing.restart()
        self.traces.forget()

    def _draw_loads(self, steps: int) -> None:
        """Heat maps of the experts' loads on the visited floors, one per layer."""
        floors = [f"floor {floor}" for floor in self.routing.visited()]
        for name, load in self.routing.loads(self._experts()).items():
            experts = [f"expert {e}" for e in range(load.shape[1])]
            title = f"{name}: load by floor"
            self.run.log.image(
                steps, f"experts/floor/{name}", heat_map(load.T, experts, floors, title)
            )

    def _plasticity(self, rollout: Rollout) -> dict[str, float]:
        """All metrics of the actor's network and the critic's, each with a loss of its own.

        The actor's is the mean of -log p of its own actions, the critic's the squared error of its
        values; both on observations of the rollout.
        """
        index = sample(rollout, self.config.probe_samples)
        inputs = self._inputs(rollout, index)
        advantages = estimate_advantages(rollout, self.config.gamma, self.config.gae_lambda)
        returns = (advantages + rollout.values).flatten()[index].unsqueeze(1)
        actions = rollout.actions.flatten(0, 1)[index]
        values: dict[str, float] = {}
        for head, target, loss in (
            ("actor", actions, self.policy.distribution.loss),
            ("critic", returns, F.mse_loss),
        ):
            path, output = self.policy.path(head), self.policy.output_layer(head)
            probe = take_probe(path, inputs, target, self.initial, output, loss)
            values |= {f"{head}/{tag}": value for tag, value in measure_all(probe).items()}
        return values

    def _inputs(self, rollout: Rollout, index: Tensor) -> Tensor:
        """Float inputs [B, ...] of the network for samples of the flattened rollout."""
        return as_input(self.env.unpack(rollout.observations.flatten(0, 1)[index]))

    def _grow(self, steps: int, rollout: Rollout, stats: UpdateStats | None) -> None:
        """Ask the controller, and log what it did."""
        if self.controller is None:
            return
        env, played = self.env, self.env.phase_played
        seen = signals(
            steps, rollout, env.num_floors, self.episodes.score, stats, self.measured,
            env.first_floor, None if played is None else (played, env.num_phases),
        )  # fmt: skip
        index = sample(rollout, self.config.probe_samples)
        event = self.controller.step(seen, lambda: (self._inputs(rollout, index), None))
        if event is not None:
            self.log_growth(steps, asdict(event), self.config.granularity)

    def _see_shift(self, steps: int, rollout: Rollout) -> None:
        """Play what came before a shift, and tell of it."""
        stage = self.shifts.see(steps, rollout, self.env.phase, self.env.num_floors)
        if stage is not None:
            if self.config.phase_returns:
                self._play(steps, stage)
            for tell in self.arrived:
                tell(stage)

    def _play(self, steps: int, phases: int) -> None:
        """Keep the returns on the first `phases` phases."""
        config = self.config
        found, shares = returns_on_phases(
            self.env, self.policy, phases, config.seed, config.autocast
        )
        self.phases["phase_returns"].append([steps, found])
        self.phases["played_shares"].append(shares)

    def _keep_routing(self, steps: int, values: dict[str, float]) -> None:
        """Keep the newest expert's share by floor, and what the routing tells of floors and time.

        Shares are means over the MoE layers.
        """
        loads, newest = self.routing.loads(self._experts()), self._experts() - 1
        shares = [load[:, newest] for load in loads.values()]
        if self.env.num_floors < 2 or not shares:
            return
        means = torch.stack(shares).mean(dim=0).tolist()
        by_floor = [list(pair) for pair in zip(self.routing.visited(), means, strict=True)]
        self.phases["newest_shares"].append([steps, by_floor])
        kept = ("router/floor_information_share/", "router/segment_")
        self.phases["routing"] |= {k: v for k, v in values.items() if k.startswith(kept)}

    def _experts(self) -> int:
        return most_experts(self.policy)
