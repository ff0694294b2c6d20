"""Any gymnasium environment with discrete actions, as a TorchVectorEnv."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from dynmoe import seeding
from dynmoe.errors import UserError
from envs.vector import Info, TorchVectorEnv


class GymEnv(TorchVectorEnv):
    """Environments of gymnasium's registry, stepped one after another in this process.

    They cannot be saved: when a run is resumed, their episodes start anew.

    Args:
        name: a gymnasium id, such as "CartPole-v1".
        num_envs, seed, device: as for all environments.

    Raises:
        UserError: actions are not discrete, or observations are neither vectors nor images.
    """

    resumable: ClassVar[bool] = False

    def __init__(
        self, name: str, num_envs: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.name, self.num_envs, self.seed, self.resets = name, num_envs, seed, 0
        self.device = torch.device(device)
        try:
            self.envs = gymnasium.make_vec(
                name, num_envs, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
            )
        except gymnasium.error.Error as error:  # unknown, or a package is lacking
            raise UserError(f"environment {name}: {error}") from None
        self.single_observation_space = self.envs.single_observation_space
        self.observation_space = self.envs.observation_space
        self.single_action_space = self.envs.single_action_space
        self.action_space = self.envs.action_space
        seen, acts = self.single_observation_space, self.single_action_space
        if not isinstance(acts, spaces.Discrete):
            self._refuse(f"its actions are {acts}, and only Discrete ones are supported")
        shape = seen.shape or ()
        if not isinstance(seen, spaces.Box) or len(shape) not in (1, 3):
            self._refuse(f"it shows {seen}, and only vectors and images are supported")
        self.first_action = int(acts.start)
        self.is_image = len(shape) == 3
        self.input_shape = (shape[2], shape[0], shape[1]) if self.is_image else tuple(shape)
        self.score = torch.zeros(num_envs)
        self.length = torch.zeros(num_envs, dtype=torch.long)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        """Start all episodes anew."""
        seed = self.seed if seed is None else seed
        first = seeding.derive(seed, self.name, self.resets) % 2**31
        observations, _ = self.envs.reset(seed=first, options=options)
        self.score.zero_()
        self.length.zero_()
        floor = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        return self._tensor(observations), {"floor": floor}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        """One step of all environments with actions [N]."""
        chosen = actions.cpu().numpy() + self.first_action
        observations, reward, terminated, truncated, seen = self.envs.step(chosen)
        done = torch.from_numpy(terminated | truncated)
        self.score += torch.from_numpy(np.asarray(reward, dtype=np.float32))
        self.length += 1
        final = np.array(observations)
        for i in done.nonzero().flatten().tolist():
            final[i] = seen["final_obs"][i]
        floor = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        info: Info = {
            "final_obs": self._tensor(final),
            "_final_obs": done.to(self.device),
            "episode": {
                "r": self.score.to(self.device, copy=True),
                "l": self.length.to(self.device, copy=True),
                "deepest": floor,
            },
            "_episode": done.to(self.device),
            "achievements": floor.new_zeros(self.num_envs, 0, dtype=torch.bool),
            "floor": floor,
        }
        self.score[done] = 0
        self.length[done] = 0
        gained = torch.from_numpy(np.asarray(reward, dtype=np.float32)).to(self.device)
        died, cut_off = (torch.from_numpy(x).to(self.device) for x in (terminated, truncated))
        return self._tensor(observations), gained, died, cut_off, info

    def unpack(self, observations: Tensor) -> Tensor:
        """Images as [B, C, H, W] in their own type, vectors as float32."""
        if self.is_image:
            return observations.permute(0, 3, 1, 2)
        return observations.float()

    def state_dict(self) -> dict[str, Any]:
        """How often the environments were started; their own state cannot be had."""
        return {"resets": self.resets}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Start anew, from another seed than before; returns the first observations."""
        self.resets = state["resets"] + 1
        return self.reset()[0]

    def close(self, **kwargs: Any) -> None:
        """Close the environments."""
        self.envs.close(**kwargs)

    def _tensor(self, observations: np.ndarray) -> Tensor:
        """A copy on the device: gymnasium reuses its arrays."""
        return torch.from_numpy(np.array(observations)).to(self.device)

    def _refuse(self, why: str) -> NoReturn:
        self.envs.close()
        raise UserError(f"environment {self.name}: {why}")


def make_gym(
    name: str, num_envs: int, seed: int = 0, device: torch.device | str = "cpu"
) -> TorchVectorEnv:
    """The environment of that gymnasium id."""
    return GymEnv(name, num_envs, seed, device)
