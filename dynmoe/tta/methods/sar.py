"""SAR: reliable entropy minimisation towards flat minima, with a reset before collapse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import entropy, margin, mean_of, wide
from dynmoe.tta.params import affine_parameters, innermost


class Sar(Adapter, name="sar", source="Niu et al. 2023 (arXiv 2302.12400)"):
    """Sharpness-aware entropy minimisation of reliable samples, reset when entropy gets too low.

    With S1 = {H < E0} and g the gradient of mean_S1 H at theta, the step goes down the gradient of
    mean_S2 H' at theta + rho g / |g|, from theta. A moving average of that mean below `reset_below`
    puts weights and optimizer back to the start; the average stays, so resets repeat until it has
    risen again.

    `setting`: in the paper (as upstream) S2 = {b in S1: H' < E0} and the logits are those at theta.
    MoETTA's code takes S2 from the whole batch, returns the logits at the shifted weights, and
    takes no step where S1 is empty; upstream steps with a gradient of 0 there.

    Attributes:
        memory: `average`, the moving average or None; `resets`, how often weights were put back.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of SAR."""

        setting: Literal["paper", "official"] = "paper"
        """paper: as in SAR's own code; official: as in MoETTA's code, with which its table is made
        """
        lr: float | None = None
        """learning rate of SGD; by default 1e-3 in the paper's setting (the ViT of SAR's code at
        batch 64), 5e-4 in the official one"""
        momentum: float = 0.9
        """momentum of SGD; both codes"""
        margin: float | None = None
        """E0 in nats; by default 0.4 ln(classes), both codes"""
        rho: float = 0.05
        """length of the shift of the weights; both codes"""
        reset_below: float = 0.2
        """moving average of the loss, in nats, below which weights are reset; fixed in both codes
        """
        decay: float = 0.9
        """share of the old moving average in the new one; both codes"""
        skip: tuple[str, ...] = ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")
        """layers whose name contains one of these are not trained, nor is the model's own `norm`;
        both codes, for a ResNet-50 or a ViT of 12 blocks. Wrappers of the model do not count"""

    config: Config

    def prepare(self) -> None:
        """Scales and shifts of all but the last layers."""
        config = self.config
        if not config.rho >= 0:
            raise UserError(f"sar: rho={config.rho} must be at least 0")

        last = innermost(self.model)._modules.get("norm")
        kept = set() if last is None else set(last.modules())

        def keep(name: str, norm: nn.Module) -> bool:
            return norm not in kept and not any(part in name for part in config.skip)

        lr = {"paper": 1e-3, "official": 5e-4}[config.setting]
        self.trained = affine_parameters(self.model, self.name, keep)
        self.use_sgd(self.trained, lr if config.lr is None else config.lr, config.momentum)
        self.memory = {"average": None, "resets": 0}

    def adapt(self, images: Tensor) -> Tensor:
        """Shift the weights, and step from where they were."""
        official = self.config.setting == "official"
        logits = self.model(images)
        h, e0 = entropy(logits), margin(self.config.margin, 0.4, logits)
        reliable = h.detach() < e0
        loss = mean_of(h, reliable)
        if not self.finite(loss, logits) or (official and not bool(reliable.any())):
            return logits
        origin = [parameter.detach().clone() for parameter in self.trained]
        self._shift(torch.autograd.grad(loss, self.trained))
        shifted = self.model(images)
        second = entropy(shifted)
        certain = second.detach() < e0
        certain = certain if official else certain & reliable
        self._step(mean_of(second, certain), shifted, origin, bool(certain.any()))
        return shifted if official else logits

    @torch.no_grad()
    def _shift(self, gradients: tuple[Tensor, ...]) -> None:
        """Move the trained weights by rho up the gradient."""
        norm = torch.stack([wide(gradient).norm() for gradient in gradients]).norm()
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.add_(self.config.rho / (norm + 1e-12) * gradient)

    def _step(self, loss: Tensor, logits: Tensor, origin: list[Tensor], any_certain: bool) -> None:
        """Step from `origin` by the gradient at the shifted weights; reset if it is time."""
        assert self.optimizer is not None
        sound = self.finite(loss, logits)
        if sound:
            self.optimizer.zero_grad()
            loss.backward()
        with torch.no_grad():
            for parameter, value in zip(self.trained, origin, strict=True):
                parameter.copy_(value)
        if not sound or not self.take_step():
            return
        memory, decay = self.memory, self.config.decay
        if any_certain:
            old, new = memory["average"], loss.item()
            memory["average"] = new if old is None else decay * old + (1 - decay) * new
        if memory["average"] is not None and memory["average"] < self.config.reset_below:
            self.restore_weights()
            memory["resets"] += 1
