"""The values that a setting may have, as its annotation tells: one check for all settings.

A number is finite and at least 0, unless the annotation has a `Range` of its own:

    temperature: float = 0.2
    bias: Signed = -1.0
    dropout: Annotated[float, Range(0, 1)] = 0.5

What must hold beyond that (above 0, no more than there are experts), parts check themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any

from dynmoe.errors import UserError

MOST = 3.4e38
"""The largest number of float32, in which nearly all of them are used."""
MOST_WHOLE = 10**12
"""No count that we know comes near it."""


@dataclass(frozen=True)
class Range:
    """The least and the largest value of a number."""

    low: float = 0
    high: float = MOST


Signed = Annotated[float, Range(-MOST, MOST)]
"""A number that may be negative."""

PLAIN: dict[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    bool: (bool, "true or false"),
    types.NoneType: (types.NoneType, "none"),
}
"""Type of a field -> the type that values have, in words."""


def check_settings(config: Any) -> None:
    """Refuse values of the wrong type or outside their range, in settings and all parts of them.

    Args:
        config: settings of a command, an instance of a dataclass.

    Raises:
        UserError: names the option and what is allowed.
    """
    for flag, value, hint in _values(config, "--"):
        problem = _problem(value, hint)
        if problem:
            raise UserError(f"{flag} {_shown(value)} {problem}")


def check_options(name: str, config: Any) -> None:
    """The same for the options of one part; a list may stand for a tuple.

    Args:
        name: what the message calls the part.
        config: the part's options, an instance of a dataclass.

    Raises:
        UserError: names the option and what is allowed.
    """
    for option, value, hint in _values(config, ""):
        given = tuple(value) if isinstance(value, list) else value
        check_value(f"{name}: {option.replace('-', '_')}", given, hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """The same for one value, such as an argument with a few allowed words.

    Args:
        name: what the message calls the value.
        value: what was given.
        hint: its annotation, such as `Literal["mean", "zero"]`.

    Raises:
        UserError: names the value and what is allowed.
    """
    problem = _problem(value, hint)
    if problem:
        raise UserError(f"{name}={value!r} {problem}")


@functools.cache
def hints_of(config: type) -> dict[str, Any]:
    """Field -> its annotation, with its range; nothing where one names what is not to be found."""
    try:
        return typing.get_type_hints(config, include_extras=True)
    except NameError:  # a type that is local to a function
        return {}


def _values(config: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(name as one types it, value, annotation) of every field that is no dataclass itself."""
    kind: type = type(config)
    hints = hints_of(kind)
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{name}.")
        else:
            yield name, value, hints.get(field.name)


def _problem(value: Any, hint: Any, own: Range | None = None) -> str:
    """What is wrong with a value; empty if nothing is. Types that we do not know take anything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _problem(value, inner[0], next((r for r in inner if isinstance(r, Range)), own))
    if origin is typing.Literal:
        return "" if value in inner else f"is neither {' nor '.join(map(str, inner))}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return f"must be {_words(hint)}"
        return next(filter(None, (_problem(item, inner[0], own) for item in value)), "")
    if origin in (types.UnionType, typing.Union):
        problems = [_problem(value, one, own) for one in inner]
        return "" if "" in problems else _of_union(problems, hint)
    number = hint in (int, float)
    if hint not in PLAIN:
        return ""
    if (number and isinstance(value, bool)) or not isinstance(value, PLAIN[hint][0]):
        return f"must be {_words(hint)}"
    return _outside(value, own or Range(high=MOST_WHOLE if hint is int else MOST)) if number else ""


def _of_union(problems: list[str], hint: Any) -> str:
    """Of a value that has one of the types, what is wrong with it; else all types."""
    told = [problem for problem in problems if not problem.startswith("must be")]
    return told[0] if told else f"must be {_words(hint)}"


def _outside(value: Any, allowed: Range) -> str:
    """What is wrong with a number; empty if it is in its range."""
    bounded = allowed.high not in (MOST, MOST_WHOLE)
    use = f"use {allowed.low:g} " + (f"to {allowed.high:g}" if bounded else "or more")
    if allowed.low == -MOST:
        use = "use a finite number"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is no finite number; {use}"
    if value < allowed.low:
        return f"is too small; {use}"
    return f"is too large; use {allowed.high:g} or less" if value > allowed.high else ""


def _words(hint: Any) -> str:
    """A field's type for an error message."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _words(inner[0])
    if origin is tuple:
        return f"a list, each {_words(inner[0])}"
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    return PLAIN[hint][1] if hint in PLAIN else " or ".join(map(_words, inner)) or str(hint)


def _shown(value: Any) -> str:
    """A value as one types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
