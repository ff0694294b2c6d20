"""The space of a search as it is written on a command line: a setting, and what it may be."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynmoe.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FORM = (
    '"name: low high log", "name: low high uniform" or "name: values", such as "lr: 1e-4 1e-2 log"'
)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones if both are written so."""

    low: float
    high: float
    log: bool
    whole: bool


Space = dict[str, "Range | list[str]"]
"""setting -> a range of numbers, or values to choose among"""


def split_words(text: str, where: str) -> list[str]:
    """The words of a text, as a shell reads them.

    Args:
        text: flags, or values.
        where: what holds it, for the message.

    Raises:
        UserError: a quote is left open, or nothing follows the last backslash.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{where} cannot be read: {str(error).lower()} in {text!r}; close each quote, and put "
            "a backslash before one that stands for itself"
        ) from None


def read_space(texts: tuple[str, ...]) -> Space:
    """The space that is written in these texts.

    Raises:
        UserError: it is empty, or one cannot be read or is named twice.
    """
    space: Space = {}
    for text in texts:
        name, colon, rest = text.partition(":")
        name = name.strip().removeprefix("--")
        words = split_words(rest, f"--space {name!r}")
        if not colon or not name or not words:
            raise UserError(f"--space {text!r} must read {FORM}")
        if name in space:
            raise UserError(f"--space names {name!r} twice; name each setting once")
        if words[-1] in ("log", "uniform"):
            space[name] = _range(text, words)
        elif len(set(words)) < len(words):
            raise UserError(f"--space {text!r} has a value twice; give each once")
        else:
            space[name] = words
    if not space:
        raise UserError(f"the search space is empty; give --space {FORM}")
    return space


def _range(text: str, words: list[str]) -> Range:
    """A range of numbers.

    Raises:
        UserError: there is no such range.
    """
    try:
        low, high = (float(word) for word in words[:-1])
    except ValueError:
        raise UserError(f"--space {text!r} needs two numbers before {words[-1]!r}") from None
    log = words[-1] == "log"
    if not low < high or math.isinf(high - low) or (log and low <= 0):
        wanted = "0 < low < high" if log else "low < high"
        raise UserError(f"--space {text!r} has no such range; use {wanted}, both finite")
    whole = all(word.lstrip("+-").isdigit() for word in words[:-1])
    return Range(low, high, log, whole)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The same for Optuna."""
    from optuna import distributions as optuna

    found: dict[str, BaseDistribution] = {}
    for name, own in space.items():
        if isinstance(own, list):
            found[name] = optuna.CategoricalDistribution(own)
        elif own.whole:
            found[name] = optuna.IntDistribution(int(own.low), int(own.high), own.log)
        else:
            found[name] = optuna.FloatDistribution(own.low, own.high, own.log)
    return found


def first_values(space: Space) -> dict[str, Any]:
    """Some point of the space, to see whether its settings exist."""
    return {
        name: own[0] if isinstance(own, list) else int(own.low) if own.whole else own.low
        for name, own in space.items()
    }


def flags_of(values: dict[str, Any]) -> str:
    """The flags that set these values; numbers with four digits."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", f"{value:.4g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
