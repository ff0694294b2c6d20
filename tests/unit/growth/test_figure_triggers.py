"""The triggers that watch a figure: their formulas, when they fire, and what they are told."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cl_benchmarks.growth_plugin import GrowthPlugin, probe_figures
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController, Signals
from dynmoe.growth.triggers.figures import FigureTrigger, PlateauTrigger
from dynmoe.moe import MoELayer

FIGURE = {
    "gradient": "grad_norm", "rank": "effective_rank", "dormancy": "dormant", "drift": "loss",
    "adwin": "loss",
}  # fmt: skip


def trigger(name: str, **options) -> FigureTrigger:
    return registry.get("trigger", name).Config(**options).build()


def asked(one: FigureTrigger, values: list[float]) -> list[int]:
    """Steps 1, 2, ... at which it fires, one value a step."""
    signals = [Signals(step=i, **{one.figure: v}) for i, v in enumerate(values, 1)]
    return [seen.step for seen in signals if one.fires(seen)]


def noisy(levels: list[tuple[int, float]], spread: float, seed: int = 0) -> list[float]:
    """So many values around each level."""
    rng = random.Random(seed)
    return [level + rng.uniform(-spread, spread) for count, level in levels for _ in range(count)]


@pytest.mark.parametrize("name", ["gradient", "drift"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_passed_over(name: str, value: float) -> None:
    """As gradients overflow in the first steps of float16."""
    change = noisy([(200, 1.0), (200, 0.1 if name == "gradient" else 5.0)], 0.05)
    plain = asked(trigger(name, cooldown=1), change)
    assert plain and asked(trigger(name, cooldown=1), [value, *change]) == [s + 1 for s in plain]


# ---------------------------------------------------------------- formulas, restated


def naive_gradient(values: list[float], share: float, memory: int) -> int | None:
    """First step at which the weighted mean lies low enough."""
    weights = [(1 - 1 / memory) ** k for k in range(len(values))]
    highest = 0.0
    for now in range(1, len(values) + 1):
        seen = values[:now][::-1]
        mean = sum(w * v for w, v in zip(weights, seen, strict=False)) / sum(weights[:now])
        if now >= memory:
            highest = max(highest, mean)
            if mean < share * highest:
                return now
    return None


def naive_page_hinkley(
    values: list[float], threshold: float, delta: float, warmup: int = 1
) -> int | None:
    """m_T and M_T written out again at each T."""
    for now in range(warmup + 1, len(values) + 1):
        sums = [0.0]
        for t in range(warmup + 1, now + 1):
            sums.append(sums[-1] + values[t - 1] - sum(values[:t]) / t - delta)
        if sums[-1] - min(sums) > threshold:
            return now
    return None


def naive_adwin(values: list[float], confidence: float) -> int | None:
    """First step at which some split tells a rise."""
    window: list[float] = []
    for now, value in enumerate(values, 1):
        window.append(value)
        again, rose = True, False
        while again and len(window) >= 10:
            again = False
            mean = sum(window) / len(window)
            variance = sum((v - mean) ** 2 for v in window) / len(window)
            for cut in range(1, len(window)):
                old, new = window[:cut], window[cut:]
                m = 1 / (1 / len(old) + 1 / len(new))
                log = math.log(2 / (confidence / math.log(len(window))))
                bound = math.sqrt(2 / m * variance * log) + 2 / (3 * m) * log
                gap = sum(new) / len(new) - sum(old) / len(old)
                if abs(gap) >= bound:
                    window, again, rose = new, True, gap > 0
                    break
        if rose:
            return now
    return None


@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_the_naive_mean(seed):
    values = noisy([(40, 2.0), (40, 1.0), (60, 0.3)], 0.2, seed)
    fired = asked(trigger("gradient", share=0.4, memory=10, cooldown=1, limit=1), values)
    assert fired == [naive_gradient(values, 0.4, 10)]
    assert fired[0] > 80


@pytest.mark.parametrize("seed", range(3))
def test_drift_is_the_page_hinkley_test(seed):
    values = noisy([(60, 1.0), (60, 1.5)], 0.3, seed)
    one = trigger("drift", threshold=3.0, delta=0.05, warmup=1, memory=0, cooldown=1, limit=1)
    fired = asked(one, values)
    assert fired == [naive_page_hinkley(values, 3.0, 0.05)]
    assert 60 < fired[0] < 90


@pytest.mark.parametrize("warmup", [1, 2, 7, 20])
def test_drift_learns_the_mean_first(warmup):
    """Values that rise at once: each one more that only warms up delays the call."""
    values = [1.0 + 0.1 * i for i in range(60)]
    one = trigger("drift", threshold=3.0, delta=0.05, warmup=warmup, memory=0, cooldown=1, limit=1)
    assert asked(one, values) == [naive_page_hinkley(values, 3.0, 0.05, warmup)]


def test_the_mean_of_drift_looks_back_so_many_values():
    one = trigger("drift", memory=4, warmup=1)
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    for step, value in enumerate(values, 1):
        one.fires(Signals(step=step, loss=value))
    mean = sum(values[:4]) / 4
    for value in values[4:]:
        mean = 0.75 * mean + 0.25 * value
    assert one.memory["mean"] == pytest.approx(mean)


@pytest.mark.parametrize("seed", range(6))
def test_adwin_is_the_naive_window_on_slopes(seed):
    """Where the bound decides to a step."""
    values = [0.2 + 0.004 * i + noise for i, noise in enumerate(noisy([(150, 0.0)], 0.1, seed))]
    one = trigger("adwin", confidence=0.3, scale=1.0, cooldown=1, limit=1)
    assert asked(one, values) == [naive_adwin(values, 0.3)]


@pytest.mark.parametrize("seed", range(3))
def test_adwin_is_the_naive_window(seed):
    values = noisy([(60, 0.5), (100, 0.1), (80, 0.8)], 0.1, seed)
    one = trigger("adwin", confidence=0.002, scale=1.0, cooldown=1, limit=1)
    fired = asked(one, values)
    assert fired == [naive_adwin(values, 0.002)]
    assert 160 < fired[0] < 200


def test_rank_and_dormancy_compare_with_their_extremes():
    assert asked(trigger("rank", share=0.5, cooldown=1), [4, 10, 5, 4.9, 4.9, 2, 5]) == [4, 6]
    values = [0.5, 0.2, 0.25, 0.375, 0.125, 0.2, 0.25]
    assert asked(trigger("dormancy", rise=0.125, cooldown=1), values) == [4, 7]


# ---------------------------------------------------------------- where they fire and where not

QUIET = {
    "gradient": noisy([(400, 1.0), (400, 0.5), (400, 2.0)], 0.3),
    "rank": noisy([(400, 30.0), (400, 25.0), (400, 40.0)], 2.0),
    "dormancy": noisy([(400, 0.2), (400, 0.05), (400, 0.1)], 0.02),
    "drift": [2 * 0.99**i + noise for i, noise in enumerate(noisy([(1200, 0.3)], 0.2))],
    "adwin": [2 * 0.99**i + noise for i, noise in enumerate(noisy([(1200, 0.3)], 0.2))],
}
"""Noise, slow change, and change in the other direction."""
LOUD = {
    "gradient": noisy([(600, 1.0), (600, 0.05)], 0.02),
    "rank": noisy([(600, 30.0), (600, 10.0)], 1.0),
    "dormancy": noisy([(600, 0.1), (600, 0.4)], 0.02),
    "drift": noisy([(600, 0.3), (600, 2.3)], 0.2),
    "adwin": noisy([(600, 0.3), (600, 2.3)], 0.2),
}
"""A jump after 600 values."""


@pytest.mark.parametrize("name", FIGURE)
def test_fires_at_a_jump_and_not_without_one(name):
    assert asked(trigger(name, limit=99), QUIET[name]) == []
    fired = asked(trigger(name, limit=99), LOUD[name])
    assert len(fired) == 1 and 600 < fired[0] < 800


@pytest.mark.parametrize("name", FIGURE)
def test_waits_and_keeps_to_its_limit(name):
    late = [v for _ in range(4) for v in LOUD[name]]
    fired = asked(trigger(name, cooldown=700, limit=99), late)
    assert fired[0] == 700  # the jump at 601 calls until it is heard
    assert all(b - a >= 700 for a, b in pairwise(fired)) and len(fired) > 1
    assert asked(trigger(name, cooldown=700, limit=1), late) == fired[:1]
    assert trigger(name, cooldown=700, limit=3).planned(2101, 9) == 3
    assert trigger(name, cooldown=700, limit=3).planned(2100, 9) == 2


@pytest.mark.parametrize("name", FIGURE)
def test_unknown_values_and_task_starts_are_passed_over(name):
    one, other = trigger(name), trigger(name)
    for step, value in enumerate(LOUD[name][590:640], 1):
        one.fires(Signals(step=step, **{one.figure: value}))
        other.fires(Signals(step=step, **{one.figure: math.nan}))
        other.fires(Signals(step=step, **{one.figure: value}, task_starts=True))
        other.fires(Signals(step=step, **{one.figure: value}))
    assert one.state_dict() == other.state_dict()
    assert one.state_dict() != trigger(name).state_dict()


@pytest.mark.parametrize("name", FIGURE)
def test_a_loop_without_the_figure_is_refused(name):
    assert trigger(name).figure == FIGURE[name]
    with pytest.raises(UserError, match=f"no {FIGURE[name]} here.*use another --trigger") as caught:
        trigger(name).fires(Signals(step=1))
    assert "\n" not in str(caught.value)


BAD = [
    ("gradient", {"share": 0.0}), ("gradient", {"share": 1.0}), ("gradient", {"memory": 0}),
    ("rank", {"share": math.nan}), ("rank", {"every": 0}), ("dormancy", {"rise": 0.0}),
    ("dormancy", {"every": -1}), ("drift", {"threshold": 0.0}), ("drift", {"delta": -0.1}),
    ("drift", {"warmup": 0}), ("drift", {"memory": -1}), ("adwin", {"confidence": 1.0}),
    ("adwin", {"scale": 0.0}), ("adwin", {"window": 9}),
    *[(name, {option: 0}) for name in FIGURE for option in ("cooldown", "limit")],
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), BAD, ids=str)
def test_bad_options_are_refused(name, options):
    ((option, value),) = options.items()
    with pytest.raises(UserError, match=f"trigger {name}: .*{option}={value}") as caught:
        trigger(name, **options)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what the plugin tells


def _network() -> nn.Module:
    layer = MoELayer(5, 7, 12, num_experts=2, max_experts=8)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), layer, nn.Linear(7, 3))


def test_probe_figures_are_the_naive_ones():
    model = _network()
    with torch.no_grad():
        model[0].bias[2] = -99.0  # a dead unit
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    figures = probe_figures(model, x, y)
    with torch.no_grad():
        first = model[1](model[0](x))
        pool, features = model[2].bank.hidden(first), model[2](first)
    sigma = torch.linalg.svdvals(features.double())
    p = sigma / sigma.sum()
    assert figures["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()))
    activity = [h.abs().double().mean(dim=0) for h in (first, pool)]
    dormant = [float(a / layer.mean()) <= 0.1 for layer in activity for a in layer]
    assert len(dormant) == 17 and sum(dormant) >= 1
    assert figures["dormant"] == pytest.approx(sum(dormant) / 17)


class _Naive:
    """The least that the plugin wants of an Avalanche strategy, with a plain training step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, torch.device("cpu")
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1)
        self.clock = SimpleNamespace(train_iterations=0, train_exp_counter=0)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(32, 4, generator=generator)
        self.data = [(image, int(i) % 3) for i, image in enumerate(x)]
        self.experience = SimpleNamespace(dataset=self.data)

    def step(self, plugin: GrowthPlugin) -> None:
        plugin.before_training_iteration(self)
        x, y = torch.stack([x for x, _ in self.data]), torch.tensor([y for _, y in self.data])
        self.optimizer.zero_grad()
        self.mb_output, self.mb_y = self.model(x), y
        self.loss = nn.functional.cross_entropy(self.mb_output, y)
        self.loss.backward()
        plugin.after_backward(self)
        self.norm = math.sqrt(sum(float(p.grad.square().sum()) for p in self.model.parameters()))
        self.optimizer.step()
        self.clock.train_iterations += 1


