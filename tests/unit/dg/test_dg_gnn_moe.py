"""GNN-MoE's router, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dg_cases import images, make
from torch import Tensor

from dynmoe.dg.methods.gnn_moe import GraphRouter, neighbour_graph
from dynmoe.errors import UserError


def near(x: Tensor, k: int) -> list[list[int]]:
    """The k tokens of [N, D] with the largest cosine to each."""
    found = []
    for i in range(len(x)):
        cosines = {j: float(x[i] @ x[j] / x[i].norm() / x[j].norm())
                   for j in range(len(x)) if j != i}  # fmt: skip
        found.append(sorted(cosines, key=lambda j: -cosines[j])[:k])
    return found


def logits(router: GraphRouter, x: Tensor, k: int) -> Tensor:
    """[N, I] of one image's tokens [N, D], by the definitions of GCN, GraphSAGE and GAT."""
    graph, rows = near(x, k), []
    both = [{j for j in range(len(x)) if j in graph[i] or i in graph[j]} | {i}
            for i in range(len(x))]  # fmt: skip
    h = [router.weight @ token for token in x]
    for i in range(len(x)):
        if router.kind == "gcn":
            z: Any = sum(h[j] / math.sqrt(len(both[i]) * len(both[j])) for j in both[i])
        elif router.kind == "sage":
            z = router.own @ x[i] + sum(h[j] for j in graph[i]) / k
        else:
            known = [i, *graph[i]]
            here, there = router.attend
            scores = torch.stack([here @ h[i] + there @ h[j] for j in known])
            scores = torch.where(scores > 0, scores, 0.2 * scores).softmax(0)
            z = sum(a * h[j] for a, j in zip(scores, known, strict=True))
        rows.append(router.logits @ torch.clamp(z + router.bias, min=0))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat"])
def test_a_router_is_its_definition(kind: Any) -> None:
    router = GraphRouter(5, 7, 3, kind, 2, None).double()
    torch.nn.init.uniform_(router.bias, -0.1, 0.1)
    x = torch.randn(2, 6, 5).double()
    expected = torch.stack([logits(router, image, 2) for image in x])
    torch.testing.assert_close(router(x), expected)
    assert neighbour_graph(x, 9).sum().item() == 2 * 6 * 5


def test_the_method_routes_by_it_and_trains_it() -> None:
    method: Any = make("gnn-moe", convolution="sage", neighbours=2, dropout=0.0).eval()
    x = images()
    method(x)
    layer = method.layers[0]
    tokens: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    method(x)
    chosen = layer.router(tokens[0]).argmax(2).flatten()
    assert torch.equal(layer.last_routing.gates.argmax(1), chosen)
    method.train().loss(x, torch.tensor([0, 1, 2, 1]))[0].backward()
    assert all(p.grad is not None for layer in method.layers for p in layer.router.parameters())
    for options, word in (({"convolution": "x"}, "convolution='x'"), ({"neighbours": 0}, "=0")):
        with pytest.raises(UserError, match=word):
            make("gnn-moe", **options)
