"""EATA, SAR and DeYO: entropy of the samples that can be relied on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.moe.model import undisturbed
from dynmoe.ranges import MOST, Range
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import margin, mean_of, softmax_entropy, sound, wide
from dynmoe.tta.options import FEW
from dynmoe.tta.params import affine_parameters, innermost


class Eata(Adapter, name="eata", source="Niu et al. 2022 (arXiv 2204.02610), Section 3"):
    """Weighted entropy of reliable, non-redundant samples, and a Fisher penalty on forgetting.

    `L = mean_S exp(E0 - H) H + alpha sum_i F_i (theta_i - theta_i^0)^2` (the factor exp(E0 - H)
    without gradient) with S = {H < E0 and |cos(q, p)| < d}, q the moving average of the
    probabilities p over past S. Where S is empty nothing is done. The Fisher information F comes
    from `observe_source`; without it there is no penalty, which is ETA.

    Attributes:
        memory: `average` is q [classes], `fisher` a list of tensors; None at first.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of EATA."""

        lr: float = 6e-4
        """learning rate of SGD; MoETTA's code, for batches of 64"""
        momentum: float = 0.9
        """momentum of SGD; MoETTA's code, as upstream"""
        margin: float | None = None
        """E0 in nats; by default 0.4 ln(classes), as upstream"""
        redundancy: float | None = None
        """d, largest cosine with the average prediction; by default 0.05, upstream for 1000
        classes, and for 200 classes or fewer 0.4, upstream for 10"""
        decay: float = 0.9
        """share of the old q in the new one; upstream"""
        fisher_weight: float = 2000.0
        """alpha, weight of the penalty; upstream. 0: ETA"""
        fisher_images: int = 2000
        """source images that the Fisher information is to be taken from; upstream"""

    @staticmethod
    def by_classes(classes: int) -> dict[str, float]:
        """The largest cosine."""
        return {"redundancy": 0.4 if classes <= FEW else 0.05}

    def prepare(self) -> None:
        """All scales and shifts."""
        self.trained = affine_parameters(self.model, self.name)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.names = [names[parameter] for parameter in self.trained]
        self.use_sgd(self.trained, self.config.lr, self.config.momentum)
        self.memory = {"average": None, "fisher": None}
        if self.config.fisher_weight > 0:
            self.source_images = self.config.fisher_images

    def learn_source(self, batches: Iterable[Tensor]) -> None:
        """Take the Fisher information: squared gradients of batches' mean cross-entropy.

        Labels are the model's own predictions; squares are averaged over the batches (of 64
        upstream).

        Raises:
            UserError: a batch whose gradients are not finite.
        """
        fisher, count = [torch.zeros_like(wide(p)) for p in self.trained], 0
        for count, images in enumerate(batches, start=1):
            with undisturbed(self.model):
                logits = wide(self.model(images))
                loss = F.cross_entropy(logits, logits.detach().argmax(dim=1))
                gradients = gradients_of(loss, self.trained)
            for total, gradient in zip(fisher, gradients, strict=True):
                total += wide(gradient).square()
            if not all(bool(total.isfinite().all()) for total in fisher):
                raise UserError(
                    f"eata: the gradients of source batch {count} are not finite; leave it out"
                )
        self.memory["fisher"] = [total / count for total in fisher]

    def adapt(self, images: Tensor) -> Tensor:
        """One step, if any sample is trusted."""
        if self.steps == 0 and self.memory["fisher"] is None and self.config.fisher_weight > 0:
            warnings.warn(
                "eata has seen no source images (observe_source), so it adapts without its Fisher "
                "penalty, as ETA; fisher_weight=0 says so",
                stacklevel=4,
            )
        logits = self.model(images)
        h, p = softmax_entropy(logits), wide(logits).softmax(dim=1)
        e0, average = margin(self.config.margin, 0.4, logits), self.memory["average"]
        trusted = h.detach() < e0
        if average is not None:
            cosine = F.cosine_similarity(average.unsqueeze(0), p.detach(), dim=1)
            trusted = trusted & (cosine.abs() < self.option("redundancy", logits))
        if not bool(trusted.any()):
            self.finite(h.new_zeros(()), logits)
            return logits
        loss = mean_of((e0 - h.detach()).exp() * h, trusted) + self.penalty()
        if self.learn(loss, logits):
            mean = p.detach()[trusted].mean(dim=0)
            decay = self.config.decay
            fresh = mean if average is None else decay * average + (1 - decay) * mean
            self.memory["average"] = fresh
        return logits

    def penalty(self) -> Tensor | float:
        """`alpha sum_i F_i (theta_i - theta_i^0)^2`, a scalar; 0 without Fisher information."""
        fisher = self.memory["fisher"]
        if fisher is None or self.config.fisher_weight == 0:
            return 0.0
        origin = [self.start[name] for name in self.names]
        terms = zip(fisher, self.trained, origin, strict=True)
        distances = [(f * (wide(p) - wide(first)).square()).sum() for f, p, first in terms]
        return self.config.fisher_weight * torch.stack(distances).sum()


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

    def prepare(self) -> None:
        """Scales and shifts of all but the last layers.

        Raises:
            UserError: rho is below 0.
            UnfitModelError: the model has no scales and shifts to train.
        """
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
        h, e0 = softmax_entropy(logits), margin(self.config.margin, 0.4, logits)
        reliable = h.detach() < e0
        loss = mean_of(h, reliable)
        if not self.finite(loss, logits) or (official and not bool(reliable.any())):
            return logits
        origin = [parameter.detach().clone() for parameter in self.trained]
        self._shift(gradients_of(loss, self.trained))
        shifted = self.model(images)
        second = softmax_entropy(shifted)
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


