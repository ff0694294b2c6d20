"""The code on the how-to pages runs as pasted: parts of one's own, an environment, a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dynmoe import registry
from dynmoe.growth import GrowthController, Signals
from dynmoe.moe import MoELayer

PAGES = Path(__file__).parents[2] / "docs" / "howto"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder on python's path; parts that a page adds are forgotten after it."""
    for kind, known in registry._PARTS.items():
        monkeypatch.setitem(registry._PARTS, kind, dict(known))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def paste(page: str, folder: Path) -> dict[str, object]:
    """Write the page's files, then run its other python blocks; what these defined."""
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(), re.DOTALL):
        if file := re.match(r"# (my_\w+\.py)\n", block):
            (folder / file.group(1)).write_text(block)
        else:
            exec(compile(block, page, "exec"), names)
    return names


def module(page: str, name: str, folder: Path) -> ModuleType:
    paste(page, folder)
    return __import__(name)


def test_the_trigger(folder: Path) -> None:
    trigger = module("trigger.md", "my_trigger", folder).HighLoss
    layer = MoELayer(4, 4, hidden=8, num_experts=2, max_experts=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    config = trigger.Config(level=1.5, steps=2, limit=1)
    controller = GrowthController(layer, optimizer, granularity=2, trigger=config)
    losses = [2.0, 1.0, 2.0, float("nan"), 2.0, 2.0, 2.0, 2.0]
    experts = []
    for step, loss in enumerate(losses):
        controller.step(Signals(step=step, loss=loss))
        experts.append(layer.num_experts)
    assert experts == [2, 2, 2, 2, 2, 4, 4, 4]  # two in a row, and no more than one growth
    assert registry.get("trigger", "high-loss") is trigger


def test_the_intervention(folder: Path) -> None:
    names = paste("intervention.md", folder)
    intervention, model = names["intervention"], names["model"]
    for name, first in intervention.first.items():  # type: ignore[attr-defined]
        largest = dict(model.named_parameters())[name].abs().max()  # type: ignore[attr-defined]
        assert largest == first  # steps of 10 went beyond, and were clipped


def test_the_environment(folder: Path) -> None:
    names = paste("environment.md", folder)
    assert names["observations"].shape == (4, 7)  # type: ignore[attr-defined]
    game = __import__("my_games").Corridor(3)
    game.reset()
    steps = [game.step(1) for _ in range(2)]
    assert [(reward, done) for _, reward, done, _, _ in steps] == [(0.0, False), (1.0, True)]
    assert np.array_equal(steps[-1][0], [0, 0, 1])


def test_the_model(folder: Path) -> None:
    torch.manual_seed(0)
    names = paste("model.md", folder)
    assert names["model"][1].num_experts == 4  # type: ignore[index]
    assert names["logits"].shape == (8, 10)  # type: ignore[attr-defined]


def test_the_study(folder: Path) -> None:
    study = module("study.md", "my_study", folder).MyRouters
    assert registry.get("study", "my-routers") is study
    assert study().streams("laptop") == {"shuffle": "--preset smoke --protocol shuffle"}
