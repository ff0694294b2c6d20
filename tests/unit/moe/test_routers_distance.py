"""Routers by distance and density: Laplace, prototypes, domain; against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import ROOM, make_router, samples
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import finish_step
from dynmoe.moe.routers.soft import distances

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, ROOM),
    temperature=st.floats(0.2, 4),
    log_scale=st.floats(-3, 3),
)
def test_laplace_is_a_softmax_of_negative_distances(seed, experts, temperature, log_scale):
    torch.manual_seed(seed)
    router = make_router("laplace", experts, seed=seed, temperature=temperature)
    x = samples(7, 10**log_scale)
    routing = router(x)
    for n in range(7):
        far = [(x[n] - router.weight[e]).square().sum().sqrt().item() for e in range(experts)]
        logits = torch.tensor([-d / temperature for d in far], dtype=torch.double)
        torch.testing.assert_close(routing.logits[n, :experts], logits, rtol=1e-12, atol=0)
        torch.testing.assert_close(routing.gates[n, :experts], logits.softmax(dim=0), rtol=1e-9,
                                   atol=1e-12)  # fmt: skip


def test_distances_do_not_cancel_in_single_precision():
    rows = torch.full((30, 40), 1e3)
    x = rows + 1e-3 * torch.randn(30, 40)
    exact = (x.double()[:, None] - rows.double()).norm(dim=2)
    torch.testing.assert_close(distances(x, rows).double(), exact, rtol=1e-5, atol=0)
    assert distances(x.bfloat16(), rows.bfloat16()).dtype == torch.float32


def test_laplace_learns_also_where_a_sample_is_the_row():
    router = make_router("laplace")
    x = router.weight[:3].detach().clone().requires_grad_()
    router(x).gates[:, 0].square().sum().backward()
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()
    assert router.weight.grad[:3].any(dim=1).all()


def naive_follow(
    weight: Tensor, idle: list[int], x: Tensor, real: list[bool], living: list[int],
    decay: float, patience: int,
) -> tuple[Tensor, list[int], list[int]]:  # fmt: skip
    """New prototypes, idle counts, and where each sample went."""
    went = [min(living, key=lambda e: (x[n] - weight[e]).square().sum().item())
            for n in range(len(x))]  # fmt: skip
    new, idle = weight.clone(), list(idle)
    here = [n for n in range(len(x)) if real[n]]
    for e in living:
        own = [n for n in here if went[n] == e]
        if own:
            new[e] = decay * weight[e] + (1 - decay) * sum(x[n] for n in own) / len(own)
            idle[e] = 0
        elif here:
            idle[e] += 1
    if patience:
        far = {n: (x[n] - weight[went[n]]).square().sum().item() for n in here}
        queue = sorted(here, key=lambda n: -far[n])
        for e in living:
            if idle[e] >= patience and queue and far[queue[0]] > 0:
                new[e], idle[e] = x[queue.pop(0)], 0
    return new, idle, went


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, ROOM),
    n=st.integers(1, 10),
    decay=st.floats(0.1, 1),  # at 0 two prototypes can end on one sample, and ties are open
    patience=st.integers(0, 3),
    padded=st.booleans(),
)
def test_prototypes_follow_their_samples_and_restart(seed, experts, n, decay, patience, padded):
    torch.manual_seed(seed)
    router = make_router("prototypes", experts, seed=seed, decay=decay, patience=patience)
    for _ in range(5):
        x, mask = samples(n), torch.rand(n) < 0.7 if padded else None
        weight, idle = router.weight.clone(), router.idle.tolist()
        routing = router(x, mask=mask)
        assert torch.equal(router.weight, weight)  # nothing moves before the step is done
        finish_step(router)
        real = [True] * n if mask is None else mask.tolist()
        living = list(range(experts))
        new, idle, went = naive_follow(weight, idle, x, real, living, decay, patience)
        torch.testing.assert_close(router.weight.data, new, **EXACT)
        assert router.idle.tolist() == idle
        for k, (gates, e) in enumerate(zip(routing.gates.tolist(), went, strict=True)):
            assert gates == [float(real[k] and f == e) for f in range(ROOM)]
    before = router.weight.clone()
    router.eval()(x)
    finish_step(router)
    assert torch.equal(router.weight, before)


def test_prototypes_find_clusters_and_so_does_a_new_expert():
    """Three far clusters, two prototypes; the third is born near 0, far from everything."""
    centres = torch.tensor([[30.0] * 6, [-30.0] * 6, [30.0] * 3 + [-30.0] * 3]).double()
    router = make_router("prototypes", 2, decay=0.5, patience=3)

    def train() -> None:
        for _ in range(40):
            x = centres.repeat(8, 1) + 0.1 * torch.randn(24, 6)
            router(x)
            finish_step(router)

    train()
    router.active[2] = True
    router.draw_rows(torch.tensor([2]), torch.Generator().manual_seed(0))
    train()
    owner = router.eval()(centres).chosen.double().argmax(dim=1)
    assert sorted(owner.tolist()) == [0, 1, 2]
    torch.testing.assert_close(router.weight[owner].data, centres, rtol=0, atol=0.3)


def test_prototypes_do_not_restart_where_one_of_them_already_is():
    router, x = make_router("prototypes", 3, patience=1), torch.ones(4, 6, dtype=torch.double)
    router.weight[0] = 1.0
    before = router.weight.clone()
    for _ in range(3):
        router(x)
        finish_step(router)
    assert torch.equal(router.weight, before)
    assert router.idle.tolist() == [0, 3, 3, 0, 0]


def test_prototypes_compare_contexts():
    router = make_router("prototypes", use="context", context_dim=2)
    assert router.weight.shape == (ROOM, 2)
    x, context = samples(8), torch.randn(8, 2)
    rows = router.weight[:3].detach().clone()
    expected = (context.double()[:, None] - rows).norm(dim=2).argmin(dim=1)
    assert torch.equal(router(x, context=context).chosen.double().argmax(dim=1), expected)
    with pytest.raises(UserError, match=r"needs a context \[N, 2\].*routing_inputs"):
        router(x)
    with pytest.raises(UserError, match=r"context is \[8, 3\], but must be \[8, 2\]"):
        router(x, context=torch.randn(8, 3))


def test_prototypes_take_and_give_no_gradient():
    router, x = make_router("prototypes"), samples(5).requires_grad_()
    routing = router(x)
    assert not any(t.requires_grad for t in (routing.gates, routing.logits, router.weight))


def naive_density(router, x: Tensor, e: int) -> float:
    """log N(x; mean_e, variance_e), channel by channel."""
    total = 0.0
    for d in range(len(x)):
        variance = router.floor + math.exp(router.log_variance[e, d].item())
        gap = (x[d] - router.weight[e, d]).item()
        total -= 0.5 * (gap**2 / variance + math.log(2 * math.pi * variance))
    return total


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, ROOM),
    k=st.integers(0, ROOM),
    padded=st.booleans(),
)
def test_domain_gates_are_posteriors_of_a_mixture(seed, experts, k, padded):
    torch.manual_seed(seed)
    router = make_router("domain", experts, seed=seed, k=k, likelihood=0.7, floor=0.01)
    x = samples(6)
    mask = torch.tensor([True, False, True, True, False, True]) if padded else None
    routing = router(x, mask=mask)
    prior = router.prior[:experts].softmax(dim=0).tolist()
    likelihoods = []
    for n in range(6):
        joint = [prior[e] * math.exp(naive_density(router, x[n], e)) for e in range(experts)]
        posterior = torch.tensor([j / sum(joint) for j in joint], dtype=torch.double)
        torch.testing.assert_close(routing.probabilities[n, :experts], posterior, **EXACT)
        if mask is not None and not mask[n]:
            assert not routing.gates[n].any()
            continue
        likelihoods.append(math.log(sum(joint)))
        kept = posterior
        if k:
            best = posterior.argsort(descending=True)[: min(k, experts)]
            kept = torch.zeros_like(posterior).index_put((best,), posterior[best])
            kept = kept / kept.sum() if k > 1 else kept
        torch.testing.assert_close(routing.gates[n, :experts], kept, **EXACT)
    expected = -0.7 * sum(likelihoods) / len(likelihoods) / 6
    assert routing.losses["likelihood"].item() == pytest.approx(expected, rel=1e-12)
    assert not router.eval()(x).losses


def test_domain_learns_the_input_and_not_the_task():
    router, x = make_router("domain", 2), samples(20).requires_grad_()
    routing = router(x)
    assert not routing.gates.requires_grad
    (grad,) = torch.autograd.grad(routing.losses["likelihood"], x, allow_unused=True)
    assert grad is None
    centres = torch.tensor([[2.0] * 6, [-2.0] * 6]).double()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        batch = centres.repeat(16, 1) + 0.1 * torch.randn(32, 6)
        loss = router(batch).losses["likelihood"]
        loss.backward()
        optimizer.step()
    owner = router.eval()(centres).gates.argmax(dim=1)
    assert sorted(owner.tolist()) == [0, 1]
    torch.testing.assert_close(router.weight[owner].data, centres, rtol=0, atol=0.2)
    # two equal clusters of standard deviation 0.1: entropy of a Gaussian, and log 2 for the choice
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.01) + math.log(2) / 6
    assert loss.item() == pytest.approx(entropy, abs=0.3)


def test_domain_duplicates_leave_the_likelihood_alone():
    router, x = make_router("domain"), samples(9)
    before = router(x)
    with torch.no_grad():
        for rows in router.expert_rows():
            rows[3] = rows[1]
    router.active[3] = True
    router.logit_shift[[1, 3]] = -math.log(2)
    after = router(x)
    torch.testing.assert_close(after.losses, before.losses, **EXACT)
    torch.testing.assert_close(after.gates[:, 0], before.gates[:, 0], **EXACT)


def test_huge_rows_of_unborn_components_do_nothing():
    router, x = make_router("domain").float(), samples(9).float()
    before = router(x)
    with torch.no_grad():
        for rows in router.expert_rows():
            rows[3:] = 1e30
    after = router(x)
    assert torch.equal(after.gates, before.gates)
    (after.losses["likelihood"] + after.probabilities.square().sum()).backward()
    for rows in router.expert_rows():
        assert rows.grad.isfinite().all() and not rows.grad[3:].any()


@pytest.mark.parametrize("name", ["laplace", "domain"])
def test_gradcheck(name):
    router = make_router(name)
    x = samples(5).requires_grad_(name != "domain")  # which has none for x, by design
    names, values = zip(*router.named_parameters(), strict=True)

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(router, dict(zip(names, values, strict=True)), (x,))
        return (routing.probabilities, *routing.losses.values())

    assert torch.autograd.gradcheck(function, (x, *values))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("laplace", {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ("prototypes", {"use": "y"}, "use='y' must be x or context"),
        ("prototypes", {"use": "context"}, "context_dim=0 must be at least 1"),
        ("prototypes", {"decay": 1.1}, "decay=1.1 must be between 0 and 1"),
        ("prototypes", {"patience": -1}, "patience=-1 must be at least 0"),
        ("domain", {"k": 6}, "k=6 must be between 0 and 5"),
        ("domain", {"likelihood": -1.0}, "likelihood=-1.0 must be at least 0"),
        ("domain", {"floor": 0.0}, "floor=0.0 must be above 0"),
    ],
)
def test_bad_options_are_refused(name, options, says):
    with pytest.raises(UserError, match=f"{name} router: {says}") as error:
        make_router(name, **options)
    assert "\n" not in str(error.value)
