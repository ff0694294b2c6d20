"""First weights, through growth."""

from __future__ import annotations

import torch
from intervention_helpers import batch, moe, weights
from torch import nn

from dynmoe.growth.budget import Budget
from dynmoe.growth.controller import GrowthController
from dynmoe.interventions.weights import Anchor
from dynmoe.registry import get


def _moved(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1


def test_keeps_copies_of_what_learns() -> None:
    model = moe()
    next(model.parameters()).requires_grad_(False)
    anchor, first = Anchor(model), weights(model)
    _moved(model)
    pairs = list(anchor.pairs())
    assert len(pairs) == len(first) - 1
    for (p, value), (name, q) in zip(pairs, list(model.named_parameters())[1:], strict=True):
        assert p is q and torch.equal(value, first[name])


def test_entries_that_growth_left_alone_keep_their_first_values() -> None:
    """Entry by entry: kept ones have their old first value, all others the one they got."""
    for budget in (Budget(), Budget(mode="per-growth")):
        model = moe()
        anchor, first = Anchor(model), weights(model)
        _moved(model)
        before = weights(model)
        pruning, init = get("pruning", "utility").Config(), get("init", "duplicate").Config()
        controller = GrowthController(
            model, granularity=2, budget=budget, pruning=pruning, init=init
        )
        controller.listeners.append(anchor.grown)
        controller.grow(1, batch(0))
        kept = renewed = 0
        for name, p in model.named_parameters():
            old, value = before[name], anchor.first[name]
            assert value.shape == p.shape
            for at in torch.cartesian_prod(*[torch.arange(n) for n in p.shape]):
                at = tuple(at.reshape(-1).tolist())
                inside = all(i < n for i, n in zip(at, old.shape, strict=True))
                same = inside and bool(p[at] == old[at])
                assert value[at] == (first[name][at] if same else p[at])
                kept, renewed = kept + same, renewed + (not same)
        assert kept > 100 and renewed > 20


def test_load_copies() -> None:
    model = moe()
    anchor = Anchor(model)
    saved = {name: value + 1 for name, value in anchor.first.items()}
    anchor.load(saved)
    assert all(torch.equal(anchor.first[n], saved[n]) for n in saved)
    assert not any(anchor.first[n].data_ptr() == saved[n].data_ptr() for n in saved)
