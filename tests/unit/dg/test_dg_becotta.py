"""BECoTTA's layers, image by image, and its mutual information by its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dg_cases import images, make
from torch import Tensor

from dynmoe.dg.methods.becotta import mutual_information
from dynmoe.errors import UserError

LABELS = torch.tensor([0, 1, 2, 1])


def loud(**options: Any) -> Any:
    method: Any = make("becotta", domains=2, experts=3, top=2, rank=2, **options)
    for layer in method.layers:
        torch.nn.init.uniform_(layer.up, -0.5, 0.5)
    return method.eval()


def reference(method: Any, image: Tensor, domain: int) -> Tensor:
    """Logits [C] of one image."""
    vit = method.backbone
    x = vit._pos_embed(vit.patch_embed(image.unsqueeze(0)))
    for layer in method.layers:
        y = layer.block(x)
        logits = (layer.gate[domain] @ y[0].mean(0)).detach()
        first, second = logits.argsort(descending=True)[:2].tolist()
        a, b = math.exp(logits[first]), math.exp(logits[second])
        x = y
        for e, gate in ((first, a / (a + b)), (second, b / (a + b))):
            x = x + gate * (F.gelu(y @ layer.down[e]) @ layer.up[e])
    return method.head(vit.norm(x)[0, 0])


def test_an_image_uses_the_best_experts_by_its_domains_router() -> None:
    method, x = loud(), images()
    with torch.no_grad():
        domains = method.discriminator(method.embed(x)).argmax(1).tolist()
        expected = torch.stack([reference(method, i, d) for i, d in zip(x, domains, strict=True)])
        torch.testing.assert_close(method(x), expected)
        torch.testing.assert_close(method(x, method.embed(x)), expected)


def test_the_objective() -> None:
    method, x, domains = loud(synergy=0.3), images(), torch.tensor([0, 1, 1, 0])
    loss, parts = method.loss(x, LABELS, None, domains)
    logits = torch.stack([reference(method, i, int(d)) for i, d in zip(x, domains, strict=True)])
    torch.testing.assert_close(parts["classification"], F.cross_entropy(logits, LABELS))
    guess = method.discriminator(method.embed(x))
    torch.testing.assert_close(parts["discriminator"], F.cross_entropy(guess, domains))
    information = [mutual_information(layer.probabilities, domains) for layer in method.layers]
    torch.testing.assert_close(parts["synergy"], -0.3 * sum(information) / len(information))
    torch.testing.assert_close(loss, torch.stack(list(parts.values())).sum())
    with pytest.raises(UserError, match="use --method.domains 3"):
        method.loss(x, LABELS, None, torch.tensor([0, 1, 2, 0]))


def test_mutual_information_is_its_double_sum() -> None:
    p, domains = torch.rand(5, 3).double().softmax(1), torch.tensor([0, 1, 1, 0, 1])
    total = 0.0
    for d in range(2):
        share = float((domains == d).double().mean())
        for e in range(3):
            within, overall = float(p[domains == d, e].mean()), float(p[:, e].mean())
            total += within * share * math.log(within * share / (overall * share))
    assert float(mutual_information(p, domains)) == pytest.approx(total)
    apart, even = torch.eye(2).double()[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    assert float(mutual_information(apart, even)) == pytest.approx(math.log(2))
    p.requires_grad_()
    mutual_information(p, domains + 1).backward()  # of domain 0 there is no image
    assert p.grad is not None and p.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"top": 4}, {"rank": 0}, {"synergy": -1.0}])
def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        make("becotta", **{"experts": 3, "top": 2} | options)
