"""The snippets of docs/inspection.md run, one after another, and print what they say."""

from __future__ import annotations

import re
from pathlib import Path

import torch

DOC = Path(__file__).parents[3] / "docs" / "inspection.md"


def test_the_snippets_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOC), "exec"), names)
    changes = [names["function_change"](names["mlp"], names[n], names["x"]) for n in
               ("split", "copies")]  # fmt: skip
    assert all(change.largest < 1e-5 for change in changes)
    printed = capsys.readouterr().out
    assert "FunctionChange(largest=" in printed and "['blocks.1.mlp']" in printed
    assert names["seen"].shape == (20, 17, 32) and names["table"].shape == (4, 5)
    assert names["picture"].dtype == torch.uint8
    assert len(names["curve"]) == 50 and names["pruned"].layer.max_experts == 8
