"""Meta-gradients of routers against finite differences of the loss after the inner steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.moe import MoELayer, share_router
from dynmoe.moe.meta import adapt_routers, meta_loss, meta_step

LR = 0.3


def make(router: str = "softmax", losses: tuple[str, ...] = ()) -> nn.Sequential:
    layer = MoELayer(3, 4, 8, num_experts=2, max_experts=4, router=router, losses=losses,
                     activation="tanh")  # fmt: skip
    return nn.Sequential(layer, nn.Linear(4, 2)).double()


def samples(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, dtype=torch.double), torch.randn(n, 2, dtype=torch.double)


def plain(model: nn.Sequential, rows: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
    """The loss with the softmax router's rows, from the formula."""
    (x, target), bank = data, model[0].bank
    gates = (x @ rows[:2].T).softmax(dim=1)
    y = sum(
        2 * gates[:, e : e + 1]
        * (torch.tanh(x @ bank.w_in[own].T + bank.b_in[own]) @ bank.w_out[:, own].T + bank.b_out[e])
        for e, own in ((e, bank.segment == e) for e in range(2))
    )  # fmt: skip
    return ((model[1](y) - target) ** 2).mean()


def adapted(
    model: nn.Sequential, rows: Tensor, support: tuple[Tensor, Tensor], steps: int
) -> Tensor:
    """The rows after the inner steps."""
    for _ in range(steps):
        moving = rows.detach().requires_grad_()
        rows = rows.detach() - LR * torch.autograd.grad(plain(model, moving, support), moving)[0]
    return rows


@pytest.mark.parametrize("steps", [1, 3])
def test_the_meta_gradient_is_that_of_the_whole_way(steps):
    model, support, query = make(), samples(), samples()
    found = meta_loss(model, support, query, F.mse_loss, lr=LR, steps=steps)
    rows = model[0].router.weight
    torch.testing.assert_close(found, plain(model, adapted(model, rows, support, steps), query))
    found.backward()
    for parameter in (rows, model[0].bank.w_out):
        for entry in [(0, 0), (1, 2)]:
            values = []
            for sign in (1, -1):
                moved = copy.deepcopy(model)
                at = moved[0].router.weight if parameter is rows else moved[0].bank.w_out
                at.data[entry] += sign * 1e-5
                way = adapted(moved, moved[0].router.weight, support, steps)
                values.append(float(plain(moved, way, query).detach()))
            slope = (values[0] - values[1]) / 2e-5
            assert float(parameter.grad[entry]) == pytest.approx(slope, rel=1e-5, abs=1e-9)
    assert not rows.grad[2:].any()


def test_first_order_takes_the_gradient_where_the_steps_have_led():
    model, support, query = make(), samples(), samples()
    meta_loss(model, support, query, F.mse_loss, lr=LR, steps=2, first_order=True).backward()
    rows = adapted(model, model[0].router.weight, support, 2).requires_grad_()
    expected = torch.autograd.grad(plain(model, rows, query), rows)[0]
    torch.testing.assert_close(model[0].router.weight.grad, expected)


def test_adapting_leaves_the_model_and_runs_in_it():
    model, support = make(losses=("importance",)), samples()
    before = copy.deepcopy(model.state_dict())
    weights = adapt_routers(model, support, F.mse_loss, lr=LR)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert list(weights) == ["0.router.weight"]
    old = F.mse_loss(model(support[0]), support[1])
    new = F.mse_loss(torch.func.functional_call(model, weights, support[0]), support[1])
    assert float(new) < float(old)


def test_a_router_that_layers_share_comes_back_as_it_was():
    layers = [MoELayer(3, 3, 8, num_experts=2, max_experts=4) for _ in range(2)]
    model, data = nn.Sequential(*layers, nn.Linear(3, 2)).double(), (samples(), samples())
    share_router(model)
    own, before = model[0].router.weight, model[0].router.weight.detach().clone()
    meta_loss(model, *data, F.mse_loss, lr=LR, steps=2).backward()
    assert model[1].router.weight is model[0].router.weight is own
    assert own.equal(before) and bool(own.grad.any())


def test_the_outer_loop_learns_to_adapt_and_follows_growth():
    """Two tasks that one router cannot serve at once: signs of the target differ."""
    model = make("topk")
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    controller = GrowthController(model, optimizer)
    tasks = []
    for sign in (1, -1):
        x = torch.randn(12, 3, dtype=torch.double)
        data = x, sign * x[:, :2]
        tasks.append(((data[0][:6], data[1][:6]), (data[0][6:], data[1][6:])))
    losses = [meta_step(model, optimizer, tasks, F.mse_loss, lr=LR) for _ in range(20)]
    assert losses[-1] < losses[0]
    controller.grow(1)
    before = model[0].router.weight.detach().clone()
    meta_step(model, optimizer, tasks, F.mse_loss, lr=LR)
    moved = (model[0].router.weight != before).any(dim=1).tolist()
    assert model[0].num_experts == 3 and moved == [True, True, True, False]


def test_what_cannot_be_adapted():
    with pytest.raises(UserError, match="no router with weights that learn"):
        adapt_routers(make("hash"), samples(), F.mse_loss)
    with pytest.raises(UserError, match="lr=0 must be above 0"):
        adapt_routers(make(), samples(), F.mse_loss, lr=0)
    with pytest.raises(UserError, match="no task is given"):
        meta_step(make(), torch.optim.SGD(make().parameters(), 1.0), [], F.mse_loss)
