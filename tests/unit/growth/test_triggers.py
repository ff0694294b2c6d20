"""When triggers fire, in the loop that the growth plugin makes of a run."""

from __future__ import annotations

import io
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_benchmarks.growth_plugin import GrowthPlugin
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Signals
from dynmoe.growth.triggers.clock import Trigger


def trigger(name: str, **options) -> Trigger:
    return registry.get("trigger", name).Config(**options).build()


def fires(trigger: Trigger, tasks: int, steps_per_task: int) -> list[int]:
    """Optimizer steps taken before each growth, in a run driven by the plugin."""
    fired: list[int] = []

    def step(signals: Signals, make_probe: object) -> None:
        if trigger.fires(signals):
            fired.append(signals.step)

    plugin = GrowthPlugin(SimpleNamespace(step=step, trigger=trigger))
    clock = SimpleNamespace(train_iterations=0, train_exp_counter=0)
    strategy = SimpleNamespace(clock=clock, experience=SimpleNamespace(dataset=None))
    for task in range(tasks):
        clock.train_exp_counter = task
        plugin.before_training_exp(strategy)
        for _ in range(steps_per_task):
            plugin.before_training_iteration(strategy)
            clock.train_iterations += 1
    return fired


def asked(trigger: Trigger, signals: list[Signals]) -> list[int]:
    """Steps at which it fires, in the loop of reinforcement learning."""
    return [seen.step for seen in signals if trigger.fires(seen)]


def clock(steps: list[int]) -> list[Signals]:
    return [Signals(step=step) for step in steps]


def at_floors(*shares: tuple[float, ...]) -> list[Signals]:
    return [Signals(step=64 * i, reached=reached) for i, reached in enumerate(shares, 1)]


def scored(*scores: float) -> list[Signals]:
    return [Signals(step=100 * i, score=score) for i, score in enumerate(scores, 1)]


def random_run(seed: int, length: int = 40) -> list[Signals]:
    """Asks at a clock that jumps; agents get deeper, their score rises and stalls.

    The other figures lie on one level for a while and then on another, with noise, or are unknown.
    """
    rng, step, deepest, score, level = random.Random(seed), 0, 0, 0.0, 1.0
    signals = []
    for _ in range(length):
        step += rng.randint(1, 60)
        deepest = min(4, deepest + (rng.random() < 0.1))
        reached = tuple(rng.random() if floor <= deepest else 0.0 for floor in range(5))
        score += rng.choice([0.0, 0.0, -0.1, 0.5])
        unknown = len(signals) < rng.randint(0, 5)
        task = rng.random() < 0.1
        level = rng.choice([0.1, 0.5, 1.0]) if rng.random() < 0.2 else level
        figure = math.nan if rng.random() < 0.1 else level * rng.uniform(0.9, 1.0)
        signals.append(Signals(step=step, task_starts=task, reached=reached,
                               score=math.nan if unknown else score, loss=figure, grad_norm=figure,
                               effective_rank=figure, dormant=figure))  # fmt: skip
    return signals


OPTIONS = {
    "at": {"steps": (37, 150, 151, 400)},
    "every": {"steps": 90},
    "stage": {"share": 0.3, "limit": 3},
    "plateau": {"patience": 120, "limit": 4},
    "gradient": {"share": 0.7, "memory": 2, "cooldown": 60},
    "rank": {"share": 0.7, "cooldown": 60},
    "dormancy": {"rise": 0.2, "cooldown": 60},
    "drift": {"threshold": 0.3, "warmup": 2, "cooldown": 60},
    "adwin": {"confidence": 0.9, "scale": 1.0, "cooldown": 60},
}
"""Of triggers that shall fire several times in a run of about 1200 steps."""
counts = st.integers(1, 6), st.integers(1, 12)


@given(*counts)
def test_task_fires_at_each_task_but_the_first(tasks, steps):
    fired = fires(trigger("task"), tasks, steps)
    assert fired == [steps * task for task in range(1, tasks)]
    assert trigger("task").planned(tasks * steps, tasks) == len(fired)


@given(*counts, st.integers(1, 80))
def test_every_fires_on_its_clock_and_never_at_the_end(tasks, steps, n):
    every = trigger("every", steps=n)
    fired = fires(every, tasks, steps)
    assert fired == [s for s in range(1, tasks * steps) if s % n == 0]
    assert every.planned(tasks * steps, tasks) == len(fired)


@given(*counts, st.sets(st.integers(1, 80), min_size=1))
def test_at_fires_at_the_given_steps_that_the_run_reaches(tasks, steps, given_steps):
    at = trigger("at", steps=tuple(given_steps))
    fired = fires(at, tasks, steps)
    assert fired == sorted(s for s in given_steps if s < tasks * steps)
    assert at.planned(tasks * steps, tasks) == len(fired)


