"""The verdict of the study of SlipperyAnt, from made-up summaries."""

from __future__ import annotations

import math
from typing import Any

from agents.statistics import tenths
from dynmoe import registry
from dynmoe.lab.experiment import Results
from dynmoe.lab.report import table
from dynmoe.lab.study import Study, judge


def summary(seed: int, best: float, last: float) -> dict[str, Any]:
    """A run of 20 points that rises to its best and ends at its last."""
    rising = [float(best * i / 9 + seed) for i in range(10)] + [best + seed]
    points = [*rising, *[last + 2.0 * seed] * 9]
    curve = [[100 * (i + 1), value] for i, value in enumerate(points)]
    return {"final_return": tenths(curve)[-1], "max_return": None, "parameters": 7,
            "env_steps": 2000, "curve": curve, "growth": []}  # fmt: skip


def test_tenths_of_a_curve() -> None:
    curve: list[list[float | None]] = [[i, float(i)] for i in range(25)]
    assert tenths(curve)[0] == 1.0 and tenths(curve)[-1] == 23.0 and len(tenths(curve)) == 23
    assert tenths([[1, None], [2, 5.0], [3, None]]) == [5.0] and tenths([[1, None]]) == []


def test_the_verdict_follows_from_the_numbers() -> None:
    study: Study = registry.get("study", "rl-slippery")()
    ends = {"dense": -200.0, "l2": -200.0, "cbp": 100.0}
    assert ends.keys() == study.variants("laptop").keys()
    runs = {name: [summary(s, 100, last) for s in range(3)] for name, last in ends.items()}
    own = Results({"friction": runs}, {"friction": {}}, study.experiment(None))  # type: ignore[arg-type]
    for seed, decline in enumerate(own.values("friction", "dense", "decline")):
        assert math.isclose(decline, 100 - -200 - seed)
    sentences, comparisons = judge(study, own)
    assert "return of its best tenth less that of the last: 299 [" in sentences[0]
    assert len(sentences) == len(ends) + 2 * 2 and comparisons <= len(sentences)
    returns = [text for text in sentences if "final return" in text]
    assert len(returns) == 2 and ", higher (" not in returns[0] and ", higher (" in returns[1]
    silent = runs["l2"][0] | {"curve": [[1, None]], "final_return": None}
    ended = Results({"s": {"x": [silent]}}, {}, own.experiment)
    assert table(ended, "s")[1][:2] == ["x", "no episode ended"]
