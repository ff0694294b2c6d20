"""What an actor's outputs say about actions: a distribution for every kind of action space.

Shapes: B samples, P outputs of the actor, K choices of A_1 .. A_K options or K coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError

if TYPE_CHECKING:
    from gymnasium import spaces

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
MASKED = -1e9
"""logit of an option that is not allowed: its probability is 0, and its entropy too, not nan"""


class ActionDistribution(nn.Module, ABC):
    """Base of all distributions over actions.

    Attributes:
        outputs: P, numbers that the actor's block gives.
        shape, dtype: of one action.
    """

    outputs: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def forward(self, outputs: Tensor) -> Tensor:
        """The distribution's parameters [B, ...], of the actor's outputs [B, P]."""
        return outputs

    def masked(self, parameters: Tensor, allowed: Tensor | None) -> Tensor:
        """Logits [B, P] of a policy that takes only allowed options, bool [B, P]; None: all.

        No gradient reaches the others. Source: Huang and Ontanon 2022 (arXiv 2006.14171).
        """
        return parameters if allowed is None else parameters.masked_fill(~allowed, MASKED)

    @abstractmethod
    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Actions [B, *shape]."""

    @abstractmethod
    def uniform(
        self, parameters: Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Actions [B, *shape], each equally often whatever the parameters, and log p [B], nats.

        Of options only those allowed, bool [B, P]; None: all.
        """

    @abstractmethod
    def evaluate(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log p(actions) [B] and the distribution's entropy [B], nats."""

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """log p(actions) [B], nats."""
        return self.evaluate(parameters, actions)[0]

    @abstractmethod
    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old || new) [B], nats, of two sets of parameters."""

    @abstractmethod
    def loss(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Mean of -log p(actions), nats, scalar, of the actor's outputs [B, P]."""


