"""Parts from files and packages outside the repository; the example is the one in the docs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cl_benchmarks.settings import Config
from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.lab.config import from_dict, to_dict
from dynmoe.moe import MoELayer

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "own_parts.md").read_text()
EXAMPLE = re.findall(r"```python\n(# my_router\.py\n.*?)```", DOC, re.DOTALL)[0]
PRUNING = '''from dynmoe.growth.pruning import PruningCriterion


class Mine(PruningCriterion, name="{name}"):
    """A pruning criterion for a test."""
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; the parts that a test adds are forgotten after it."""
    for kind, known in registry._PARTS.items():
        monkeypatch.setitem(registry._PARTS, kind, dict(known))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.fixture
def example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The doc's file, named in the environment variable."""
    (folder / "my_router.py").write_text(EXAMPLE)
    monkeypatch.setenv("DYNMOE_PARTS", "my_router.py")
    return folder / "my_router.py"


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module of dynmoe in a process of its own, in a folder of the user's."""
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    environment = {k: v for k, v in os.environ.items() if k != "DYNMOE_PARTS"} | environment
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def install(folder: Path, value: str, before: str = "") -> str:
    """A site folder that holds an installed package `my-parts`; its path."""
    site = folder / "site"
    (site / "my_parts").mkdir(parents=True)
    (site / "my_parts" / "__init__.py").touch()
    (site / "my_parts" / "my_router.py").write_text(
        EXAMPLE.replace("class My", f"{before}\n\nclass My")
    )
    info = site / "my_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dynmoe.parts]\nrouters = {value}\n")
    return str(site)


def message(kind: str = "router") -> str:
    """The error that asking for names ends in."""
    with pytest.raises(UserError) as caught:
        registry.names(kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# the doc's example on the command line -----------------------------------------------------------

SMALL = "--preset smoke --compare --chunks 2 --epochs 1 --eval-samples 60 --probe-samples 40"


@pytest.mark.slow
def test_the_docs_router_trains_and_resumes_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "my_router.py").write_text(EXAMPLE)
    chosen = [*SMALL.split(), "--router", "mine", "--router.share", "0.2", "--name", "x"]
    done = run("dynmoe.cl", *chosen, folder=tmp_path, DYNMOE_PARTS="my_router.py")
    assert done.returncode == 0, done.stderr
    saved = tmp_path / "runs" / "cl" / "x" / "seed-0"
    settings = json.loads((saved / "config.json").read_text())
    assert settings["router"] == {"part": "mine", "share": 0.2}
    summary = json.loads((saved / "summary.json").read_text())
    assert [task["num_experts"] for task in summary["tasks"]] == [2, 4]
    (session,) = json.loads((saved / "environment.json").read_text())["sessions"]
    digest = hashlib.sha256(EXAMPLE.encode()).hexdigest()
    assert session["own_parts"] == [f"{(tmp_path / 'my_router.py').resolve()} {digest}"]

    (saved / "summary.json").unlink()
    lost = run("dynmoe.cl", *chosen, "--resume", folder=tmp_path)
    assert lost.returncode == 2
    assert lost.stderr.startswith("error: unknown router 'mine'; known: ")
    assert lost.stderr.endswith("If it is your own, name its file in DYNMOE_PARTS.\n")
    done = run("dynmoe.cl", *chosen, "--resume", folder=tmp_path, DYNMOE_PARTS="my_router.py")
    assert done.returncode == 0, done.stderr
    assert json.loads((saved / "summary.json").read_text())["tasks"] == summary["tasks"]


@pytest.mark.slow
def test_a_sweeps_processes_know_it(tmp_path: Path) -> None:
    (tmp_path / "my_router.py").write_text(EXAMPLE)
    sweep = ["cl", "--name", "s", "--seeds", "1", "--jobs", "1", "--variants"]
    sweep += ["low: --router.share 0.1"]
    flags = ["--", *SMALL.split(), "--chunks", "2", "--router", "mine"]
    done = run("dynmoe.sweep", *sweep, *flags, folder=tmp_path, DYNMOE_PARTS="my_router.py")
    assert done.returncode == 0, done.stderr
    saved = [json.loads(path.read_text())["router"] for path in tmp_path.rglob("config.json")]
    assert [(router["part"], router["share"]) for router in saved] == [("mine", 0.1)]


