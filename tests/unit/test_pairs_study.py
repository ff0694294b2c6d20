"""The study of two-class tasks: its settings, blocks of tasks, and words that follow from them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from dynmoe import cl
from dynmoe.lab.config import parse
from dynmoe.lab.experiment import Results
from dynmoe.studies.pairs import BLOCKS, TASKS, Pairs, by_block


def _run(start: float, end: float) -> dict[str, Any]:
    """A run of 40 tasks whose test accuracy goes straight from one value to another."""
    steps = [start + (end - start) * k / 39 for k in range(40)]
    return {"tasks": [{"test_accuracy": x} for x in steps], "dataset": "photos"}


def test_every_variant_runs_and_none_has_an_option_without_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = Pairs()
    choices = [own for found in study.searches("laptop").values() for own in found]
    for base in study.streams("laptop").values():
        for own in [*study.variants("laptop").values(), *choices]:
            config = parse(cl.presets(), shlex.split(f"{base} {own} --compare"), "study", "")[1]
            assert (config.chunks, config.dataset.classes) == (TASKS, 50)
    (tmp_path / "data" / "tiny-imagenet-200" / "train").mkdir(parents=True)
    assert "--dataset tiny-imagenet" in study.streams("laptop")["pairs"]


def test_blocks_are_means_of_tenths() -> None:
    found = by_block(_run(0.0, 0.39))
    assert len(found) == BLOCKS and found == pytest.approx([0.015 + 0.04 * k for k in range(10)])
    assert by_block({"tasks": [{"test_accuracy": x} for x in (0.1, 0.2)]})[::9] == [0.1, 0.2]


def test_words_follow_from_the_first_and_the_last_tenth() -> None:
    noise = (-0.01, 0.0, 0.01)
    held = {v: [_run(0.8, 0.8 + n) for n in noise] for v in ("l2-init", "cbp", "shrink-perturb")}
    runs = {"dense": [_run(0.8, 0.6 + n) for n in noise], **held}
    said = Pairs().verdict(Results({"pairs": runs}, {}, cl.experiment()))
    assert (
        "dense: test accuracy 79.2 % in the first tenth of the tasks, 60.8 % in the last" in said[0]
    )
    assert said[0].endswith("falls.") and said[1].endswith("no change seen.")
    assert any(s.startswith("pairs: cbp against dense") and s.endswith("higher.") for s in said)
    assert "The published order is met: l2-init, cbp, shrink-perturb end above dense." in said
    runs["cbp"] = runs["dense"]
    said = Pairs().verdict(Results({"pairs": runs}, {}, cl.experiment()))
    assert "Not shown of the published order: that cbp end above dense." in said
