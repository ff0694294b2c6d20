"""The snippets of docs/tta.md run, and its table of methods names them all."""

from __future__ import annotations

import re
from pathlib import Path

from tta_models import stream, vit

from dynmoe import registry

PAGE = (Path(__file__).parents[3] / "docs" / "tta.md").read_text()


def test_the_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) >= 2
    for snippet in snippets:
        names = {"model": vit(), "batches": stream(2)}
        exec(compile(snippet, "tta.md", "exec"), names)
        assert names["adapter"].model is names["model"]


def test_every_method_is_in_the_table():
    for name in registry.names("tta"):
        assert f"`{name}`" in PAGE
