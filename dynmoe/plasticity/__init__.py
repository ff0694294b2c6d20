"""Measures of how well a network can still learn: activations, gradients, weights, routing."""

from dynmoe.plasticity.callback import PlasticityCallback as PlasticityCallback
from dynmoe.plasticity.measuring import measure as measure
from dynmoe.plasticity.measuring import measure as measure_plasticity  # noqa: F401
from dynmoe.plasticity.metric import measure_all as measure_all
from dynmoe.plasticity.probes import take_probe as take_probe
