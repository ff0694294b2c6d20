"""Normalisation before every activation."""

from __future__ import annotations

import torch
from torch import nn

from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import find_units
from dynmoe.interventions.weights import replace_module


class LayerNormStrategy(
    Intervention, name="layernorm", source="Lyle et al. 2023 (arXiv 2303.01486), Section 5"
):
    """Puts layer normalisation (Ba et al. 2016) before the activations of hidden layers.

    Linear layers get LayerNorm, convolutions GroupNorm with one group. Layers that are normalised
    already stay as they are, and so does what is inside an MoE layer.
    """

    def transform(self, model: nn.Module, generator: torch.Generator) -> None:
        """Insert the normalisation; it draws nothing."""
        insert_norms(model)


def insert_norms(model: nn.Module) -> None:
    """Normalise before the activation of every hidden layer that is not normalised yet, in place.

    Raises:
        UserError: no hidden layer is found.
    """
    for layer in find_units(model):
        if layer.bank is not None or layer.norms:
            continue
        weight = layer.incoming[0].parameter
        convolution = weight.dim() == 4
        norm = nn.GroupNorm(1, len(weight)) if convolution else nn.LayerNorm(len(weight))
        replace_module(model, layer.source, nn.Sequential(layer.source, norm.to(weight)))
