"""CReLU, LayerNorm, normalise-and-project, injection, hare and tortoise: what they make of it."""

from __future__ import annotations

import pytest
import torch
from intervention_helpers import NETWORKS, Loop, batch, conv, make, mlp, seeded, weights
from torch import nn

from cl_benchmarks.networks import build_network
from dynmoe.errors import UserError
from dynmoe.growth.budget import Budget
from dynmoe.interventions.architecture import Injected
from dynmoe.interventions.units import find_units
from dynmoe.registry import get


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------- CReLU


@pytest.mark.parametrize("network", NETWORKS)
def test_crelu_has_fewer_parameters_and_the_same_outputs_shape(network: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    before = count(model)
    make("crelu").transform(model, seeded())
    assert count(model) < before
    assert model(batch(0)[0]).shape == (16, 3)


def test_crelu_passes_on_both_halves() -> None:
    torch.manual_seed(0)
    model = mlp()
    weight, bias = (p.detach().clone() for p in model[1].parameters())  # type: ignore[index]
    make("crelu").transform(model, seeded())
    x = batch(0)[0]
    half = x.flatten(1) @ weight[:6].T + bias[:6]
    expected = torch.cat([half.relu(), (-half).relu()], dim=1)
    assert torch.allclose(model[:3](x), expected, atol=1e-6)  # type: ignore[index]


def test_crelu_behind_batch_normalisation() -> None:
    torch.manual_seed(0)
    model = conv()
    make("crelu").transform(model, seeded())
    x = batch(0)[0]
    half = nn.functional.conv2d(x, model[0].weight, padding=1)  # type: ignore[index]
    assert half.shape[1] == 3
    normal = (half - half.mean((0, 2, 3), keepdim=True)) / (
        half.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    expected = torch.cat([normal.relu(), (-normal).relu()], dim=1)
    assert torch.allclose(model[:3](x), expected, atol=1e-5)  # type: ignore[index]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()


def test_crelu_on_a_residual_network() -> None:
    """Shared ReLUs, some of them behind a sum, still work."""
    torch.manual_seed(0)
    config = get("network", "resnet18").Config(width=8, hidden=12)
    model = build_network(config, (3, 16, 16), 5)
    before = count(model)
    make("crelu").transform(model, seeded())
    assert count(model) < 0.8 * before
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_crelu_refuses_what_it_cannot_halve() -> None:
    odd = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(UserError, match="layer 0 has 3 units, an odd number"):
        make("crelu").transform(odd, seeded())
    smooth = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(UserError, match="no ReLU"):
        make("crelu").transform(smooth, seeded())


@pytest.mark.parametrize("name", ["crelu", "layernorm", "nap"])
def test_frozen_layers_and_what_they_read_are_not_rebuilt(name: str) -> None:
    """Of three hidden layers, the first is frozen, and what reads the second one."""
    layers = [nn.Linear(8, 8) for _ in range(4)]
    layers[0].requires_grad_(False), layers[2].requires_grad_(False)
    hidden = [m for layer in layers for m in (layer, nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(8, 2))
    make(name).transform(model, seeded())
    rebuilt = [isinstance(model[2 * i], nn.Sequential) for i in range(4)]
    assert rebuilt == [False, False, False, True]
    assert all(
        isinstance(model[2 * i], nn.Linear) and len(model[2 * i].weight) == 8 for i in (0, 2)
    )


@pytest.mark.parametrize("name", ["crelu", "layernorm"])
def test_frozen_networks_are_refused(name: str) -> None:
    model = mlp()
    model[3].requires_grad_(False)  # type: ignore[index]
    with pytest.raises(UserError, match=f"{name}: every layer of hidden units is frozen"):
        make(name).transform(model, seeded())


# ---------------------------------------------------------------- LayerNorm


def test_layernorm_normalises_before_activations() -> None:
    torch.manual_seed(0)
    model = mlp()
    make("layernorm").transform(model, seeded())
    x = batch(0)[0]
    plain = x.flatten(1) @ model[1][0].weight.T + model[1][0].bias  # type: ignore[index]
    normal = (plain - plain.mean(1, keepdim=True)) / (
        plain.var(1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    assert torch.allclose(model[:3](x), normal.relu(), atol=1e-5)  # type: ignore[index]
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 and len(find_units(model)) == 2


def test_layernorm_of_maps_is_over_all_positions_and_what_is_normalised_stays() -> None:
    torch.manual_seed(0)
    model = conv()
    make("layernorm").transform(model, seeded())
    (norm,) = [m for m in model.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 1 and norm.num_channels == 4
    maps = model[:5](batch(0)[0])  # type: ignore[index]
    assert torch.allclose(maps.mean((1, 2, 3)), torch.zeros(16), atol=1e-5)
    assert isinstance(model[1], nn.BatchNorm2d)  # type: ignore[index]


# ---------------------------------------------------------------- normalise and project


@pytest.mark.parametrize("network", NETWORKS)
def test_nap_keeps_every_matrix_at_its_first_norm(network: str) -> None:
    loop = Loop(network, "nap", lr=0.05)
    first = {n: float(p.norm()) for n, p in weights(loop.model).items()}
    assert any(isinstance(m, nn.LayerNorm | nn.GroupNorm) for m in loop.model.modules())
    before = weights(loop.model)
    loop.run(5)
    for name, p in weights(loop.model).items():
        matrix = name.endswith(("w_in", "w_out")) or (p.dim() > 1 and name.endswith("weight"))
        if matrix and "router" not in name:
            assert float(p.norm()) == pytest.approx(first[name], rel=1e-5), name
            assert not torch.equal(p, before[name])


def test_nap_projects_by_scaling_alone_and_when_it_is_time() -> None:
    loop = Loop("mlp", "nap", every=3, normalise=False, lr=0.05)
    plain = Loop("mlp", "none", lr=0.05).run(3)
    assert len(list(loop.model.modules())) == len(list(plain.model.modules()))
    first = weights(loop.model)
    loop.run(2)
    assert float(loop.model[1].weight.detach().norm()) != pytest.approx(
        float(first["1.weight"].norm())
    )  # type: ignore[index]
    loop.run(3)
    for name, p in weights(plain.model).items():
        scale = first[name].norm() / p.norm() if p.dim() > 1 else 1.0
        assert torch.allclose(weights(loop.model)[name], scale * p, atol=1e-6)


def test_nap_counts_new_units_with_the_norm_of_their_start() -> None:
    loop = Loop("moe", "nap", lr=0.1, budget=Budget(mode="per-growth"))
    first = weights(loop.model)["3.bank.w_in"]
    before = weights(loop.run(3).model)["3.bank.w_in"]
    loop.controller.grow(3, batch(0))
    born = weights(loop.model)["3.bank.w_in"]
    kept = born[: len(before)] == before
    born[: len(before)][kept] = first[kept]
    assert len(born) > len(before) and kept.any()
    loop.run(5)
    weight = dict(loop.model.named_parameters())["3.bank.w_in"]
    assert float(weight.detach().norm()) == pytest.approx(float(born.norm()), rel=1e-5)


# ---------------------------------------------------------------- plasticity injection


@pytest.mark.parametrize("network", NETWORKS)
def test_injection_changes_nothing_at_that_moment(network: str) -> None:
    loop = Loop(network, "injection", task=1).run(4)
    images = batch(50)[0]
    loop.model.eval()
    with torch.no_grad():
        before, parameters = loop.model(images), count(loop.model)
        loop.intervention.task_starts(1, None)
        after = loop.model(images)
    assert torch.allclose(before, after, atol=1e-6)
    assert count(loop.model) == parameters
    assert isinstance(list(loop.model.children())[-1], Injected)


def test_injected_head_learns_and_the_old_one_does_not() -> None:
    loop = Loop("mlp", "injection", task=1).run(4)
    old = loop.model[5]  # type: ignore[index]
    kept = weights(old)
    loop.intervention.task_starts(1, None)
    head = loop.model[5]  # type: ignore[index]
    fresh = weights(head.new)
    assert fresh["weight"].shape == (3, 8) and fresh["weight"].abs().max() <= 8**-0.5
    loop.tasks = False
    loop.run(7)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(head, f"frozen_{name}"), kept[name])
        assert torch.equal(getattr(head, f"copy_{name}"), fresh[name])
        assert not torch.equal(getattr(head.new, name), fresh[name])
        assert getattr(head.new, name).grad is not None
    z = torch.randn(4, 8)
    expected = old(z) + head.new(z) - (z @ fresh["weight"].T + fresh["bias"])
    assert torch.allclose(head(z), expected, atol=1e-6)
    assert int(loop.optimizer.state[head.new.weight]["step"]) == 3
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loop.model.parameters()}


def test_injection_comes_once_and_when_it_is_due() -> None:
    for options, due in (({"task": 2}, 9), ({"step": 5}, 5)):
        loop = Loop("mlp", "injection", **options)
        for step in range(1, 14):
            loop.run(step)
            assert loop.intervention.done == (step >= due)  # type: ignore[attr-defined]
        assert sum(isinstance(m, Injected) for m in loop.model.modules()) == 1


# ---------------------------------------------------------------- hare and tortoise


def test_tortoise_follows_and_the_hare_goes_back_to_it() -> None:
    loop = Loop("conv", "hare-tortoise", tasks=False, momentum=0.8, period=3)
    slow = {n: t.clone() for n, t in loop.model.state_dict().items()}
    fast: dict[str, torch.Tensor] = {}
    loop.optimizer.register_step_post_hook(
        lambda *_: fast.update({n: t.clone() for n, t in loop.model.state_dict().items()})
    )
    for step in range(1, 8):
        loop.run(step)
        for name, value in fast.items():
            if value.is_floating_point():
                slow[name] = 0.8 * slow[name] + 0.2 * value
            now = loop.model.state_dict()[name]
            expected = slow[name] if step % 3 == 0 and value.is_floating_point() else value
            assert torch.allclose(now, expected, atol=1e-6), (step, name)
    assert int(loop.model[1].num_batches_tracked) == 7  # type: ignore[index]


def test_hare_and_tortoise_share_no_memory() -> None:
    loop = Loop("conv", "hare-tortoise", momentum=0.5, period=2).run(2)
    intervention = loop.intervention
    slow = {**intervention.tortoise.first, **intervention.buffers}  # type: ignore[attr-defined]
    fast = {t.data_ptr() for t in loop.model.state_dict().values()}
    assert len(slow) == 11 + 4 and len(fast) > 11
    assert not {t.data_ptr() for t in slow.values()} & fast


def test_tortoise_does_not_undo_a_growth() -> None:
    """Right after it, going back brings new units to where they were born."""
    loop = Loop("moe", "hare-tortoise", momentum=0.9, period=100).run(3)
    layer = loop.model[3]  # type: ignore[index]
    old = layer.bank.w_in.detach().clone()
    loop.controller.grow(3, batch(0))
    new = (layer.bank.w_in != old).all(dim=1)
    assert 0 < int(new.sum()) < 8
    sizes, born = layer.bank.hidden_sizes(), layer.bank.w_in.detach().clone()
    shift = layer.router.logit_shift.clone()
    loop.intervention.steps = 99
    loop.intervention.step_done()
    assert torch.equal(layer.bank.w_in[new], born[new]) and layer.bank.hidden_sizes() == sizes
    assert torch.equal(layer.router.logit_shift, shift) and layer.num_experts == 4
