"""CoTTA: a student that follows its slow teacher, and remembers the source now and then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import cross_entropy, wide
from dynmoe.tta.params import UnfitModelError, holding


class Cotta(Adapter, name="cotta", source="Wang et al. 2022 (arXiv 2203.13591), Section 3"):
    """Symmetric cross-entropy with an averaged teacher; weights fall back to the source at random.

    The model is the student; teacher and source differ from it in the trained weights only: all
    parameters called weight or bias. Where the source's confidence, mean_b max_c p, is below a
    threshold, the target is the mean of the teacher's logits over random views, else it is the
    teacher's logits. `L = mean_b [-1/2 sum q log p - 1/2 sum p log q]` with q of the target and p
    of the student. After the step the teacher moves towards the student, and every trained number
    returns to its source value with a small chance. Returned are the target's logits.

    Attributes:
        memory: `teacher`, the teacher's trained weights by name, in float32 or wider.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of CoTTA."""

        lr: float = 1e-3
        """learning rate of SGD; MoETTA's code"""
        momentum: float = 0.9
        """momentum of SGD; MoETTA's code"""
        confidence: float = 0.1
        """confidence of the source below which views are averaged; MoETTA's code, as upstream for
        ImageNet"""
        views: int = 32
        """views that the teacher averages over; both codes"""
        teacher_decay: float = 0.999
        """share of the old teacher in the new one; both codes"""
        restore: float = 0.001
        """chance of each trained number to return to its source value; both codes for ImageNet"""
        seed: int = 0
        """of views and restored numbers"""

    def prepare(self) -> None:
        """All parameters called weight or bias.

        Raises:
            UserError: an option is out of range.
            UnfitModelError: no parameter is called weight or bias.
        """
        config = self.config
        if config.views < 1 or not all(0 <= p <= 1 for p in (config.teacher_decay, config.restore)):
            raise UserError(
                f"cotta: views={config.views} must be at least 1, teacher_decay="
                f"{config.teacher_decay} and restore={config.restore} between 0 and 1"
            )
        named = self.model.named_parameters()
        self.trained = {n: p for n, p in named if n.split(".")[-1] in ("weight", "bias")}
        if not self.trained:
            raise UnfitModelError(
                "cotta trains parameters called weight or bias; the model has none"
            )
        self.use_sgd(list(self.trained.values()), config.lr, config.momentum)
        teacher = {n: wide(p.detach()).clone() for n, p in self.trained.items()}
        self.memory = {"teacher": teacher}

    def adapt(self, images: Tensor) -> Tensor:
        """One step of the student, then of the teacher."""
        logits = self.model(images)
        target = self._target(images)
        log_p, log_q = wide(logits).log_softmax(dim=1), wide(target).log_softmax(dim=1)
        cross = cross_entropy(log_q, log_p) + cross_entropy(log_p, log_q)
        if self.learn(0.5 * cross.mean(), torch.cat([logits.detach(), target])):
            self._follow()
        return target

    @torch.no_grad()
    def _target(self, images: Tensor) -> Tensor:
        """[B, classes] logits that the student is to learn."""
        with holding(self.trained, self.start):
            p = wide(self.model(images)).softmax(dim=1)
        if float(p.amax(dim=1).mean()) >= self.config.confidence:
            return self._teach(images)
        views = (self._teach(augment(images, self.generator)) for _ in range(self.config.views))
        return sum(views, start=torch.zeros((), device=images.device)) / self.config.views

    def _teach(self, images: Tensor) -> Tensor:
        """[B, classes] logits of the teacher."""
        with holding(self.trained, self.memory["teacher"]):
            return self.model(images)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the teacher, then restore some of the student."""
        for name, student in self.trained.items():
            self.memory["teacher"][name].lerp_(wide(student), 1 - self.config.teacher_decay)
        for name, student in self.trained.items():
            luck = torch.rand(
                student.shape, generator=self.generator, device=student.device, dtype=torch.float32
            )
            student.copy_(torch.where(luck < self.config.restore, self.start[name], student))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of a batch [B, C, H, W], drawn once for all its images.

    Wang et al. 2022 (arXiv 2203.13591) and its code: clip to [0, 1]; brightness 0.6-1.4, contrast
    0.7-1.3, saturation 0.5-1.5, hue +-0.06 and gamma 0.7-1.3, in a random order; a margin of half
    the side, repeating the edge; rotation by +-15 degrees, shift by 1/16, scale 0.9-1.1 (bilinear,
    ours); Gaussian blur of 5 pixels and sigma 0.001-0.5; the centre; a flip with chance 1/2; noise
    of 0.005; clip. Images that are normalised already are clipped all the same, as there.

    Raises:
        UserError: images with neither 1 nor 3 channels.
    """
    from torchvision.transforms.v2 import functional as transform

    channels, height, width = images.shape[1:]
    if channels not in (1, 3):
        raise UserError(f"cotta augments images of 1 or 3 channels, not {channels}")

    def draw(low: float, high: float) -> float:
        share = torch.rand((), generator=generator, device=generator.device)
        return low + (high - low) * float(share)

    colours = [
        (transform.adjust_brightness, 0.6, 1.4),
        (transform.adjust_contrast, 0.7, 1.3),
        (transform.adjust_saturation, 0.5, 1.5),
        (transform.adjust_hue, -0.06, 0.06),
        (transform.adjust_gamma, 0.7, 1.3),
    ]
    x = images.clamp(0, 1)
    for index in torch.randperm(5, generator=generator, device=generator.device).tolist():
        change, low, high = colours[index]
        x = change(x, draw(low, high)).clamp(0, 1)
    x = transform.pad(x, [width // 2, height // 2], padding_mode="edge")
    x = transform.affine(
        x,
        angle=draw(-15, 15),
        translate=[draw(-1, 1) * x.shape[-1] / 16, draw(-1, 1) * x.shape[-2] / 16],
        scale=draw(0.9, 1.1),
        shear=[0.0, 0.0],
        interpolation=transform.InterpolationMode.BILINEAR,
    )
    x = transform.gaussian_blur(x, [5, 5], [draw(0.001, 0.5)] * 2)
    x = transform.center_crop(x, [height, width])
    x = x.flip(-1) if draw(0, 1) < 0.5 else x
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + 0.005 * noise).clamp(0, 1)
