"""Methods by name with options, as `--compare` takes them: `moetta:balance_weight=0,lr=0.01`."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

from torch import nn

from dynmoe.errors import UserError
from dynmoe.registry import PartConfig
from dynmoe.tta.options import for_classes, make_config


def parse_variant(text: str, classes: int) -> PartConfig:
    """The Config that `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE` stands for.

    Args:
        text: the variant; values are read as JSON (0.5, true, null) and else taken as they stand.
        classes: of the data; decides the options that `text` leaves open, see `for_classes`.

    Raises:
        UserError: an unknown method or option, or an option without a value.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        option, equals, value = pair.partition("=")
        option = option.strip().replace("-", "_")
        if not equals:
            raise UserError(f"variant {text!r} must read NAME:OPTION=VALUE,OPTION=VALUE")
        try:
            options[option] = json.loads(value)
        except json.JSONDecodeError:
            options[option] = value.strip()
    return for_classes(make_config(name, options), classes)


def for_run(config: PartConfig, lr_scale: float, seed: int, model: nn.Module) -> PartConfig:
    """The same options with the learning rate multiplied, and the method's draws from `seed`.

    Args:
        config: the method's options.
        lr_scale: multiplies its learning rate, if it has one.
        seed: is added to its seed, if it has one.
        model: what it will adapt; a copy is asked for a rate that depends on other options.

    Raises:
        UserError: the method cannot adapt this model.
    """
    changes: dict[str, Any] = {}
    if hasattr(config, "lr") and lr_scale != 1:
        lr = config.lr
        if lr is None:
            lr = config.build(copy.deepcopy(model)).optimizer.param_groups[0]["lr"]
        changes["lr"] = lr * lr_scale
    if hasattr(config, "seed"):
        changes["seed"] = config.seed + seed
    return dataclasses.replace(config, **changes)
