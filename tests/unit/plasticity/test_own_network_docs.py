"""The snippets of docs/your_own_network.md run, and the Avalanche plugin that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_s_snippets_run(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = (DOCS / "your_own_network.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "your_own_network.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "units: 80.00"
    assert [line.split(",")[0] for line in lines[-3:]] == [
        "task 1: 2 experts", "task 2: 4 experts", "task 3: 6 experts"
    ]  # fmt: skip
    assert list((tmp_path / "runs" / "my-network").glob("events.out.tfevents.*"))
    shown = set(re.findall(r"^\| `([\w/.]+)`", text, re.MULTILINE))
    assert "dead_units" in shown and shown <= set(names["values"])  # type: ignore[call-overload]


def test_the_avalanche_plugin_logs_every_task():
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    from cl_benchmarks.plasticity_plugin import PlasticityPlugin
    from dynmoe.errors import UserError

    class Data(torch.utils.data.Dataset):
        targets = [n % 4 for n in range(64)]  # noqa: RUF012

        def __len__(self) -> int:
            return 64

        def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
            return torch.full((1, 4, 4), number / 64), self.targets[number]

    class Written(list):
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.append((tag, global_step))

    written = Written()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    common = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1),
              "train_mb_size": 8, "evaluator": EvaluationPlugin(loggers=[])}  # fmt: skip
    naive = Naive(plugins=[PlasticityPlugin(written, every=3, samples=16)], **common)
    benchmark = nc_benchmark(Data(), Data(), 2, task_labels=False, seed=0)
    for experience in benchmark.train_stream:  # four steps each
        naive.train(experience)
    assert [step for tag, step in written if tag == "plasticity/dead_units"] == [0, 3, 6]
    assert ("plasticity/grad_norm/l2", 6) in written
    wrong = Naive(plugins=[PlasticityPlugin(written, every=0)], **common)
    with pytest.raises(UserError, match="every 0"):
        wrong.train(benchmark.train_stream[0])
