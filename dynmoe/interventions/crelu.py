"""Concatenated ReLUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import UnitLayer, find_units
from dynmoe.interventions.weights import replace_module


class CReLU(Intervention, name="crelu", source="Abbas et al. 2023 (arXiv 2303.07507), Section 5"):
    """Hidden layers pass on relu(x) and relu(-x), from half the units.

    The layer before each ReLU, and any normalisation between, keeps the first half of its outputs,
    so what reads the activations does not change and the network gets no more parameters. What is
    inside an MoE layer stays as it is.
    """

    def transform(self, model: nn.Module, generator: torch.Generator) -> None:
        """Halve and mirror; it draws nothing.

        Raises:
            UserError: there is no ReLU behind a layer, or a layer has an odd number of units.
        """
        layers = [u for u in find_units(model) if isinstance(u.activation, nn.ReLU)]
        if not layers:
            raise UserError("strategy crelu: the network has no ReLU behind a layer of its own")
        for layer in layers:
            if layer.units % 2:
                raise UserError(
                    f"strategy crelu: layer {layer.name} has {layer.units} units, an odd number"
                )
        for layer in layers:
            _halve(layer)
            replace_module(model, layer.source, nn.Sequential(layer.source, Mirror()))


class Mirror(nn.Module):
    """x [B, U, ...] -> [x, -x] [B, 2U, ...]: what a ReLU behind it makes a CReLU.

    Vectors and their sequences [B, T, U] are mirrored in the last axis, images in the second.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate x and -x."""
        return torch.cat([x, -x], dim=1 if x.dim() == 4 else -1)


@torch.no_grad()
def _halve(layer: UnitLayer) -> None:
    """Keep the first half of the units in what feeds and normalises them."""
    half = layer.units // 2
    sizes = ("out_features", "out_channels", "num_features", "num_channels")
    for module in (layer.incoming[0].module, *layer.norms):
        for name, parameter in list(module.named_parameters(recurse=False)):
            kept = nn.Parameter(parameter[:half].clone(), parameter.requires_grad)
            setattr(module, name, kept)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dim() == 1:
                setattr(module, name, buffer[:half].clone())
        for name in sizes:
            if hasattr(module, name):
                setattr(module, name, half)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (half, *module.normalized_shape[1:])
