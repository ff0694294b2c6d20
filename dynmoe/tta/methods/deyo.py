"""DeYO: trust samples whose prediction depends on the object's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import entropy, margin, sound, wide
from dynmoe.tta.params import affine_parameters
from dynmoe.tta.shuffle import Destruction, occlude, shuffle_patches, shuffle_pixels

CONSTANTS = {
    "paper": {"lr": 1e-3, "filter": 0.5, "margin": 0.4, "plpd": 0.2},
    "official": {"lr": 5e-5, "filter": 0.4, "margin": 0.5, "plpd": 0.5},
}
"""Where DeYO's code (paper) and MoETTA's (official) differ; margins as shares of ln classes."""


class Deyo(Adapter, name="deyo", source="Lee et al. 2024 (arXiv 2403.07366)"):
    """Weighted entropy of samples whose probability falls when the image's shape is destroyed.

    S1 = {H < tau}; PLPD = p[c] - p'[c] with c = argmax p and p' of the destroyed image, for S1
    only; S = {b in S1: PLPD > threshold}; `L = mean_S (exp(E0 - H) + exp(PLPD)) H`, the factor
    without gradient. Where S1 or S is empty nothing is done.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of DeYO."""

        setting: Literal["paper", "official"] = "paper"
        """paper: the constants of DeYO's own code; official: those of MoETTA's code"""
        lr: float | None = None
        """learning rate of SGD; by default 1e-3 (paper, the ViT at batch 64; upstream multiplies it
        by batch/64), 5e-5 (official)"""
        momentum: float = 0.9
        """momentum of SGD; both codes"""
        filter: float | None = None
        """tau in nats; by default 0.5 ln(classes) (paper), 0.4 ln(classes) (official)"""
        margin: float | None = None
        """E0 in nats; by default 0.4 ln(classes) (paper), 0.5 ln(classes) (official)"""
        plpd: float | None = None
        """threshold of PLPD; by default 0.2 (paper), 0.5 (official)"""
        destroy: Destruction = "patch"
        """patch: shuffled patches, each image in its own order (both codes' default); pixel:
        shuffled pixels, one order for all; occlusion: the centre gets the channel's mean"""
        grid: int = 4
        """patches along either side; both codes"""
        occlusion: float = 0.5
        """side of the occluded square as a share of the image's; both codes (112 of 224)"""
        seed: int = 0
        """of the random orders"""

    config: Config
    draws_on_cpu = True

    def prepare(self) -> None:
        """All scales and shifts."""
        config = self.config
        if config.grid < 1 or not 0 < config.occlusion <= 1:
            raise UserError(
                f"deyo: grid={config.grid} must be at least 1 and occlusion={config.occlusion} "
                "above 0, at most 1"
            )
        lr = CONSTANTS[config.setting]["lr"] if config.lr is None else config.lr
        self.use_sgd(affine_parameters(self.model, self.name), lr, config.momentum)

    def adapt(self, images: Tensor) -> Tensor:
        """One step, if any sample is trusted."""
        config, constants = self.config, CONSTANTS[self.config.setting]
        logits = self.model(images)
        h = entropy(logits)
        likely = (h < margin(config.filter, constants["filter"], logits)).nonzero().flatten()
        if not len(likely) or not bool(sound(logits)):
            self.finite(h.detach().sum(), logits)
            return logits
        plpd = self._fall(images[likely], logits.detach()[likely])
        trusted = plpd > (constants["plpd"] if config.plpd is None else config.plpd)
        if not bool(trusted.any()):
            return logits
        h, plpd = h[likely][trusted], plpd[trusted]
        e0 = margin(config.margin, constants["margin"], logits)
        weight = (e0 - h.detach()).exp() + plpd.exp()
        self.learn((weight * h).mean(), logits)
        return logits

    @torch.no_grad()
    def _fall(self, images: Tensor, logits: Tensor) -> Tensor:
        """[B] PLPD: how much less probable the predicted class is for the destroyed image."""
        p = wide(logits).softmax(dim=1)
        best = p.argmax(dim=1, keepdim=True)
        destroyed = wide(self.model(self._destroyed(images))).softmax(dim=1)
        return (p.gather(1, best) - destroyed.gather(1, best)).squeeze(1)

    def _destroyed(self, images: Tensor) -> Tensor:
        if self.config.destroy == "patch":
            return shuffle_patches(images, self.config.grid, self.generator)
        if self.config.destroy == "pixel":
            return shuffle_pixels(images, self.generator)
        return occlude(images, self.config.occlusion)