@pytest.mark.parametrize("name", FIGURE)
def test_the_plugin_measures_what_the_trigger_needs(name, monkeypatch):
    options = {"every": 3} if name in ("rank", "dormancy") else {}
    model = _network()
    controller = GrowthController(model, trigger=type(trigger(name)).Config(**options))
    seen: list[Signals] = []
    original = controller.trigger.fires
    monkeypatch.setattr(controller.trigger, "fires", lambda s: seen.append(s) or original(s))
    plugin, strategy = GrowthPlugin(controller, probe_samples=16), _Naive(model)
    plugin.before_training_exp(strategy)
    losses, norms, probes = [math.nan, math.nan], [math.nan, math.nan], [None]
    for _ in range(7):
        index = torch.linspace(0, 31, 16).long()
        x = torch.stack([strategy.data[i][0] for i in index])
        probes.append(probe_figures(model, x, torch.tensor([strategy.data[i][1] for i in index])))
        strategy.step(plugin)
        losses.append(float(strategy.loss.detach()))
        norms.append(strategy.norm)
    for ask, signals in enumerate(seen):
        step = max(ask - 1, 0)
        assert signals.step == step and not signals.task_starts
        told = {f: getattr(signals, f) for f in set(FIGURE.values())}
        expected: dict[str, float | None] = dict.fromkeys(told)
        expected[FIGURE[name]] = {
            "loss": losses[ask], "grad_norm": norms[ask],
        }.get(FIGURE[name], math.nan)  # fmt: skip
        if options and ask > 0 and step % 3 == 0:
            expected[FIGURE[name]] = probes[ask][FIGURE[name]]
        assert told == pytest.approx(expected, nan_ok=True)
    assert len(seen) == 8


