"""Interventions that change the network: normalisation, and CReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.interventions.anchor import Anchor
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import UnitLayer, find_units
from dynmoe.interventions.weights import replace_module, weight_matrices
from dynmoe.registry import PartConfig


class LayerNormIntervention(
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
            raise UserError("intervention crelu: the network has no ReLU behind a layer of its own")
        for layer in layers:
            if layer.units % 2:
                raise UserError(
                    f"intervention crelu: layer {layer.name} has {layer.units} units, an odd number"
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


class NaP(Intervention, name="nap", source="Lyle et al. 2024 (arXiv 2407.01800), Section 4"):
    """Normalises before activations, and keeps every weight matrix at its first norm.

    Layers are normalised as by `layernorm`. After optimizer steps each weight matrix is scaled back
    to the Frobenius norm that it began with (after a growth: that its units began with). Biases and
    the normalisation's scales learn freely.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of normalise and project."""

        every: int = 1
        """optimizer steps between two projections"""
        normalise: bool = True
        """insert the normalisation; without it only norms are kept"""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.every < 1:
            raise UserError(f"nap: every={config.every} must be at least 1")

    def transform(self, model: nn.Module, generator: torch.Generator) -> None:
        """Normalise before activations."""
        if self.config.normalise:
            insert_norms(model)

    def begin(self) -> None:
        """Keep the first weights, for their norms."""
        self.anchor = Anchor(self.model)

    @torch.no_grad()
    def after_step(self) -> None:
        """Project when it is time."""
        if self.steps % self.config.every:
            return
        first = {parameter: value for parameter, value in self.anchor.pairs()}
        for slot in weight_matrices(self.model):
            weight = slot.parameter
            weight.mul_(first[weight].norm() / weight.norm().clamp_min(1e-12))

    def state(self) -> dict[str, Any]:
        """The first weights."""
        return {"first": self.anchor.first}

    def restore(self, state: dict[str, Any]) -> None:
        """Put the first weights back."""
        self.anchor.load(state["first"])

    def grown(self, before: dict[str, Tensor]) -> None:
        """New units count with the weights they begin with."""
        self.anchor.grown(before)
