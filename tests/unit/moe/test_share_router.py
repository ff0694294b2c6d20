"""One router for several layers: who shares, training, growth, saving."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController
from dynmoe.growth.settings import GrowthSettings
from dynmoe.moe import MoELayer, moe_layers, share_router


def layer(
    seed: int, router: str = "cosine", hidden: int = 12, width: int = 6, **options
) -> MoELayer:
    generator = torch.Generator().manual_seed(seed)
    config = registry.get("router", router).Config()
    options = {"num_experts": 2, "max_experts": 6} | options
    return MoELayer(width, 6, hidden, router=config, generator=generator, **options)


def model(router: str = "cosine", count: int = 3) -> nn.Sequential:
    layers = [layer(seed, router, hidden=12 + 2 * seed) for seed in range(count)]
    return nn.Sequential(*layers).double()


def test_all_layers_use_the_first_ones_router_and_it_counts_once():
    net = model()
    first, before = net[0].router, sum(p.numel() for p in net.parameters())
    assert share_router(net) == ["1", "2"]
    assert all(block.router is first for block in net)
    assert sum(p.numel() for p in net.parameters()) == before - 2 * first.weight.numel()
    names = [name for name, _ in net.named_parameters() if "router" in name]
    assert names == ["0.router.weight"]
    assert share_router(net) == []  # once more changes nothing


def test_only_layers_that_are_alike_share():
    net = nn.ModuleList(
        [
            layer(0),
            layer(1, router="softmax"),
            layer(2, num_experts=3),
            layer(3, max_experts=5),
            layer(4, width=5),
            layer(5),
            layer(6, router="softmax"),
            nn.Linear(6, 6),
        ]
    )
    assert share_router(net) == ["5", "6"]
    assert net[5].router is net[0].router and net[6].router is net[1].router


@pytest.mark.parametrize(
    "net",
    [nn.Linear(2, 2), layer(0), nn.ModuleList([layer(0), layer(1, width=5)])],
    ids=["none", "one", "different"],
)
def test_nothing_to_share_is_an_error(net):
    with pytest.raises(
        UserError, match=r"no router can be shared: the model has \d MoE layers"
    ) as e:
        share_router(net)
    assert "\n" not in str(e.value)


def test_the_gradient_is_the_sum_over_the_layers():
    net, twin = model(), model()
    share_router(net)
    for block in twin:  # equal routers, each layer its own
        block.router.load_state_dict(net[0].router.state_dict())
    x = torch.randn(7, 6, dtype=torch.double)
    y = net(x)
    torch.testing.assert_close(y, twin(x), rtol=0, atol=0)
    y.square().sum().backward()
    twin(x).square().sum().backward()
    total = sum(block.router.weight.grad for block in twin)
    torch.testing.assert_close(net[0].router.weight.grad, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net[0].bank.w_in.grad, twin[0].bank.w_in.grad)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> float:
    optimizer.zero_grad()
    loss = (net(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("router", ["cosine", "topk", "hierarchical", "expert-choice"])
def test_growth_in_the_middle_of_training(router):
    net = model(router)
    share_router(net)
    shared = net[0].router
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    init = registry.get("init", "random").Config(router="new")
    generator = torch.Generator().manual_seed(0)
    pruning = registry.get("pruning", "utility").Config()
    controller = GrowthController(
        net, optimizer, granularity=2, pruning=pruning, init=init, generator=generator
    )
    x, target = torch.randn(20, 6).double(), torch.randn(20, 6).double()
    for experts in (2, 4, 6):
        losses = [train(net, optimizer, x, target) for _ in range(3)]
        assert losses[2] < losses[0]
        assert [block.num_experts for block in net] == [experts] * 3
        assert all(block.router is shared for block in net)
        if experts == 6:
            break
        old, mean = copy.deepcopy(shared.weight.data), _mean_square(optimizer, shared, experts)
        state = copy.deepcopy(optimizer.state[shared.weight])
        controller.grow(experts, (x, None))
        new = slice(experts, experts + 2)
        after = optimizer.state[shared.weight]
        assert torch.equal(shared.weight[:experts], old[:experts])
        assert (shared.weight[new] != old[new]).all()
        assert torch.equal(after["exp_avg"][:experts], state["exp_avg"][:experts])
        assert not after["exp_avg"][new].any()
        torch.testing.assert_close(
            after["exp_avg_sq"][new], torch.full((2, 6), mean, dtype=torch.double)
        )
        assert [block.bank.hidden_sizes() for block in net] == [
            controller.events[-1].hidden_sizes[name] for name, _ in moe_layers(net)
        ]
    assert sum(p is shared.weight for group in optimizer.param_groups for p in group["params"]) == 1


def _mean_square(optimizer: torch.optim.Optimizer, router: nn.Module, rows: int) -> float:
    return optimizer.state[router.weight]["exp_avg_sq"][:rows].mean().item()


def test_growth_draws_the_new_rows_once():
    """The same rows as one layer alone would get from the same generator."""
    net, alone = model(count=2), model(count=1)
    share_router(net)
    pruning = registry.get("pruning", "first").Config()  # which draws nothing
    for part in (net, alone):
        GrowthController(part, pruning=pruning, generator=torch.Generator().manual_seed(5)).grow(0)
    assert net[0].router.active.tolist() == [True] * 3 + [False] * 3
    assert torch.equal(net[0].router.weight, alone[0].router.weight)


def test_duplicates_keep_the_function_where_hidden_sizes_agree():
    net = nn.Sequential(*(layer(seed, hidden=12, activation="tanh") for seed in range(3))).double()
    share_router(net)
    x = torch.randn(9, 6, dtype=torch.double)
    before = net(x)
    init = registry.get("init", "duplicate").Config()
    GrowthController(net, granularity=2, init=init).grow(0, (x, None))
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_saving_and_copying_keep_it_shared():
    net, other = model(), model()
    share_router(net)
    optimizer = torch.optim.Adam(net.parameters())
    x, target = torch.randn(9, 6).double(), torch.randn(9, 6).double()
    train(net, optimizer, x, target)
    GrowthController(net, optimizer, granularity=2).grow(0, (x, None))
    train(net, optimizer, x, target)
    share_router(other)
    resumed = torch.optim.Adam(other.parameters())
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved, saved_optimizer = torch.load(file, weights_only=True)
    other.load_state_dict(saved, strict=True)
    resumed.load_state_dict(saved_optimizer)
    twin = copy.deepcopy(net)
    assert twin[2].router is twin[0].router and twin[0].router is not net[0].router
    assert torch.equal(other(x), net(x)) and torch.equal(twin(x), net(x))
    train(net, optimizer, x, target)
    train(other, resumed, x, target)
    assert torch.equal(other(x), net(x))
    assert other[2].router is other[0].router and other[2].num_experts == 4


def test_the_setting_shares_where_there_are_layers():
    net, dense = model(), nn.Sequential(nn.Linear(6, 6))
    GrowthSettings().join_routers(net)
    assert net[1].router is not net[0].router
    settings = GrowthSettings(share_router=True)
    settings.join_routers(dense)
    settings.join_routers(net)
    assert net[2].router is net[0].router
    with pytest.raises(UserError, match="no router can be shared"):
        settings.join_routers(nn.Sequential(layer(0)))