# packages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "before"),
    [
        ("my_parts.my_router", ""),
        ("my_parts.my_router:MyRouter", "import dynmoe.registry as r; r.names('pruning')\n"),
    ],
    ids=["module", "class"],
)
def test_an_installed_packages_parts_are_found(tmp_path: Path, value: str, before: str) -> None:
    """The second asks for names while it is being imported."""
    site = install(tmp_path, value, before)
    done = run("dynmoe.list", "router", folder=tmp_path, PYTHONPATH=site)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.split("  router mine\n")[1].splitlines()
    assert lines[:4] == [
        "      Softmax gates, a share of which is spread evenly: no expert starves.",
        "      source: ours",
        "      options: share=0.1",
        f"      defined in: {tmp_path / 'site' / 'my_parts' / 'my_router.py'}",
    ]


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("my_parts.gone", "ModuleNotFoundError: No module named 'my_parts.gone'"),
        ("my_parts.my_router:Gone", "has no attribute 'Gone'"),
        ("my_parts.my_router:__name__", "it is neither a module nor a class"),
    ],
)
def test_a_broken_package_is_named_in_one_line(tmp_path: Path, value: str, reason: str) -> None:
    site = install(tmp_path, value)
    done = run("dynmoe.list", "router", folder=tmp_path, PYTHONPATH=site)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"error: {value}, declared as dynmoe.parts 'routers' by the package my-parts, cannot be "
        "loaded: "
    )
    assert reason in done.stderr and done.stderr.count("\n") == 1


def test_the_docs_package_declares_what_is_read() -> None:
    declared = f'[project.entry-points."{registry.GROUP}"]\nrouters = "my_parts.my_router"\n'
    assert declared in DOC and registry.VARIABLE in DOC


# files -------------------------------------------------------------------------------------------


def test_settings_find_an_own_part_by_name(example: Path) -> None:
    config = Config(router=registry.get("router", "mine").Config(share=0.3))
    values = json.loads(json.dumps(to_dict(config)))
    assert values["router"] == {"part": "mine", "share": 0.3}
    assert from_dict(Config, values) == config


def test_the_docs_router_does_what_it_says(example: Path) -> None:
    """Gates against a loop, then three steps, a growth, three steps, all in one compiled graph."""
    torch.manual_seed(0)
    config = registry.get("router", "mine").Config(share=0.2)
    layer = MoELayer(4, 3, hidden=12, num_experts=2, max_experts=4, router=config).double()
    controller = GrowthController(layer, torch.optim.Adam(layer.parameters()), granularity=1)
    torch._dynamo.reset()
    graph = torch.compile(layer, backend="eager", fullgraph=True)
    for experts in (2, 3):
        for _ in range(3):
            x = torch.randn(5, 4, dtype=torch.float64)
            assert torch.equal(graph(x), layer(x))
            controller.optimizer.zero_grad()
            graph(x).square().mean().backward()
            assert layer.router.weight.grad.abs().sum() > 0
            controller.optimizer.step()
        gates = layer.router(x).gates.detach()
        for row, sample in zip(gates, x, strict=True):
            scores = [float((w @ sample).exp()) for w in layer.router.weight.detach()[:experts]]
            for e, score in enumerate(scores):
                expected = 0.8 * score / sum(scores) + 0.2 / experts
                assert abs(float(row[e]) - expected) < 1e-12
            assert (row[experts:] == 0).all()
        if experts == 2:
            controller.grow(0, probe=(x, None))
    with pytest.raises(UserError, match=r"share=1\.5 must be between 0 and 1"):
        MoELayer(4, 3, hidden=12, router=registry.get("router", "mine").Config(share=1.5))


def test_the_docs_router_has_initial_weights_as_any_other(example: Path) -> None:
    """Its constructor says nothing about them, nor does it define a reset."""

    def make() -> MoELayer:
        config = registry.get("router", "mine").Config()
        return MoELayer(4, 3, hidden=12, num_experts=2, max_experts=4, router=config)

    torch.manual_seed(1)
    direct = make()
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), direct.state_dict(), rtol=0, atol=0)


def test_a_file_is_imported_once_whatever_it_is_called(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        PRUNING.format(name="mine") + "\nwith open('count', 'a') as file:\n    file.write('x')\n"
    )
    (folder / "my-pruning.py").write_text(source)
    both = os.pathsep.join(["my-pruning.py", "", str(folder / "my-pruning.py")])
    monkeypatch.setenv("DYNMOE_PARTS", both)
    assert "mine" not in registry.names("router")  # of any kind: the file is imported all the same
    assert "mine" in registry.names("pruning") and "mine" in registry.names("pruning")
    assert (folder / "count").read_text() == "x"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")  # where the relative path leads nowhere
    assert "mine" in registry.names("pruning")
    assert registry.get("pruning", "mine").__module__ == "own_my_pruning"