def gradients_of(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """Gradients in the parameters' shapes; 0 for what the pass left out, as an auxiliary head."""
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


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
        plpd: Annotated[float | None, Range(-MOST, MOST)] = None
        """threshold of PLPD; by default 0.2 (paper), 0.5 (official)"""
        destroy: Literal["patch", "pixel", "occlusion"] = "patch"
        """patch: shuffled patches, each image in its own order (both codes' default); pixel:
        shuffled pixels, one order for all; occlusion: the centre gets the channel's mean"""
        grid: int = 4
        """patches along either side; both codes"""
        occlusion: float = 0.5
        """side of the occluded square as a share of the image's; both codes (112 of 224)"""
        seed: int = 0
        """of the random orders"""

    draws_on_cpu = True

    def prepare(self) -> None:
        """All scales and shifts.

        Raises:
            UserError: an option is out of range.
            UnfitModelError: the model has no scales and shifts to train.
        """
        config = self.config
        if config.grid < 1 or not 0 < config.occlusion <= 1:
            raise UserError(
                f"deyo: grid={config.grid} must be at least 1 and occlusion={config.occlusion} "
                "above 0, at most 1"
            )
        lr = CONSTANTS[config.setting]["lr"] if config.lr is None else config.lr
        self.use_sgd(affine_parameters(self.model, self.name), lr, config.momentum)

    def check_side(self, side: int) -> None:
        """Refuse images with fewer pixels along a side than `grid` has patches."""
        if self.config.destroy == "patch" and self.config.grid > side:
            raise UserError(
                f"deyo: grid={self.config.grid} cuts more patches along a side than the images "
                f"have pixels; use 1 to {side}"
            )

    def adapt(self, images: Tensor) -> Tensor:
        """One step, if any sample is trusted."""
        self.check_side(min(images.shape[-2:]))
        config, constants = self.config, CONSTANTS[self.config.setting]
        logits = self.model(images)
        h = softmax_entropy(logits)
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


def shuffle_patches(images: Tensor, grid: int, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W] cut into grid x grid patches, in a random order of each image's own.

    Sides that the grid does not divide are resized (bilinear, antialiased) to ones that it does,
    and back. Orders are the ranks of uniform float32 noise [B, grid^2] of a CPU generator.
    """
    height, width = images.shape[-2:]
    size = (height // grid * grid, width // grid * grid)
    pieces = _resize(images, size)
    b, c = pieces.shape[:2]
    rows, columns = size[0] // grid, size[1] // grid
    pieces = pieces.view(b, c, grid, rows, grid, columns).permute(0, 2, 4, 1, 3, 5)
    noise = torch.rand(b, grid * grid, generator=generator, dtype=torch.float32)
    order = noise.argsort(dim=1).to(images.device)
    flat = pieces.reshape(b, grid * grid, c, rows, columns)
    mixed = flat[torch.arange(b, device=images.device).unsqueeze(1), order]
    mixed = mixed.view(b, grid, grid, c, rows, columns).permute(0, 3, 1, 4, 2, 5)
    return _resize(mixed.reshape(b, c, *size), (height, width))


def shuffle_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W] with their pixels in one random order, the same for all."""
    order = torch.randperm(images.shape[-2:].numel(), generator=generator).to(images.device)
    return images.flatten(2)[:, :, order].view_as(images)


def occlude(images: Tensor, share: float) -> Tensor:
    """Images [B, C, H, W] whose central `share` of either side has each channel's mean."""
    height, width = images.shape[-2:]
    rows, columns = round(height * share), round(width * share)
    top, left = (height - rows) // 2, (width - columns) // 2
    hidden = images.clone()
    means = images.mean(dim=(2, 3), keepdim=True)
    hidden[:, :, top : top + rows, left : left + columns] = means
    return hidden


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)
