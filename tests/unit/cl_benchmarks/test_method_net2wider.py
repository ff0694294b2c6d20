"""Net2Wider: the function is kept, old units keep their optimizer state, copies learn."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from expansion_helpers import at_task, batch, config, train, training_of
from torch import nn

from cl_benchmarks.experiment import ContinualLearning
from cl_benchmarks.images import ImageData
from cl_benchmarks.methods.expanding import WideningBlock, WidenPlugin, widen
from dynmoe.errors import UserError
from dynmoe.growth.budget import Budget
from dynmoe.interventions.architecture import insert_norms
from dynmoe.interventions.penalties import L2Init
from dynmoe.lab.runner import run_one
from dynmoe.registry import get


@pytest.fixture
def digits() -> ImageData:
    return get("dataset", "digits").Config().build().load(0)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("hidden", [9, 15, 40])
def test_outputs_do_not_change_without_noise(hidden: int) -> None:
    block = WideningBlock(6, [8], 6).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    before = block(x)
    widen(block, hidden, 0.0, seeded())
    assert block.hidden == hidden == block.layers[1].in_features
    torch.testing.assert_close(block(x), before, rtol=0, atol=1e-12)


def test_weights_are_the_papers_loop() -> None:
    """Eqs. 4 and 5: U_ij = W_ig(j), V_jk = W_g(j)k / |{x: g(x) = g(j)}|."""
    block = WideningBlock(6, [4], 6).double()
    first, second = copy.deepcopy(block.layers)
    widen(block, 11, 0.0, seeded())
    generator = seeded()
    g = [*range(4), *torch.randint(4, (7,), generator=generator).tolist()]
    assert len(set(g[4:])) < 7  # some unit has two copies
    wide_first, wide_second = block.layers
    for j, parent in enumerate(g):
        assert torch.equal(wide_first.weight[j], first.weight[parent])
        assert wide_first.bias[j] == first.bias[parent]
        torch.testing.assert_close(
            wide_second.weight[:, j], second.weight[:, parent] / g.count(parent)
        )
    assert torch.equal(wide_second.bias, second.bias)


def test_noise_falls_on_what_feeds_the_copies() -> None:
    plain, noisy = WideningBlock(6, [30], 6), WideningBlock(6, [30], 6)
    noisy.load_state_dict(plain.state_dict())
    spread = float(plain.layers[0].weight.detach().std())
    widen(plain, 90, 0.0, seeded())
    widen(noisy, 90, 0.1, seeded())
    for name in ("weight", "bias"):
        change = getattr(noisy.layers[0], name) - getattr(plain.layers[0], name)
        assert (change[:30] == 0).all() and (change[30:] != 0).all()
        assert float(change[30:].detach().std()) == pytest.approx(0.1 * spread, rel=0.3)
    assert torch.equal(noisy.layers[1].weight, plain.layers[1].weight)


@pytest.mark.parametrize("moments", ["mean", "zero"])
def test_old_units_keep_their_optimizer_state(moments: str) -> None:
    training = training_of(WideningBlock(6, [4, 7], 6))
    train(training, range(5))
    state = {n: dict(training.optimizer.state[p]) for n, p in training.model.named_parameters()}
    WidenPlugin(training, 0.01, moments).before_training_exp(at_task(training, 1))  # type: ignore[arg-type]
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert (
        held
        == {id(p) for p in training.model.parameters()}
        == set(map(id, training.optimizer.state))
    )
    for name, parameter in training.model.named_parameters():
        now, axis = training.optimizer.state[parameter], 1 if name == "0.2.weight" else 0
        grown = name in ("0.0.weight", "0.0.bias", "0.2.weight")
        assert int(now["step"]) == 5
        for key in ("exp_avg", "exp_avg_sq"):
            assert now[key].shape == parameter.shape
            assert torch.equal(
                now[key].narrow(axis, 0, state[name][key].shape[axis]), state[name][key]
            )
            if grown:
                new = now[key].narrow(axis, 4, 3)
                mean = (
                    float(state[name][key].mean())
                    if (key, moments) == ("exp_avg_sq", "mean")
                    else 0.0
                )
                torch.testing.assert_close(new, torch.full_like(new, mean), rtol=1e-6, atol=0)


def test_copies_with_noise_learn_apart_and_without_it_stay_alike() -> None:
    gaps = {}
    for noise in (0.0, 0.05):
        training = training_of(WideningBlock(6, [5, 10], 6))
        train(training, range(3))
        plugin = WidenPlugin(training, noise, "mean")
        plugin.before_training_exp(at_task(training, 0))
        assert plugin.blocks["0"].hidden == 5  # not in the first task
        plugin.before_training_exp(at_task(training, 1))
        parent = torch.randint(5, (5,), generator=seeded(5)).tolist()
        train(training, range(3, 40))
        first = training.model[0].layers[0].weight
        twins = [(5 + i, 5 + j) for i in range(5) for j in range(i) if parent[i] == parent[j]]
        assert twins
        gaps[noise] = max(float((first[a] - first[b]).detach().norm()) for a, b in twins)
    assert gaps[0.0] < 1e-6 and gaps[0.05] > 0.02


def test_an_intervention_is_told_of_the_new_weights() -> None:
    intervention = L2Init.Config(strength=1.0).build()
    training = training_of(WideningBlock(6, [4, 9], 6), intervention=intervention)
    intervention.attach(training.model, training.optimizer, seeded())
    train(training, range(4))
    before = float(intervention.penalty().detach())
    WidenPlugin(training, 0.01, "mean").before_training_exp(at_task(training, 1))
    after = intervention.penalty()  # what did not change is as far from its first value as before
    assert 0 < float(after.detach()) <= before
    after.backward()
    assert training.model[0].layers[0].weight.grad.shape == (9, 6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resume_rebuilds_the_shapes(optimizer: str) -> None:
    def begin() -> tuple:
        training = training_of(WideningBlock(6, [4, 7, 12], 6), optimizer)
        return training, WidenPlugin(training, 0.01, "mean")

    def go_on(training, plugin) -> None:
        train(training, range(8, 12))
        plugin.before_training_exp(at_task(training, 2))
        train(training, range(12, 16))

    training, plugin = begin()
    train(training, range(4))
    plugin.before_training_exp(at_task(training, 1))
    train(training, range(4, 8))
    file = io.BytesIO()
    parts = (training.model, training.optimizer, plugin)
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_plugin = begin()
    other_plugin.rebuild_from(saved[2])
    for part, state in zip((other.model, other.optimizer, other_plugin), saved, strict=True):
        part.load_state_dict(state)
    go_on(training, plugin)
    go_on(other, other_plugin)
    for a, b in zip(training.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    x, _ = batch(0)
    assert plugin.blocks["0"].hidden == 12 and torch.equal(training.model(x), other.model(x))


@pytest.mark.parametrize(
    ("options", "budget", "widths"),
    [
        ({}, Budget(), [5, 10, 14, 19, 24]),
        ({"factor": 2.0}, Budget(), [10, 19, 29, 38, 48]),
        ({}, Budget(mode="per-growth"), [24, 48, 72, 96, 120]),
        ({}, Budget(mode="per-growth", units=4), [11, 22, 34, 45, 56]),
    ],
)
def test_widths_end_where_dynamicmoe_ends(
    options: dict, budget: Budget, widths: list[int], digits: ImageData, tmp_path: Path
) -> None:
    made = config(tmp_path, method=("net2wider", options), budget=budget, epochs=1)
    summary = run_one(ContinualLearning(), "smoke", made, digits).summary
    outside = 65 * 16 + 17 * 2
    expected = [outside + 17 * hidden + (hidden + 1) * 16 for hidden in widths]
    assert [task["parameters"] for task in summary["tasks"]] == expected


def test_bad_options_are_refused(digits: ImageData, tmp_path: Path) -> None:
    for options in ({"factor": -1.0}, {"noise": -0.1}, {"noise": float("nan")}):
        with pytest.raises(UserError, match="method net2wider: .* must be at least 0"):
            get("method", "net2wider").Config(**options).build()
    network = get("network", "mlp").Config(width=16, hidden=3)
    made = config(tmp_path, method="net2wider", granularity=1, network=network, budget=Budget())
    with pytest.raises(UserError, match="granularity 1 grows to 5 experts"):
        run_one(ContinualLearning(), "smoke", made, digits)
    made = config(tmp_path, method=("net2wider", {"factor": 1.0}), network=network)
    with pytest.raises(UserError, match="3 hidden units in the end are too few"):
        run_one(ContinualLearning(), "smoke", made, digits)


def test_the_block_starts_as_a_dense_one_of_its_width() -> None:
    torch.manual_seed(4)
    block = WideningBlock(6, [8, 16], 6)
    torch.manual_seed(4)
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    x, _ = batch(1)
    assert torch.equal(block(x), dense(x))


def test_a_block_that_an_intervention_has_rebuilt_is_refused_in_one_line() -> None:
    block = WideningBlock(4, [2, 4], 4)
    insert_norms(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), block))
    with pytest.raises(
        UserError, match="net2wider cannot widen a block that an intervention"
    ) as error:
        block.append(2, None)
    assert "\n" not in str(error.value)