def test_a_script_may_import_a_file_that_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable stays set in the shell in which the file is then imported as in any script."""
    (folder / "my_part.py").write_text(PRUNING.format(name="mine-too"))
    monkeypatch.setenv("DYNMOE_PARTS", "my_part.py")
    script = "from dynmoe import registry\n"
    first, then = "from my_part import Mine\n", "got = registry.get('pruning', 'mine-too')\n"
    for order in (first + then, then + first):
        (folder / "script.py").write_text(script + order + "assert got.name == Mine.name\n")
        found = subprocess.run(
            [sys.executable, "script.py"], env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert found.stderr == ""


def test_a_file_may_ask_for_names_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "first.py").write_text(
        "from dynmoe import registry\n"
        "class Mine(registry.get('pruning', 'second'), name='first-own'):\n    '''A criterion.'''\n"
    )
    (folder / "second.py").write_text(PRUNING.format(name="second"))
    monkeypatch.setenv("DYNMOE_PARTS", os.pathsep.join(["first.py", "second.py"]))
    assert {"first-own", "second"} <= set(registry.names("pruning"))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("gone.py", None, "there is no such file"),
        ("part.txt", "", "it must be a python file (.py)"),
        ("bad.py", "class Mine(:\n", "SyntaxError: invalid syntax (bad.py, line 1)"),
        ("bad.py", "import math\nmath.nothing\n", "AttributeError: module 'math' has no"),
        ("bad.py", "raise ValueError('two\\n  lines')", "ValueError: two lines"),
        ("bad.py", PRUNING.format(name="utility"),
         "pruning 'utility' is defined by dynmoe.growth.pruning.UtilityUnits and again by "
         "own_bad.Mine; rename one"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_imported_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, reason: str
) -> None:
    registry.names("pruning")
    if text is not None:
        (folder / name).write_text(text)
    monkeypatch.setenv("DYNMOE_PARTS", name)
    for kind in ("router", "router", "pruning"):  # it stays an error
        line = message(kind)
        assert line.startswith(f"{name}, named in DYNMOE_PARTS, cannot be loaded: {reason}")
    assert "own_bad" not in sys.modules
    (folder / name).unlink(missing_ok=True)
    (folder / "mended.py").write_text(PRUNING.format(name="mended"))
    monkeypatch.setenv("DYNMOE_PARTS", "mended.py")
    assert "mended" in registry.names("pruning")


def test_two_files_of_one_name_are_told_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("a", "b"):
        (folder / place).mkdir()
        (folder / place / "pruning.py").write_text(PRUNING.format(name=place))
    files = [str(Path(place) / "pruning.py") for place in ("a", "b")]
    monkeypatch.setenv("DYNMOE_PARTS", os.pathsep.join(files))
    line = message("pruning")
    assert line.startswith(f"{files[1]}, named in DYNMOE_PARTS, cannot be loaded: ")
    assert f"{(folder / files[0]).resolve()} has the same name; rename one of them" in line


NETWORK = '''from cl_benchmarks.trunks import Trunk


class Mine(Trunk, name="mlp"):
    """A network for a test."""
'''


def test_a_name_that_is_taken_is_one_line_at_the_command_line(tmp_path: Path) -> None:
    """Also where all kinds are listed."""
    (tmp_path / "mine.py").write_text(NETWORK)
    last = run("dynmoe.list", "network", folder=tmp_path, DYNMOE_PARTS="mine.py")
    assert (last.returncode, last.stdout) == (2, "")
    assert last.stderr == (
        "error: mine.py, named in DYNMOE_PARTS, cannot be loaded: network 'mlp' is defined by "
        "cl_benchmarks.trunks.MLP and again by own_mine.Mine; rename one\n"
    )
    first = run("dynmoe.list", folder=tmp_path, DYNMOE_PARTS="mine.py")
    assert first.returncode == 2
    assert first.stderr == (
        "error: mine.py, named in DYNMOE_PARTS, cannot be loaded: network 'mlp' is defined by "
        "cl_benchmarks.trunks.MLP and again by own_mine.Mine; rename one\n"
    )
