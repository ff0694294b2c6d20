"""The law on packages: who may import whom, and what an import and `--help` may cost."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dynmoe
from dynmoe import registry

ROOT = Path(__file__).parents[2]
HEAVY = ("avalanche", "torchvision", "timm", "jax", "matplotlib", "tensorboard", "sklearn", "scipy")
LIBRARY = tuple(
    f"dynmoe.{name}" for name in ("moe", "growth", "plasticity", "interventions", "tta", "dg")
)
BASE = ("dynmoe.errors", "dynmoe.ranges", "dynmoe.registry", "dynmoe.seeding")
"""What every package may use."""
NEIGHBOURS = ("cl_benchmarks", "agents", "envs")
OURS = ("dynmoe", *NEIGHBOURS)
CORE = ("dynmoe.moe", "dynmoe.growth", "dynmoe.plasticity")
COMMANDS = ("dynmoe.tta.__main__", "dynmoe.dg.__main__")
"""Files that stand above the package they lie in."""
SCENES = ("cl_benchmarks.domains.craftax", "envs.craftax_scenes")
"""The one data set that is drawn by a game, and what it takes from it."""
DATA = tuple(f"cl_benchmarks.{name}" for name in (
    "images", "datasets", "protocol", "protocols", "fractals", "stream", "styles", "rehearsal",
    "shifts", "domains", "domain_set", "backbone",
))  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in OURS
    for path in sorted((ROOT / package).rglob("*.py"))
}
"""Module -> its file."""


def _nodes(tree: ast.AST, functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run; those in functions only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _nodes(ast.Module([other], []), functions)
        elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _nodes(node, functions)


def _imports(source: str, functions: bool = True) -> set[str]:
    """Full names of the modules and members that a piece of code imports."""
    names: set[str] = set()
    for node in _nodes(ast.parse(source), functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert node.level == 0 and node.module, "relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _is_in(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _backward(source: str, forbidden: Iterable[str], allowed: Iterable[str] = ()) -> set[str]:
    """What a piece of code imports of the forbidden packages, but for what is allowed in them.

    A package's own name is left out, so that `dynmoe` may be forbidden and `dynmoe.moe` allowed.
    """
    allowed = tuple(allowed)
    names = {name for name in _imports(source) if _is_in(name, forbidden)}
    above = {name for name in names if any(_is_in(one, [name]) for one in allowed)}
    return {name for name in names - above if not _is_in(name, allowed)}


def _modules(packages: Iterable[str]) -> list[str]:
    """Modules of these packages, commands apart; each package must have one."""
    found = []
    for package in packages:
        inside = [m for m in FILES if _is_in(m, [package]) and m not in COMMANDS]
        assert inside, package
        found += inside
    return found


LAW: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "library": (LIBRARY, OURS, (*LIBRARY, *BASE)),
    "core": (CORE, (*OURS, "avalanche", "jax", "gymnasium", "craftax"), (*CORE, *BASE)),
    "integrations": (("dynmoe.integrations",), OURS, ("dynmoe.integrations", *LIBRARY, *BASE)),
    "lab": (("dynmoe.lab",), OURS, ("dynmoe.lab", "dynmoe.__version__", *BASE)),
    "base": (BASE, OURS, BASE),
    "data": (DATA, OURS, (*DATA, "dynmoe.lab.cache", "dynmoe.lab.files", *BASE)),
    "envs": (("envs",), OURS, ("envs", "dynmoe.lab", *BASE)),
    "networks": (
        ("cl_benchmarks.networks", "cl_benchmarks.trunks"),
        (*OURS, "avalanche"),
        ("cl_benchmarks.trunks", *LIBRARY, *BASE),
    ),
    "agents": (("agents",), OURS, ("agents", "envs", "dynmoe.lab", *LIBRARY, *BASE)),
    "benchmarks": (
        ("cl_benchmarks",),
        OURS,
        ("cl_benchmarks", "dynmoe.lab", SCENES[1], *LIBRARY, *BASE),
    ),
}
"""Part -> (its packages, packages that it may not import, but for these)."""


@pytest.mark.parametrize("part", LAW)
def test_no_import_points_backward(part: str) -> None:
    packages, forbidden, allowed = LAW[part]
    wrong = {}
    for module in _modules(packages):
        own = (*allowed, SCENES[1]) if module == SCENES[0] else allowed
        if found := _backward(FILES[module].read_text(), forbidden, own):
            wrong[module] = found
    assert wrong == {}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("library", "from dynmoe.lab import cache"),
        ("library", "def f():\n    from dynmoe.lab.run import Run"),
        ("library", "from dynmoe import experiments, errors"),
        ("library", "import cl_benchmarks.shifts"),
        ("core", "def f():\n    import jax.numpy as jnp"),
        ("core", "from dynmoe.tta import adapt"),
        ("lab", "from dynmoe import moe"),
        ("lab", "import dynmoe.plasticity.tasks"),
        ("lab", "if True:\n    import torch, envs"),
        ("data", "from dynmoe.moe.layer import MoELayer"),
        ("data", "from dynmoe.lab.run import Run"),
        ("data", "from cl_benchmarks.method import Method"),
        ("data", "from envs import make"),
        ("agents", "from cl_benchmarks.interventions import Replay"),
        ("benchmarks", "from envs.vector import Info"),
        ("envs", "from dynmoe import growth"),
    ],
)
def test_a_backward_import_is_found(part: str, source: str) -> None:
    _, forbidden, allowed = LAW[part]
    assert _backward(source, forbidden, allowed)


def test_other_imports_are_let_through() -> None:
    _, forbidden, allowed = LAW["library"]
    for source in (
        "from dynmoe import registry",
        "from dynmoe.moe.layer import MoELayer",
        "import jax, dynmoetta, agents_of_mine",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dynmoe.lab.run import Run",
    ):
        assert not _backward(source, forbidden, allowed), source


def _package(module: str) -> str:
    """`dynmoe.moe` of `dynmoe.moe.layer`, `agents` of `agents.ppo`; a command is its own."""
    if module in COMMANDS or not module.startswith("dynmoe."):
        return module if module in COMMANDS else module.split(".")[0]
    return ".".join(module.split(".")[:2])


def _arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among the sources that it imports, wherever it does so."""
    return {
        module: {
            name for node in _nodes(ast.parse(source), True) for name in _targets(node, sources)
        }
        - {module}
        for module, source in sources.items()
    }


