"""Evaluations while an agent learns, in environments of their own, and its best checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from agents.actor_critic import ActorCritic
from agents.evaluate import evaluation_summary, play
from agents.making import make_env
from agents.settings import Config
from dynmoe import seeding
from dynmoe.lab import checkpoint, processes
from dynmoe.lab.run import Run
from envs.vector import TorchVectorEnv

BEST = "best"
"""folder of a run whose newest checkpoint did best"""
LOGGED = ("return_mean", "return_iqm", "length_mean", "deepest_mean", "unfinished")


class Evaluator:
    """Plays one episode in each of as many environments every `config.eval_every` steps.

    They are made anew each time, as an environment may remember the episodes before: so they are
    the same worlds, and nothing of training depends on them. Where observations are normalised, it
    is by the statistics of the training environments at that time.

    Args:
        run, config, policy: whose, and of whom.
        trained_in: the environments of training.
        state: everything to go on from, kept where the mean return is the best so far.

    Attributes:
        scores: [environment steps, mean return or None] of each evaluation.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        policy: ActorCritic,
        trained_in: TorchVectorEnv,
        state: Callable[[], dict[str, Any]],
    ) -> None:
        self.run, self.config, self.policy = run, config, policy
        self.trained_in, self.state = trained_in, state
        self.scores: list[list[float | None]] = []
        self._told = False

    def update_done(self, update: int) -> None:
        """Play if it is time, or training is over."""
        every, size = self.config.eval_every, self.config.batch_size
        passed = update * size // every > (update - 1) * size // every
        if passed or update == self.config.updates:
            self._play(update, update * size)

    @property
    def best(self) -> list[float | None] | None:
        """The best of `scores`, the first of equals; None while no episode has ended."""
        known = [score for score in self.scores if score[1] is not None]
        return max(known, key=lambda score: score[1] or 0.0, default=None)

    def _play(self, update: int, steps: int) -> None:
        config = self.config
        with seeding.kept():
            env = processes.in_turn(self._made)
        try:
            if config.normalize_observations or config.normalize_rewards:
                env.normalise_as(self.trained_in.state_dict())
            acts = config.method.build().acts
            episodes, unfinished, _ = play(
                env, self.policy, config.seed, config.eval_steps, not acts, config.autocast
            )
            found = evaluation_summary(env, episodes, unfinished)
        finally:
            env.close()
        known = {f"evaluation/{n}": found[n] for n in LOGGED if found[n] is not None}
        self.run.log.scalars(steps, known)
        self.scores.append([steps, found["return_mean"]])
        if unfinished and not self._told and processes.rank() == 0:
            self._told = True
            print(
                f"note: {unfinished} of {env.num_envs} episodes of the evaluation at step {steps} "
                f"were not over after --eval-steps {config.eval_steps}, and its mean return and "
                "`best` are of the others alone; use more steps",
                file=sys.stderr,
            )
        if self.best == self.scores[-1]:
            state = {"step": update, "state": self.state()}  # of all processes
            if processes.rank() == 0:
                checkpoint.save(self.run.folder / BEST, update, state)

    def _made(self) -> TorchVectorEnv:
        """Environments in which nobody has played, of the phase that training is in."""
        phase = self.trained_in.phase
        if phase is not None:
            return self.trained_in.on_phase(phase)
        return make_env(self.config, self.run.device)
