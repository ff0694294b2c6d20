"""Measures of how well a network can still learn: activations, gradients, weights, routing."""

from dynmoe.plasticity.metric import measure as measure
from dynmoe.plasticity.metric import measure_all as measure_all
from dynmoe.plasticity.probes import take_probe as take_probe
