"""Writes a run down, asks the growth controller, and saves: what `ppo.train` reports to."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from agents.actor_critic import ActorCritic, as_input
from agents.figures import layout, router_figure, write_figure
from agents.growth import sample, signals
from agents.ppo import UpdateStats, estimate_advantages
from agents.rollout import Rollout
from agents.settings import Config
from agents.statistics import EpisodeStats, FloorRouting, Traces
from dynmoe.errors import NumericError
from dynmoe.growth.controller import GrowthController
from dynmoe.interventions.intervention import Intervention
from dynmoe.lab.figures import as_image
from dynmoe.lab.heat_map import heat_map
from dynmoe.lab.progress import ProgressLine
from dynmoe.lab.run import Run
from dynmoe.moe.layer import moe_layers
from dynmoe.moe.stats import routing_stats
from dynmoe.plasticity.metric import measure_all
from dynmoe.plasticity.probes import copy_parameters, take_probe
from envs.vector import TorchVectorEnv


class Recorder:
    """The observer of one training run.

    Attributes:
        curve: (environment steps, mean return since the point before or None), one per look.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        env: TorchVectorEnv,
        policy: ActorCritic,
        optimizer: Optimizer,
        controller: GrowthController | None,
        progress: ProgressLine,
        intervention: Intervention,
    ) -> None:
        self.run, self.config, self.env = run, config, env
        self.policy, self.optimizer, self.controller = policy, optimizer, controller
        self.progress, self.intervention = progress, intervention
        self.initial = _outside_experts(policy)
        self.episodes = EpisodeStats(env)
        self.routing = FloorRouting(env.num_floors)
        self.traces = Traces()
        self.curve: list[list[float | None]] = []
        self.began = (time.monotonic(), 0)
        self.measured: dict[str, float] = {}  # of the actor's and critic's network, this update
        run.log.tensorboard.add_custom_scalars(layout())

    def update_done(self, update: int, rollout: Rollout, stats: UpdateStats | None) -> None:
        """Count, log, grow, save."""
        config, steps = self.config, update * self.config.batch_size
        last = update == config.updates
        self.episodes.add(rollout)
        self.routing.add(rollout)
        self.traces.add(rollout)
        if stats is not None:
            self.run.log.scalars(steps, {f"ppo/{k}": v for k, v in asdict(stats).items()})
        if last or update % config.probe_every == 0:
            self._look(steps, rollout)
        if not last:
            self._grow(steps, rollout, stats)
        self.measured = {}
        if self.progress.due(steps) or last:
            self.progress.update(steps, ret=self.episodes.score, experts=self._experts())
        if last or self.run.checkpoint_due():
            self._check_weights(steps)
            self.run.checkpoint(update, self._checkpoint(update, rollout), logged=steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `_checkpoint` saved of this recorder."""
        self.curve = state["curve"]
        self.began = (time.monotonic(), state["steps"])
        for part in ("episodes", "routing", "traces"):
            getattr(self, part).load_state_dict(state[part])

    def _look(self, steps: int, rollout: Rollout) -> None:
        """Log episodes, routing and plasticity, and draw the best episode's routing."""
        values = self.episodes.values() | self.routing.values(self._experts())
        for layer, use in routing_stats(self.policy).items():
            values |= {f"router/{name}/{layer}": value for name, value in use.items()}
        self.measured = self._plasticity(rollout)
        values |= self.measured
        self.run.log.scalars(steps, values)
        self.curve.append([steps, values.get("episode/return")])
        now, (then, done) = time.monotonic(), self.began
        tensorboard = self.run.log.tensorboard  # log.jsonl holds no times
        tensorboard.add_scalar("time/steps_per_s", (steps - done) / (now - then), steps)
        self.began = (now, steps)
        if self.traces.best is not None and self.traces.best.gates:
            title = f"{self.config.env}, {steps:,} steps"
            figure = router_figure(self.traces.best, title)
            tensorboard.add_image("router", as_image(figure), steps, dataformats="HWC")
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
        seen = signals(
            steps, rollout, self.env.num_floors, self.episodes.score, stats, self.measured
        )
        index = sample(rollout, self.config.probe_samples)
        event = self.controller.step(seen, lambda: (self._inputs(rollout, index), None))
        if event is not None:
            self.run.log.event(steps, "growth", asdict(event))
            shock = {f"growth/{name}": value for name, value in event.shock.items()}
            self.run.log.scalars(steps, shock | {"growth/experts": float(event.experts)})

    def _checkpoint(self, update: int, rollout: Rollout) -> dict[str, Any]:
        """Everything to go on from."""
        return {
            "update": update,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict() if self.controller else None,
            "intervention": self.intervention.state_dict(),
            "env": self.env.state_dict(),
            "floors": rollout.next_floors,
            "recorder": {
                "steps": update * self.config.batch_size,
                "curve": self.curve,
                "episodes": self.episodes.state_dict(),
                "routing": self.routing.state_dict(),
                "traces": self.traces.state_dict(),
            },
        }

    def _check_weights(self, steps: int) -> None:
        """Never save what cannot be gone on from.

        Raises:
            NumericError: a weight is not finite; the checkpoints before are good.
        """
        for name, parameter in self.policy.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NumericError(
                    f"{name} is no longer finite at step {steps}; earlier checkpoints are kept; a "
                    "smaller --lr may help"
                )

    def _experts(self) -> int:
        return max((layer.num_experts for _, layer in moe_layers(self.policy)), default=1)


def _outside_experts(policy: ActorCritic) -> dict[str, Tensor]:
    """Copies of the parameters outside MoE layers: inside, growth moves units about."""
    layers = tuple(f"{name}." for name, _ in moe_layers(policy))
    return {n: p for n, p in copy_parameters(policy).items() if not n.startswith(layers)}
