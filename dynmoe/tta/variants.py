"""Methods by name with options, as `--compare` takes them: `moetta:balance_weight=0,lr=0.01`."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

from torch import nn

from dynmoe import registry
from dynmoe.errors import UserError, unknown
from dynmoe.registry import PartConfig

FEW = 200
"""Up to so many classes count as few."""


def few_class_options(name: str, classes: int) -> dict[str, Any]:
    """Options of a method whose published defaults are for 1000 classes, where data have fewer.

    EATA's own code takes 0.4 for the 10 classes of CIFAR. The margins are ours: MoETTA's code takes
    0.4 ln 1000 whatever the classes, the other methods 0.4 ln(classes).
    """
    if classes > FEW:
        return {}
    if name == "eata":
        return {"redundancy": 0.4}
    return {"margin": 0.4 * math.log(classes)} if name in ("moetta", "becotta") else {}


def parse_variant(text: str, classes: int) -> PartConfig:
    """The Config that `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE` stands for.

    Args:
        text: the variant; values are read as JSON (0.5, true, null) and else taken as they stand.
        classes: of the data; decides `few_class_options`, which options in `text` override.

    Raises:
        UserError: an unknown method or option, or an option without a value.
    """
    name, _, rest = text.partition(":")
    kind = registry.get("tta", name).Config
    known = [field.name for field in dataclasses.fields(kind)]
    options = few_class_options(name, classes)
    for pair in filter(None, rest.split(",")):
        option, equals, value = pair.partition("=")
        option = option.strip().replace("-", "_")
        if not equals:
            raise UserError(f"variant {text!r} must read NAME:OPTION=VALUE,OPTION=VALUE")
        if option not in known:
            raise unknown(f"option of {name}", option, known)
        try:
            options[option] = json.loads(value)
        except json.JSONDecodeError:
            options[option] = value.strip()
    return kind(**options)


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
