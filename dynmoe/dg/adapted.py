"""What the methods of the MoA family share: a frozen transformer that runs with given sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynmoe.dg.backbone import features
from dynmoe.dg.bank import AdapterBank
from dynmoe.dg.moa import MoALinear, Theta


def adapted_features(
    backbone: nn.Module, layers: list[MoALinear], thetas: list[Theta], images: Tensor
) -> Tensor:
    """[B, D] features of images [B, C, H, W] with the layers' parameters for this pass."""
    for layer, theta in zip(layers, thetas, strict=True):
        layer.theta = theta
    try:
        return features(backbone, images)
    finally:
        for layer in layers:
            layer.theta = None


def whole_set(bank: AdapterBank) -> list[Theta]:
    """The Theta of each layer from a bank of one set, shared by all samples."""
    alone = bank.rows["bias"].new_ones(1, 1)
    return bank.thetas(bank.mix(alone), alone)


def balance(layers: list[MoALinear], weight: float) -> dict[str, Tensor]:
    """The layers' load-balancing losses, weighted and summed, by name; none outside training."""
    losses = [layer.last_balance for layer in layers if layer.last_balance is not None]
    return {"balance": weight * torch.stack(losses).sum()} if losses else {}
