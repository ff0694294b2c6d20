"""Growth under every optimizer of torch.optim: state of the right shape, and a start that moves."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from dynmoe.growth import Budget, GrowthController
from dynmoe.growth.pruning import UtilityUnits
from dynmoe.moe import MoELayer

OPTIMIZERS = sorted(
    name
    for name, found in vars(torch.optim).items()
    if inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer
)
OPTIONS = {
    "Adafactor": {"lr": 1e-2}, "SGD": {"lr": 1e-2, "momentum": 0.9}, "Adadelta": {"lr": 1.0},
    "Adagrad": {"lr": 1e-2, "initial_accumulator_value": 0.1},
}  # fmt: skip
VARIANTS = [
    ("Adam", {"foreach": True}), ("Adam", {"fused": True, "amsgrad": True}),
    ("Adagrad", {"lr": 1e-2}), ("RMSprop", {"centered": True, "momentum": 0.9}),
]  # fmt: skip
X, Y = torch.randn(64, 10), torch.randint(0, 3, (64,))


def make_model() -> nn.Sequential:
    layer = MoELayer(10, 16, hidden=32, num_experts=2, max_experts=8, activation="tanh")
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(16, 3))


def make_optimizer(name: str, model: nn.Module, options: dict | None = None) -> Optimizer:
    parameters = list(model.parameters())
    if name == "Muon":  # takes matrices only
        [p.requires_grad_(p.dim() == 2) for p in parameters]
        parameters = [p for p in parameters if p.requires_grad]
    given = OPTIONS.get(name, {"lr": 1e-2}) if options is None else options
    return getattr(torch.optim, name)(parameters, **given)


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        if isinstance(optimizer, torch.optim.SparseAdam):
            for parameter in model.parameters():
                parameter.grad = parameter.grad.to_sparse()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("mode", ["constant", "per-growth"])
@pytest.mark.parametrize(
    ("name", "options"), [*((name, None) for name in OPTIMIZERS), *VARIANTS], ids=str
)
def test_fresh_units_move_like_old_ones(name, options, mode):
    model = make_model()
    optimizer = make_optimizer(name, model, options)
    train(model, optimizer, 20)
    controller = GrowthController(
        model, optimizer, granularity=2, budget=Budget(mode=mode), pruning=UtilityUnits.Config()
    )
    controller.grow(0, (X, Y))
    bank = model[0].bank
    before, fresh = bank.w_in.detach().clone(), bank.segment >= 2
    train(model, optimizer, 1)
    moved = (bank.w_in.detach() - before).abs().mean(dim=1)
    assert moved.isfinite().all()
    assert moved[fresh].mean() >= 1e-2 * moved[~fresh].mean() > 0
    assert moved[fresh].mean() <= 1e2 * moved[~fresh].mean()
    controller.grow(21, (X, Y))
    train(model, optimizer, 5)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # What is saved fits a fresh model and optimizer, which go on alike.
    other = make_model()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again = make_optimizer(name, other, options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, its in ((model, optimizer), (other, again)):
        train(net, its, 2)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["constant", "per-growth"])
def test_factored_moments_start_at_their_mean(mode):
    """Row statistics of w_in [H, D] belong to units, and column statistics of w_out [D, H]."""
    model = make_model()
    optimizer = torch.optim.Adafactor(model.parameters(), 1e-2)
    train(model, optimizer, 5)
    bank = model[0].bank
    old = {n: copy.deepcopy(optimizer.state[getattr(bank, n)]) for n in ("w_in", "w_out")}
    GrowthController(
        model, optimizer, granularity=2, budget=Budget(mode=mode), pruning=UtilityUnits.Config()
    ).grow(0, (X, Y))
    new = {name: optimizer.state[getattr(bank, name)] for name in old}
    fresh, units = bank.segment >= 2, len(bank.segment)
    assert new["w_in"]["row_var"].shape == (units, 1) and new["w_in"]["col_var"].shape == (1, 10)
    assert new["w_out"]["row_var"].shape == (16, 1) and new["w_out"]["col_var"].shape == (1, units)
    for name, key in (("w_in", "row_var"), ("w_out", "col_var")):
        values, before = new[name][key].flatten(), old[name][key].flatten()
        torch.testing.assert_close(values[fresh], before.mean().expand(int(fresh.sum())))
        kept = (~fresh[: len(before)]).nonzero().flatten()
        assert torch.equal(values[kept], before[kept])
    assert torch.equal(new["w_in"]["col_var"], old["w_in"]["col_var"])


def test_transformers_adafactor_keeps_its_shapes():
    optimization = pytest.importorskip("transformers.optimization")
    model = make_model()
    optimizer = optimization.Adafactor(model.parameters(), lr=1e-2, relative_step=False)
    train(model, optimizer, 3)
    controller = GrowthController(model, optimizer, budget=Budget(mode="per-growth"))
    controller.grow(0)
    units = len(model[0].bank.segment)
    assert optimizer.state[model[0].bank.w_in]["exp_avg_sq_row"].shape == (units,)
    assert optimizer.state[model[0].bank.w_out]["exp_avg_sq_col"].shape == (units,)
    train(model, optimizer, 3)


def test_state_of_unknown_shape_is_made_again():
    """A matrix of all units against all units, as preconditioners have, cannot be extended."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    bank = model[0].bank
    optimizer.state[bank.w_in]["factor"] = torch.eye(32 + 1)
    GrowthController(model, optimizer, budget=Budget(mode="per-growth")).grow(0)
    assert bank.w_in not in optimizer.state and bank.w_out in optimizer.state
    train(model, optimizer, 2)
    assert optimizer.state[bank.w_in]["exp_avg"].shape == bank.w_in.shape


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["constant", "per-growth"])
def test_pending_gradients_stay_with_their_weights(mode, sparse):
    model = make_model()
    nn.functional.cross_entropy(model(X), Y).backward()
    bank, router = model[0].bank, model[0].router
    if sparse:
        bank.w_in.grad = bank.w_in.grad.to_sparse()
    old = {n: p.grad.to_dense().clone() for n, p in model.named_parameters()}
    pruning = UtilityUnits.Config()
    GrowthController(model, granularity=2, budget=Budget(mode=mode), pruning=pruning).grow(
        0, (X, Y)
    )
    fresh = bank.segment >= 2
    kept = (~fresh).nonzero().flatten()
    assert bank.w_in.grad.is_sparse == sparse
    for name, axis in bank.unit_axes():
        gradient = getattr(bank, name).grad.to_dense().movedim(axis, 0)
        assert not gradient[fresh].any()
        assert torch.equal(gradient[kept], old[f"0.bank.{name}"].movedim(axis, 0)[kept])
    assert not router.weight.grad[:4].any()  # all rows are drawn
    assert torch.equal(bank.b_out.grad[:2], old["0.bank.b_out"][:2])
    assert torch.equal(model[2].weight.grad, old["2.weight"])
