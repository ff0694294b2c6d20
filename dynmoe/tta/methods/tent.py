"""Tent, no adaptation, and MGTTA, which cannot be had without its authors' file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import tent_loss
from dynmoe.tta.params import affine_parameters


class Tent(Adapter, name="tent", source="Wang et al. 2021 (arXiv 2006.10726), Section 3"):
    """Entropy minimisation: `L = mean_b H(logits_b)`, by the normalisation layers' affines.

    Options (ours) leave unsure samples out, and add `-im H(mean_b p_b)` (information maximisation).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of Tent."""

        lr: float = 5e-4
        """learning rate of SGD; MoETTA's code, for batches of 64 (the ViT of SAR's and DeYO's
        code: 1e-3)"""
        momentum: float = 0.9
        """momentum of SGD; MoETTA's code, as upstream"""
        reliable: bool = False
        """learn from samples with H < 0.4 ln(classes) alone (EATA's margin)"""
        im: float = 0.0
        """weight of -H(mean p), the entropy of the batch's mean prediction; 1: information
        maximisation (Krause et al. 2010; SHOT)"""

    def prepare(self) -> None:
        """All scales and shifts.

        Raises:
            UserError: im is out of range.
            UnfitModelError: the model has no scales and shifts to train.
        """
        if not 0 <= self.config.im < float("inf"):
            raise UserError(f"tent: im={self.config.im} must be at least 0")
        parameters = affine_parameters(self.model, self.name)
        self.use_sgd(parameters, self.config.lr, self.config.momentum)

    def adapt(self, images: Tensor) -> Tensor:
        """One step down the loss."""
        logits = self.model(images)
        self.learn(tent_loss(logits, self.config.reliable, self.config.im), logits)
        return logits


class NoAdapt(Adapter, name="noadapt"):
    """The source model as it is: the baseline of all baselines."""

    adapts = False

    def prepare(self) -> None:
        """Nothing is trained."""

    @torch.no_grad()
    def adapt(self, images: Tensor) -> Tensor:
        """The model's logits."""
        return self.model(images)


class Mgtta(Adapter, name="mgtta", source="a baseline of Fan et al. 2025 (arXiv 2511.13760)"):
    """The affines of LayerNorms moved by a learned optimizer; says what it would need."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """MGTTA has no options here."""

    def prepare(self) -> None:
        """Refuse, always.

        Raises:
            UserError: always.
        """
        raise UserError(
            "mgtta moves weights by a learned optimizer: it needs its authors' checkpoint "
            "(mgg_ckpt.pth), their code for it and statistics of the source, none of which comes "
            "with dynmoe; use another method"
        )

    def adapt(self, images: Tensor) -> Tensor:
        """Never reached."""
        return self.model(images)
