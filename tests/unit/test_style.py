"""Rules of the house that no linter checks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("dynmoe", "cl_benchmarks", "envs", "agents", "benchmarks")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PROSE = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("docs/**/*.md")]
PROSE += ROOT.glob("docs/**/*.ipynb")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
FOREIGN = re.compile(
    r"(?<![\w.~])/(home|root|work|tmp|mnt|Users|opt)/\w|py[p]i\.org|python[h]osted|download\.pytorch"
    r"|conda\.anaconda|index-url|trusted-host"
)
"""Places on one machine, and hosts of package registries."""
SHAPE = re.compile(r"(?<!\w)\[[^\[\]]*\](?!\()|\bscalars?\b|\bshapes?\b", re.IGNORECASE)
"""A tensor's shape in a docstring: axes in brackets, or the word."""


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_sizes_and_annotations(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    for node in ast.walk(_tree(path)):
        if not isinstance(node, FUNCTION):
            continue
        where = f"{_id(path)}:{node.lineno} {node.name}"
        assert (node.end_lineno or 0) - node.lineno < 60, where
        spec = node.args
        arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
        bare = [a.arg for a in arguments if a and a.annotation is None]
        assert set(bare) <= {"self", "cls"}, where


def test_public_things_are_documented() -> None:
    """Modules, and public classes, functions and methods: 98 % at least have a docstring."""
    have, lack = 0, []
    for path in FILES:
        tree = _tree(path)
        things: list[tuple[str, ast.AST]] = [(_id(path), tree)]
        owners: list[Any] = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
        for owner in owners:
            things += [
                (f"{_id(path)} {node.name}", node)
                for node in owner.body
                if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_")
            ]
        for name, node in things:
            if ast.get_docstring(node):  # type: ignore[arg-type]
                have += 1
            else:
                lack.append(name)
    assert have > 200 and have / (have + len(lack)) >= 0.98, lack


def _public(owner: Any, cls: Any = None) -> Iterator[tuple[Any, Any]]:
    """(class or None, function) of the public functions and methods in a module."""
    for node in owner.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public(node, node)
        if isinstance(node, FUNCTION) and (node.name == "__init__" or node.name[0] != "_"):
            yield cls, node


def _docs(cls: Any, node: Any, classes: dict[str, Any]) -> str:
    """A function's docstring, with those of the methods that it overrides.

    A constructor's is its class's.
    """
    texts, todo = [ast.get_docstring(node) or ""], [cls] if cls else []
    for one in todo:  # grows
        own = [n for n in one.body if isinstance(n, FUNCTION) and n.name == node.name]
        texts += [ast.get_docstring(n) or "" for n in (*own, *[one] * (node.name == "__init__"))]
        names = [ast.unparse(base).split("[")[0].split(".")[-1] for base in one.bases]
        todo += [classes[n] for n in names if n in classes and classes[n] not in todo]
    return "\n".join(texts)


def _tensors(node: Any) -> bool:
    """Whether a function takes or returns tensors, as its annotations have it."""
    spec = node.args
    given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    annotations = [*(a.annotation for a in given if a), node.returns]
    return any(re.search(r"\bTensor\b", ast.unparse(a)) for a in annotations if a)


def _raises(node: ast.AST) -> bool:
    """Whether a function raises in its own body, but for what it only passes on."""
    inner = (*FUNCTION, ast.Lambda, ast.ClassDef)
    return any(
        (isinstance(n, ast.Raise) and n.exc is not None) or _raises(n)
        for n in ast.iter_child_nodes(node) if not isinstance(n, inner)
    )  # fmt: skip


def test_public_functions_tell_shapes_and_errors() -> None:
    """98 % at least of those with tensors tell a shape, of those that raise have a `Raises:`."""
    trees = {path: _tree(path) for path in FILES}
    nodes = [node for tree in trees.values() for node in tree.body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    shapes: dict[str, bool] = {}
    errors: dict[str, bool] = {}
    for path, tree in trees.items():
        for cls, node in _public(tree):
            where, docs = f"{_id(path)}:{node.lineno} {node.name}", _docs(cls, node, classes)
            if node.name != "__init__" and _tensors(node):
                shapes[where] = bool(SHAPE.search(docs))
            if _raises(node):
                errors[where] = "Raises:" in docs
    for found in (shapes, errors):
        lack = [where for where, told in found.items() if not told]
        assert len(found) > 200 and len(lack) / len(found) <= 0.02, lack


def test_what_counts_as_a_shape() -> None:
    for text in ("x [N, D]: `[N]`.", "of any shape", "a scalar", "int64 [n]", "`[]`"):
        assert SHAPE.search(text), text
    for text in ("see [the page](page.md)", "a list[Tensor] of weights", "reshaped"):
        assert not SHAPE.search(text), text


@pytest.mark.parametrize("path", [*FILES, *PROSE], ids=_id)
def test_no_places_of_one_machine(path: Path) -> None:
    assert FOREIGN.search(path.read_text()) is None
    assert "../" + "shared" not in path.read_text()


def test_what_counts_as_a_place() -> None:
    for text in (
        "'/home/user/data'",
        "in /tmp/x",
        "(/wo" + "rk/main)",
        "https://py" + "pi.org/simple",
    ):
        assert FOREIGN.search(text), text
    for text in ("~/.cache/dynmoe", "data/home/x", "and/or", "/proc/self", "runs/tmp/x"):
        assert not FOREIGN.search(text), text
