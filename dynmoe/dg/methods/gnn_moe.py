"""GNN-MoE: a graph network over an image's tokens picks each token's Kronecker adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.dg.bank import AdapterBank
from dynmoe.dg.methods.moa import MoASets
from dynmoe.dg.moa import MoAConfig
from dynmoe.errors import UserError
from dynmoe.moe.draws import draw_uniform

Convolution = Literal["gcn", "sage", "gat"]
SLOPE = 0.2
"""Of GAT's leaky rectifier."""


class GnnMoE(MoASets, name="gnn-moe", source="ours; after the abstract of GNN-MoE"):
    """MoA whose gate sees a token with its neighbours, by a graph convolution.

    The graph joins each token of an image to those most like it. The convolution is one layer of
    GCN (Kipf and Welling 2017), GraphSAGE with the mean (Hamilton et al. 2017) or GAT with one head
    (Velickovic et al. 2018), then a rectifier and a linear map to the adapters' logits. Noise,
    top-1 choice, balance loss and adapters are MoA's.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(MoAConfig):
        """Options of GNN-MoE; `gate_dim` is the width of the convolution."""

        convolution: Convolution = "gcn"
        """kind of the graph network: gcn, sage or gat"""
        neighbours: int = 8
        """tokens that each token is joined to"""

    def prepare(self, config: Config, generator: torch.Generator | None) -> None:
        """Make MoA, and give its layers routers of their own."""
        if config.convolution not in get_args(Convolution):
            raise UserError(
                f"gnn-moe: convolution={config.convolution!r} must be one of "
                f"{', '.join(get_args(Convolution))}"
            )
        if config.neighbours < 1:
            raise UserError(f"gnn-moe: neighbours={config.neighbours} must be at least 1")
        super().prepare(config, generator)
        (bank,) = self.sets
        assert isinstance(bank, AdapterBank)
        for name in ("project", "offset", "anchors", "log_scale"):  # the gate that is replaced
            bank.rows[name].requires_grad_(False)
        for layer in self.layers:
            layer.router = GraphRouter(
                layer.base.in_features, config.gate_dim, len(config.ranks), config.convolution,
                config.neighbours, generator,
            )  # fmt: skip


class GraphRouter(nn.Module):
    """Logits [B, N, I] of tokens [B, N, D], by one graph convolution of width G.

    Args:
        dim, width, experts: D, G and I.
        kind: of the convolution.
        neighbours: of each token, at most N - 1.
        generator: draws the weights, uniform in +-1/sqrt(their inputs); biases start at 0.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        experts: int,
        kind: Convolution,
        neighbours: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.kind, self.neighbours = kind, neighbours
        self.weight = nn.Parameter(torch.empty(width, dim))
        self.bias = nn.Parameter(torch.empty(width))
        self.logits = nn.Parameter(torch.empty(experts, width))
        if kind == "sage":
            self.own = nn.Parameter(torch.empty(width, dim))
        if kind == "gat":
            self.attend = nn.Parameter(torch.empty(2, width))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights again."""
        for name, parameter in self.named_parameters():
            if name == "bias":
                parameter.zero_()
            else:
                draw_uniform(parameter, parameter.shape[1] ** -0.5, generator)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, I] from [B, N, D]."""
        joined = neighbour_graph(x, self.neighbours)
        h = F.linear(x, self.weight)
        if self.kind == "gcn":
            h = normalised(joined).to(h) @ h
        elif self.kind == "sage":
            near = joined.to(h)
            h = F.linear(x, self.own) + (near @ h) / near.sum(dim=2, keepdim=True)
        else:
            h = self._attention(h, joined) @ h
        return F.linear(F.relu(h + self.bias), self.logits)

    def _attention(self, h: Tensor, joined: Tensor) -> Tensor:
        """[B, N, N] GAT's weights, of each token over its neighbours and itself."""
        here, there = F.linear(h, self.attend).unbind(2)
        scores = F.leaky_relu(here.unsqueeze(2) + there.unsqueeze(1), SLOPE)
        itself = torch.eye(h.shape[1], dtype=torch.bool, device=h.device)
        return scores.masked_fill(~(joined | itself), -torch.inf).softmax(dim=2)


@torch.no_grad()
def neighbour_graph(x: Tensor, neighbours: int) -> Tensor:
    """bool [B, N, N]: row i marks the tokens of largest cosine to token i, itself left out.

    Args:
        x: tokens [B, N, D].
        neighbours: how many; all others where there are fewer.
    """
    unit = F.normalize(x, dim=2)
    likeness = unit @ unit.transpose(1, 2)
    likeness.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    count = min(neighbours, x.shape[1] - 1)
    nearest = likeness.topk(count, dim=2).indices
    return torch.zeros_like(likeness, dtype=torch.bool).scatter_(2, nearest, True)


def normalised(joined: Tensor) -> Tensor:
    """`D^-1/2 (A + I) D^-1/2` [B, N, N], A the graph with both directions (Kipf and Welling)."""
    both = joined | joined.transpose(1, 2)
    a = both.double() + torch.eye(joined.shape[1], device=joined.device)
    scale = a.sum(dim=2).rsqrt()
    return a * scale.unsqueeze(2) * scale.unsqueeze(1)
