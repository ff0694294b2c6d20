"""The code on the how-to pages runs as pasted, and the commands of all pages can be given.

The commands are not run: their flags are read. Those with a shell's variables are left out.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import dynmoe.dg.__main__ as dg
import dynmoe.tta.__main__ as tta
import envs
from dynmoe import cl, registry, rl
from dynmoe.growth import GrowthController, Signals
from dynmoe.lab.config import parse
from dynmoe.moe import MoELayer

ROOT = Path(__file__).parents[2]
HOWTO = ROOT / "docs" / "howto"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIRST = {"README.md", "index.md", "howto"}
"""Pages (and folders of pages) whose commands are read by default; those of others are slow."""
COMMANDS = {"cl": cl, "rl": rl, "tta": tta, "dg": dg}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder on python's path; parts that a page adds are forgotten after it."""
    for kind, known in registry._PARTS.items():
        registry.names(kind)  # what is imported later would be forgotten, too
        monkeypatch.setitem(registry._PARTS, kind, dict(known))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("my_", "own_")):
            del sys.modules[name]


def paste(page: str, folder: Path) -> dict[str, object]:
    """Write the page's files, then run its other python blocks; what these defined."""
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (HOWTO / page).read_text(), re.DOTALL):
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
    one = {"name": "my_games:Corridor-v0", "frames": 3, "size": 4}
    stacked = envs.make("my_stacks:Stacked-v0", num_envs=2, env_args=one)
    seen, _ = stacked.reset()
    assert seen.shape == (2, 3, 4) and stacked.resumable
    seen = stacked.step([1, 0])[0]
    assert seen.argmax(dim=2).tolist() == [[0, 0, 1], [0, 0, 0]]  # places, the latest last
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


def test_the_first_page(folder: Path) -> None:
    names = paste("../index.md", folder)
    assert names["model"][0].num_experts == 4 and names["logits"].shape == (32, 10)  # type: ignore


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each `python -m dynmoe...` line in the page's blocks of shell commands."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if "-m dynmoe." in line and "$" not in line and "..." not in line:
                yield shlex.split(line.partition("-m dynmoe.")[2], comments=True)


CASES = [
    pytest.param(page, id=str(page.relative_to(ROOT)),
                 marks=() if FIRST & {page.name, page.parent.name} else pytest.mark.slow)
    for page in PAGES if "studies" not in page.parts and list(commands(page))
]  # fmt: skip


@pytest.mark.parametrize("page", CASES)
def test_commands_can_be_given(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, text in re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", page.read_text(), re.S):
        (folder / file).write_text(text)
        if "name=" in text:  # a part
            monkeypatch.setenv(registry.VARIABLE, file)
    for name, *words in commands(page):
        if name in COMMANDS and "--help" not in words:
            parse(COMMANDS[name].presets(), words, name, "What it does.")
        elif name == "study" and words[0] != "--list":
            registry.get("study", words[0])
