"""The state of MuJoCo's simulations (gymnasium's Ant, Humanoid ...) as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("MjModel", "MjData")
PICTURES = ("tex_", "mesh_", "skin_")
"""How names of a model's arrays begin that are large and do not change."""


def is_simulation(value: Any) -> bool:
    """Whether a value is MuJoCo's model, or the data of one that runs."""
    kind = type(value)
    return kind.__module__.startswith("mujoco.") and kind.__name__ in KINDS


def simulation_state(value: Any) -> dict[str, Tensor]:
    """What a model or its data hold, by name.

    Tensors of the arrays' shapes. Of the data also MuJoCo's own state [D], from which it goes on:
    environments read what the latest step computed, too.
    """
    state = {name: torch.from_numpy(np.array(array)) for name, array in _arrays(value)}
    if type(value).__name__ == "MjModel":
        options = _options(value.opt)
        return state | {f"opt.{n}": torch.from_numpy(np.array(v)) for n, v in options}
    return state | {"state": torch.from_numpy(_whole_state(value))}


def restore_simulation(value: Any, state: dict[str, Tensor]) -> None:
    """Bring a model, or its data, to a `simulation_state` (tensors of the arrays' shapes).

    The model has to come first.
    """
    import mujoco

    if type(value).__name__ == "MjData":
        whole = state["state"].numpy()
        mujoco.mj_setState(value.model, value, whole, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(value.model, value)
    else:
        for name, now in list(_options(value.opt)):
            saved = state[f"opt.{name}"].numpy()
            setattr(value.opt, name, saved if isinstance(now, np.ndarray) else saved.item())
    for name, array in _arrays(value):
        saved = state[name].numpy()
        if array.shape == saved.shape:  # those of contacts are made anew by each step
            array[...] = saved


def _arrays(value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """All arrays by name, but those that serve pictures only."""
    for name in dir(value):
        array = None if name.startswith(("_", *PICTURES)) else getattr(value, name)
        if isinstance(array, np.ndarray) and array.dtype.kind in "biuf":
            yield name, array


def _options(options: Any) -> Iterator[tuple[str, Any]]:
    """Settings of the physics by name, such as gravity."""
    for name in dir(options):
        value = None if name.startswith("_") else getattr(options, name)
        if isinstance(value, np.ndarray | int | float):
            yield name, value


def _whole_state(data: Any) -> np.ndarray:
    """All that MuJoCo's next step depends on."""
    import mujoco

    what = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, what))
    mujoco.mj_getState(data.model, data, state, what)
    return state
