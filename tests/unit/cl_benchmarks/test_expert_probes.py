"""Linear probes of the oldest, the newest and fresh experts' hidden units on the next task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from torch import Tensor, nn

from cl_benchmarks.board import BOARD
from cl_benchmarks.experiment import ContinualLearning
from cl_benchmarks.expert_probes import RIDGE, choose_units, probe_experts, ridge_labels
from cl_benchmarks.images import ImageData
from cl_benchmarks.stream import ChunkDataset
from dynmoe import cl
from dynmoe.errors import UserError
from dynmoe.lab.config import parse
from dynmoe.lab.experiment import logged
from dynmoe.lab.runner import run_one
from dynmoe.moe import MoELayer
from dynmoe.registry import get

CPU = torch.device("cpu")
FIELDS = ("next_oldest", "next_newest", "next_fresh")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chunk(images: Tensor, labels: Tensor) -> ChunkDataset:
    """Float images [N, 1, 1, D], which are not standardised."""
    return ChunkDataset(images, torch.arange(len(images)), labels, torch.zeros(1), torch.ones(1))


def task(count: int, seed: int) -> ChunkDataset:
    """Three classes that one direction of four tells: x0 below -0.5, between, above 0.5."""
    images = torch.randn(count, 1, 1, 4, generator=seeded(seed))
    return chunk(
        images, torch.bucketize(images[:, 0, 0, 0].contiguous(), torch.tensor([-0.5, 0.5]))
    )


def grown(sizes: list[int], created: list[int]) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(4, 3, sum(sizes), num_experts=len(sizes), max_experts=6)
    layer.bank.set_hidden_sizes(sizes)  # type: ignore[operator]
    layer.created[: len(sizes)] = torch.tensor(created)
    return layer


def test_ridge_is_that_of_scikit_learn() -> None:
    x = torch.randn(90, 7, generator=seeded()).double()
    labels = torch.tensor([1, 4, 6])[(x[:, :3] + torch.randn(90, 3, generator=seeded(1))).argmax(1)]
    test = torch.randn(500, 7, generator=seeded(2)).double()
    mean, std = x.mean(0), x.std(0, correction=0)
    theirs = RidgeClassifier(alpha=RIDGE * 90).fit(((x - mean) / std).numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.predict(((test - mean) / std).numpy()))
    assert torch.equal(ridge_labels(x, labels, test), expected)


def test_units_that_are_silent_in_training_are_left_out() -> None:
    x = torch.randn(60, 3, generator=seeded())
    labels = (x[:, 0] > 0).long()
    silent, test = x.clone(), torch.randn(200, 3, generator=seeded(1))
    silent[:, 1] = 0.3
    wild = test.clone()
    wild[:, 1] = 1e6
    assert torch.equal(ridge_labels(silent, labels, test), ridge_labels(silent, labels, wild))
    assert not torch.equal(ridge_labels(x, labels, test), ridge_labels(x, labels, wild))


def test_groups_are_equally_large_and_of_their_own_experts() -> None:
    layer = grown([9, 3, 6, 4, 8], [0, 0, 1, 2, 2])
    units = choose_units(layer, seeded())
    segment = layer.bank.segment
    assert list(units) == ["oldest", "newest", "fresh"]
    assert {len(own.unique()) for own in units.values()} == {12}
    assert set(segment[units["oldest"]].tolist()) == {0, 1}
    assert set(segment[units["newest"]].tolist()) == {3, 4}
    assert len(choose_units(grown([9, 3, 6], [0, 0, 1]), seeded())["oldest"]) == 6
    again, other = choose_units(layer, seeded()), choose_units(layer, seeded(1))
    assert all(torch.equal(units[g], again[g]) for g in units)
    assert not torch.equal(units["fresh"], other["fresh"])
    assert list(choose_units(grown([5, 5], [0, 0]), seeded())) == ["oldest", "fresh"]


def test_experts_that_see_what_matters_serve_and_blind_ones_do_not() -> None:
    layer = grown([6, 6], [0, 1])
    with torch.no_grad():
        layer.bank.w_in[:6, 0] = 0.0  # type: ignore[index]  # the oldest expert is blind to x0
        layer.bank.w_in[6:] = 0.0  # type: ignore[index]  # the newest sees nothing else
        layer.bank.w_in[6:, 0] = torch.tensor([1.0, 1, 1, -1, -1, -1])  # type: ignore[index]
        layer.bank.b_in[6:] = torch.tensor([0.5, 0.0, -0.5] * 2)  # type: ignore[index]
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(3, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = probe_experts(model, task(400, 1), task(400, 2), seeded(), CPU)
    assert tuple(sorted(found)) == tuple(sorted(FIELDS))
    assert found["next_newest"] > 0.85 and found["next_oldest"] < 0.5
    assert found["next_oldest"] + 0.1 < found["next_fresh"]
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Both(nn.Module):
    """Two layers side by side."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


