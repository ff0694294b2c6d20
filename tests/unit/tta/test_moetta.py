"""MoETTA against a naive restatement in float64: a loop over samples, its own SGD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from tta_models import NaiveSGD, shannon, stream, vit

from dynmoe.errors import UserError
from dynmoe.moe import moe_layers, routing_stats
from dynmoe.tta import MoELayerNorm, adapt
from dynmoe.tta.methods.moetta import next_threshold

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class NaiveNorm(nn.Module):
    """One sample after the other; keeps P and the choices of the last pass."""

    def __init__(self, norm: nn.LayerNorm, twin: MoELayerNorm) -> None:
        super().__init__()
        self.scale, self.shift, self.eps = norm.weight.detach(), norm.bias.detach(), norm.eps
        self.weight = nn.Parameter(torch.zeros_like(twin.experts_weight))
        self.bias = nn.Parameter(torch.zeros_like(twin.experts_bias))
        self.router = nn.Linear(*reversed(twin.router.weight.shape)).double()
        self.router.load_state_dict(
            {"weight": twin.router.weight.clone(), "bias": twin.router.bias.clone()}
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs, self.p, self.choice = [], [], []
        for sample in x:
            p = self.router(sample.mean(dim=0)).softmax(dim=0)
            e = int(p.argmax())
            s = p[e] / p[e].detach()
            scale, shift = self.scale + s * self.weight[e], self.shift + s * self.bias[e]
            mean = sample.mean(dim=1, keepdim=True)
            variance = ((sample - mean) ** 2).mean(dim=1, keepdim=True)
            outputs.append((sample - mean) / (variance + self.eps).sqrt() * scale + shift)
            self.p.append(p)
            self.choice.append(e)
        return torch.stack(outputs)

    def balance(self) -> Tensor:
        experts, n = len(self.weight), len(self.p)
        f = [self.choice.count(e) / n for e in range(experts)]
        m = sum(self.p) / n
        return experts * sum(f[e] * m[e] for e in range(experts))


class NaiveThreshold:
    """The history as a list; `official` keeps its first entry and T in one tensor."""

    def __init__(self, official: bool) -> None:
        self.official = official

    def __call__(self, mean: Tensor) -> Tensor:
        if not hasattr(self, "history"):
            self.value = mean.clone()
            self.history = [self.value if self.official else mean.clone()]
        elif self.official:
            before = torch.stack(self.history).mean()
            self.history.append(mean.clone())
            self.value *= torch.stack(self.history).mean() / before
        else:
            self.history.append(mean.clone())
            self.value = torch.stack(self.history).mean()
        return self.value.clone()


def naive_twin(adapter: nn.Module, keep: int, **options: object) -> nn.Module:
    """The source model with naive norms that hold the adapter's routers."""
    model = vit(**options).requires_grad_(False)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)][keep:]
    for name, twin in zip(names, adapter.norms, strict=True):
        parent, _, own = name.rpartition(".")
        norm = model.get_submodule(name)
        setattr(model.get_submodule(parent), own, NaiveNorm(norm, twin))
    return model


@pytest.mark.parametrize("setting", ["paper", "official"])
@pytest.mark.parametrize("balance", [0.0, 0.2])
def test_every_step_equals_the_restatement(setting, balance):
    options = {"lr": 0.02, "num_experts": 4, "balance_weight": balance, "setting": setting}
    options["margin"] = 0.4 * math.log(1000)  # the code's, whatever the classes
    adapter = adapt(vit(), "moetta", **options)
    model = naive_twin(adapter, keep=1)
    norms = [m for m in model.modules() if isinstance(m, NaiveNorm)]
    assert len(norms) == 4 == len(adapter.norms)
    trained = [p for norm in norms for p in norm.parameters()]
    sgd, threshold = NaiveSGD(trained, 0.02, 0.9), NaiveThreshold(setting == "official")
    dropped = kept = 0
    for images in stream(7):
        logits = model(images)
        h = [shannon(row) for row in logits]
        limit = threshold(torch.stack(h).detach().mean())
        chosen = [v for v in h if v <= limit]
        dropped, kept = dropped + len(h) - len(chosen), kept + len(chosen)
        loss = sum((0.4 * math.log(1000) - v.detach()).exp() * v for v in chosen) / len(chosen)
        loss = loss + balance * limit * sum(norm.balance() for norm in norms)
        sgd.step(torch.autograd.grad(loss, trained))
        torch.testing.assert_close(adapter(images), logits.detach(), **CLOSE)
        torch.testing.assert_close(adapter.memory["threshold"], limit, **CLOSE)
    assert dropped and kept and any(len(set(norm.choice)) > 1 for norm in norms)
    for naive, ours in zip(norms, adapter.norms, strict=True):
        assert naive.weight.abs().max() > 1e-3
        for got, want in [
            (ours.experts_weight, naive.weight), (ours.experts_bias, naive.bias),
            (ours.router.weight, naive.router.weight), (ours.router.bias, naive.router.bias),
        ]:  # fmt: skip
            torch.testing.assert_close(got.detach(), want.detach(), **CLOSE)
    assert (adapter.steps, adapter.skipped) == (7, 0)


