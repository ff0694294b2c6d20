"""When triggers fire, in the loop that the growth plugin makes of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_benchmarks.growth_plugin import GrowthPlugin
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Signals
from dynmoe.growth.trigger import Trigger


def trigger(name: str, **options) -> Trigger:
    return registry.get("trigger", name).Config(**options).build()


def fires(trigger: Trigger, tasks: int, steps_per_task: int) -> list[int]:
    """Optimizer steps taken before each growth, in a run driven by the plugin."""
    fired: list[int] = []

    def step(signals: Signals, make_probe: object) -> None:
        if trigger.fires(signals):
            fired.append(signals.step)

    plugin = GrowthPlugin(SimpleNamespace(step=step))
    clock = SimpleNamespace(train_iterations=0, train_exp_counter=0)
    strategy = SimpleNamespace(clock=clock, experience=SimpleNamespace(dataset=None))
    for task in range(tasks):
        clock.train_exp_counter = task
        plugin.before_training_exp(strategy)
        for _ in range(steps_per_task):
            plugin.before_training_iteration(strategy)
            clock.train_iterations += 1
    return fired


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
    plugin = GrowthPlugin(SimpleNamespace(step=lambda signals, _: asked.append(signals)))
    clock = SimpleNamespace(train_iterations=8, train_exp_counter=2)
    experience = SimpleNamespace(dataset=None)
    plugin.before_training_exp(SimpleNamespace(clock=clock, experience=experience, resuming=True))
    assert not asked
    plugin.before_training_exp(SimpleNamespace(clock=clock, experience=experience, resuming=False))
    assert asked == [Signals(step=8, task_starts=True)]


@pytest.mark.parametrize("name", registry.names("trigger"))
def test_state_goes_round(name):
    options = {"at": {"steps": (3,)}}.get(name, {})
    one, other = trigger(name, **options), trigger(name, **options)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