@pytest.mark.parametrize("steps", [(), (0,), (5, -1), (7, 7)])
def test_at_refuses_bad_steps(steps):
    with pytest.raises(UserError, match="must be distinct numbers of at least 1"):
        trigger("at", steps=steps)


@pytest.mark.parametrize("steps", [0, -3])
def test_every_refuses_bad_steps(steps):
    with pytest.raises(UserError, match="must be at least 1"):
        trigger("every", steps=steps)


def test_a_resuming_strategy_does_not_grow_at_the_task_start():
    asked: list[Signals] = []
    controller = SimpleNamespace(step=lambda seen, _: asked.append(seen), trigger=trigger("task"))
    plugin = GrowthPlugin(controller)
    clock = SimpleNamespace(train_iterations=8, train_exp_counter=2)
    experience = SimpleNamespace(dataset=None)
    plugin.before_training_exp(SimpleNamespace(clock=clock, experience=experience, resuming=True))
    assert not asked
    plugin.before_training_exp(SimpleNamespace(clock=clock, experience=experience, resuming=False))
    assert asked == [Signals(step=8, task_starts=True)]


# ---------------------------------------------------------------- a clock that begins anew


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("gradient", {"share": 0.99, "memory": 1, "cooldown": 4}, [4, 8]),
        ("plateau", {"patience": 4, "limit": 9}, [4, 8]),
        ("every", {"steps": 4}, [4, 8]),
        ("at", {"steps": (1, 6)}, [1, 6]),
    ],
)
def test_a_second_training_grows_as_the_first_though_its_clock_begins_anew(name, options, expected):
    one, figures = trigger(name, **options), {"score": 1.0}
    for training in range(3):
        fired = []
        for step in range(11):
            figures["grad_norm"] = 1 / (1 + step)
            if step == 0 and training:  # each but the first begins with a task
                assert not one.fires(Signals(step=0, task_starts=True, **figures))
            if (step or not training) and one.fires(Signals(step=step, **figures)):
                fired.append(step)
        assert fired == expected


# ---------------------------------------------------------------- a clock that jumps

jumps = st.lists(st.integers(1, 50), min_size=1, max_size=30).map(
    lambda steps: [sum(steps[: i + 1]) for i in range(len(steps))]
)


@given(jumps, st.integers(1, 80))
def test_every_fires_once_per_interval_that_holds_a_multiple(asks, n):
    """The interval after the ask before, up to and with this one."""
    befores = [0, *asks[:-1]]
    expected = [
        now for before, now in zip(befores, asks, strict=True)
        if any(step % n == 0 for step in range(before + 1, now + 1))
    ]  # fmt: skip
    assert asked(trigger("every", steps=n), clock(asks)) == expected


@given(jumps, st.sets(st.integers(1, 200), min_size=1))
def test_at_fires_once_per_interval_that_holds_a_given_step(asks, steps):
    befores = [0, *asks[:-1]]
    expected = [
        now for before, now in zip(befores, asks, strict=True)
        if steps & set(range(before + 1, now + 1))
    ]  # fmt: skip
    assert asked(trigger("at", steps=tuple(steps)), clock(asks)) == expected


@pytest.mark.parametrize("name", ["at", "every"])
def test_a_clock_that_stands_still_fires_no_second_time(name):
    one = trigger(name, **({"steps": 10} if name == "every" else {"steps": (10,)}))
    assert asked(one, clock([10, 10, 11])) == [10]
    assert not one.fires(Signals(step=25, task_starts=True))  # nor at a task's start


# ---------------------------------------------------------------- stages


def test_stage_fires_at_the_first_arrival_in_each_deeper_stage():
    one = trigger("stage", limit=9)
    run = at_floors((1, 0, 0, 0), (1, 0.01, 0, 0), (1, 0.5, 0, 0), (1, 0, 0, 0), (1, 0.2, 0.1, 0),
                    (0, 1, 0, 0), (0, 0, 0.4, 0), (0, 0, 0, 1))  # fmt: skip
    assert asked(one, run) == [128, 320, 512]


def test_several_stages_at_once_are_one_growth():
    one = trigger("stage", limit=9)
    assert asked(one, at_floors((1, 0.1, 0.1, 0), (1, 0.5, 0.5, 0), (1, 0, 0, 0.1))) == [64, 192]


def test_stage_counts_more_than_its_share_between_two_asks():
    one = trigger("stage", share=0.25, limit=9)
    run = at_floors((1, 0.24, 0.2), (1, 0.25, 0.25), (1, 0.26, 0.25), (1, 0.1, 0.3))
    assert asked(one, run) == [192, 256]


@pytest.mark.parametrize("limit", [1, 2])
def test_stage_keeps_to_its_limit(limit):
    run = at_floors(*(tuple(float(f == floor) for f in range(6)) for floor in range(6)))
    assert asked(trigger("stage", limit=limit), run) == [128, 192, 256][:limit]
    assert trigger("stage", limit=limit).planned(10**9, 1) == limit


