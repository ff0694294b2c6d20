"""Measures of how well a network can still learn: activations, gradients, weights, routing."""
