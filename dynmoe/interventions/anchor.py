"""The first weights of a network, kept in step with its growth."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Anchor:
    """Each parameter's value at the start.

    What a growth draws, copies or rescales starts with the value that the growth gave it.

    Args:
        model: its present weights are the first ones.

    Attributes:
        first: parameter name -> its value at the start; this is the whole state.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.first = {name: p.detach().clone() for name, p in model.named_parameters()}

    def pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, its value at the start), for all that learn."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield parameter, self.first[name]

    def load(self, first: dict[str, Tensor]) -> None:
        """Take copies of saved values at the start, to where the parameters are."""
        parameters = dict(self.model.named_parameters())
        self.first = {name: first[name].clone().to(p.device) for name, p in parameters.items()}

    @torch.no_grad()
    def grown(self, before: dict[str, Tensor]) -> None:
        """The network has grown; `before` holds the parameters that growth may have changed."""
        parameters = dict(self.model.named_parameters())
        for name, old in before.items():
            born = parameters[name].detach().clone()
            kept = tuple(slice(0, n) for n in old.shape)
            same = born[kept] == old
            born[kept] = torch.where(same, self.first[name], born[kept])
            self.first[name] = born
        for name in parameters.keys() - self.first.keys():
            self.first[name] = parameters[name].detach().clone()
