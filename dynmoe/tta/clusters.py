"""Which domain an image is of, without labels: k-means that follows the stream."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError

RESTARTS = 10
"""Of k-means on the first batch; the one of least squared distance counts."""


class Clusters(nn.Module):
    """The nearest of E centres, each the running mean of the samples that were nearest to it.

    Mini-batch k-means (Sculley 2010, "Web-scale k-means clustering", Algorithm 1); distances are in
    standard deviations of the stream so far, feature by feature (ours), so that no feature drowns
    the others. Centres start by k-means++ on the first batch. Only training mode moves them.

    Args:
        count: E.
        dim: D, features.
        seed: of the start.

    Raises:
        UserError: scipy, which places the centres, is not installed.

    Attributes:
        led: a module that takes its samples has been found.
        chosen: int64 [B], the centres of the samples seen last.
        centres, counts: buffers [E, D] and [E], the samples' means and numbers.
        seen, mean, square: buffers [], [D] and [D]: samples so far, their mean, and sum of squared
            deviations from it.
    """

    led = False
    centres: Tensor
    counts: Tensor
    seen: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, count: int, dim: int, seed: int = 0) -> None:
        if importlib.util.find_spec("scipy") is None:
            raise UserError("router=clusters needs scipy to place its centres: pip install scipy")
        super().__init__()
        self.seed = seed
        self.chosen = torch.zeros(0, dtype=torch.int64)
        self.register_buffer("centres", torch.zeros(count, dim))
        self.register_buffer("counts", torch.zeros(count))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("square", torch.zeros(dim))

    def check_width(self, dim: int) -> None:
        """Refuse samples of another number of features.

        Raises:
            UserError: names both numbers.
        """
        if dim != len(self.mean):
            raise UserError(
                f"router=clusters: the first LayerNorm that the model calls has {dim} features, "
                f"and the first in module order {len(self.mean)}; name the latter in frozen, or "
                "use router=learned"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Clusters:
        """Move along, but stay in float32: half precision cannot count the samples of a stream."""
        device = fn(self.seen.new_zeros(())).device
        for name, buffer in self.named_buffers(recurse=False):
            self._buffers[name] = buffer.to(device)
        self.chosen = self.chosen.to(device)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Samples [B, D] -> the number of each one's centre, int64 [B]; `chosen` from then on.

        Samples that are not finite move nothing.
        """
        x = x.detach().to(self.centres)
        if self.training:
            self._learn(x[x.isfinite().all(dim=1)])
        self.chosen = self._nearest(x)
        return self.chosen

    def _nearest(self, x: Tensor) -> Tensor:
        """int64 [B]."""
        deviation = self._deviation()
        return torch.cdist(x / deviation, self.centres / deviation).argmin(dim=1)

    def _deviation(self) -> Tensor:
        """[D] of the stream so far; 1 for features that do not vary."""
        variance = self.square / self.seen.clamp(min=1)
        return torch.where(variance > 0, variance, 1.0).sqrt()

    def _learn(self, x: Tensor) -> None:
        """Take samples x [B, D] into the statistics; each moves the centre nearest to it."""
        if not len(x):
            return
        self._note(x)
        if not bool(self.counts.any()):
            self._start(x)
        own = F.one_hot(self._nearest(x), len(self.centres)).to(x.dtype)
        counts = own.sum(dim=0)
        self.counts += counts
        pace = (counts / self.counts.clamp(min=1))[:, None]
        means = own.T @ x / counts.clamp(min=1)[:, None]
        self.centres += pace * (means - self.centres)

    def _note(self, x: Tensor) -> None:
        """Take x into mean and squared deviations (Chan, Golub and LeVeque 1979)."""
        total, off = self.seen + len(x), x.mean(dim=0) - self.mean
        self.square += (x - x.mean(dim=0)).square().sum(dim=0)
        self.square += off.square() * self.seen * len(x) / total
        self.mean += off * len(x) / total
        self.seen.copy_(total)

    def _start(self, x: Tensor) -> None:
        """Place the centres by k-means on the samples x [B, D], in turn again if they are few."""
        from scipy.cluster.vq import kmeans2, vq

        deviation, count = self._deviation(), len(self.centres)
        points = (x / deviation).double().cpu().numpy()
        points = np.resize(points, (max(len(points), count), points.shape[1]))
        rng = np.random.default_rng(self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a centre without samples stays where it is
            trials = [kmeans2(points, count, iter=20, minit="++", rng=rng)[0]
                      for _ in range(RESTARTS)]  # fmt: skip
        best = min(trials, key=lambda centres: np.square(vq(points, centres)[1]).sum())
        self.centres.copy_(torch.from_numpy(best).to(x) * deviation)
