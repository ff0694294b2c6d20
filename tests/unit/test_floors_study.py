"""The verdict of the studies of floors and phases, from made-up summaries."""

from __future__ import annotations

from typing import Any

import pytest

from dynmoe import registry
from dynmoe.lab.experiment import Results
from dynmoe.lab.report import table
from dynmoe.lab.study import judge
from dynmoe.studies.floors import FULL, KEPT, OTHERS, ROUTERS, ROUTING, TIMES, WATCHED, Shifting


def summary(seed: int, level: float, new: float, old: float, grown: bool) -> dict[str, Any]:
    """A run of two phases of 40 steps that end at a level, with a growth at the shift."""
    noise = 0.01 * seed
    return {
        "final_return": level + noise, "max_return": None, "parameters": 7, "env_steps": 80,
        "curve": [[10 * (i + 1), level + noise] for i in range(8)],
        "shifts": [[0, 0], [1, 40]], "stage_floors": [0, 1],
        "phase_returns": [[40, [level]], [80, [level - noise, level]]],
        "played_shares": [],
        "growth": [{"step": 40}] if grown else [],
        "newest_shares": [[50, [[0, 0.5], [1, 0.5]]], [80, [[0, old - noise], [1, new + noise]]]],
        "routing": {},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["rl-floors", "rl-phases"])
def test_the_verdict_follows_from_the_numbers(name: str) -> None:
    study: Shifting = registry.get("study", name)()
    runs = {}
    for variant in study.variants("laptop"):
        grown = variant.startswith("1 -> ")
        level = 3.0 if variant == "1 -> 2" else 2.0
        never = variant == "1 -> 2, rows kept"
        runs[variant] = [summary(s, level, 0.8, 0.1, grown and not never) for s in range(5)]
        for seed, run in enumerate(runs[variant]):
            told = 0.02 * seed + 0.3 if variant == "1 -> 2" else 0.01 * seed + 0.1
            run["routing"] = {"router/floor_information_share/actor.0": told}
    own = Results({"s": runs}, {"s": {}}, study.experiment(None))  # type: ignore[arg-type]
    full = len(set(FULL) & set(runs))
    assert full == (2 if name == "rl-floors" else 0)
    sentences, comparisons = judge(study, own)
    watched = 2 * len(WATCHED) + len(ROUTING)
    assert len(sentences) == len(OTHERS) * len(study.judged) + len(TIMES) + full + watched
    assert comparisons <= len(sentences)
    assert set(OTHERS) | set(TIMES) | set(WATCHED) <= set(runs)
    told = [text for text in sentences if text.startswith(f"s: 1 -> 2 against {OTHERS[0]}: +1.00")]
    assert told and "higher" in told[0]
    (on,) = (t for t in sentences if t.startswith("s: 1 -> 2: newest expert's share on the floor"))
    assert "+0.740 [" in on and "higher (5 of 5 seeds)" in on  # 0.8 - 0.1 + 0.02 + 0.02
    assert [t for t in sentences if "rows kept: newest" in t and "not measured, no growth" in t]
    (information, routing) = sentences[-len(ROUTING) :]
    assert "what experts could tell of the floor at the end of training: +0.220 [" in information
    assert "higher (5 of 5 seeds)" in information and "SRP" in routing and "not measured" in routing
    ended = Results({"s": {"x": [runs["dense"][0] | {"final_return": None}]}}, {}, own.experiment)
    assert table(ended, "s")[1][:3] == ["x", "no episode ended", "2.00"]
    headings, *rows = table(own, "s")
    assert "recovery, steps" in headings and "SRP" not in headings  # which no run has
    assert len(rows) == len(runs)


def test_routers_are_judged_by_where_their_new_expert_is_used_and_by_return() -> None:
    study = registry.get("study", "rl-routers")()
    runs = {}
    for variant in study.variants("laptop"):
        level, new = (3.0, 0.8) if variant == f"1 -> 2, {KEPT}" else (2.0, 0.1)
        runs[variant] = [summary(s, level, new, 0.1, "->" in variant) for s in range(5)]
    own = Results({"s": runs}, {"s": {}}, study.experiment(None))  # type: ignore[arg-type]
    sentences, _ = judge(study, own)
    assert len(sentences) == 4 * (len(ROUTERS) + 1)
    shares = [text for text in sentences if "on the floor that it came on" in text]
    assert [KEPT in text for text in shares if "higher" in text] == [True]
    against = [text for text in sentences if text.startswith(f"s: 1 -> 2, {KEPT} against ")]
    assert ["2 experts, gaussian" in against[0], "1 expert" in against[1]] == [True, True]
    assert all("+1.00" in text and "higher" in text for text in against)


def test_a_study_of_fewer_agents_judges_those_that_it_has() -> None:
    study = registry.get("study", "rl-phases-long")()
    names = ("1 -> 2", "1 expert", "2 experts", "dense")
    assert tuple(study.variants("laptop")) == names
    assert '"steps": 32768' in study.streams("laptop")["phases"]
    runs = {v: [summary(s, 2.0, 0.8, 0.1, v == "1 -> 2") for s in range(5)] for v in names}
    own = Results({"s": runs}, {"s": {}}, study.experiment(None))  # type: ignore[arg-type]
    sentences, _ = judge(study, own)
    assert len(sentences) == 3 * len(study.judged) + 2 + len(ROUTING)


def test_the_takeover_is_judged_with_and_without_a_new_floor() -> None:
    """Made-up shares that rise where the floor changes, by 0.3 with an expert drawn at random."""
    study = registry.get("study", "rl-takeover")()
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for stream in study.streams("laptop"):
        changes = stream == "next floor"
        for variant in study.variants("laptop"):
            new = 0.8 if changes and variant == study.drawn else 0.5
            own = [summary(s, 2.0, new, 0.1, True) for s in range(5)]
            runs.setdefault(stream, {})[variant] = own
    own = Results(runs, {name: {} for name in runs}, study.experiment(None))  # type: ignore[arg-type]
    sentences, _ = judge(study, own)
    assert len(sentences) == 2 * 4 + 2 * 3 + 1
    rises = [text for text in sentences if "from just after its growth" in text]
    assert ["+0.320 [" in text and "higher" in text for text in rises] == [True, *[False] * 7]
    against = [text for text in sentences if f" against {study.drawn}: " in text]
    assert ["lower" in text for text in against] == [True] * 3 + [False] * 3
    assert "the rise on the next floor less that on the same floor: +0.300" in sentences[-1]
    assert study.verdict(Results({"next floor": runs["next floor"]}, {}, own.experiment))


def test_routers_on_craftax_are_judged_by_floor() -> None:
    study = registry.get("study", "rl-craftax-routers")()
    assert list(study.streams("laptop")) == ["next floor"]
    assert study.variants("laptop")["softmax"].endswith("--trigger.steps 24576 --router softmax")
    runs = {}
    for name in study.variants("laptop"):
        runs[name] = [summary(s, 2.0, 0.8 if name == "softmax" else 0.1, 0.1, True)
                      for s in range(5)]  # fmt: skip
    own = Results({"next floor": runs}, {"next floor": {}}, study.experiment(None))  # type: ignore[arg-type]
    sentences, _ = judge(study, own)
    assert len(sentences) == 2 * 4 + 2 * 3
    shares = [text for text in sentences if "on the floor that it came on" in text]
    assert ["softmax" in text for text in shares if "higher" in text] == [True]
