"""Craftax and Craftax-Classic as vector environments that hand out torch tensors.

Upstream's rules run in JAX (see envs.craftax_game). Tensors share memory with JAX's arrays where
both are on one kind of device; each step hands out new ones, so writing into them harms nothing.
The states themselves are never handed out: JAX reuses their memory from step to step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from dynmoe import seeding
from dynmoe.errors import UserError
from envs import craftax_game, jax_setup
from envs.craftax_code import layout
from envs.craftax_game import Carry, Programs, State
from envs.vector import Actions, Info, TorchVectorEnv, count_of, counted, step_info

NAMES = {
    "Craftax-Pixels-v1": (False, True),
    "Craftax-Symbolic-v1": (False, False),
    "Craftax-Classic-Pixels-v1": (True, True),
    "Craftax-Classic-Symbolic-v1": (True, False),
}
"""name -> whether it is Classic, whether it shows pixels"""
OBSERVATIONS = ("codes", "pixels", "pixels-float")
RENDERERS = ("fast", "upstream")
ENV_DEVICES = ("auto", "cpu", "cuda")


class CraftaxVectorEnv(TorchVectorEnv):
    """N environments of one of upstream's four names.

    Environment i's k-th world depends on (seed, i, k) alone, and the chance in its steps on
    (seed, i, number of the step): N environments are the first N of any larger number, and a part
    of them plays as it does among all.

    Args:
        name: one of NAMES.
        num_envs: N.
        seed: of worlds and chance, unless `reset` is given one.
        device: of all tensors.
        observation: of pixel environments: "codes" (default), uint8 rows that `unpack` turns into
            frames; "pixels", uint8 frames [H, W, 3]; "pixels-float", the same as float32 in 0..1.
            Symbolic environments have upstream's float32 vector and no choice.
        renderer: "fast", ours, or "upstream", the reference, which has no codes.
        env_device: where JAX runs the rules; "auto" is the kind that `device` is, if JAX has it.
        max_timesteps: length at which an episode is cut off; upstream's by default.
        part: (r, P) for the r-th of P equal parts of the N environments alone.

    Raises:
        UserError: any of these cannot be, or jax or craftax is not installed.
    """

    by_env = ("episodes", "waiting", "state", "returns", "deepest")

    def __init__(
        self,
        name: str,
        num_envs: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        observation: str | None = None,
        renderer: str = "fast",
        env_device: str = "auto",
        max_timesteps: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.classic, pixels = NAMES[name]
        self.observation = _observation(name, pixels, observation, renderer)
        if max_timesteps is not None:
            max_timesteps = counted("max_timesteps", max_timesteps)
        self.part, num_envs = part, count_of(num_envs, part)
        self.name, self.num_envs, self.seed = name, num_envs, seed
        self.device, self.renderer = torch.device(device), renderer
        kind, index = _place(self.device, env_device)
        self._shares, self._jax = kind == self.device.type, (kind, index)
        self._jax_device = jax_setup.device(kind, index)
        self._programs = craftax_game.programs(self.classic, num_envs, kind, index)
        drawn = pixels and renderer == "fast"
        seen = "codes" if drawn else self.observation
        self._see, shape = craftax_game.view(self.classic, num_envs, seen, kind, index)
        if drawn:
            from envs.craftax_render import Renderer

            self._draw = Renderer(self.classic, self.device)
        facts = self._programs.facts
        self.achievements, self.num_floors = tuple(facts.achievements), facts.num_floors
        self.max_return = facts.max_return
        self.max_timesteps = facts.max_timesteps if max_timesteps is None else max_timesteps
        self._describe(pixels, shape, facts.num_actions)
        self._carry: Carry | None = None  # none before the first reset
        self._begin(seed)

    def _describe(self, pixels: bool, shape: tuple[int, ...], actions: int) -> None:
        """Set the spaces, given the shape of what is seen."""
        height, width, colors = layout(self.classic).frame_shape
        self.input_shape = (colors, height, width) if pixels else shape
        kinds: dict[str, Any] = {
            "codes": (0, 255, shape, np.uint8),
            "pixels": (0, 255, (height, width, colors), np.uint8),
            "pixels-float": (0.0, 1.0, (height, width, colors), np.float32),
            "symbolic": (-np.inf, np.inf, shape, np.float32),  # upstream says 0..1 and goes beyond
        }
        self.set_spaces(spaces.Box(*kinds[self.observation]), spaces.Discrete(actions))

    def _begin(self, seed: int) -> None:
        """Forget all episodes."""
        self.seed = seed
        self._chance = _key(seed, "steps")
        self._worlds = self._new_worlds(_key(seed, "worlds"))
        self._waiting = np.zeros(0, np.int64)  # environments that are in a new world from now on

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Info]:
        """Start new episodes: all over again with a seed, else each in its next world.

        Returns observations [N, ...] and `floor` [N].
        """
        if self._carry is None or seed is not None:
            self._begin(self.seed if seed is None else seed)
            self._carry = _blank(self._programs.carry, self._jax_device)
        self._worlds.use(self._waiting)  # no world is entered twice
        every = np.arange(self.num_envs)
        first = self._frames(self._enter(every)[every])
        return first, {"floor": torch.zeros(every.shape, dtype=torch.long, device=self.device)}

    def step(self, actions: Actions) -> tuple[Tensor, Tensor, Tensor, Tensor, Info]:
        """One step of all environments with actions [N], integers.

        Raises:
            RuntimeError: `reset` was not called yet.
        """
        if self._carry is None:
            raise RuntimeError("call reset() before step()")
        rows, count = _padded(self._waiting, self.num_envs), np.int32(len(self._waiting))
        taken = self.as_actions(actions).to(torch.int32).numpy()
        self._carry, out = self._programs.step(
            *(self._carry, self._worlds.worlds, rows, count),
            *(taken, self._chance, np.int32(self._longest()), np.int32(self.first)),
        )
        self._worlds.use(self._waiting)
        observations = final = self._frames(self._look())
        self._waiting = np.flatnonzero(np.asarray(out["flags"])[2])
        if len(self._waiting):
            ended = torch.from_numpy(self._waiting).to(self.device)
            observations = final.clone()
            observations[ended] = self._frames(self._enter(self._waiting)[ended])
        reward, returns = self._tensor(out["floats"]).unbind()
        terminated, truncated, done = self._tensor(out["flags"]).unbind()
        length, deepest, floor = self._tensor(out["counts"]).long().unbind()
        unlocked = self._tensor(out["achievements"])
        info = step_info(final, done, returns, length, deepest, unlocked, floor)
        return observations, reward, terminated, truncated, info

    def unpack(self, observations: Tensor) -> Tensor:
        """Frames [B, 3, H, W] uint8, channels last, of codes or pixels; vectors as they are."""
        if self.observation == "symbolic":
            return observations
        if self.observation == "codes":
            observations = self._draw.uint8(observations)
        elif self.observation == "pixels-float":
            observations = (observations * 255).round().to(torch.uint8)
        return observations.permute(0, 3, 1, 2)

    @property
    def pictured(self) -> bool:
        """All states can be drawn, also where vectors are observed."""
        return True

    def pictures(self) -> Tensor | None:
        """Codes of the present states where vectors are observed, uint8 [N, size]."""
        if self.observation != "symbolic":
            return None
        assert self._carry is not None
        encode, _ = craftax_game.view(self.classic, self.num_envs, "codes", *self._jax)
        codes = self._tensor(encode(self._carry["state"])).clone()
        if len(self._waiting):  # they are in new worlds already
            codes[self._waiting] = self._tensor(encode(self._worlds.worlds))[self._waiting]
        return codes

    def images(self, pictures: Tensor) -> Tensor:
        """Frames [B, 3, H, W] uint8 of codes or pixels."""
        if self.observation != "symbolic":
            return self.unpack(pictures)
        from envs.craftax_render import Renderer

        return Renderer(self.classic, self.device).uint8(pictures).permute(0, 3, 1, 2)

    def state_dict(self) -> dict[str, Any]:
        """States, counters and statistics of the running episodes, as tensors on the CPU.

        Worlds made in advance are left out, as they can be made again; so are those of the
        environments `waiting` to begin an episode, which are numbers among all.

        Raises:
            RuntimeError: `reset` was not called yet.
        """
        if self._carry is None:
            raise RuntimeError("call reset() before state_dict()")
        carry = dict(self._carry)
        state = {name: _copied(values) for name, values in carry.pop("state").items()}
        return {
            "name": self.name,
            "num_envs": self.whole,
            "max_timesteps": self.max_timesteps,
            "seed": self.seed,
            "episodes": _copied(self._worlds.episodes),
            "waiting": _copied(self._waiting) + self.first,
            "state": state,
            **{name: _copied(values) for name, values in carry.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        """Go on where `state_dict` of all environments was called.

        Returns the present observations [N, ...].

        Raises:
            UserError: the state is of other environments, or of another version of Craftax.
        """
        own = {"name": self.name, "num_envs": self.whole, "max_timesteps": self.max_timesteps}
        for name, value in own.items():
            if state[name] != value:
                raise UserError(
                    f"the saved environments have {name} {state[name]!r}, these have {value!r}; "
                    "use the same"
                )
        wanted = self._programs.carry
        if set(wanted["state"]) != set(state["state"]):
            raise UserError("the environments were saved by another version of craftax; install it")
        import jax

        def restored(like: Any, saved: Tensor) -> Any:
            # a copy, because JAX would write into the saved tensor
            values = saved.cpu().numpy()[self.rows] if like.shape else saved.cpu().numpy()
            return jax.device_put(np.array(values, like.dtype), self._jax_device)

        self._begin(state["seed"])
        self._resume(state)
        self._worlds.episodes[:] = state["episodes"].cpu().numpy()[self.rows]
        self._carry = jax.tree.map(restored, wanted, {name: state[name] for name in wanted})
        seen = self._look().clone()
        waiting = state["waiting"].cpu().numpy() - self.first
        waiting = waiting[(waiting >= 0) & (waiting < self.num_envs)]
        if len(waiting):
            seen[waiting] = self._enter(waiting)[waiting]
        return self._frames(seen)

    def close_extras(self, **kwargs: Any) -> None:
        """Free the states; `reset` begins again."""
        self._carry = None
        self._begin(self.seed)

    def __repr__(self) -> str:
        return (
            f"CraftaxVectorEnv({self.name!r}, {self.num_envs}, device={str(self.device)!r}, "
            f"observation={self.observation!r})"
        )

    def _new_worlds(self, key: np.ndarray) -> Worlds:
        """None made yet."""
        return Worlds(self._programs, self._jax_device, key, self.first)

    def _longest(self) -> int:
        """Length at which the next step cuts episodes off."""
        return self.max_timesteps

    def _resume(self, state: dict[str, Any]) -> None:
        """What a subclass has in `state_dict` besides, before any world is made."""

    def _enter(self, rows: np.ndarray) -> Tensor:
        """Have environments `rows` begin new episodes; what is seen of all next worlds [N, ...]."""
        self._waiting = rows
        if self._worlds.get(rows):
            self._first = self._tensor(self._see(self._worlds.worlds))
        return self._first

    def _look(self) -> Tensor:
        """What is seen of the present states, [N, ...]: codes, pixels or vectors."""
        assert self._carry is not None
        return self._tensor(self._see(self._carry["state"]))

    def _frames(self, seen: Tensor) -> Tensor:
        """Observations [B, ...] of what was seen."""
        if self.renderer == "upstream" or self.observation not in ("pixels", "pixels-float"):
            return seen
        draw = self._draw.uint8 if self.observation == "pixels" else self._draw.float32
        return draw(seen)

    def _tensor(self, values: Any) -> Tensor:
        """A JAX array as a tensor on the device."""
        if self._shares:
            return torch.from_dlpack(values)
        return torch.from_numpy(np.array(values)).to(self.device)


class Worlds:
    """The next world of every environment, made by the block when one is wanted and not there.

    Attributes:
        worlds: states [N] of those worlds that are there.
        episodes: [N] number of the episode that each environment will begin next.
        first: number of the first environment among all.
    """

    def __init__(self, programs: Programs, device: Any, key: np.ndarray, first: int) -> None:
        self.programs, self.key, self.first = programs, key, first
        self.worlds: State = _blank(programs.carry["state"], device)
        self.episodes = np.zeros(programs.carry["deepest"].shape, np.int64)
        self.there = np.zeros(self.episodes.shape, bool)

    def get(self, rows: np.ndarray) -> bool:
        """See to it that the worlds of environments `rows` are there; returns whether any changed.

        What is left of a block goes to others whose next world is missing.
        """
        k, before = self.programs.k, self.there[rows].all()
        while not self.there[rows].all():
            missing = np.flatnonzero(~self.there)
            wanted = np.isin(missing, rows)
            some = np.concatenate([missing[wanted], missing[~wanted]])[:k]
            block = _padded(some, k)
            episodes = self.episodes[block].astype(np.int32)
            self.worlds = self.programs.make(
                self.worlds, self.key, block, episodes, np.int32(len(some)), np.int32(self.first)
            )
            self.made()
            self.there[some] = True
        return not before

    def made(self) -> None:
        """More worlds are there; a subclass may change them."""

    def use(self, rows: np.ndarray) -> None:
        """Environments `rows` have begun the episodes of their worlds."""
        self.there[rows] = False
        self.episodes[rows] += 1


def _observation(name: str, pixels: bool, observation: str | None, renderer: str) -> str:
    """What is observed: one of OBSERVATIONS or "symbolic"."""
    if renderer not in RENDERERS:
        raise UserError(f"unknown renderer {renderer!r}; known: {', '.join(RENDERERS)}")
    if not pixels:
        if observation is not None or renderer != "fast":
            raise UserError(
                f"{name} shows vectors: leave out observation and renderer, or use "
                f"{name.replace('Symbolic', 'Pixels')}"
            )
        return "symbolic"
    if observation not in (None, *OBSERVATIONS):
        raise UserError(f"unknown observation {observation!r}; known: {', '.join(OBSERVATIONS)}")
    observation = observation or "codes"
    if renderer == "upstream" and observation == "codes":
        raise UserError(
            "the upstream renderer has no codes; use observation 'pixels' or 'pixels-float', "
            "or the renderer 'fast'"
        )
    return observation


def _place(device: torch.device, env_device: str) -> tuple[str, int]:
    """Kind and number of the JAX device."""
    if env_device not in ENV_DEVICES:
        raise UserError(f"unknown env_device {env_device!r}; known: {', '.join(ENV_DEVICES)}")
    number = device.index or 0
    if env_device == "auto":
        env_device = "cuda" if device.type == "cuda" and jax_setup.has("cuda", number) else "cpu"
    return (env_device, number if env_device == "cuda" else 0)


def _key(seed: int, use: str) -> np.ndarray:
    """A JAX key, [2] uint32."""
    number = seeding.derive(seed, "craftax", use)
    return np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros(length, np.int32)
    padded[: len(rows)] = rows
    return padded


def _blank(like: Any, device: Any) -> Any:
    """Zeros of the same shapes and types."""
    import jax

    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), device), like)


def _copied(values: Any) -> Tensor:
    """On the CPU."""
    return torch.from_numpy(np.array(values))
