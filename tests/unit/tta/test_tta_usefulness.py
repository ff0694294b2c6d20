"""The learned routing against others: exact routing, exact scores, and no trace left."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tta_models import CLASSES, convnext, stream, vit

from dynmoe.tta import Adapter, adapt
from dynmoe.tta.measures import routed_by, usefulness


def learnt(experts: int = 3, model: nn.Module | None = None, top_k: int = 1) -> Adapter:
    """After a few steps, with experts and routers that count."""
    adapter = adapt(model or vit(), "moetta", num_experts=experts, lr=0.05, top_k=top_k)
    for images in stream(3, side=16 if model is None else 32):
        adapter(images)
    for norm in adapter.norms:  # type: ignore[attr-defined]
        nn.init.normal_(norm.experts_weight, 0.0, 0.5)
        nn.init.normal_(norm.experts_bias, 0.0, 0.5)
        nn.init.normal_(norm.router.weight, 0.0, 1.0)
    return adapter


Given = list[tuple[Tensor, Tensor, Tensor]]


def batches(side: int = 16) -> Given:
    labels, domains = torch.arange(15) % CLASSES, torch.arange(15) * 2 % 5
    images = stream(3, size=5, side=side, seed=4)
    return list(zip(images, labels.split(5), domains.split(5), strict=True))


def measure(adapter: Adapter, given: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, dict]:
    return usefulness(adapter.model, lambda: given, torch.Generator().manual_seed(0))


@torch.no_grad()
def naive(
    adapter: Adapter, given: Given, paths: list[list[Tensor]] | None
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """Scores and choices, by router weights that pick paths[batch][layer] [B]; None: the own.

    An image at a time: a router's bias of 1e9 for an expert sends any image there.
    """
    loss, right, taken = 0.0, 0, []
    twin = copy.deepcopy(adapter)
    for number, (images, labels, _) in enumerate(given):
        picks: list[list[int]] = [[] for _ in twin.norms]  # type: ignore[attr-defined]
        for i, image in enumerate(images):
            for depth, norm in enumerate(twin.norms):  # type: ignore[attr-defined]
                norm.layer.router.selection_bias.zero_()
                if paths is not None:
                    norm.layer.router.selection_bias[int(paths[number][depth][i])] = 1e9
            logits = twin.model(image[None])
            loss += float(F.cross_entropy(logits, labels[i : i + 1]))
            right += int(logits.argmax() == labels[i])
            for depth, norm in enumerate(twin.norms):  # type: ignore[attr-defined]
                picks[depth].append(int(norm.layer.last_routing.chosen[0].int().argmax()))
        taken.append([torch.tensor(p) for p in picks])
    count = sum(len(labels) for _, labels, _ in given)
    return {"loss": loss / count, "accuracy": right / count}, taken


def close(got: dict[str, float], want: dict[str, float]) -> None:
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-10)
    assert got["accuracy"] == want["accuracy"]


def test_every_score_equals_the_restatement():
    adapter, given = learnt(), batches()
    found = measure(adapter, given)
    assert set(found) == {"learned", "random", "most_loaded", "best", "by_domain", "by_image"}
    own, taken = naive(adapter, given, None)
    close(found["learned"], own)
    layers = len(adapter.norms)  # type: ignore[attr-defined]
    loads = [torch.cat([t[d] for t in taken]).bincount(minlength=3) for d in range(layers)]
    assert len({int(load.argmax()) for load in loads}) > 1  # the most loaded differs by layer
    busy = [[torch.full((5,), int(load.argmax())) for load in loads]] * 3
    close(found["most_loaded"], naive(adapter, given, busy)[0])
    singles = [naive(adapter, given, [[torch.full((5,), e)] * layers] * 3)[0] for e in range(3)]
    best = min(range(3), key=lambda e: singles[e]["loss"])
    assert found["best"]["expert"] == best and best != 0
    close(found["best"], singles[best])
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randint(3, (5,), generator=generator) for _ in range(layers)] for _ in range(3)]
    close(found["random"], naive(adapter, given, drawn)[0])
    oracles = {"by_domain": 0.0, "by_image": 0.0}
    for domain in range(5):
        losses = []
        for e in range(3):
            one = [[torch.full((1,), e)] * layers]
            losses.append([
                naive(adapter, [(x[None], y[None], d)], one)[0]["loss"]
                for images, labels, ds in given
                for x, y, d in zip(images, labels, ds, strict=True) if d == domain
            ])  # fmt: skip
        oracles["by_domain"] += min(map(sum, losses)) / 15
        oracles["by_image"] += sum(map(min, zip(*losses, strict=True))) / 15
    for name, loss in oracles.items():
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-10)
    assert found["by_image"]["accuracy"] >= found["best"]["accuracy"]
    scores = [row["loss"] for row in found.values()]
    assert len(set(scores)) == 6  # or they would not be told apart here


def test_the_learned_routing_has_all_experts_that_the_model_takes():
    adapter, given = learnt(top_k=2), batches()
    found = measure(adapter, given)
    close(found["learned"], naive(adapter, given, None)[0])


def test_nothing_is_touched():
    adapter, twin = learnt(), learnt()
    before = copy.deepcopy(adapter.state_dict())
    drawn = torch.get_rng_state()
    norm = adapter.norms[0]  # type: ignore[attr-defined]
    last = norm.layer.last_routing
    measure(adapter, batches())
    assert norm.layer.last_routing is last and norm.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not norm.router._forward_hooks
    after = adapter.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for images in stream(2, seed=5):
        assert torch.equal(adapter(images), twin(images))


def test_hooks_end_with_the_block_even_after_an_error():
    adapter = learnt()

    def broken(layer: object, routing: object) -> Tensor:
        raise ValueError("no choice")

    with pytest.raises(ValueError, match="no choice"), routed_by(adapter.model, broken):
        adapter.model(stream(1)[0])
    assert not any(n.router._forward_hooks for n in adapter.norms)  # type: ignore[attr-defined]


def test_experts_to_come_are_not_used():
    adapter = adapt(vit(), "moetta", num_experts=2, max_experts=6)
    used: set[int] = set()

    def watch(bank: nn.Module, args: tuple) -> None:
        used.update(args[1].chosen.int().argmax(dim=1).tolist())

    adapter.norms[0].bank.register_forward_pre_hook(watch)  # type: ignore[attr-defined]
    found = measure(adapter, batches())
    assert used == {0, 1} and found["best"]["expert"] in used


def test_other_models():
    assert measure(adapt(vit(), "tent"), batches()) == {}
    adapter = learnt(model=convnext())
    found = measure(adapter, batches(side=32))
    assert found["learned"]["loss"] > 0
