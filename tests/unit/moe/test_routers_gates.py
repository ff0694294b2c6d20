"""Hierarchical, ReLU and token routers against their formulas, loops in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import ROOM, make_router, samples
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import finish_step

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def naive_hierarchy(router, x: Tensor) -> tuple[Tensor, list[int]]:
    """[N, M] coarse times fine probabilities, and each sample's best group."""
    living = [e for e, lives in enumerate(router.active.tolist()) if lives]
    group = router.group.tolist()
    groups = sorted({group[e] for e in living})
    result, best = torch.zeros(len(x), ROOM, dtype=torch.double), []
    for n, sample in enumerate(x):
        coarse = {g: math.exp((router.coarse.weight[g] @ sample).item()) for g in groups}
        for g in groups:
            members = [e for e in living if group[e] == g]
            fine = {e: math.exp((router.weight[e] @ sample).item()) for e in members}
            for e in members:
                result[n, e] = coarse[g] / sum(coarse.values()) * fine[e] / sum(fine.values())
        best.append(max(coarse, key=coarse.get))
    return result, best


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, ROOM),
    groups=st.integers(1, ROOM),
    n=st.integers(1, 8),
    mixed=st.booleans(),
)
def test_hierarchical_gates_are_fine_probabilities_or_products(seed, experts, groups, n, mixed):
    """Eq. 10 for top1: the fine gate within the best group; groups in any order."""
    torch.manual_seed(seed)
    x = samples(n)
    for coarse, gate in (("soft", "fine"), ("top1", "fine"), ("top1", "product")):
        router = make_router(
            "hierarchical", experts, seed=seed, num_groups=groups, coarse=coarse, gate=gate
        )
        assert router.group.tolist() == [e % groups for e in range(ROOM)]
        if mixed:
            router.group.copy_(torch.randint(groups, (ROOM,)))
        owner = router.group.tolist()
        expected, best = naive_hierarchy(router, x)
        routing = router(x)
        torch.testing.assert_close(routing.probabilities, expected, **EXACT)
        torch.testing.assert_close(routing.logits.softmax(dim=1), expected, **EXACT)
        if coarse == "soft":
            assert routing.chosen is None
            torch.testing.assert_close(routing.gates, expected, **EXACT)
            continue
        for row, gates, p, group in zip(routing.chosen, routing.gates, expected, best, strict=True):
            mine = [e < experts and owner[e] == group for e in range(ROOM)]
            assert row.tolist() == mine
            share = p * torch.tensor(mine)
            share = share / share.sum() if gate == "fine" else share
            torch.testing.assert_close(gates, share, **EXACT)


@pytest.mark.parametrize("gate", ["fine", "product"])
def test_the_coarse_gate_learns_from_the_task_by_the_product_alone(gate):
    router, x = make_router("hierarchical", 5, gate=gate), samples(30)
    routing = router(x)
    (routing.gates * torch.randn(30, 5)).sum().backward(retain_graph=True)
    assert (router.weight.grad.norm(dim=1) > 1e-3).all()
    coarse = router.coarse.weight
    if gate == "product":
        assert (coarse.grad.norm(dim=1) > 1e-3).all()
    else:
        assert coarse.grad is None
        (routing.probabilities * torch.randn(30, 5)).sum().backward()  # auxiliary losses
        assert (coarse.grad.norm(dim=1) > 1e-3).all()


def test_groups_are_kept_by_pruning_and_filled_up_by_growth():
    router = make_router("hierarchical", 5, num_groups=3)  # groups 0 1 2 0 1
    router.keep_experts(torch.tensor([4, 1, 2, 0, 3]), 2)
    assert router.group.tolist() == [1, 1, 0, 2, 0]
    assert router.active.tolist() == [True] * 2 + [False] * 3


def test_states_without_groups_are_those_of_earlier_versions():
    router, x = make_router("hierarchical", 4, seed=3), samples(8)
    state = router.state_dict()
    del state["group"]
    other = make_router("hierarchical", 2)
    other.group.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x).gates, router(x).gates)
    assert "group" not in state
    other.group.zero_()
    other.load_state_dict({"weight": state["weight"]}, strict=False)
    assert not other.group.any()


