"""Classes that are masked with logits of -inf: as if the classifier did not have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from tta_models import CLASSES, stream, vit
from tta_options import each_learner, make, same

from dynmoe.tta import Adapter, adapt
from dynmoe.tta.entropy import cross_entropy, possible_classes, softmax_entropy, sound
from dynmoe.tta.headroom import LOSSES, gradients

KEPT = (0, 2, 3, 6, 7, 9)
INF = float("inf")


class Masked(nn.Module):
    """All logits; those of classes that are not kept are -inf."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        masked = [c for c in range(CLASSES) if c not in KEPT]
        self.register_buffer("masked", torch.tensor(masked))

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).index_fill(1, self.masked, -INF)


class Cut(Masked):
    """The logits of the kept classes alone."""

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)[:, list(KEPT)]


def weights(adapter: Adapter) -> dict[str, Tensor]:
    return dict(adapter.model.named_parameters())


@each_learner
@pytest.mark.parametrize("eager", [True, False])
def test_a_masked_class_is_as_one_that_is_not_there(method, eager):
    """With options that trust all, and with the defaults, whose margins follow the classes."""

    def build(model: nn.Module) -> Adapter:
        return make(method, model, **options) if eager else adapt(model, method, **options)

    options = {"eata": {"fisher_weight": 5.0}, "cotta": {"views": 2}}.get(method, {})
    masked, cut = build(Masked(vit())), build(Cut(vit()))
    for adapter in (masked, cut):
        adapter.observe_source(stream(2, seed=7))
    for images in stream(6):
        logits, fewer = masked(images), cut(images)
        torch.testing.assert_close(logits[:, list(KEPT)], fewer, rtol=1e-9, atol=1e-9)
    assert masked.steps == cut.steps > (5 if eager else 0) and masked.skipped == 0
    for (name, got), want in zip(weights(masked).items(), weights(cut).values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=name)
    if method == "moetta" and eager:
        shocks = [[e.shock["output_change"] for e in a.controller.events] for a in (masked, cut)]
        assert len(shocks[0]) == 2 and shocks[0] == pytest.approx(shocks[1])


@each_learner
@pytest.mark.parametrize("bad", [float("nan"), INF, "all masked"])
def test_what_is_no_prediction_is_still_skipped(method, bad):
    class Spoilt(Masked):
        spoils = False

        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            if not self.spoils:
                return logits
            rows = torch.full_like(logits[:1], -INF)
            if bad != "all masked":
                rows = logits[:1].index_fill(1, torch.tensor([2]), bad)
            return torch.cat([rows, logits[1:]])

    adapter, images = make(method, Spoilt(vit())), stream(2)
    adapter.model.spoils = True
    adapter(images[0])
    assert (adapter.steps, adapter.skipped) == (0, 1)
    adapter.model.spoils = False
    adapter(images[1])
    assert (adapter.steps, adapter.skipped) == (1, 1)
    assert all(p.isfinite().all() for p in adapter.parameters())


def test_entropy_of_masked_logits_and_its_gradient():
    logits = torch.randn(3, 5, dtype=torch.double)
    logits[0, 1] = logits[2, 0] = logits[2, 4] = -INF
    logits.requires_grad_()
    for row in range(3):
        kept = logits[row][logits[row].detach() > -INF].detach().requires_grad_()
        p = kept.softmax(0)
        want = -(p * p.log()).sum()
        got = softmax_entropy(logits)[row]
        torch.testing.assert_close(got, want)
        (gradient,) = torch.autograd.grad(got, logits)
        (due,) = torch.autograd.grad(want, kept)
        torch.testing.assert_close(gradient[row][logits[row].detach() > -INF], due)
        assert not gradient[row][logits[row].detach() == -INF].any()
    one = torch.tensor([[0.0, -INF, -INF]], requires_grad=True)
    softmax_entropy(one).sum().backward()
    assert softmax_entropy(one) == 0 and not one.grad.any()
    other = torch.tensor([[-INF, 0.0, -INF]]).log_softmax(1)
    assert cross_entropy(one.detach().log_softmax(1), other) == INF  # p is not 0 there


def test_entropy_without_masks_is_what_it_was():
    for logits in (torch.randn(50, 20) * 40, torch.randn(9, 7).half()):
        logits.requires_grad_()
        log_p = logits.float().log_softmax(dim=1)
        old, new = -(log_p.exp() * log_p).sum(dim=1), softmax_entropy(logits)
        same(new, old)
        pair = [torch.autograd.grad(value.sum(), logits, retain_graph=True) for value in (new, old)]
        same(*pair)


def test_classes_that_count_and_rows_that_are_sound():
    logits = torch.tensor([[0.0, -INF, -INF, 1.0], [0.0, 0.0, -INF, -INF]])
    assert possible_classes(logits) == 3 and sound(logits)
    for spoilt in (float("nan"), INF):
        assert not sound(torch.tensor([[0.0, 1.0], [0.0, spoilt]]))
    nothing = torch.full((2, 3), -INF)
    assert not sound(nothing) and possible_classes(nothing) == 1


def test_gradients_of_domains_with_masked_classes():
    batches = [(images, torch.zeros(len(images))) for images in stream(2)]
    blind = {name: lambda logits, labels, loss=loss: loss(logits) for name, loss in LOSSES.items()}
    masked, cut = (gradients(kind(vit()), batches, blind) for kind in (Masked, Cut))
    for name in LOSSES:
        assert masked[name].norm() > 0
        torch.testing.assert_close(masked[name], cut[name])
