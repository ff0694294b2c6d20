"""Small models for the tests of test-time adaptation, and what a naive learner needs."""

from __future__ import annotations

import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

CLASSES, SIDE = 10, 16


def vit(seed: int = 0, depth: int = 2, sharp: float = 3.5) -> nn.Module:
    """A float64 ViT whose predictions are of all degrees of certainty."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=CLASSES
    )
    return shaken(model.double().eval(), sharp)


def shaken(model: nn.Module, sharp: float) -> nn.Module:
    """The model with weights of size, affines away from 1 and 0, and a head sure of itself."""
    for module in model.modules():
        if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, module.weight[0].numel() ** -0.5)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.normal_(head.weight, 0.0, sharp / head.in_features**0.5)
    return model


def convnext() -> nn.Module:
    torch.manual_seed(0)
    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=CLASSES)
    return shaken(model.double().eval(), 3.0)


def resnet(group_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    options = {"norm_layer": timm.layers.GroupNorm1} if group_norm else {}
    model = ResNet(
        BasicBlock, [1, 1, 1, 1], num_classes=CLASSES, channels=(8, 8, 16, 16), **options
    )
    return shaken(model.double().eval(), 3.0)


def stream(batches: int, size: int = 6, side: int = SIDE, seed: int = 1) -> list[Tensor]:
    """Batches of noise images whose brightness and contrast change."""
    generator = torch.Generator().manual_seed(seed)

    def batch(i: int) -> Tensor:
        noise = torch.randn(size, 3, side, side, generator=generator, dtype=torch.double)
        shift = torch.randn(size, 3, 1, 1, generator=generator, dtype=torch.double)
        return (0.5 + 0.3 * i) * noise + 2 * shift

    return [batch(i) for i in range(batches)]


def shannon(row: Tensor) -> Tensor:
    """Entropy of one row of logits, term by term."""
    p = row.exp() / row.exp().sum()
    return -sum(q * q.log() for q in p)


class NaiveSGD:
    """SGD with momentum, as in textbooks: v = mu v + g, theta -= lr v."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float) -> None:
        self.parameters, self.lr, self.momentum = parameters, lr, momentum
        self.velocity = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        for i, gradient in enumerate(gradients):
            self.velocity[i] = self.momentum * self.velocity[i] + gradient
            self.parameters[i] -= self.lr * self.velocity[i]


def affines(model: nn.Module, skip: tuple[str, ...] = ()) -> list[Tensor]:
    """Scales and shifts of the LayerNorms, found by their names, made trainable."""
    model.requires_grad_(False)
    found = [
        p
        for name, p in model.named_parameters()
        if "norm" in name and not any(part in name for part in skip)
    ]
    return [p.requires_grad_(True) for p in found]
