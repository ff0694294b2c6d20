"""MoETTA against a naive restatement in float64: a loop over samples, its own SGD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from tta_models import CLASSES, NaiveSGD, shannon, stream, vit

from dynmoe.errors import UserError
from dynmoe.moe import moe_layers, routing_stats
from dynmoe.tta import MoELayerNorm, adapt
from dynmoe.tta.methods.moetta import next_threshold
from dynmoe.tta.options import for_stream, make_config

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class NaiveNorm(nn.Module):
    """One sample after the other; keeps P and the choices of the last pass."""

    def __init__(self, norm: nn.LayerNorm, twin: MoELayerNorm, k: int, per: str) -> None:
        super().__init__()
        self.k, self.per = k, per
        self.scale, self.shift, self.eps = norm.weight.detach(), norm.bias.detach(), norm.eps
        self.weight = nn.Parameter(torch.zeros_like(twin.experts_weight))
        self.bias = nn.Parameter(torch.zeros_like(twin.experts_bias))
        self.router = nn.Linear(*reversed(twin.router.weight.shape)).double()
        self.router.load_state_dict(
            {"weight": twin.router.weight.clone(), "bias": twin.router.bias.clone()}
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs, self.choice = [], []
        self.p = [self.router(sample.mean(dim=0)).softmax(dim=0) for sample in x]
        if self.per == "batch":
            self.p = [sum(self.p) / len(self.p)] * len(self.p)
        for sample, p in zip(x, self.p, strict=True):
            best = sorted(range(len(p)), key=lambda e: -float(p[e].detach()))[: self.k]
            total = sum(p[e].detach() for e in best)
            scale = self.scale + sum(p[e] / total * self.weight[e] for e in best)
            shift = self.shift + sum(p[e] / total * self.bias[e] for e in best)
            mean = sample.mean(dim=1, keepdim=True)
            variance = ((sample - mean) ** 2).mean(dim=1, keepdim=True)
            outputs.append((sample - mean) / (variance + self.eps).sqrt() * scale + shift)
            self.choice += best
        return torch.stack(outputs)

    def balance(self) -> Tensor:
        experts, n = len(self.weight), len(self.p)
        f = [self.choice.count(e) / len(self.choice) for e in range(experts)]
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


def naive_twin(adapter: nn.Module, frozen: tuple[int, ...], k: int, per: str) -> nn.Module:
    """The source model with naive norms that hold the adapter's routers."""
    model = vit().requires_grad_(False)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    names = [name for number, name in enumerate(names) if number not in frozen]
    for name, twin in zip(names, adapter.norms, strict=True):
        parent, _, own = name.rpartition(".")
        norm = model.get_submodule(name)
        setattr(model.get_submodule(parent), own, NaiveNorm(norm, twin, k, per))
    return model


E0 = 0.4 * math.log(1000)  # the code's, whatever the classes
SWITCHES = {
    "paper": {},
    "paper, no balance": {"balance_weight": 0.0},
    "official": {"setting": "official"},
    "official, no balance": {"setting": "official", "balance_weight": 0.0},
    "two experts": {"top_k": 2},
    "all experts": {"top_k": 4},
    "one expert per batch": {"route_per": "batch"},
    "two experts per batch": {"route_per": "batch", "top_k": 2},
    "fixed threshold": {"threshold": "fixed"},
    "no weights": {"reweight": False},
    "information": {"im": 0.7},
    "frozen": {"frozen": (1, 3)},
}


@pytest.mark.parametrize("case", SWITCHES)
def test_every_step_equals_the_restatement(case):
    given = SWITCHES[case]
    adapter = adapt(vit(), "moetta", **{"lr": 0.02, "num_experts": 4, "margin": E0, **given})
    per, k = given.get("route_per", "sample"), given.get("top_k", 1)
    balance, frozen = given.get("balance_weight", 0.2), given.get("frozen", (0,))
    model = naive_twin(adapter, frozen, k, per)
    norms = [m for m in model.modules() if isinstance(m, NaiveNorm)]
    assert len(norms) == 5 - len(frozen) == len(adapter.norms)
    trained = [p for norm in norms for p in norm.parameters()]
    sgd, threshold = NaiveSGD(trained, 0.02, 0.9), NaiveThreshold("official" in case)
    dropped = kept = 0
    for images in stream(7):
        logits = model(images)
        h = [shannon(row) for row in logits]
        limit = threshold(torch.stack(h).detach().mean())
        if case == "fixed threshold":
            limit = torch.tensor(0.4 * math.log(CLASSES), dtype=torch.double)
        chosen = [v for v in h if v <= limit]
        dropped, kept = dropped + len(h) - len(chosen), kept + len(chosen)
        weights = [1.0 if case == "no weights" else (E0 - v.detach()).exp() for v in chosen]
        loss = sum(w * v for w, v in zip(weights, chosen, strict=True)) / max(len(chosen), 1)
        loss = loss + balance * limit * sum(norm.balance() for norm in norms)
        mean = sum(row.exp() / row.exp().sum() for row in logits) / len(logits)
        loss = loss - given.get("im", 0.0) * -sum(q * q.log() for q in mean)
        sgd.step(torch.autograd.grad(loss, trained))
        torch.testing.assert_close(adapter(images), logits.detach(), **CLOSE)
        if case != "fixed threshold":
            torch.testing.assert_close(adapter.memory["threshold"], limit, **CLOSE)
    assert dropped and kept
    assert per == "batch" or any(len(set(norm.choice)) > k for norm in norms) or k == 4
    for naive, ours in zip(norms, adapter.norms, strict=True):
        assert naive.weight.abs().max() > 1e-3
        for got, want in [
            (ours.experts_weight, naive.weight), (ours.experts_bias, naive.bias),
            (ours.router.weight, naive.router.weight), (ours.router.bias, naive.router.bias),
        ]:  # fmt: skip
            torch.testing.assert_close(got.detach(), want.detach(), **CLOSE)
    assert (adapter.steps, adapter.skipped) == (7, 0)


def test_the_paper_s_constants_follow_the_stream():
    config = make_config("moetta", {})
    for stream_name, values in {"potpourri": (11, 0.5), "classical": (9, 0.2)}.items():
        filled = for_stream(config, stream_name)
        assert (filled.num_experts, filled.balance_weight) == values
    given = for_stream(make_config("moetta", {"num_experts": 9}), "potpourri")
    assert (given.num_experts, given.balance_weight) == (9, 0.5)
    assert adapt(vit(), "moetta").config.num_experts == 9


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
        ({"grow": "every"}, "use max_experts=10 or more"),
        ({"grow": "drift", "max_experts": 10, "granularity": 2}, "use max_experts=11 or more"),
        ({"keep": 5}, "none beyond the first 5"),
        ({"keep": -1}, "keep=-1"),
        ({"setting": "papre"}, "'papre' is neither"),
        ({"balance_weight": -1.0}, "balance_weight=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"grow_wait": 0}, "grow_wait=0"),
        ({"top_k": 10}, "top_k=10 from 1 to num_experts=9"),
        ({"im": -1.0}, "im=-1"),
        ({"frozen": (5,)}, "LayerNorm 5, and the model's are 0 to 4"),
        ({"frozen": (0, 1, 2, 3, 4)}, "none beyond those in frozen"),
        ({"frozen": (1,), "keep": 2}, "keep=2 has no effect beside frozen"),
        ({"threshold": "fixed", "setting": "official"}, "threshold=fixed has none"),
        ({"route_per": "image"}, "neither sample nor batch"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        adapt(vit(), "moetta", **options)