@pytest.mark.parametrize("name", FIGURE)
def test_a_restored_plugin_goes_on_with_the_latest_figures(name):
    """The first ask after a resume is about a step that was taken before it."""
    torch.manual_seed(0)
    model = _network()
    plugin, strategy = (
        GrowthPlugin(GrowthController(model, trigger=type(trigger(name)).Config())),
        (_Naive(model)),
    )
    plugin.before_training_exp(strategy)
    for _ in range(3):
        strategy.step(plugin)
    other = GrowthPlugin(GrowthController(model, trigger=type(trigger(name)).Config()))
    other.load_state_dict(plugin.state_dict())
    strategy.resuming = True
    other.before_training_exp(strategy)
    for one in (plugin, other):
        one.before_training_iteration(strategy)
    assert one.state_dict()["latest"] == plugin.state_dict()["latest"]
    assert other.controller.trigger.state_dict() == plugin.controller.trigger.state_dict()


def test_the_score_of_a_plateau_is_the_accuracy_on_the_latest_minibatches(monkeypatch):
    """Before their update; the same at a task's start; kept by a checkpoint."""
    monkeypatch.setattr("cl_benchmarks.growth_plugin.SCORE_STEPS", 3)
    model = _network()
    controller = GrowthController(model, trigger=PlateauTrigger.Config(patience=10**6))
    seen: list[Signals] = []
    original = controller.trigger.fires
    monkeypatch.setattr(controller.trigger, "fires", lambda s: seen.append(s) or original(s))
    plugin, strategy = GrowthPlugin(controller), _Naive(model)
    strategy.optimizer.param_groups[0]["lr"] = 3.0  # so that the accuracy moves
    x, y = zip(*strategy.data, strict=True)
    plugin.before_training_exp(strategy)
    accuracies = []
    for _ in range(5):
        with torch.no_grad():
            right = [int(model(image[None]).argmax()) == label
                     for image, label in zip(x, y, strict=True)]  # fmt: skip
        accuracies.append(sum(right) / len(right))
        strategy.step(plugin)
    other = GrowthPlugin(controller)
    other.load_state_dict(plugin.state_dict())
    other.before_training_exp(strategy)
    assert len(set(accuracies)) > 1
    latest = [accuracies[max(0, n - 3) : n] for n in (1, 2, 3, 4, 5)]
    expected = [math.nan, math.nan, *(sum(a) / len(a) for a in latest)]
    assert [s.score for s in seen] == pytest.approx(expected, nan_ok=True)
    assert seen[0].loss is None
