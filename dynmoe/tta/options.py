"""A method's options by name, checked, and those whose default follows the number of classes."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from numbers import Integral, Real
from typing import Any

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.registry import PartConfig

FEW = 200
"""Up to so many classes count as few: published defaults for 1000 classes do not fit them."""

PLAIN: dict[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    bool: (bool, "true or false"),
    types.NoneType: (types.NoneType, "none"),
}
"""Type of a field -> the type that values have, in words."""


def sure_margin(classes: int) -> float:
    """E0 in nats: 0.4 ln 1000, MoETTA's code; for few classes 0.4 ln(classes), ours."""
    return 0.4 * math.log(classes if classes <= FEW else 1000)


def make_config(method: str, options: dict[str, Any]) -> PartConfig:
    """The Config of a method with these options.

    Raises:
        UserError: an unknown method or option, or a value of the wrong type.
    """
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    config = registry.make_config("tta", method, given)
    check_types(config)
    return config


def check_types(config: PartConfig) -> None:
    """Refuse options of the wrong type.

    Raises:
        UserError: one is.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if _fits(value, hint):
            continue
        given = f"{config.part.name}: {field.name}={value!r}"
        if typing.get_origin(hint) is typing.Literal:
            raise UserError(f"{given} is neither {' nor '.join(map(str, typing.get_args(hint)))}")
        raise UserError(f"{given} must be {_words(hint)}")


def for_classes(config: PartConfig, classes: int) -> PartConfig:
    """The options, with those filled in that are None and follow the number of classes.

    An adapter does the same for the logits that it meets, so both are one algorithm.
    """
    values = config.part.by_classes(classes)  # type: ignore[attr-defined]
    return dataclasses.replace(
        config, **{name: v for name, v in values.items() if getattr(config, name) is None}
    )


def for_stream(config: PartConfig, stream: str) -> PartConfig:
    """The options, with those filled in that are None and follow the stream's name."""
    values = config.part.by_stream(stream, config)  # type: ignore[attr-defined]
    return dataclasses.replace(
        config, **{name: v for name, v in values.items() if getattr(config, name) is None}
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; types that we do not know take anything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if isinstance(value, bool) and hint in (int, float):
        return False
    return hint not in PLAIN or isinstance(value, PLAIN[hint][0])


def _words(hint: Any) -> str:
    """A field's type for an error message."""
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_words(typing.get_args(hint)[0])}"
    return PLAIN[hint][1] if hint in PLAIN else " or ".join(map(_words, typing.get_args(hint)))
