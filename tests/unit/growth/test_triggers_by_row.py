"""Triggers that watch a loss act alike on each row, whatever the batch size, at a stated rate."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import Signals
from dynmoe.growth.triggers.changes import false_alarm_interval
from dynmoe.growth.triggers.figures import FigureTrigger

BATCHES = (1, 8, 64)
ROWS = 64
"""Rows in a step, by default."""
OPTIONS = {
    "drift": {"unit": "deviation", "threshold": 8.0, "delta": 0.5},
    "adwin": {},
    "gradient": {},
}


def trigger(name: str, batch: int = ROWS, **options) -> FigureTrigger:
    config = registry.get("trigger", name).Config(**{"cooldown": 1, "limit": 10**9} | options)
    one = config.build()
    one.count_rows(batch)
    return one


def fired_at(one: FigureTrigger, rows: np.ndarray, batch: int) -> list[int]:
    """Rows after which it fires, where each batch's figure is the mean of its rows'."""
    means = rows[: len(rows) // batch * batch].reshape(-1, batch).mean(axis=1).tolist()
    asks = (Signals(step=i, **{one.figure: mean}) for i, mean in enumerate(means, 1))
    return [seen.step * batch for seen in asks if one.fires(seen)]


def losses(*parts: tuple[int, float], seed: int = 0) -> np.ndarray:
    """Losses of single rows, exponential: so many values' worth of rows around each mean."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.exponential(mean, count * ROWS) for count, mean in parts])


def test_false_alarms_of_drift_are_as_far_apart_as_siegmund_says() -> None:
    """At all batch sizes, and on the same rows: about one in 340 values."""
    rows = losses((3000, 0.7))
    options = OPTIONS["drift"] | {"threshold": 4.0}
    found = [fired_at(trigger("drift", b, **options), rows, b) for b in BATCHES]
    assert found[0] == found[1] == found[2]
    apart = 3000 / len(found[0])
    assert false_alarm_interval(4.0, 0.5) == pytest.approx(338, abs=1)
    assert 0.4 < apart / false_alarm_interval(4.0, 0.5) < 2


def test_the_rate_does_not_hang_on_the_scale_of_the_loss() -> None:
    rows = losses((1500, 0.7))
    options = OPTIONS["drift"] | {"threshold": 4.0}
    small, large = (fired_at(trigger("drift", **options), f * rows, ROWS) for f in (0.01, 50.0))
    assert small == large != []


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_fires_on_a_stream_that_does_not_change(name: str) -> None:
    """1000 values, 64,000 rows; drift is to fire once in 19,000 values, adwin in 500 at most."""
    for batch in BATCHES:
        assert fired_at(trigger(name, batch, **OPTIONS[name]), losses((1000, 0.7)), batch) == []


def test_adwins_false_alarms_stay_far_below_its_confidence() -> None:
    rows = losses((1000, 0.7), seed=3)
    assert fired_at(trigger("adwin", confidence=0.5, scale=2.0), rows, ROWS) == []


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "delay"), [("drift", 15), ("adwin", 80)])
def test_an_abrupt_change_is_found_in_time(name: str, delay: int, batch: int) -> None:
    """A loss that doubles: within 15 or 80 values, that is 960 or 5120 rows."""
    for seed in range(3):
        rows = losses((300, 0.7), (100, 1.4), seed=seed)
        first, *_ = fired_at(trigger(name, batch, **OPTIONS[name]), rows, batch)
        assert 300 * ROWS < first <= (300 + delay) * ROWS


def test_single_rows_are_joined_and_large_batches_are_not() -> None:
    """As it was before: batches of 64 and more are values themselves, however many their rows."""
    assert [trigger("drift", b).joined for b in (1, 8, 60, 64, 256)] == [64, 8, 2, 1, 1]
    assert trigger("drift", 8, rows=1).joined == 1
    plain = registry.get("trigger", "drift").Config().build()  # not told, as in rl
    assert plain.joined == 1
    one = trigger("drift", 256, memory=0)
    for step, value in enumerate([0.3, 0.7, 0.2], 1):
        one.fires(Signals(step=step, loss=value))
    assert one.memory["count"] == 3 and one.memory["mean"] == pytest.approx(0.4)


@pytest.mark.parametrize("batch", BATCHES)
def test_waits_are_counted_in_joined_steps(batch: int) -> None:
    """A loss that only rises: called at once, heard after the wait, in the same row."""
    rows = np.repeat(1.05 ** np.arange(120), ROWS)
    one = trigger("drift", batch, cooldown=50, limit=2)
    assert fired_at(one, rows, batch) == [50 * ROWS, 100 * ROWS]
    again = trigger("drift", batch, cooldown=50, limit=9)
    assert again.planned(120 * ROWS // batch, 1) == 2
    assert again.planned(100 * ROWS // batch, 1) == 1  # one at the last step could learn nothing
    patient = registry.get("trigger", "plateau").Config(patience=30, limit=9).build()
    patient.count_rows(batch)
    scored = (Signals(step=i, score=0.5) for i in range(120 * ROWS // batch))
    fired = [seen.step * batch // ROWS for seen in scored if patient.fires(seen)]
    assert fired == [30, 60, 90] and patient.planned(120 * ROWS // batch, 1) == 3


def test_a_value_half_joined_is_resumed_and_gaps_are_passed_over() -> None:
    one, other = trigger("drift", 16), trigger("drift", 16)
    for step, value in enumerate([1.0, 2.0, math.nan, 3.0], 1):
        one.fires(Signals(step=step, loss=value))
    assert one.memory["count"] == 0 and one.part == [6.0, 3]
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.fires(Signals(step=5, loss=6.0))
        assert each.memory["count"] == 1 and each.memory["mean"] == 3.0
    one.load_state_dict(other.state_dict())
    one.fires(Signals(step=6, loss=1.0))
    assert other.part == [0.0, 0]  # a state that was handed over is not changed


def test_a_loss_that_never_moves_is_no_drift_and_its_first_move_is_not_infinite() -> None:
    one = trigger("drift", **OPTIONS["drift"])
    assert fired_at(one, np.full(200 * ROWS, 0.5), ROWS) == []
    assert math.isfinite(one.memory["sum"])
    with pytest.raises(UserError, match="trigger drift: rows=0 must be at least 1"):
        trigger("drift", rows=0)
    with pytest.raises(UserError, match="trigger plateau: rows=-1 must be at least 1"):
        registry.get("trigger", "plateau").Config(rows=-1).build()
