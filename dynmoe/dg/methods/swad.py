"""SWAD: the weights of all steps within a valley of the validation loss, averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.dg.method import DGMethod
from dynmoe.errors import UserError
from dynmoe.registry import PartConfig


@dataclass
class Average:
    """The mean of the weights of some steps; empty at first."""

    weights: list[Tensor] = field(default_factory=list)
    """one per trained tensor"""
    count: int = 0
    """steps"""

    def add(self, weights: list[Tensor], count: int = 1) -> None:
        """Take in the mean weights of `count` more steps; shapes are the same in every call."""
        if not self.count:
            self.weights = [w.detach().clone() for w in weights]
            self.count = count
            return
        self.count += count
        for mean, new in zip(self.weights, weights, strict=True):
            mean.add_(new.detach() - mean, alpha=count / self.count)


@dataclass
class Valley:
    """Where averaging starts and ends: Algorithm 1 of SWAD, on evaluations for its iterations.

    It starts at the first of `patience` evaluations in a row of which the first has the least loss,
    and ends before the last `tolerance` ones once all of those are above `ratio` times the mean
    loss of the former.
    """

    patience: int
    """N_s"""
    tolerance: int
    """N_e"""
    ratio: float
    """r"""
    losses: list[float] = field(default_factory=list)
    """those of the latest evaluations that still decide"""
    segments: list[Average] = field(default_factory=list)
    """the steps before each of these evaluations"""
    limit: float | None = None
    """the loss that ends it; None before it has started"""
    merged: Average = field(default_factory=Average)
    """steps that are in for good"""
    ended: bool = False
    """nothing more is taken in"""

    def watch(self, loss: float, segment: Average) -> None:
        """Take in an evaluation and the steps that led to it."""
        if self.ended:
            return
        self.losses.append(loss)
        self.segments.append(segment)
        if self.limit is None:
            recent = self.losses[-self.patience :]
            self.losses, self.segments = recent, self.segments[-self.patience :]
            if len(recent) == self.patience and recent[0] == min(recent):
                self.limit = self.ratio * sum(recent) / self.patience
        while self.limit is not None and len(self.losses) > self.tolerance:
            self.losses.pop(0)
            oldest = self.segments.pop(0)
            self.merged.add(oldest.weights, oldest.count)
        if self.limit is not None and len(self.losses) == self.tolerance and self.merged.count:
            self.ended = min(self.losses) > self.limit

    def average(self) -> Average | None:
        """The mean weights as of now; None before the valley has started."""
        if self.limit is None:
            return None
        found = Average()
        parts = [self.merged, *([] if self.ended else self.segments)]
        for part in parts:
            if part.count:
                found.add(part.weights, part.count)
        return found


class SWAD(DGMethod, name="swad", source="Cha et al. 2021 (arXiv 2102.08604), Algorithm 1"):
    """ERM, and the mean of its weights after every step within a valley of the validation loss.

    The loss is the cross-entropy on the sources' held-out images, looked at at each evaluation, so
    that evaluations must be frequent (the authors: every 50 to 100 steps): set `--eval-every`. Of
    fewer than `patience` there is no valley, and such settings are refused. Evaluations show the
    averaged weights once the valley has started; those at the last one are SWAD's result, whatever
    `--selection` says of it. Training goes on from the plain weights.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        """Options of SWAD."""

        patience: int = 3
        """N_s, evaluations of which the first must be the best for the averaging to start"""
        tolerance: int = 6
        """N_e, evaluations that must all be too high for it to end"""
        ratio: float = 1.3
        """r, too high is this times the mean loss at the start (1.2 for VLCS)"""

    watches = True

    @staticmethod
    def least_evaluations(config: Config) -> int:
        """The first average is over those of its start."""
        return config.patience

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Begin with no average."""
        if config.patience < 1 or config.tolerance < 1 or not 0 < config.ratio < float("inf"):
            raise UserError(
                f"swad: patience={config.patience} and tolerance={config.tolerance} must be at "
                f"least 1, and ratio={config.ratio} above 0"
            )
        self.valley = Valley(config.patience, config.tolerance, config.ratio)
        self.segment = Average()
        self.shown: list[Tensor] | None = None

    def after_step(self) -> None:
        """Take the weights into the mean of the steps since the last evaluation."""
        self.shown = None
        if not self.valley.ended:
            self.segment.add([p.data for p in self.trainable()])

    def watch(self, loss: float) -> None:
        """See the validation loss of the weights as they are; from now on, show their mean."""
        if self.segment.count:
            self.valley.watch(loss, self.segment)
            self.segment = Average()
        found = self.valley.average()
        self.shown = None if found is None else found.weights

    @torch.no_grad()
    def settle(self) -> None:
        """Put the averaged weights in place of the plain ones, where there are some."""
        for parameter, mean in zip(self.trainable(), self.shown or [], strict=False):
            parameter.copy_(mean)
        self.shown = None

    def outputs(self, images: Tensor, embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, B, C]; by the averaged weights in evaluation mode, where there are some."""
        if self.training or self.shown is None:
            return super().outputs(images, embedding)
        with swapped(self.trainable(), self.shown):
            return super().outputs(images, embedding)

    def measures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """averaged_steps: steps in the mean. 0: the valley never began, and this is plain ERM.

        Images [B, 3, H, W] and labels [B] are not looked at.
        """
        found = self.valley.average()
        return {"averaged_steps": float(found.count) if found else 0.0}

    def extra_state(self) -> dict[str, Any]:
        """The valley so far."""
        valley = self.valley
        return {
            "losses": list(valley.losses), "limit": valley.limit, "ended": valley.ended,
            "segments": [[s.weights, s.count] for s in valley.segments],
            "merged": [valley.merged.weights, valley.merged.count],
            "segment": [self.segment.weights, self.segment.count],
        }  # fmt: skip

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on within it."""
        valley = self.valley
        valley.losses, valley.limit = list(state["losses"]), state["limit"]
        valley.ended = state["ended"]
        valley.segments = [self._average(saved) for saved in state["segments"]]
        valley.merged = self._average(state["merged"])
        self.segment = self._average(state["segment"])

    def _average(self, saved: tuple[list[Tensor], int]) -> Average:
        weights, count = saved
        return Average([w.to(self.head.weight.device) for w in weights], count)


@contextmanager
def swapped(parameters: list[nn.Parameter], weights: list[Tensor]) -> Iterator[None]:
    """Other values, of the same shapes, in some parameters, inside the block only."""
    own = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, weights, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value