def test_layers_count_alike() -> None:
    seeing, blind = grown([6], [0]), grown([6], [0])
    with torch.no_grad():
        blind.bank.w_in[:, 0] = 0.0  # type: ignore[index]
    accuracies = [
        probe_experts(nn.Sequential(nn.Flatten(), part), task(300, 1), task(300, 2), seeded(), CPU)
        for part in (seeing, blind, Both(seeing, blind), nn.Linear(4, 3))
    ]
    one, other, both = (found["next_oldest"] for found in accuracies[:3])
    assert one > other + 0.1 and both == pytest.approx((one + other) / 2)
    assert accuracies[3] == {}


# ---------------------------------------------------------------- in runs


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def run(runs: Path, data: ImageData, **settings: Any) -> tuple[dict[str, Any], Path]:
    config = replace(
        cl.presets()["plain"],
        runs_dir=runs,
        compare=(),
        chunks=3,
        epochs=2,
        eval_samples=20,
        probe_samples=20,
        name="r",
        protocol=get("protocol", "permuted").Config(images=200),
        network=get("network", "mlp").Config(width=16, hidden=24),
        **settings,
    )
    done = run_one(ContinualLearning(), "x", config, data)
    return done.summary, done.folder


def test_a_run_asks_of_each_next_task_and_nothing_else_changes(
    digits: ImageData, tmp_path: Path
) -> None:
    asked, folder = run(tmp_path / "1", digits, expert_probes=True)
    plain, _ = run(tmp_path / "2", digits)
    known = [[row[field] is not None for field in FIELDS] for row in asked["tasks"]]
    assert known == [[True, False, True], [True, True, True], [False, False, False]]
    assert all(0.1 < row["next_fresh"] <= 1 for row in asked["tasks"][:2])
    assert logged(folder, "task/next_oldest") == [r["next_oldest"] for r in asked["tasks"][:2]]
    shown = BOARD.points({f"task/{field}": 0.5 for field in FIELDS})
    assert len(shown) == len(FIELDS)
    for row in asked["tasks"]:
        row |= dict.fromkeys(FIELDS)
    assert asked == plain


def test_dense_networks_and_tasks_without_measurements_are_not_asked(
    digits: ImageData, tmp_path: Path
) -> None:
    dense = get("method", "dense").Config()
    for name, settings in {"dense": {"method": dense}, "seldom": {"measure_every": 2}}.items():
        rows = run(tmp_path / name, digits, expert_probes=True, **settings)[0]["tasks"]
        known = [row["next_fresh"] is not None for row in rows]
        assert known == [name == "seldom", False, False]


@pytest.mark.parametrize("given", [
    ["--bank", "bottleneck"], ["--bank", "conv", "--network.place", "trunk"],
    ["--network.place", "everywhere"],
    ["--method", "dense", "--compare", "dynamicmoe", "--bank", "affine"],
])  # fmt: skip
def test_banks_without_hidden_units_of_vectors_are_refused(given: list[str]) -> None:
    words = ["--expert-probes", "--pruning", "utility", *given, "--allow-unused"]
    config = parse(cl.presets(), words, "p", "d")[1]
    with pytest.raises(UserError, match="--expert-probes reads hidden units.*use --bank pool"):
        ContinualLearning().check(config)
    ContinualLearning().check(replace(config, expert_probes=False))


def test_it_is_refused_where_it_tells_nothing() -> None:
    def given(*words: str) -> Any:
        return parse(cl.presets(), [*words, "--expert-probes"], "p", "d")[1]

    with pytest.raises(UserError, match="--expert-probes has no effect: these methods have no exp"):
        given("--method", "dense", "--compare", "fresh")
    with pytest.raises(UserError, match="--expert-probes has no effect: --pruning reinit"):
        given("--pruning", "reinit")
    for words in (
        "--pruning utility", "--budget.mode per-growth", "--init duplicate", "--method moe-static",
    ):  # fmt: skip
        config = given(*words.split())
        assert config.expert_probes
        ContinualLearning().check(config)
