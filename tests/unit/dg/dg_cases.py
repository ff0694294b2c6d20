"""Tiny vision transformers, and MoA layers spelled out for one sample and one token at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.dg import DGMethod
from dynmoe.dg.bank import AdapterBank

CLASSES = 3
METHODS = registry.names("dg")
SMALL: dict[str, dict[str, Any]] = {
    name: {"ranks": (1, 2), "gate_dim": 5, "terms": 4}
    for name in ("moa", "moa-lora", "ensemble", "domain-experts", "moe2", "gnn-moe", "meta-dmoe")
}


def tiny_vit(dim: int = 16, depth: int = 3) -> VisionTransformer:
    """Five tokens of an image [3, 16, 16]."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=dim, depth=depth, num_heads=2, num_classes=0
    )
    for parameter in vit.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return vit.double()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.double)


def make(name: str, vit: nn.Module | None = None, **options: Any) -> DGMethod:
    """A float64 method on a tiny transformer."""
    config = registry.get("dg", name).Config(**SMALL.get(name, {}) | options)
    method = config.build(vit or tiny_vit(), CLASSES, torch.Generator().manual_seed(1))
    return method.double()


def scatter(method: DGMethod) -> DGMethod:
    """Give every adapter row and prototype a value far from 0 and from the others."""
    for name, parameter in method.named_parameters():
        if "rows" in name or "router" in name:
            nn.init.uniform_(parameter, -1.0, 1.0)
    return method


def bank_of(method: Any) -> AdapterBank:
    return method.outer.bank


def rank_spans(ranks: tuple[int, ...]) -> list[slice]:
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


def dense_updates(rows: dict[str, Tensor], layer: int, ranks: tuple[int, ...]) -> list[Tensor]:
    """[D_in, D_out] of each inner adapter of one set: explicit Kronecker products."""
    left, right = rows["left"][layer], rows["right"][layer]
    out = []
    for span in rank_spans(ranks):
        total: Any = 0
        for t in range(len(left)):
            small = left[t][:, span] @ right[t][span]
            if "u" in rows:
                small = torch.kron(torch.outer(rows["u"][t], rows["v"][t]), small)
            total = total + small
        out.append(total)
    return out


def reference(method: Any, image: Tensor, weights: Tensor) -> Tensor:
    """Logits [C] of one image [3, H, W], everything per sample and dense; weights [K]."""
    bank = bank_of(method)
    ranks, count = bank.config.options.ranks, len(weights)
    sets = [{n: rows[k] for n, rows in bank.rows.items()} for k in range(count)]
    mixed = {n: sum(weights[k] * sets[k][n] for k in range(count)) for n in bank.rows}
    vit = copy.deepcopy(method.backbone)
    every = bank.config.options.every
    for number, block in enumerate(vit.blocks):
        if number % every:
            continue
        layer = number // every
        if bank.config.synthesis == "factors":
            updates = dense_updates(mixed, layer, ranks)
        else:
            each = [dense_updates(one, layer, ranks) for one in sets]
            updates = [
                sum(weights[k] * each[k][e] for k in range(count)) for e in range(len(ranks))
            ]
        gate = {n: mixed[n][layer] for n in ("bias", "project", "offset", "anchors", "log_scale")}
        block.attn.qkv = Dense(block.attn.qkv.base, gate, updates)
    tokens = vit.forward_features(image.unsqueeze(0))
    return method.head(tokens[:, 0])[0]


class Dense(nn.Module):
    """A MoA layer with dense updates, token by token."""

    def __init__(self, base: nn.Linear, gate: dict[str, Tensor], updates: list[Any]) -> None:
        super().__init__()
        self.base, self.gate, self.updates = base, gate, updates

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.token(x[0, t]) for t in range(x.shape[1])]).unsqueeze(0)

    def token(self, x: Tensor) -> Tensor:
        g = self.gate
        query = g["project"] @ x + g["offset"]
        query = query / query.norm()
        sharp = torch.exp(torch.clamp(g["log_scale"], max=math.log(100)))
        logits = torch.stack([query @ s / s.norm() * sharp for s in g["anchors"]])
        p = logits.exp() / logits.exp().sum()
        best = int(p.argmax())
        return (
            self.base.weight @ x + self.base.bias + p[best] * (x @ self.updates[best]) + g["bias"]
        )
