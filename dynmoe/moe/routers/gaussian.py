"""Routing by statistics of what each expert was trained on: Gaussians with one covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynmoe.moe.passes import Passes, new_pass, one_batch, places, sum_over_processes
from dynmoe.moe.router import Router, RouterInput, RouterSize, Routing, check_option
from dynmoe.registry import PartConfig

REFRESH = 10
"""Optimizer steps between two factorisations of the covariance."""


class GaussianRouter(
    Router,
    name="gaussian",
    source="ours; the posterior is that of streaming linear discriminant analysis, Hayes and Kanan "
    "2020 (arXiv 1909.01520)",
):
    """The probability that x comes from what each expert was trained on, by running statistics.

    Each expert has a mean, and all share a covariance: linear discriminant analysis, with experts
    for classes. Only the newest experts' means follow the samples of training passes; each sample
    counts for the nearest of them. A growth fixes the older ones. So samples like those of an
    earlier task find that task's experts.

    It is a cure of lock-out, where routers that learn by gradient leave new experts without
    samples, and so without learning (docs/cl.md, Lock-out): here their gate depends on where their
    samples lie, and not on what they have learnt so far. That needs old rows to be kept
    (`init.router` "new"). Where inputs do not tell tasks apart, the newest can get all samples.

    With prior "recent" an expert's prior weight is its share of the samples lately, as in a mixture
    model whose older components are fixed. It decides where inputs do not tell tasks apart: there
    the newest experts, which fit the present best, take over. Where inputs do, it hardly matters.

    No gradient reaches the means or passes through the gates. Inputs should keep their meaning: a
    trunk that goes on learning moves away from old means. The covariance is the mean of those of
    all growths' phases. New experts without any sample yet get the mean logit of the others.
    Statistics take 3 D^2 numbers beside the means: no parameters, but memory.

    Attributes:
        weight: Parameter [M, D] without gradient, the means.
        learning: buffer [M] bool, whose means follow samples: the rows drawn last.
        seen: buffer [M], optimizer steps with samples, those long ago counted less.
        share: buffer [M], mean gate of each expert lately; where it is new, that of the others.
        covariance, phases: buffers [D, D] and [], the mean of the finished phases', and how many.
        current, steps: buffers [D, D] and [], the present phase's, and the steps in it.
        whiten: buffer [D, D], takes x to where the covariance is the identity; refreshed now and
            then.
        sums, counts, scatter, gated: [M, D], [M], [D, D] and [M], of this step's samples; not
            saved.
    """

    learning: Tensor
    seen: Tensor
    share: Tensor
    covariance: Tensor
    phases: Tensor
    current: Tensor
    steps: Tensor
    whiten: Tensor
    step_notes = ("sums", "counts", "scatter", "gated")

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of the Gaussian router."""

        k: int = 0
        """experts per sample, the most probable ones; 0 for all"""
        temperature: float = 1.0
        """divides the log densities; larger is softer"""
        prior: Literal["even", "recent"] = "even"
        """weight of the experts before x is looked at: even, or their share of recent samples"""
        least: float = 0.01
        """with prior recent: least weight of an expert"""
        shrinkage: float = 0.1
        """share of the covariance's diagonal in place of the covariance; 1: no correlations"""
        decay: float = 0.99
        """how much of the statistics is left after a step; the rest is the step's samples"""

    def __init__(self, config: Config, *size: *RouterSize) -> None:
        dim, num_experts, most, generator = size
        check_option(config, "k", 0 <= config.k <= most, f"between 0 and {most}")
        check_option(config, "temperature", config.temperature > 0, "above 0")
        check_option(config, "prior", config.prior in ("even", "recent"), "even or recent")
        check_option(config, "least", 0 < config.least <= 1, "above 0 and at most 1")
        check_option(config, "shrinkage", 0 <= config.shrinkage <= 1, "between 0 and 1")
        check_option(config, "decay", 0 <= config.decay < 1, "at least 0 and below 1")
        super().__init__(dim, num_experts, most, generator)
        self.weight.requires_grad_(False)
        self.k = config.k or None
        self.temperature, self.shrinkage = config.temperature, config.shrinkage
        self.prior, self.least, self.decay = config.prior, config.least, config.decay
        self.register_buffer("learning", torch.ones(most, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros(most))
        self.register_buffer("share", torch.zeros(most))
        self.register_buffer("covariance", torch.zeros(dim, dim))
        self.register_buffer("phases", torch.zeros((), dtype=torch.long))
        self.register_buffer("current", torch.zeros(dim, dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("whiten", torch.eye(dim))
        self.sums, self.scatter = torch.zeros(most, dim), torch.zeros(dim, dim)
        self.counts, self.gated = torch.zeros(most), torch.zeros(most)
        self._passes = Passes()

    def reset_buffers(self) -> None:
        """Back to the start: no statistics."""
        super().reset_buffers()
        self.learning.fill_(True)
        for name in ("seen", "share", "covariance", "phases", "current", "steps"):
            self._buffers[name].zero_()  # type: ignore[union-attr]
        self.whiten.zero_().fill_diagonal_(1.0)
        self._forget()

    def expert_buffers(self) -> list[Tensor]:
        """Without the matrices [D, D], whose D may be M."""
        matrices = (self.covariance, self.current, self.whiten, self.scatter)
        return [b for b in super().expert_buffers() if not any(b is one for one in matrices)]

    @torch.no_grad()
    def draw_rows(self, index: Tensor, generator: torch.Generator | None) -> None:
        """Re-initialise the rows `index` [n]: they are the newest, and a new phase begins."""
        super().draw_rows(index, generator)
        if "seen" not in self._buffers:  # within the base's constructor
            return
        self.learning.zero_()
        self.learning[index] = True
        self.seen[index] = 0
        self.share[index] = 0
        if not self.steps.is_meta and self.steps > 0:
            self.covariance.copy_(self._mean_covariance())
            self.phases += 1
            self.current.zero_()
            self.steps.zero_()

    def route(self, inputs: RouterInput) -> Routing:
        """Route x [N, D]: softmax of `-||W (x - mu_e)||^2 / (2 temperature)`, W the whitening."""
        x = inputs.x.detach().to(torch.promote_types(inputs.x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            whiten = self.whiten.to(x.dtype)
            z, means = x @ whiten, self.weight.to(x.dtype) @ whiten
            squared = z.square().sum(1, keepdim=True) - 2 * z @ means.T + means.square().sum(1)
        logits = -squared / (2 * self.temperature)
        if self.prior == "recent":
            logits = logits + self._weights().log().to(logits.dtype)
        started = self.active & (self.seen > 0)
        others = torch.where(started, logits, 0.0).sum(1, keepdim=True) / started.sum().clamp(min=1)
        logits = self.mask(torch.where(started, logits, others))
        if self.training and self._passes.learns(new_pass()):
            self._note(x, logits, inputs.mask)
        probabilities = logits.softmax(dim=1).to(inputs.x.dtype)
        if self.k is not None:
            return self.sparse(logits, probabilities, self.choose(logits, self.k), self.k > 1)
        return Routing(
            gates=probabilities, logits=logits, probabilities=probabilities, active=self.active
        )

    @torch.no_grad()
    def _note(self, x: Tensor, logits: Tensor, mask: Tensor | None) -> None:
        """Add the samples x [N, D] of a pass to the statistics of the nearest newest expert.

        While one of those has had no sample yet, samples are dealt to all of them in turn.
        """
        learning = self.learning & self.active
        nearest = logits.masked_fill(~learning, float("-inf")).argmax(dim=1)
        turns = places(len(x), x.device) % learning.sum().clamp(min=1)
        dealt = (learning.cumsum(0) - 1 == turns.unsqueeze(1)).logical_and(learning)
        all_started = (self.seen[None] > 0).logical_or(~learning[None]).all()
        own = torch.nn.functional.one_hot(nearest, len(learning)).bool()
        own = torch.where(all_started, own, dealt)
        if mask is not None:
            own = own & mask.unsqueeze(1)
        own = own.to(x.dtype)
        self.notes_to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            sums, counts = own.T @ x, own.sum(0)
            all_sums, all_counts = sums, counts
            if one_batch():
                all_sums, all_counts = sum_over_processes(sums), sum_over_processes(counts)
            means = torch.where((self.seen > 0)[:, None], self.weight.to(x.dtype),
                                all_sums / all_counts.clamp(min=1)[:, None])  # fmt: skip
            off = own.sum(1, keepdim=True) * (x - own @ means)
            self.sums += sums
            self.counts += counts
            self.gated += (logits.softmax(1) * own.sum(1, keepdim=True)).sum(0)
            self.scatter += off.T @ off

    @torch.no_grad()
    def finish_step(self) -> None:
        """Move means and covariance by the samples of the step's passes."""
        self.notes_to(self.active.device)
        counts = sum_over_processes(self.counts)
        total = counts.sum()
        if total > 0:
            means = sum_over_processes(self.sums) / counts.clamp(min=1)[:, None]
            has = counts > 0
            self.seen.copy_(torch.where(has, self.decay * self.seen + 1, self.seen))
            pace = torch.where(has, 1 / self.seen.clamp(min=1), 0.0)[:, None]
            self.weight.add_((pace * (means - self.weight)).to(self.weight.dtype))
            gates = sum_over_processes(self.gated) / total
            self.share.copy_(self.decay * self._weights() + (1 - self.decay) * gates)
            steps = (self.steps + 1).to(counts.dtype)
            weight = (1 - self.decay) / (1 - self.decay**steps)  # 1, 1/2, 1/3, ...
            self.current += weight * (sum_over_processes(self.scatter) / total - self.current)
            if self.steps % REFRESH == 0:
                self._factorise()
            self.steps += 1
        self._forget()

    def _weights(self) -> Tensor:
        """[M] prior weights: the experts' shares, those of new ones the mean of the others'."""
        known = self.active & (self.share > 0)
        mean = torch.where(known, self.share, 0.0).sum() / known.sum().clamp(min=1)
        weights = torch.where(known, self.share, torch.where(known.any(), mean, 1.0))
        return torch.where(self.active, weights.clamp(min=self.least), 0.0)

    def _mean_covariance(self) -> Tensor:
        """[D, D] over all phases."""
        return (self.phases * self.covariance + self.current) / (self.phases + 1)

    def _factorise(self) -> None:
        """The whitening W: `W W^T` is the inverse of the shrunk covariance."""
        matrix = self._mean_covariance().double()
        variances = matrix.diagonal()
        floor = 1e-3 * variances.mean() + 1e-8  # features that never vary
        matrix = (1 - self.shrinkage) * matrix
        matrix.diagonal().add_(self.shrinkage * variances + floor)
        lower = torch.linalg.cholesky(matrix)
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        self.whiten.copy_(torch.linalg.solve_triangular(lower, eye, upper=False).T)

    def _forget(self) -> None:
        for noted in self.notes():
            noted.zero_()
        self._passes.clear()
