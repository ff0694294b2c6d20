"""A method's options by name, checked, and those whose default follows the number of classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dynmoe import registry
from dynmoe.ranges import check_options
from dynmoe.registry import PartConfig

FEW = 200
"""Up to so many classes count as few: published defaults for 1000 classes do not fit them."""


def sure_margin(classes: int) -> float:
    """E0 in nats: 0.4 ln 1000, MoETTA's code; for few classes 0.4 ln(classes), ours."""
    return 0.4 * math.log(classes if classes <= FEW else 1000)


def make_config(method: str, options: dict[str, Any]) -> PartConfig:
    """The Config of a method with these options.

    Raises:
        UserError: an unknown method or option, or a value of the wrong type or out of range.
    """
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    config = registry.make_config("tta", method, given)
    check_types(config)
    return config


def check_types(config: PartConfig) -> None:
    """Refuse options of the wrong type or out of range.

    Raises:
        UserError: one is.
    """
    check_options(config.part.name, config)


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
