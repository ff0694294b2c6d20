"""A trained network as files to share: weights, how to make the network again, a model card.

A folder holds

    model.safetensors    every tensor
    model.json           the command, its settings, and all else that makes the network again
    README.md            the card: what, data, command, metrics, settings, licence

What makes a network again is the experiment's (`Exporter.state`): nested dicts and lists
of plain values and tensors. Here the tensors are taken out and put back.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe import __version__
from dynmoe.errors import ResourceError, UserError
from dynmoe.lab.files import make_folder, write_atomic, write_json

FORMAT = 1
"""Raise it when files of before can no longer be read."""
WEIGHTS, ABOUT, CARD = "model.safetensors", "model.json", "README.md"
TENSOR, NUMBERED, FLOAT = "__tensor__", "__pairs__", "__float__"
"""Keys that stand for a tensor, for a dict whose keys are no texts, and for nan or infinity."""


def write_network(folder: Path, about: dict[str, Any], state: dict[str, Any], card: str) -> None:
    """Write the three files; README.md comes last.

    Args:
        folder: made where it is missing.
        about: plain values that `read_network` gives back.
        state: see `Exporter.state`.
        card: README.md.

    Raises:
        ResourceError: disk full.
        TypeError: a value is neither plain nor a tensor.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    plain = take_out(state, tensors)
    make_folder(folder)
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / ABOUT, {"format": FORMAT, "dynmoe": __version__, **about, "state": plain})
    write_atomic(folder / CARD, card.encode())


def read_network(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_network` was given as `about` and `state`; tensors are on the CPU.

    Raises:
        UserError: there is no such network, or one of another version.
        ResourceError: its files are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    missing = [name for name in (ABOUT, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}; give a folder that `dynmoe export RUN OUT` has made"
        )
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["format"] != FORMAT:
            raise UserError(
                f"{folder} was exported in format {about['format']}, and this version reads "
                f"{FORMAT}; export the run again, or use dynmoe {about.get('dynmoe')}"
            )
        tensors = load((folder / WEIGHTS).read_bytes())
        return about, put_back(about.pop("state"), tensors)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ResourceError(f"{folder} cannot be read ({reason}); export the run again") from None


def take_out(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """The value as JSON takes it, its tensors, of any shape, moved into `tensors`.

    There they stand under dotted names, on the CPU.

    Raises:
        TypeError: a value is neither plain nor a tensor.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return {NUMBERED: take_out([list(pair) for pair in value.items()], tensors, name)}
        return {key: take_out(one, tensors, _below(name, key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [take_out(one, tensors, _below(name, n)) for n, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name or 'the state'} is a {type(value).__name__}, which cannot be exported")


def put_back(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `take_out` was given, tensors in their shapes; tuples come back as lists.

    Raises:
        KeyError: a tensor is not there.
    """
    if isinstance(value, list):
        return [put_back(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {TENSOR}:
        return tensors[value[TENSOR]]
    if set(value) == {FLOAT}:
        return float(value[FLOAT])
    if set(value) == {NUMBERED}:
        return {key: put_back(one, tensors) for key, one in value[NUMBERED]}
    return {key: put_back(one, tensors) for key, one in value.items()}


def equal_states(one: Any, other: Any) -> bool:
    """Whether two states hold the same values and, bit for bit, the same tensors."""
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    if take_out(one, first) != take_out(other, second) or first.keys() != second.keys():
        return False
    return all(
        a.dtype == (b := second[name]).dtype and a.shape == b.shape and torch.equal(a, b)
        for name, a in first.items()
    )


def _below(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


class Exporter(ABC):
    """What an experiment knows of its networks outside a run; see `Experiment.exporter`."""

    def parts(self, config: Any, shared: Any) -> list[str]:
        """Names of the networks of one run, where it has several; by default it has one."""
        return []

    @abstractmethod
    def state(
        self, folder: Path, config: Any, shared: Any, saved: dict[str, Any] | None, part: str
    ) -> dict[str, Any]:
        """All that `network` needs, as plain values and tensors.

        Args:
            folder: the run's.
            config: its settings.
            shared: see `Experiment.load`.
            saved: the state in its newest checkpoint; None if there is none.
            part: one of `parts`, or "".

        Raises:
            UserError: the run has not kept its network.
        """

    @abstractmethod
    def network(self, config: Any, state: dict[str, Any]) -> nn.Module:
        """The network again, on the CPU and in evaluation mode; data are not needed.

        Raises:
            UserError: a part of the user's own that it is made of is not there.
        """

    def weights(self, network: nn.Module) -> dict[str, Any]:
        """The "weights" of `state`, as a network made again has them."""
        return dict(network.state_dict())

    @abstractmethod
    def usage(self, config: Any, shared: Any, part: str) -> str:
        """For the card: the shapes that go in and come out, and how the input is made."""


def no_checkpoint(folder: Path, remedy: str) -> UserError:
    """The error for a run that has kept no network."""
    return UserError(f"{folder} has kept no network; {remedy}")