def test_a_new_group_opens_when_its_first_expert_is_born():
    router, x = make_router("hierarchical", 2, num_groups=3, coarse="soft"), samples(4)
    before = router(x).gates
    router.active[2] = True
    after = router(x).gates
    assert (after[:, 2] > 0).all()
    torch.testing.assert_close(after[:, 0] / after[:, 1], before[:, 0] / before[:, 1])


def naive_relu(router, x: Tensor, real: list[bool], k: float) -> tuple[Tensor, float, float]:
    """Gates [N, M], the L1 loss without its strength, and the share of zero gates."""
    experts = int(router.active.sum())
    gates = torch.zeros(len(x), ROOM, dtype=torch.double)
    for n, sample in enumerate(x):
        for e in range(experts):
            gates[n, e] = max((router.weight[e] @ sample).item(), 0.0) if real[n] else 0.0
    count = sum(real)
    loss, zeros = 0.0, 0
    for e in range(experts):
        positive = sum(gates[n, e].item() > 0 for n in range(len(x)))
        loss += experts / (k * count) * positive * gates[:, e].sum().item() / count
        zeros += count - positive
    return gates, loss, zeros / (count * experts)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, ROOM),
    n=st.integers(1, 12),
    k=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    padded=st.booleans(),
)
def test_relu_gates_and_their_adaptive_loss(seed, experts, n, k, padded):
    torch.manual_seed(seed)
    router = make_router("relu", experts, seed=seed, k=k, strength=0.5, alpha=1.3)
    x = samples(n)
    mask = torch.arange(n) % 3 != 1 if padded else None
    real = [True] * n if mask is None else mask.tolist()
    gates, loss, zeros = naive_relu(router, x, real, k)
    routing = router(x, mask=mask)
    torch.testing.assert_close(routing.gates, gates, **EXACT)
    assert torch.equal(routing.chosen, gates > 0)
    assert routing.losses.keys() == {"sparsity"}
    assert routing.losses["sparsity"].item() == pytest.approx(0.5 * loss, rel=1e-12)
    finish_step(router)
    missing = max(1 - k / experts, 0.0) - zeros
    if abs(missing) > 1e-9:
        assert router.strength.item() == pytest.approx(0.5 * 1.3 ** math.copysign(1, missing))
    for row, p in zip(gates, routing.probabilities, strict=True):
        if row.any():
            torch.testing.assert_close(p, row / row.sum(), **EXACT)
        elif not padded:
            torch.testing.assert_close(p, router.active.double() / experts)
    assert not router.eval()(x).losses


def test_relu_sparsity_reaches_its_target_and_follows_growth():
    """SGD on the router's own loss alone; without adaptation all gates would die or none."""
    router, x = make_router("relu", 4, k=1.0, strength=1e-3), samples(256)
    with torch.no_grad():
        router.weight.add_(router.weight.abs())  # positive rows and samples: all gates open
    x = x.abs()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    shares = []
    for step in range(300):
        if step == 150:
            router.active[4] = True
        optimizer.zero_grad()
        routing = router(x)
        # a task that wants every gate to be 1 pulls against the loss
        ((routing.gates - 1).square().mean() + routing.losses["sparsity"]).backward()
        optimizer.step()
        finish_step(router)
        shares.append(routing.chosen[:, router.active].double().sum(dim=1).mean().item())
    assert shares[0] == 4
    assert 0.5 < sum(shares[100:150]) / 50 < 1.5
    assert 0.5 < sum(shares[250:]) / 50 < 1.5


def test_relu_copies_share_a_gate():
    router, x = make_router("relu"), samples(9)
    before = router(x).gates
    with torch.no_grad():
        router.weight[3] = router.weight[1]
    router.active[3] = True
    router.logit_shift[[1, 3]] = -math.log(2)
    after = router(x).gates
    torch.testing.assert_close(after[:, [1, 3]], before[:, [1, 1]] / 2)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])


def test_relu_strength_rests_while_all_experts_are_wanted_and_used():
    router = make_router("relu", 2, k=4.0, strength=3.0)
    with torch.no_grad():
        router.weight.abs_()
    router(samples(9).abs())
    finish_step(router)
    assert router.strength.item() == 3.0


