"""The network that acts and judges: an encoder, and a block each for actor and critic.

    observations -> encoder -> [B, F] -> actor block -> outputs [B, P], logits of A actions or so
                                      -> critic block -> value [B]

With a trunk block, another block and a ReLU follow the encoder. A block maps its input through
`hidden` units to its output: a dense two-layer MLP or an MoELayer of the same size. Which of the
two is the method's choice.

It has two modes: `acting`, as it is evaluated, and `learning`, so that it acts the same. What makes
a policy act differently from one pass to the next (noise of routers, dropout, statistics of a
batch) is off in both, so that before an update the policy that learns is the policy that acted: all
probability ratios are 1. Everything else is in training mode while it learns: auxiliary losses are
computed, and statistics of routers and interventions follow the minibatches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.fx
from torch import Tensor, nn

from agents.actions import distribution_over
from agents.encoders import Encoder, orthogonal
from dynmoe.errors import UserError
from dynmoe.moe import Router
from dynmoe.moe.draws import Noise

if TYPE_CHECKING:
    from gymnasium import spaces

CHANGEABLE: tuple[type[nn.Module], ...] = (
    Noise, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.RReLU, nn.MultiheadAttention, nn.RNNBase,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
)  # fmt: skip
"""Modules whose outputs differ in training mode."""
MakeBlock = Callable[[int, int, int], nn.Module]
"""(input width, hidden units, output width) -> module"""
PLACES = ("trunk", "actor", "critic")


@dataclass(frozen=True)
class Spaces:
    """What a policy is made for; environments have the same two attributes."""

    input_shape: tuple[int, ...]
    """of one observation, (C, H, W) or (D,)"""
    single_action_space: spaces.Space
    """what the agent may do"""


def dense_block(dim_in: int, hidden: int, dim_out: int) -> nn.Module:
    """The dense counterpart of an MoELayer: a two-layer ReLU MLP, [B, dim_in] -> [B, dim_out]."""
    return nn.Sequential(nn.Linear(dim_in, hidden), nn.ReLU(), nn.Linear(hidden, dim_out))


class ActorCritic(nn.Module):
    """Policy and value over a shared encoder.

    Args:
        encoder: Config of a registered encoder.
        shape: of one observation, (C, H, W) or (D,).
        actions: what the agent may do: an action space, or A for Discrete(A).
        make_block: makes the blocks at `encoder.place`; the others are dense.

    Attributes:
        trunk, actor, critic: `actor(trunk(x))` are the actor's outputs [B, P],
            `critic(trunk(x))` values [B, 1].
        distribution: over actions, of the actor's outputs. Its P is A for Discrete(A).

    Every observation is routed by itself, whatever the router: what an agent does in one
    environment must not depend on what goes on in the others.

    Raises:
        UserError: an unknown place, sizes that cannot work, or actions of another kind.
    """

    def __init__(
        self,
        encoder: Encoder.Config,
        shape: tuple[int, ...],
        actions: spaces.Space | int,
        make_block: MakeBlock = dense_block,
    ) -> None:
        super().__init__()
        if encoder.hidden < 1:
            raise UserError(f"encoder: hidden={encoder.hidden} must be at least 1")
        for place in encoder.place:
            if place not in PLACES:
                raise UserError(f"encoder: place={place} is unknown; use {', '.join(PLACES)}")
        from gymnasium import spaces

        space = spaces.Discrete(actions) if isinstance(actions, int) else actions
        self.distribution = distribution_over(space)
        outputs = self.distribution.outputs
        make = {place: make_block if place in encoder.place else dense_block for place in PLACES}
        frames: Encoder = encoder.build(shape)
        features, self.reads_bytes = frames.out_features, frames.reads_bytes
        self.trunk = nn.Sequential(frames)
        if "trunk" in encoder.place:
            self.trunk.append(make["trunk"](features, encoder.hidden, features))
            self.trunk.append(nn.ReLU())
        self.actor = nn.Sequential(make["actor"](features, encoder.hidden, outputs))
        self.critic = nn.Sequential(make["critic"](features, encoder.hidden, 1))
        if encoder.actor_tail:
            self.actor.append(nn.ReLU())
            self.actor.append(orthogonal(nn.Linear(outputs, outputs), 0.01))
        for module in self.modules():
            if isinstance(module, Router):
                module.independent = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The distribution's parameters and values [B], float32, of x: uint8 images or floats.

        The parameters are logits [B, A] where actions are Discrete(A).
        """
        features = self.trunk(x if self.reads_bytes else as_input(x))
        parameters = self.distribution(self.actor(features).float())
        return parameters, self.critic(features).squeeze(1).float()

    def output_layer(self, head: str) -> nn.Module:
        """The module that gives a head's outputs: a linear layer, or an MoELayer."""
        last: nn.Module = getattr(self, head)
        while isinstance(last, nn.Sequential):
            last = last[-1]
        return last

    def output_layers(self) -> list[nn.Module]:
        """The modules that give the outputs of actor and critic."""
        return [self.output_layer("actor"), self.output_layer("critic")]

    def path(self, head: str) -> nn.Sequential:
        """The network of one head alone, "actor" or "critic"; its modules are this network's."""
        parts = [("trunk", self.trunk), (head, getattr(self, head))]
        return nn.Sequential(OrderedDict(parts))


@torch.fx.wrap  # one piece in a traced graph: it looks at its argument's type
def as_input(x: Tensor) -> Tensor:
    """uint8 frames as floats in [0, 1], in bfloat16 under autocast; floats unchanged."""
    if x.dtype != torch.uint8:
        return x
    half = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if half else torch.float32
    return x.to(dtype) / 255


@contextmanager
def acting(policy: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block: nothing of the policy moves."""
    with _flags(policy, lambda module: False):
        yield


@contextmanager
def learning(policy: nn.Module) -> Iterator[None]:
    """Training mode inside the block, but for modules whose outputs would differ in it."""
    still = {part for m in policy.modules() if isinstance(m, CHANGEABLE) for part in m.modules()}
    with _flags(policy, lambda module: module not in still):
        yield


@contextmanager
def _flags(policy: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Training flags as wanted inside the block, and as they were after it.

    Only those that differ are set: this is done at every step, and setting one takes microseconds.
    """
    changed = [module for module in policy.modules() if module.training != wanted(module)]
    try:
        for module in changed:
            module.training = not module.training
        yield
    finally:
        for module in changed:
            module.training = not module.training
