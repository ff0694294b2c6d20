"""What the name of a run's folder says of its settings: the preset, and what differs from it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynmoe.lab.config import placed
from dynmoe.registry import PartConfig

APART = {"method", "intervention", "dataset", "domains", "env", "streams", "data", "seed", "device",
         "threads"}  # fmt: skip
"""Settings that the rest of a name says, or that say nothing; the options of parts do count."""
LONGEST, VALUE = 60, 16
"""Most characters of all that is named, and of one value."""


def preset_and_changes(preset: str, base: Any, config: Any) -> str:
    """How a name begins: `laptop`, or `laptop-granularity=2_router=topk`.

    A part that was chosen in place of the preset's is compared with its own defaults. Paths are
    left out; what does not fit is counted.

    Args:
        preset: its name.
        base: its settings.
        config: the settings of the run, of the same class.
    """
    apart = {*APART, *(name.replace("_", "-") for name in placed(config))}
    found = [f"{name}={_short(value)}" for name, value in _changes(config, base)
             if name not in apart and not isinstance(value, Path)]  # fmt: skip
    named: list[str] = []
    for text in found:
        if len("_".join([*named, text])) > LONGEST:
            break
        named.append(text)
    more = [f"{len(found) - len(named)}-more"] if len(found) > len(named) else []
    return "-".join(filter(None, [preset, "_".join(named + more)]))


def of_others(begins: str) -> str:
    """How names of runs begin that are compared with: without the main method's own options."""
    return re.sub(r"(?<=[-_])(method|intervention)\.[^_]*(_|$)", "", begins).rstrip("-_")


def _changes(config: Any, base: Any) -> Iterator[tuple[str, Any]]:
    """(setting, value) of all that differ, as the command line calls them."""
    for field in dataclasses.fields(config):
        name, own, before = field.name, getattr(config, field.name), getattr(base, field.name)
        name = name.replace("_", "-")
        if isinstance(own, PartConfig) and type(own) is not type(before):
            yield name, own.part.name
            before = type(own)()
        if dataclasses.is_dataclass(own):
            yield from ((f"{name}.{option}", value) for option, value in _changes(own, before))
        elif own != before:
            yield name, own


def _short(value: Any) -> str:
    """A value as part of a folder's name."""
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text)[:VALUE]