def test_relu_strength_keeps_its_bounds_and_rests_on_padding():
    router = make_router("relu", 2, strength=1e-12)
    router(samples(20))  # two experts and k=2: zero gates are too many, strength would fall
    finish_step(router)
    assert router.strength.item() == 1e-12
    router.strength.fill_(3.0)
    router(samples(4), mask=torch.zeros(4, dtype=torch.bool))
    finish_step(router)
    assert router.strength.item() == 3.0


def naive_token(router, x: Tensor) -> Tensor:
    """[N, E] logits without noise."""
    a, b = router.projection.weight, router.projection.bias
    scale = math.exp(min(router.log_scale.item(), math.log(100)))
    experts = int(router.active.sum())
    result = torch.zeros(len(x), experts, dtype=torch.double)
    for n, sample in enumerate(x):
        q = torch.stack([a[i] @ sample + b[i] for i in range(len(a))])
        for e in range(experts):
            w = router.weight[e]
            result[n, e] = (q @ w) / (q.norm() * w.norm()) * scale
    return result


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, ROOM),
    log_scale=st.sampled_from([None, -1.0, 7.0]),
    training=st.booleans(),
)
def test_token_gate(seed, experts, log_scale, training):
    torch.manual_seed(seed)
    router = make_router("token", experts, seed=seed, dim=3).train(training)
    if log_scale is None:
        assert router.log_scale.item() == pytest.approx(math.log(2))
    else:
        torch.nn.init.constant_(router.log_scale, log_scale)
    x = samples(10)
    twin = copy.deepcopy(router)
    routing = router(x)
    logits = naive_token(router, x).detach()
    noise = twin.noise.normal(routing.logits)[:, :experts] / experts if training else 0.0
    noisy = (logits + noise).softmax(dim=1)
    clean = logits.softmax(dim=1)
    torch.testing.assert_close(routing.logits[:, :experts], logits, **EXACT)
    torch.testing.assert_close(routing.probabilities[:, :experts], clean, **EXACT)
    for n in range(10):
        best = int(noisy[n].argmax())
        assert routing.chosen[n].nonzero().flatten().tolist() == [best]
        torch.testing.assert_close(routing.gates[n, best], noisy[n, best], **EXACT)
        for e in range(experts):
            z = (clean[n, e] - noisy[n].max()).item() * experts
            phi = 0.5 * (1 + math.erf(z / math.sqrt(2)))
            assert routing.load[n, e].item() == pytest.approx(phi, rel=1e-9)
    assert not routing.load[:, experts:].any()


def test_the_token_gate_tries_other_experts_in_training_only():
    router, x = make_router("token", 4, dim=3), samples(400)
    first, second = router(x).chosen, router(x).chosen
    assert (first != second).any(dim=1).sum() > 10
    router.eval()
    assert torch.equal(router(x).chosen, router(x).chosen)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hierarchical", {"coarse": "soft"}),
        ("hierarchical", {}),
        ("hierarchical", {"gate": "product"}),
        ("relu", {}),
        ("token", {"dim": 3}),
    ],
)
def test_gradcheck(name, options):
    router, x = make_router(name, 4, **options).eval(), samples(5).requires_grad_()
    names, values = zip(*router.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(router, dict(zip(names, values, strict=True)), (x,))
        outputs = (routing.gates, routing.probabilities)
        return outputs if routing.load is None else (*outputs, routing.load)

    assert torch.autograd.gradcheck(function, (x, *values))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("hierarchical", {"num_groups": 0}, "num_groups=0 must be between 1 and 5"),
        ("hierarchical", {"num_groups": 6}, "num_groups=6 must be between 1 and 5"),
        ("hierarchical", {"coarse": "top2"}, "coarse='top2' must be top1 or soft"),
        ("hierarchical", {"gate": "coarse"}, "gate='coarse' must be fine or product"),
        ("relu", {"k": 0}, "k=0 must be above 0"),
        ("relu", {"strength": 0.0}, "strength=0.0 must be between"),
        ("relu", {"alpha": 0.9}, "alpha=0.9 must be at least 1"),
        ("token", {"dim": 0}, "dim=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(name, options, says):
    with pytest.raises(UserError, match=f"{name} router: {says}") as error:
        make_router(name, **options)
    assert "\n" not in str(error.value)