def _targets(node: ast.Import | ast.ImportFrom, modules: Iterable[str]) -> set[str]:
    """Modules that a statement imports: `from dynmoe import seeding` is an arrow to seeding."""
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    else:
        members = {f"{node.module}.{alias.name}" for alias in node.names}
        names = {name if name in modules else str(node.module) for name in members}
    return {name for name in names if name in modules}


def _circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """One circle of arrows, or nothing."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _between_packages(arrows: Mapping[str, set[str]]) -> dict[str, set[str]]:
    joined: dict[str, set[str]] = {}
    for module, others in arrows.items():
        own = _package(module)
        joined.setdefault(own, set()).update({_package(other) for other in others} - {own})
    return joined


def test_no_circle_between_files_or_packages() -> None:
    arrows = _arrows({module: path.read_text() for module, path in FILES.items()})
    assert _circle(arrows) == []
    assert _circle(_between_packages(arrows)) == []


def test_a_circle_is_found() -> None:
    files = {"agents.a": "def f():\n    import envs.b", "envs.b": "from envs import c"}
    files |= {"envs.c": "", "agents.d": "", "envs.e": "from agents import d"}
    arrows = _arrows(files)
    assert _circle(arrows) == []
    assert set(_circle(_between_packages(arrows))) == {"agents", "envs"}
    assert _arrows({"a": "from a.b import x\nfrom a import y", "a.b": ""}) == {
        "a": {"a.b"},
        "a.b": set(),
    }
    assert _arrows({"a": "", "a.b": "", "c": "from a.b import x\nfrom a import y"})["c"] == {
        "a",
        "a.b",
    }
    back = _arrows({**files, "envs.c": "import agents.a"})
    assert set(_circle(back)) == {"agents.a", "envs.b", "envs.c"}


def _foreign(source: str) -> set[str]:
    """What is imported when the module is loaded, beyond torch, numpy and python's own."""
    allowed = (*sys.stdlib_module_names, "torch", "numpy", "dynmoe")
    return {name for name in _imports(source, functions=False) if not _is_in(name, allowed)}


