"""EATA: learn from reliable samples that are not redundant, and forget little of the source."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe.model import undisturbed
from dynmoe.registry import PartConfig
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import entropy, margin, mean_of, wide
from dynmoe.tta.options import FEW
from dynmoe.tta.params import affine_parameters


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

    config: Config

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
                gradients = torch.autograd.grad(loss, self.trained)
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
        h, p = entropy(logits), wide(logits).softmax(dim=1)
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
        """`alpha sum_i F_i (theta_i - theta_i^0)^2`; 0 without Fisher information."""
        fisher = self.memory["fisher"]
        if fisher is None or self.config.fisher_weight == 0:
            return 0.0
        origin = [self.start[name] for name in self.names]
        terms = zip(fisher, self.trained, origin, strict=True)
        distances = [(f * (wide(p) - wide(first)).square()).sum() for f, p, first in terms]
        return self.config.fisher_weight * torch.stack(distances).sum()
