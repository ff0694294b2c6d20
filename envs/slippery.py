"""SlipperyAnt: MuJoCo's ant on ground whose friction changes, abruptly and again and again.

Source: Dohare et al. 2024 (Nature 632, 768-774), Figure 3: every 2 million steps, at the start of
an episode, friction is drawn log-uniformly from 0.02 to 2. There plain PPO loses its ability to
learn, and continual backpropagation or L2 regularisation keep it. Theirs is PyBullet's ant; this is
gymnasium's Ant-v5, with its rewards.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import gymnasium
import numpy as np

from dynmoe.errors import UserError

NAME = "SlipperyAnt-v0"
LOWEST, HIGHEST = 0.02, 2.0
FIRST = 1.0
"""friction before the first change: Ant-v5's own"""


def register() -> None:
    """Let gymnasium know it.

    Raises:
        UserError: MuJoCo is not installed.
    """
    if importlib.util.find_spec("mujoco") is None:
        raise UserError(f"{NAME} needs MuJoCo; run: pip install 'dynmoe[mujoco]'")
    if NAME not in gymnasium.registry:
        gymnasium.register(NAME, entry_point=SlipperyAnt, max_episode_steps=1000)


class SlipperyAnt(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Ant-v5 whose sliding friction is another every so many steps.

    All parts get the friction, the ground and the ant: MuJoCo takes the larger of two parts that
    touch. The new friction holds from the first episode that begins after the change is due.

    Args:
        every: steps of this environment from one change to the next; N environments side by side
            make N times as many in between.
        schedule: decides the frictions: environments with the same one have the same frictions.
        kwargs: of Ant-v5.

    Raises:
        UserError: every or schedule cannot be.
    """

    def __init__(self, every: int = 2_000_000, schedule: int = 0, **kwargs: Any) -> None:
        for option, value, least in (("every", every, 1), ("schedule", schedule, 0)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{option}={value} must be a whole number of at least {least}")
        render_mode = kwargs.pop("render_mode", None)
        super().__init__(gymnasium.make("Ant-v5", -1, render_mode=render_mode, **kwargs).unwrapped)
        self.every, self.schedule, self.steps = every, schedule, 0
        self.friction = FIRST

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, with another friction if one is due; info["friction"] tells it."""
        self.friction = friction(self.schedule, self.steps // self.every)
        self.unwrapped.model.geom_friction[:, 0] = self.friction  # type: ignore[attr-defined]
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "friction": self.friction}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step."""
        self.steps += 1
        return self.env.step(action)


def friction(schedule: int, change: int) -> float:
    """The friction after a number of changes: the ant's own, then log-uniform in 0.02..2."""
    if change == 0:
        return FIRST
    generator = np.random.default_rng([schedule, change])
    return math.exp(generator.uniform(math.log(LOWEST), math.log(HIGHEST)))
