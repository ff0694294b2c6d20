"""Meta-DMoE: the student's step, who teaches it, and what each part learns from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dg_cases import images, make
from torch import Tensor

from dynmoe.errors import UserError

LABELS = torch.tensor([0, 1, 2, 1])


def method(**options: Any) -> Any:
    return make("meta-dmoe", experts=2, dropout=0.0, balance=0.0, **options).eval()


def stepped(m: Any, x: Tensor, taught: Tensor, step: float) -> Any:
    """A copy whose student has gone down its mean KL by plain autograd on its parameters."""
    other = copy.deepcopy(m)
    for p in other.student.parameters():
        p.grad = None
    own = other.head(other._features(other.student, x)).softmax(1)
    target = taught.detach().softmax(1)
    divergence = F.kl_div(target.log(), own, reduction="batchmean")  # KL(own || target)
    divergence.backward()
    with torch.no_grad():
        for p in other.student.parameters():
            if p.grad is not None:
                p -= step * p.grad
    return other


def test_prediction_is_the_students_after_its_step() -> None:
    m, x = method(step=0.5), images()
    together = torch.stack([m._features(bank, x) for bank in m.experts], dim=1)
    taught = m.teacher(m.aggregator(together))
    other = stepped(m, x, taught, 0.5)
    with torch.no_grad():
        expected = other.head(other._features(other.student, x))
        torch.testing.assert_close(m(x), expected)
        before = m.head(m._features(m.student, x))
    assert not torch.allclose(m(x), before, rtol=1e-6)
    assert not torch.allclose(m(x)[:1], m(x[:1]), rtol=1e-6)  # the batch has a say
    torch.testing.assert_close(method(step=0.0)(x), before)


def test_the_targets_expert_does_not_teach_and_the_query_is_not_adapted_on() -> None:
    m, x, domains = method(step=0.5), images(), torch.tensor([0, 1, 1, 0])
    m.after_step()  # the second domain is the target: images 1 and 2
    loss, parts = m.loss(x, LABELS, None, domains)
    seen = m._features(m.experts[0], x[1:3]).unsqueeze(1)
    taught = m.teacher(m.aggregator(seen))
    torch.testing.assert_close(parts["aggregate"], F.cross_entropy(taught, LABELS[1:3]))
    other = stepped(m, x[1:2], taught[:1], 0.5)
    logits = other.head(other._features(other.student, x[2:3]))
    torch.testing.assert_close(parts["classification"], F.cross_entropy(logits, LABELS[2:3]))
    own = [F.cross_entropy(m.expert_logits(x, None)[k][domains == k], LABELS[domains == k])
           for k in range(2)]  # fmt: skip
    torch.testing.assert_close(parts["experts"], sum(own) / 2)
    torch.testing.assert_close(loss, torch.stack(list(parts.values())).sum())
    with pytest.raises(UserError, match="use --method.experts 3"):
        m.loss(x, LABELS, None, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(UserError, match="the batch has 1 image of a domain"):
        m.loss(x, LABELS, None, torch.tensor([0, 0, 0, 1]))


@pytest.mark.parametrize("options", [{"experts": 1}, {"step": -1.0}])
def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        make("meta-dmoe", **options)
