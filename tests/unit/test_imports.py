"""Arrows point one way: who may import whom, and what `--help` may cost."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynmoe import registry

ROOT = Path(__file__).parents[2]
HEAVY = ("avalanche", "torchvision", "timm", "jax", "matplotlib", "tensorboard", "sklearn", "scipy")
MODEL_CODE = (
    "dynmoe.moe",
    "dynmoe.growth",
    "cl_benchmarks.networks",
    "dynmoe.nets",
    "dynmoe.plasticity",
)
STRATEGIES = ("dynmoe.interventions.intervention", "dynmoe.interventions")
"""What keeps networks plastic works in any training loop, so agents may import it."""
SCENES = ("cl_benchmarks/domains/craftax.py", "envs.craftax_scenes")
"""The one data set that is drawn by a game, and what it takes from it."""
CORE = ["dynmoe/moe", "dynmoe/growth", "dynmoe/plasticity"]
DATA = [f"cl_benchmarks/{name}" for name in (
    "images.py", "dataset.py", "datasets", "protocol.py", "protocols", "fractals.py", "stream.py",
    "shifts",
    "domains", "domain_set.py", "domain_tree.py", "domain_split.py", "domain_images.py",
    "domain_styles.py", "backbone.py",
)]  # fmt: skip


def _files(places: list[str]) -> list[Path]:
    """Python files in these folders and files; each place must have one."""
    found = []
    for place in places:
        path = ROOT / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert files and files[0].is_file(), place
        found += files
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules and members that a piece of code imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_the_top(tree: ast.Module) -> Iterator[str]:
    """The same for imports that run when the module is loaded."""
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield from _imports(statement)


def _is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _backward(source: str, forbidden: tuple[str, ...]) -> set[str]:
    return {name for name in _imports(ast.parse(source)) if _is_in(name, forbidden)}


@pytest.mark.parametrize(
    ("places", "forbidden"),
    [
        (CORE, ("cl_benchmarks", "envs", "agents", "avalanche", "jax", "gymnasium", "craftax")),
        (DATA, (*MODEL_CODE, "dynmoe.cl", "dynmoe.lab.run", "agents", "envs")),
        (["envs"], ("dynmoe.moe", "dynmoe.growth", "agents", "cl_benchmarks")),
        (["agents"], ("cl_benchmarks",)),  # but for STRATEGIES
        (
            ["dynmoe/nets", "cl_benchmarks/networks.py"],
            ("cl_benchmarks", "envs", "agents", "avalanche"),
        ),
    ],
)
def test_no_import_points_backward(places: list[str], forbidden: tuple[str, ...]) -> None:
    wrong = {}
    for path in _files(places):
        found = _backward(path.read_text(), forbidden)
        if places == ["agents"]:
            found = {name for name in found if not _is_in(name, STRATEGIES)}
        if path == ROOT / SCENES[0]:
            found = {name for name in found if not _is_in(name, (SCENES[1],))}
        if found:
            wrong[str(path.relative_to(ROOT))] = found
    assert wrong == {}


def test_interventions_need_no_framework_at_the_top() -> None:
    """Nor anything of `cl_benchmarks` that knows Avalanche or how a run is made."""
    shared = [f"cl_benchmarks/{m}.py" for m in ("anchor", "periodic", "units", "weights")]
    files = _files([*shared, "dynmoe/interventions/intervention.py", "dynmoe/interventions"])
    bound = ("trainer", "experiment", "recorder", "method", "methods", "settings", "growth_plugin")
    forbidden = (*HEAVY, "agents", "envs", *(f"cl_benchmarks.{name}" for name in bound))
    for path in files:
        names = set(_at_the_top(ast.parse(path.read_text())))
        assert {name for name in names if _is_in(name, forbidden)} == set(), path


def test_backward_imports_are_found_in_every_form() -> None:
    for source in (
        "import jax.numpy as jnp",
        "def f():\n    from jax import numpy",
        "if x:\n    import torch, jax",
    ):
        assert _backward(source, ("jax",)), source
    assert _backward("from dynmoe import moe", ("dynmoe.moe",)) == {"dynmoe.moe"}
    assert not _backward("import jaxtyping, ajax\nfrom dynmoe import moetta", ("jax", "dynmoe.moe"))


def test_core_imports_only_torch_and_numpy_at_the_top() -> None:
    allowed = (*sys.stdlib_module_names, "torch", "numpy", "dynmoe")
    wrong = {
        (str(path.relative_to(ROOT)), name)
        for path in _files(CORE)
        for name in _at_the_top(ast.parse(path.read_text()))
        if not _is_in(name, allowed)
    }
    assert wrong == set()


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
    assert {"torch", "tyro", "dynmoe.registry"} <= loaded
    assert {name for name in loaded if _is_in(name, HEAVY)} == set()
    for kind in ("method", "protocol", "dataset", "router", "trigger", "network"):
        assert f"--{kind} (default: " in text
        for name in registry.names(kind):
            assert f" {name}: {registry.summary(kind, name)[:30]}" in text
    assert re.search(r"Cost: .*\bpaper \(.*\d+ million images", text)
