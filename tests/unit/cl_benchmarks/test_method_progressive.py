"""Progressive columns: their formula, what is frozen, what learns, and resuming."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from expansion_helpers import at_task, batch, config, train, training_of

from cl_benchmarks.experiment import ContinualLearning
from cl_benchmarks.images import ImageData
from cl_benchmarks.methods.expanding import LARGEST_SCALE, ColumnPlugin, ProgressiveBlock
from dynmoe.errors import UserError
from dynmoe.growth.budget import Budget
from dynmoe.lab.runner import run_one
from dynmoe.registry import get


@pytest.fixture
def digits() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def block_of(columns: int, seed: int = 1) -> ProgressiveBlock:
    torch.manual_seed(2)
    block = ProgressiveBlock(6, [4, 3, 5], 6, seed)
    for _ in range(columns - 1):
        block.add_column()
    return block


def relu(values: list[float]) -> list[float]:
    return [max(v, 0.0) for v in values]


def affine(layer: torch.nn.Linear, x: list[float]) -> list[float]:
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(layer.weight.tolist(), bias, strict=True)
    ]


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_output_is_the_naive_column(columns: int) -> None:
    """y = W h_k + b + U relu(V [alpha_1 h_1, ..., alpha_(k-1) h_(k-1)] + c), sample by sample."""
    block = block_of(columns).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    rows = []
    for sample in x.tolist():
        hidden = [relu(affine(column.hidden[0], sample)) for column in block.columns]
        newest = block.columns[-1]
        y = affine(newest.output, hidden[-1])
        if columns > 1:
            scaled = [
                a * h for a, own in zip(newest.scale.tolist(), hidden, strict=False) for h in own
            ]
            side = affine(newest.adapt, relu(affine(newest.reduce[0], scaled)))
            y = [a + b for a, b in zip(y, side, strict=True)]
        rows.append(y)
    torch.testing.assert_close(
        block(x), torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_sizes_and_first_values_of_columns() -> None:
    block = block_of(3)
    assert [c.hidden[0].out_features for c in block.columns] == [4, 3, 5]
    assert [c.reduce[0].in_features for c in list(block.columns)[1:]] == [4, 7]
    for k in (1, 2):
        scale = block.columns[k].scale
        assert scale.shape == (k,) and (scale > 0).all() and (scale < LARGEST_SCALE).all()
    state = torch.get_rng_state()
    same, other = block_of(3), block_of(3, seed=9)
    assert torch.equal(same.columns[2].output.weight, block.columns[2].output.weight)
    assert not torch.equal(other.columns[2].output.weight, block.columns[2].output.weight)
    assert torch.equal(other.columns[0].output.weight, block.columns[0].output.weight)
    torch.set_rng_state(state)
    block.add_column()  # of the last size
    assert torch.equal(torch.get_rng_state(), state)
    assert block.columns[3].hidden[0].out_features == 5


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_old_columns_are_frozen_and_new_ones_learn(optimizer: str) -> None:
    """Even though the optimizer has momentum left for the old ones."""
    training = training_of(ProgressiveBlock(6, [4, 3, 5], 6, 0), optimizer)
    plugin = ColumnPlugin(training)
    for task in range(3):
        plugin.before_training_exp(at_task(training, task))
        columns = training.model[0].columns
        assert len(columns) == task + 1
        assert all(p.grad is None for column in list(columns)[:task] for p in column.parameters())
        before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
        train(training, range(10 * task, 10 * task + 5))
        for name, parameter in training.model.named_parameters():
            frozen = name.startswith("0.columns.") and int(name.split(".")[2]) < task
            assert torch.equal(parameter, before[name]) == frozen, name
            assert parameter.requires_grad != frozen
    held = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(map(id, held))) == len(list(training.model.parameters()))


def test_gradients_reach_the_adapter_and_what_is_before_the_block() -> None:
    block = block_of(2)
    x = torch.randn(30, 6, requires_grad=True)
    block(x).square().sum().backward()
    newest = block.columns[1]
    for parameter in newest.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert all(p.grad is None for p in block.columns[0].parameters())
    assert x.grad is not None and (x.grad != 0).any()


def test_resume_rebuilds_the_columns() -> None:
    def begin() -> tuple:
        training = training_of(ProgressiveBlock(6, [4, 3, 5], 6, 0))
        return training, ColumnPlugin(training)

    training, plugin = begin()
    for task in range(2):
        plugin.before_training_exp(at_task(training, task))
        train(training, range(4 * task, 4 * task + 4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (training.model, training.optimizer, plugin)], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_plugin = begin()
    other_plugin.rebuild_from(saved[2])
    for part, state in zip((other.model, other.optimizer, other_plugin), saved, strict=True):
        part.load_state_dict(state)
    for one, its_plugin in ((training, plugin), (other, other_plugin)):
        train(one, range(8, 11))
        its_plugin.before_training_exp(at_task(one, 2))
        train(one, range(11, 15))
    for a, b in zip(training.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    assert torch.equal(training.model(batch(0)[0]), other.model(batch(0)[0]))


@pytest.mark.parametrize(
    ("options", "budget", "sizes"),
    [({}, Budget(), [5, 5, 5, 5, 4]), ({"units": 3}, Budget(), [3] * 5),
     ({}, Budget(mode="per-growth"), [24] * 5)],
)  # fmt: skip
def test_columns_share_what_dynamicmoe_ends_with(
    options: dict, budget: Budget, sizes: list[int], digits: ImageData, tmp_path: Path
) -> None:
    made = config(tmp_path, method=("progressive", options), budget=budget, epochs=1)
    summary = run_one(ContinualLearning(), "smoke", made, digits).summary
    expected, total = [], 65 * 16 + 17 * 2
    for k, units in enumerate(sizes):
        total += 17 * units + (units + 1) * 16
        if k:
            total += k + (sum(sizes[:k]) + 1) * units + units * 16
        expected.append(total)
    assert [task["parameters"] for task in summary["tasks"]] == expected


def test_bad_options_are_refused(digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method progressive: units=-1 must be at least 0"):
        get("method", "progressive").Config(units=-1).build()
    network = get("network", "mlp").Config(width=16, hidden=9)
    made = config(tmp_path, method="progressive", network=network)
    with pytest.raises(UserError, match="granularity 2 grows to 10 experts"):
        run_one(ContinualLearning(), "smoke", made, digits)
