"""Environments as gymnasium vector environments that hand out torch tensors.

env = envs.make("Craftax-Classic-Pixels-v1", num_envs=64)
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from dynmoe.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

    from envs.vector import TorchVectorEnv

__all__ = ["has_floors", "has_phases", "make"]
CRAFTAX_USUAL = {
    "observation": None, "renderer": "fast", "env_device": "auto", "max_timesteps": None,
}  # fmt: skip
"""Settings that only Craftax has, and their defaults."""


def has_phases(name: str) -> bool:
    """Whether environments of that name can begin their episodes on the floors of phases."""
    return name in ("Stages-v0", "Craftax-Phases-v1")


def has_floors(name: str) -> bool:
    """Whether environments of that name tell floors apart, so that arrivals there are known."""
    return has_phases(name) or name in ("Craftax-Pixels-v1", "Craftax-Symbolic-v1")


def make(
    name: str,
    num_envs: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    observation: str | None = None,
    renderer: str = "fast",
    env_device: str = "auto",
    max_timesteps: int | None = None,
    env_args: dict[str, Any] | None = None,
    normalize_observations: bool = False,
    normalize_rewards: bool = False,
    gamma: float = 0.99,
    part: tuple[int, int] = (0, 1),
) -> TorchVectorEnv:
    """N environments of that name.

    Args:
        name: a Craftax name (see envs.craftax), a debug one (see envs.debug) or a gymnasium id;
            "module:Name-v0" imports the module that registers it.
        num_envs: N.
        seed: of all randomness.
        device: of all tensors: auto, cpu, cuda or cuda:N.
        observation, renderer, env_device, max_timesteps: see envs.craftax.CraftaxVectorEnv; other
            environments have no such choice.
        env_args: keyword arguments of a gymnasium environment; options of a debug one or of
            Craftax-Phases-v1.
        normalize_observations, normalize_rewards, gamma: see envs.wrappers; gymnasium's only.
        part: (r, P) for the r-th of P equal parts of the N environments alone; gymnasium's are made
            whole all the same, and their `part` says so (see envs.vector).

    Raises:
        UserError: unknown name, or a setting that cannot be.
    """
    if num_envs < 1:
        raise UserError(f"num_envs {num_envs} is too small; use 1 or more")
    from dynmoe.lab.device import resolve

    where = resolve(str(device))
    values = (observation, renderer, env_device, max_timesteps)
    settings: dict[str, Any] = dict(zip(CRAFTAX_USUAL, values, strict=True))
    normalising = {
        "normalize_observations": normalize_observations,
        "normalize_rewards": normalize_rewards,
    }
    _only_gymnasium(name, normalising)
    options = env_args or {}
    own = _own_env(name, num_envs, seed, where, settings, options, part)
    if own is not None:
        return own
    if name == "SlipperyAnt-v0":
        from envs import slippery

        slippery.register()
    if _in_gymnasium(name):
        from envs.gym import GymEnv

        return GymEnv(name, num_envs, seed, where, options, gamma=gamma, **normalising)
    raise _unknown(name, [*_ours(), "SlipperyAnt-v0"])


def _own_env(
    name: str,
    num_envs: int,
    seed: int,
    where: torch.device,
    settings: dict[str, Any],
    options: dict[str, Any],
    part: tuple[int, int],
) -> TorchVectorEnv | None:
    """Craftax or a debug environment; None: the name is none of ours.

    Raises:
        UserError: a setting or an option that it does not have.
    """
    from envs import craftax, craftax_phases, debug

    if name in craftax.NAMES:
        _known(name, options, ())
        return craftax.CraftaxVectorEnv(name, num_envs, seed, where, part=part, **settings)
    if name == craftax_phases.NAME:
        _known(name, options, craftax_phases.OPTIONS)
        own = settings | options
        return craftax_phases.CraftaxPhases(num_envs, seed, where, part=part, **own)
    for setting, value in settings.items():
        if value != CRAFTAX_USUAL[setting] and (name in debug.GAMES or _in_gymnasium(name)):
            raise UserError(f"{setting} {value!r} is for Craftax only; leave it out for {name}")
    if name in debug.GAMES:
        _known(name, options, [field.name for field in fields(debug.StagesOptions)])
        return debug.Stages(name, num_envs, seed, where, part, **options)
    return None


def _ours() -> list[str]:
    """Names of environments that are no gymnasium ids."""
    from envs import craftax, craftax_phases, debug

    return [*craftax.NAMES, craftax_phases.NAME, *debug.GAMES]


def _only_gymnasium(name: str, settings: dict[str, bool]) -> None:
    """Refuse settings of gymnasium's environments for ours.

    Raises:
        UserError: one is given.
    """
    for setting, value in settings.items():
        if value and name in _ours():
            raise UserError(
                f"{setting} {value!r} is for gymnasium's environments only; leave it out for {name}"
            )


def _known(name: str, options: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse options that an environment of ours does not have."""
    for option, value in options.items():
        if not known:
            raise UserError(
                f"env_args {options!r} is not for {name}, which has no options; leave it out"
            )
        if option not in known:
            raise unknown(f"option of {name}", option, known, f"(env_args: {option}={value!r})")


def _unknown(name: str, known: list[str]) -> UserError:
    import gymnasium

    module, colon, short = name.rpartition(":")
    near = difflib.get_close_matches(short, [*known, *gymnasium.registry], n=1)
    hint = f" Did you mean {module + colon + near[0]!r}?" if near else ""
    own = "" if colon else f" One of your own is named with its module, my_module:{name}."
    return UserError(
        f"unknown environment {name!r}; known: {', '.join(known)}, or a gymnasium id.{hint}{own}"
    )


def _in_gymnasium(name: str) -> bool:
    """Whether gymnasium knows the name, once the module before a colon is imported."""
    import gymnasium

    module, colon, short = name.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"environment {name}: its module {module!r} cannot be imported: {why}"
            ) from error
    return short in gymnasium.registry