def run_thresholds(means: Tensor, setting: str) -> list[Tensor]:
    memory, values = {"batches": 0, "threshold": None, "first": None, "later": None}, []
    for mean in means:
        memory = next_threshold(memory, mean, setting)
        values.append(memory["threshold"])
    return values


def test_the_official_recurrence_aliases_and_the_paper_s_is_the_mean():
    means = torch.rand(40, dtype=torch.double) + 0.1
    paper, official = (run_thresholds(means, s) for s in ("paper", "official"))
    for setting, values in (("paper", paper), ("official", official)):
        naive = NaiveThreshold(setting == "official")
        for mean, value in zip(means, values, strict=True):
            torch.testing.assert_close(value, naive(mean), rtol=1e-13, atol=0)
    torch.testing.assert_close(paper[-1], means.mean())
    torch.testing.assert_close(official[:2], paper[:2], rtol=1e-14, atol=0)
    assert all(a != b for a, b in zip(official[2:], paper[2:], strict=True))


def test_a_stream_without_entropy_has_threshold_0_and_recovers():
    values = run_thresholds(torch.tensor([0.0, 0.0, 1.0, 1.0]), "official")
    assert all(v.isfinite() for v in values) and values[1] == 0 and values[3] > 0


def test_a_batch_without_reliable_samples_trains_the_routers_alone():
    adapter = adapt(vit(), "moetta", momentum=0.0, lr=0.1)
    images = stream(1)[0]
    adapter(images)
    adapter.memory["later"] = torch.tensor(-1e3)  # the threshold falls below any entropy
    last = adapter.norms[-1]  # whose experts no other layer's router sees
    before, router = last.experts_weight.detach().clone(), last.router.weight.detach().clone()
    adapter(images)
    assert adapter.steps == 2 and adapter.memory["threshold"] < 0
    assert torch.equal(last.experts_weight, before)
    assert not torch.equal(last.router.weight, router) and last.router.weight.isfinite().all()


def test_a_sample_at_the_threshold_is_reliable():
    """The first batch's threshold is its mean entropy: that of its only image."""
    adapter = adapt(vit(), "moetta", lr=0.1)
    adapter(stream(1, size=1)[0])
    assert all(norm.experts_weight.any() for norm in adapter.norms)


def test_parameters_are_as_many_as_the_paper_counts():
    """2ED + DE + E per layer; everything else is frozen (spec: 497,880 for ViT-B)."""
    adapter = adapt(vit(), "moetta", num_experts=3)
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert trained == 4 * (2 * 3 * 16 + 3 * 16 + 3)
    names = [name for name, _ in moe_layers(adapter.model)]
    assert names == [f"{n}.layer" for n in
                     ("blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm")]  # fmt: skip
    adapter(stream(1)[0])
    assert set(routing_stats(adapter.model)) == set(names)


def test_routers_are_xavier_normal_and_the_model_starts_as_it_was():
    model = vit()
    images = stream(1)[0]
    before = model(images).detach()
    adapter = adapt(model, "moetta", num_experts=4000)
    weight = adapter.norms[0].router.weight.detach()
    assert abs(float(weight.std()) / (2 / 4016) ** 0.5 - 1) < 0.02
    assert not adapter.norms[0].router.bias.any()
    assert not any(norm.experts_weight.any() or norm.experts_bias.any() for norm in adapter.norms)
    torch.testing.assert_close(adapter(images), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"max_experts": 3}, "max_experts=3"),
        ({"keep": 5}, "none beyond the first 5"),
        ({"keep": -1}, "keep=-1"),
        ({"setting": "papre"}, "'papre' is neither"),
        ({"balance_weight": -1.0}, "balance_weight=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"grow_wait": 0}, "grow_wait=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        adapt(vit(), "moetta", **options)
