"""The snippets of docs/inspection.md and docs/core.md run, and print what they say."""

from __future__ import annotations

import re
from pathlib import Path

import torch

DOCS = Path(__file__).parents[3] / "docs"


def run_snippets(name: str, count: int) -> dict[str, object]:
    """Run the first `count` snippets of a page, one after another; returns what they defined."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert len(blocks) >= count
    names: dict[str, object] = {}
    for block in blocks[:count]:
        exec(compile(block, name, "exec"), names)
    return names


def test_the_core_s_snippets_run(capsys):
    names = run_snippets("core.md", 3)
    assert names["event"].experts == 4
    assert names["y"].shape == (8, 10, 64) and not names["y"][~names["mask"]].any()
    assert names["heads"](names["x"]).shape == (8, 10, 64)
    assert "'.switch': tensor(" in capsys.readouterr().out


def test_the_snippets_on_inspection_run(capsys):
    names = run_snippets("inspection.md", 5)
    changes = [names["function_change"](names["mlp"], names[n], names["x"]) for n in
               ("split", "copies")]  # fmt: skip
    assert all(change.largest < 1e-5 for change in changes)
    printed = capsys.readouterr().out
    assert "FunctionChange(largest=" in printed and "['blocks.1.mlp']" in printed
    assert names["seen"].shape == (20, 17, 32) and names["table"].shape == (4, 5)
    assert names["picture"].dtype == torch.uint8
    assert len(names["curve"]) == 50 and names["pruned"].layer.max_experts == 8