def test_stage_does_not_fire_where_all_begin():
    assert asked(trigger("stage", limit=9), at_floors((1, 0), (1, 0), (0.5, 0))) == []


@pytest.mark.parametrize("reached", [(), (1.0,)])
def test_stage_refuses_loops_without_stages(reached):
    with pytest.raises(UserError, match="no stages here.*use another --trigger") as caught:
        trigger("stage").fires(Signals(step=1, reached=reached))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"share": -0.1}, {"share": 1.0}, {"share": math.nan}, {"limit": 0}], ids=str
)
def test_stage_refuses_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        trigger("stage", **options)


# ---------------------------------------------------------------- plateaus


def test_plateau_fires_once_its_patience_is_over():
    """Asked every 100 steps: the first score is a gain, and a growth begins a new wait."""
    one = trigger("plateau", patience=300, limit=9)
    assert asked(one, scored(*[5.0] * 10)) == [400, 700, 1000]


def test_plateau_waits_while_the_score_rises():
    one = trigger("plateau", patience=200, gain=0.1, limit=9)
    assert asked(one, scored(1.0, 1.05, 1.11, 1.15, 1.23, 1.2, 1.2)) == [700]
    one = trigger("plateau", patience=200, gain=0.0, limit=9)
    assert asked(one, scored(*(1 + i / 1000 for i in range(20)))) == []


def test_plateau_compares_with_the_best_not_with_the_latest():
    one = trigger("plateau", patience=300, gain=0.0, limit=9)
    assert asked(one, scored(5.0, 1.0, 2.0, 3.0, 4.0, 4.5)) == [400]


@pytest.mark.parametrize(("scores", "fires"), [((-10.0, -9.6), True), ((-10.0, -9.4), False)])
def test_a_gain_is_a_share_of_the_bests_size(scores, fires):
    """Below zero as above it: 5 % of 10 are 0.5."""
    one = trigger("plateau", patience=100, gain=0.05, limit=9)
    assert asked(one, scored(*scores)) == ([200] if fires else [])


def test_plateau_does_not_wait_for_a_score_that_is_not_there_yet():
    """Patience begins with the first episode that ends."""
    one = trigger("plateau", patience=200, limit=9)
    assert asked(one, scored(math.nan, math.nan, math.nan, 1.0, 1.0, 1.0)) == [600]
    other = trigger("plateau", patience=200, limit=9)
    assert asked(other, scored(*[math.nan] * 20)) == []


@pytest.mark.parametrize("limit", [1, 3])
def test_plateau_keeps_to_its_limit(limit):
    assert len(asked(trigger("plateau", patience=100, limit=limit), scored(*[1.0] * 30))) == limit


def test_plateau_refuses_loops_without_a_score():
    with pytest.raises(UserError, match="no score here.*use another --trigger") as caught:
        trigger("plateau").fires(Signals(step=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"patience": 0}, {"gain": -0.1}, {"gain": math.nan}, {"limit": 0}],
    ids=str,
)
def test_plateau_refuses_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        trigger("plateau", **options)


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", registry.names("trigger"))
def test_a_restored_trigger_goes_on_as_the_one_that_was_saved(name):
    """At each ask of a run, through a file of plain values."""
    run, uninterrupted = random_run(3, 160), trigger(name, **OPTIONS.get(name, {}))
    expected = asked(uninterrupted, run)
    assert len(expected) >= 2
    one = trigger(name, **OPTIONS.get(name, {}))
    for at in range(len(run)):
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        other = trigger(name, **OPTIONS.get(name, {}))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert asked(other, run[at:]) == [s for s in expected if s >= run[at].step]
        assert other.state_dict() == uninterrupted.state_dict()
        one.fires(run[at])


@given(st.integers(0, 10**6), st.sampled_from(registry.names("trigger")))
def test_no_more_growths_than_planned(seed, name):
    """A loop asks at the end of each rollout but the last; layers have room for what is planned."""
    run = random_run(seed, length=random.Random(seed).randint(1, 40))
    tasks = 1 + sum(seen.task_starts for seen in run[:-1])
    one = trigger(name, **OPTIONS.get(name, {}))
    assert len(asked(one, run[:-1])) <= one.planned(run[-1].step, tasks)


@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 150))
def test_plans_of_clock_triggers_are_exact_where_rollouts_are_short(updates, batch, n):
    """With at most one growth falling due between two asks, what is planned comes true."""
    run = clock([batch * update for update in range(1, updates)])
    steps = batch * updates
    if n >= batch:
        every = trigger("every", steps=n)
        due = [m for m in range(n, steps, n) if m <= batch * (updates - 1)]
        assert len(asked(every, run)) == len(due)
        assert 0 <= every.planned(steps, 1) - len(due) <= 1


@pytest.mark.parametrize("name", registry.names("trigger"))
def test_state_goes_round(name):
    options = {"at": {"steps": (3,)}}.get(name, {})
    one, other = trigger(name, **options), trigger(name, **options)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
