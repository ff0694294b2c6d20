"""SWAD's valley and mean weights, and MIRO's penalty, against their definitions written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dg_cases import images, make, tiny_vit
from torch import Tensor

from dynmoe.dg.methods.swad import Average, Valley
from dynmoe.errors import UserError

LABELS = torch.tensor([0, 1, 2, 1])


def algorithm(losses: list[float], patience: int, tolerance: int, ratio: float) -> tuple[int, int]:
    """First and last evaluation (from 0) whose steps are averaged; (-1, -1) for none."""
    for i in range(patience - 1, len(losses)):
        window = losses[i - patience + 1 : i + 1]
        if window[0] == min(window):
            first = i - patience + 1
            limit = ratio * sum(window) / patience
            for j in range(first + tolerance, len(losses)):
                if min(losses[j - tolerance + 1 : j + 1]) > limit:
                    return first, j - tolerance
            return first, len(losses) - 1
    return -1, -1


@pytest.mark.parametrize(
    "losses",
    [
        [5, 4, 3, 2, 1],  # falls to the end: no valley
        [5, 4, 1, 2, 2, 1.5],  # starts, never ends
        [5, 1, 1.1, 1.2, 1, 3, 3, 3, 3, 3],  # starts and ends
        [5, 1, 1.1, 9, 1, 9, 9, 1.2, 9, 9, 9, 9],  # one low value keeps it open
    ],
)
@pytest.mark.parametrize("tolerance", [2, 4])
def test_the_valley_is_that_of_the_algorithm(losses: list[float], tolerance: int) -> None:
    valley = Valley(patience=3, tolerance=tolerance, ratio=1.3)
    for number, loss in enumerate(losses):
        segment = Average()
        for step in range(number % 2 + 1):  # of one step or two
            segment.add([torch.tensor([10.0 * number + step])])
        valley.watch(loss, segment)
    first, last = algorithm(losses, 3, tolerance, 1.3)
    found = valley.average()
    if first < 0:
        assert found is None
        return
    steps = [10.0 * n + s for n in range(first, last + 1) for s in range(n % 2 + 1)]
    assert found is not None and found.count == len(steps)
    assert found.weights[0].item() == pytest.approx(sum(steps) / len(steps))


def test_swad_shows_the_mean_weights_and_trains_on_from_the_plain_ones() -> None:
    method: Any = make("swad", patience=1)
    optimizer = torch.optim.SGD(method.trainable(), 0.1)
    x, passed, kept = images(), [], None
    for step in range(4):
        loss, _ = method.train().loss(x, LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
        passed.append([p.detach().clone() for p in method.trainable()])
        if step % 2:
            plain = method.eval()(x).detach()
            method.watch(1.0)
            shown = method(x).detach()
            kept = kept or copy.deepcopy(method.extra_state())
    reference: Any = make("swad")
    with torch.no_grad():
        for parameter, *values in zip(reference.trainable(), *passed, strict=True):
            parameter.copy_(torch.stack(values).mean(0))
    torch.testing.assert_close(shown, reference.eval()(x))
    assert not torch.allclose(shown, plain)
    torch.testing.assert_close(method.trainable()[0], passed[-1][0])  # training is not disturbed
    assert method.measures(x, LABELS) == {"averaged_steps": 4.0}
    assert make("swad").measures(x, LABELS) == {"averaged_steps": 0.0}
    again: Any = make("swad", patience=1)
    again.load_extra_state(kept)
    assert again.valley.segments[0].count == 2
    method.settle()
    torch.testing.assert_close(method(x), shown)
    with pytest.raises(UserError, match="ratio=0"):
        make("swad", ratio=0.0)


def test_miro_adds_the_negative_log_likelihood_of_the_oracles_features() -> None:
    vit = tiny_vit()
    method: Any = make("miro", copy.deepcopy(vit), weight=0.3).train()
    torch.nn.init.uniform_(method.backbone.blocks[0].mlp.fc1.weight, -0.1, 0.1)
    for raw in method.variances:
        torch.nn.init.uniform_(raw, -1.0, 1.0)
    x = images()

    def layers(model: Any) -> list[Tensor]:
        tokens, found = model._pos_embed(model.patch_embed(x)), []
        for block in model.blocks:
            tokens = block(tokens)
            found.append(tokens)
        return found

    expected: Any = 0
    for own, oracle, raw in zip(
        layers(method.backbone), layers(vit), method.variances, strict=True
    ):
        deviation = (F.softplus(raw) + 1e-5).sqrt()
        density = torch.distributions.Normal(own, deviation).log_prob(oracle)
        expected = expected - density.mean() - math.log(2 * math.pi) / 2
    loss, parts = method.loss(x, LABELS)
    torch.testing.assert_close(parts["information"], 0.3 * expected)
    torch.testing.assert_close(parts["classification"], F.cross_entropy(method(x), LABELS))
    torch.testing.assert_close(loss, parts["information"] + parts["classification"])
    assert not any(p.requires_grad for p in method.oracle.parameters())
    assert "information" not in method.eval().loss(x, LABELS)[1]
    start = F.softplus(make("miro").variances[0]) + 1e-5
    torch.testing.assert_close(start, torch.full_like(start, 0.1), rtol=1e-5, atol=0)
