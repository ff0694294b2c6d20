"""The metric contract: a `Probe` in, named finite numbers out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from dynmoe import registry
from dynmoe.errors import NumericError
from dynmoe.plasticity.probes import Probe
from dynmoe.registry import Part


class Metric(Part, ABC, kind="metric"):
    """Base of all plasticity metrics: built from their `Config` alone, they define `measure`.

    No metric is a verdict on its own: they disagree with each other and with accuracy.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def measure(self, probe: Probe) -> dict[str, float]:
        """Tags and values, e.g. `{"dormant/0.025": 0.12}`.

        Every value is a finite float for a finite probe. A tag whose subject the network lacks
        (no experts, no activation modules) is left out rather than given a made-up value.
        """


def measure_all(probe: Probe, names: Iterable[str] | None = None) -> dict[str, float]:
    """The values of several metrics with their default options; of all registered ones by default.

    Raises:
        UserError: a name that is not registered.
        NumericError: a value is not finite, because the network's activations or gradients aren't.
    """
    values: dict[str, float] = {}
    for name in registry.names("metric") if names is None else names:
        values |= registry.get("metric", name).Config().build().measure(probe)
    for tag, value in values.items():
        if not math.isfinite(value):
            raise NumericError(f"plasticity metric {tag!r} is {value}")
    return values