def test_the_library_imports_only_torch_and_numpy_at_the_top() -> None:
    found = {module: _foreign(FILES[module].read_text()) for module in _modules(LIBRARY)}
    assert {module: names for module, names in found.items() if names} == {}
    assert _foreign("try:\n    import timm\nexcept ImportError:\n    pass") == {"timm"}
    assert not _foreign("def f():\n    import timm")


def _loaded_by(code: str) -> set[str]:
    """Modules that a process of its own has after running the code."""
    full = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(full, cwd=ROOT, capture_output=True, text=True).stdout.split())


def test_importing_the_library_is_cheap() -> None:
    assert {"dynmoe"} == {name for name in _loaded_by("import dynmoe") if _is_in(name, OURS)}
    assert "torch" not in _loaded_by("import dynmoe")
    loaded = _loaded_by("import dynmoe\nfor name in dynmoe.__all__: getattr(dynmoe, name)")
    assert {"torch", "dynmoe.moe.layer", "dynmoe.tta.adapter"} <= loaded
    others = (*HEAVY, *NEIGHBOURS, "dynmoe.lab", "tyro", "rich", "PIL")
    assert {name for name in loaded if _is_in(name, others)} == set()


def test_the_public_surface_is_what_it_says() -> None:
    assert dynmoe.__all__ == sorted(dynmoe.__all__) and set(dynmoe.__all__) <= set(dir(dynmoe))
    tree = ast.parse((ROOT / "dynmoe/__init__.py").read_text())
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    named = [a for node in ast.walk(typed) if isinstance(node, ast.ImportFrom) for a in node.names]
    assert sorted(alias.asname or alias.name for alias in named) == dynmoe.__all__
    for node in ast.walk(typed):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            module = __import__(str(node.module), fromlist=[alias.name])
            assert getattr(dynmoe, alias.asname or alias.name) is getattr(module, alias.name)
    with pytest.raises(AttributeError, match="no attribute 'MoeLayer'"):
        dynmoe.MoeLayer  # noqa: B018


def _run(*command: str) -> tuple[str, set[str]]:
    """Output of a command in a process of its own, and what it imported, by python's own list."""
    full = [sys.executable, "-X", "importtime", "-m", *command]
    done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    loaded = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    return " ".join(done.stdout.split()), loaded


@pytest.mark.parametrize("argv", [["--help"], ["router"]], ids=" ".join)
def test_listing_is_cheap(argv: list[str]) -> None:
    text, loaded = _run("dynmoe.list", *argv)
    assert {"tyro", "dynmoe.registry"} <= loaded and "router" in text
    others = ("agents", "cl_benchmarks", "envs", "gymnasium")
    assert {name for name in loaded if _is_in(name, (*HEAVY, *others))} == set()


def test_help_is_cheap_and_complete() -> None:
    text, loaded = _run("dynmoe.cl", "--help")
    assert {"torch", "dynmoe.registry"} <= loaded
    assert {name for name in loaded if _is_in(name, HEAVY)} == set()
    for kind in ("method", "protocol", "dataset", "router", "trigger", "network"):
        assert f"--{kind} " in text
        for name in registry.names(kind):
            assert name in text
    assert re.search(r"Cost: .*\bpaper \(.*\d+ million images", text)
