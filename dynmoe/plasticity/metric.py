"""The metric contract: a `Probe` in, named finite numbers out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import NumericError
from dynmoe.plasticity.probes import Probe, output_layer, take_probe
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


def measure(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    classifier: nn.Module | None = None,
) -> dict[str, float]:
    """Plasticity of a network on one batch: every registered metric that applies to it.

    Shares of dormant units, ranks of features, norms of weights; with labels norms of gradients,
    and with MoE layers how their experts are used: tags such as `dormant/0.025`, `rank/srank99`,
    `weight_norm/l2`, `grad_norm/l2`, `router/entropy`, each also per layer. The metrics' docstrings
    explain them. The model is left as it was (see `take_probe`), and its parameters' `.grad`, too.

    Args:
        model: any network of torch modules. Units are counted behind modules such as `nn.ReLU`.
        inputs: [N, ...], on the model's device. Ranks are at most N: take more than features.
        labels: [N] int class indices of a classifier with logits [N, C]. None: no gradients.
        classifier: the module whose inputs are the features; by default the last linear map,
            convolution or MoE layer in module order.

    Raises:
        UserError: no module of the model can be taken as its classifier.
        ValueError: an empty batch, logits not [N, C], or a classifier that was not called.
        NumericError: the loss, an activation or a gradient is not finite.
    """
    classifier = output_layer(model) if classifier is None else classifier
    return measure_all(take_probe(model, inputs, labels, classifier=classifier))