class Categorical(ActionDistribution):
    """K independent choices, one softmax over the logits of each.

    Args:
        sizes: options of each choice.
        shape: of one action: () for a single choice.
    """

    dtype = torch.long

    def __init__(self, sizes: Sequence[int], shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.sizes, self.shape, self.outputs = [int(size) for size in sizes], shape, int(sum(sizes))

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Actions [B, *shape] of logits [B, P]."""
        if len(self.sizes) == 1:
            return torch.multinomial(parameters.softmax(dim=1), 1, generator=generator).view(
                -1, *self.shape
            )
        drawn = [
            torch.multinomial(part.softmax(dim=1), 1, generator=generator)
            for part in parameters.split(self.sizes, dim=1)
        ]
        return torch.cat(drawn, dim=1).view(-1, *self.shape)

    def uniform(
        self, parameters: Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Every allowed option equally often."""
        equal = self.masked(torch.zeros_like(parameters), allowed)
        actions = self.sample(equal, generator)
        return actions, self.evaluate(equal, actions)[0]

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """Without the entropy, which is a third of the work."""
        parts = [
            part.log_softmax(dim=1).gather(1, chosen.unsqueeze(1)).squeeze(1)
            for part, chosen in self._choices(parameters, actions)
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    def evaluate(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the choices: they are independent."""
        log_probs, entropies = [], []
        for part, chosen in self._choices(parameters, actions):
            log_p = part.log_softmax(dim=1)
            log_probs.append(log_p.gather(1, chosen.unsqueeze(1)).squeeze(1))
            entropies.append(-(log_p.exp() * log_p).sum(dim=1))
        if len(self.sizes) == 1:  # the usual case; small networks take no longer than a few calls
            return log_probs[0], entropies[0]
        return torch.stack(log_probs).sum(dim=0), torch.stack(entropies).sum(dim=0)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum over the choices."""
        parts = []
        for one, other in zip(old.split(self.sizes, 1), new.split(self.sizes, 1), strict=True):
            log_p = one.log_softmax(dim=1)
            parts.append((log_p.exp() * (log_p - other.log_softmax(dim=1))).sum(dim=1))
        return torch.stack(parts).sum(dim=0)

    def loss(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Cross entropy, summed over the choices."""
        parts = [F.cross_entropy(part, chosen) for part, chosen in self._choices(outputs, actions)]
        return torch.stack(parts).sum()

    def _choices(self, logits: Tensor, actions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits [B, A_k] and what was chosen [B], per choice."""
        parts = logits.split(self.sizes, dim=1) if len(self.sizes) > 1 else (logits,)
        return list(zip(parts, actions.reshape(len(actions), -1).unbind(1), strict=True))


class DiagonalGaussian(ActionDistribution):
    """Independent normal distributions: the actor gives the means, the spread is learned apart.

    Its logarithm is a parameter, the same in every state and 0 at first, as in Schulman et al. 2017
    (arXiv 1707.06347), Section 6.1, and in the PPO of CleanRL and Stable-Baselines3. As there,
    actions beyond the space's bounds are clipped by the environment's `step`, and the agent learns
    from what it drew.

    Attributes:
        log_std: Parameter [K], logarithms of the standard deviations.
    """

    dtype = torch.float32

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.shape, self.outputs = space.shape, math.prod(space.shape)
        self.log_std = nn.Parameter(torch.zeros(self.outputs))
        self.low: Tensor
        self.high: Tensor
        for name in ("low", "high"):
            bound = np.asarray(getattr(space, name), np.float32).reshape(-1)
            self.register_buffer(name, torch.tensor(bound), persistent=False)

    def forward(self, outputs: Tensor) -> Tensor:
        """Means and logarithms of the deviations, [B, 2 K]."""
        return torch.cat([outputs, self.log_std.expand_as(outputs)], dim=1)

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Mean plus noise, not clipped."""
        mean, log_std = parameters.chunk(2, dim=1)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return (mean + log_std.exp() * noise).view(-1, *self.shape)

    def uniform(
        self, parameters: Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Uniform where a coordinate has both bounds, else standard normal."""
        mean = torch.zeros_like(parameters[:, : self.outputs])
        bounded = (self.high - self.low).isfinite()  # also not where the width overflows
        low, width = self.low.where(bounded, 0.0), (self.high - self.low).where(bounded, 1.0)
        flat = low + width * torch.empty_like(mean).uniform_(generator=generator)
        normal = torch.empty_like(mean).normal_(generator=generator)
        log_p = torch.where(bounded, -width.log(), -0.5 * normal.square() - HALF_LOG_TWO_PI)
        actions = torch.where(bounded, flat, normal)
        return actions.view(-1, *self.shape), log_p.sum(dim=1)

    def evaluate(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the coordinates: they are independent."""
        mean, log_std = parameters.chunk(2, dim=1)
        z = (actions.reshape(len(actions), -1) - mean) * (-log_std).exp()
        log_probs = -0.5 * z.square() - log_std - HALF_LOG_TWO_PI
        return log_probs.sum(dim=1), (0.5 + HALF_LOG_TWO_PI + log_std).sum(dim=1)

    def divergence(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum over the coordinates of log(s'/s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2."""
        (mean, log_std), (new_mean, new_log_std) = old.chunk(2, dim=1), new.chunk(2, dim=1)
        ratio = (2 * (log_std - new_log_std)).exp()
        shift = ((mean - new_mean) * (-new_log_std).exp()).square()
        return (new_log_std - log_std + 0.5 * (ratio + shift - 1)).sum(dim=1)

    def loss(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Negative log likelihood at the present deviations."""
        parameters = torch.cat([outputs, self.log_std.detach().expand_as(outputs)], dim=1)
        return -self.evaluate(parameters, actions)[0].mean()


def distribution_over(space: spaces.Space) -> ActionDistribution:
    """The distribution over the actions of a space; what counts must count from 0.

    Raises:
        UserError: no distribution of ours fits it.
    """
    from gymnasium import spaces

    match space:
        case spaces.Discrete():
            return Categorical([int(space.n)])
        case spaces.MultiDiscrete():
            return Categorical(space.nvec.reshape(-1).tolist(), space.shape)
        case spaces.MultiBinary():
            return Categorical([2] * math.prod(space.shape), space.shape)
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            return DiagonalGaussian(space)
    raise UserError(
        f"actions are {space}, and only Discrete, MultiDiscrete, MultiBinary and Box of floats are "
        "supported; wrap the environment so that it takes one of these"
    )
