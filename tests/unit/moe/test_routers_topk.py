"""Top-k routing with and without noise, against its formulas."""

from __future__ import annotations

import copy
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import DIM, make_router, samples
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import Router

EXACT = {"rtol": 1e-12, "atol": 1e-12}
BOTH = pytest.mark.parametrize("name", ["topk", "noisy-topk"])


@BOTH
@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_takes_the_most_probable_experts(name, k):
    router, x = make_router(name, 4, k=k).eval(), samples(30)
    probabilities = (x @ router.weight[:4].T).softmax(dim=1)
    routing = router(x)
    assert (routing.chosen.sum(dim=1) == k).all()
    for row, p, gates in zip(routing.chosen, probabilities, routing.gates, strict=True):
        best = p.sort(descending=True).indices[:k]
        assert row.nonzero().flatten().tolist() == sorted(best.tolist())
        assert torch.equal(gates > 0, row)
        torch.testing.assert_close(gates[best], p[best] / (p[best].sum() if k > 1 else 1), **EXACT)


@BOTH
def test_top1_gate_is_the_probability_and_teaches_the_router(name):
    """Renormalised, it would be 1 and the router's gradient zero."""
    router, x = make_router(name, k=1), samples(30)
    routing = router(x)
    torch.testing.assert_close(routing.gates.sum(dim=1), routing.probabilities.amax(dim=1))
    (routing.gates.sum(dim=1) * torch.randn(30)).sum().backward()
    assert (router.weight.grad[:3].norm(dim=1) > 1e-2).all()


@BOTH
def test_all_are_used_while_fewer_live(name):
    router, x = make_router(name, 2, k=4), samples(8)
    routing = router(x)
    assert routing.chosen.tolist() == [[True, True, False, False, False]] * 8
    torch.testing.assert_close(routing.gates, routing.probabilities)
    router.active[2:4] = True
    assert (router(x).chosen.sum(dim=1) == 4).all()


@BOTH
def test_unborn_experts_are_left_out_where_probabilities_underflow(name):
    router, x = make_router(name, 3, k=3).float(), samples(50, 1e4).float()
    routing = router(x)
    assert (routing.probabilities[:, :3] == 0).any()
    assert routing.chosen.sum(dim=0).tolist() == [50, 50, 50, 0, 0]


@BOTH
@pytest.mark.parametrize("k", [-1, 0, 6])
def test_bad_k_is_refused(name, k):
    with pytest.raises(UserError, match=f"k={k} must be between 1 and 5"):
        make_router(name, k=k)


@pytest.mark.parametrize("sigma", [0.0, -1.0])
def test_fixed_noise_needs_a_scale(sigma):
    with pytest.raises(UserError, match=f"sigma={sigma} must be above 0"):
        make_router("noisy-topk", noise="fixed", sigma=sigma)


# noise --------------------------------------------------------------------------------------------


def noisy_router(experts: int = 4, **options: object) -> Router:
    """Its noise weights are no longer zero, as after training."""
    router = make_router("noisy-topk", experts, **options)
    if router.noise_weight is not None:
        generator = torch.Generator().manual_seed(5)
        fresh = torch.randn(5, DIM, generator=generator, dtype=torch.double)
        router.noise_weight.data.copy_(fresh)
    return router


def noise_scales(router: Router, x: Tensor) -> Tensor:
    """softplus(x W_noise^T), or sigma, one entry at a time."""
    scales = torch.full((len(x), 5), router.sigma, dtype=torch.double)
    if router.noise_weight is not None:
        for n, row in enumerate(x.tolist()):
            for e, weights in enumerate(router.noise_weight.tolist()):
                scales[n, e] = math.log1p(math.exp(math.fsum(map(float.__mul__, row, weights))))
    return scales


@pytest.mark.parametrize("noise", ["learned", "fixed"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_noisy_scores_gates_and_load_equal_the_formulas(noise, k):
    """Shazeer et al., Eqs. 3-5 and 8-10, one sample and expert at a time."""
    router, x = noisy_router(k=k, noise=noise, sigma=0.7), samples(12)
    router.logit_shift[:4] = torch.tensor([0.5, -1.0, 0.0, 0.3])
    draws = copy.deepcopy(router.noise).normal(torch.empty(12, 5, dtype=torch.double))
    routing, scales = router(x), noise_scales(router, x)
    clean = x @ router.weight.detach().T + router.logit_shift
    for n in range(12):
        noisy = [float(clean[n, e] + draws[n, e] * scales[n, e]) for e in range(4)]
        best = sorted(range(4), key=lambda e: -noisy[e])[:k]
        assert routing.chosen[n].nonzero().flatten().tolist() == sorted(best)
        total = sum(math.exp(noisy[e]) for e in (best if k > 1 else range(4)))
        for e in range(4):
            gate = math.exp(noisy[e]) / total if e in best else 0.0
            assert routing.gates[n, e].item() == pytest.approx(gate, rel=1e-12)
            kth = sorted((noisy[o] for o in range(4) if o != e), reverse=True)[k - 1]
            chance = NormalDist().cdf(float(clean[n, e] - kth) / float(scales[n, e]))
            assert routing.load[n, e].item() == pytest.approx(chance, rel=1e-12, abs=1e-14)
        torch.testing.assert_close(routing.logits[n, :4].tolist(), noisy, **EXACT)


def test_there_is_no_noise_in_evaluation():
    noisy, plain, x = noisy_router(k=2).eval(), make_router("topk", 4, k=2), samples(20)
    torch.testing.assert_close(noisy(x).gates, plain(x).gates, rtol=0, atol=0)
    assert not noisy.noise.drawn.any()


def test_every_pass_draws_again():
    router, x = noisy_router(k=2), samples(5)
    first, second = router(x).logits[:, :4], router(x).logits[:, :4]
    assert (first != second).all()


def test_noise_that_vanishes_leaves_load_and_gradients_finite():
    """softplus(-400) is 0 in float32: the chosen experts' load is 1, the others' 0."""
    router, x = noisy_router(k=2).float(), samples(20).float().abs()
    with torch.no_grad():
        router.noise_weight.fill_(-400.0)
        x[:, 0] = 1.0
    routing = router(x)
    torch.testing.assert_close(routing.load, routing.chosen.float())
    (routing.load * torch.randn_like(routing.load)).sum().backward()
    assert router.weight.grad.isfinite().all() and router.noise_weight.grad.isfinite().all()
    with torch.no_grad():
        router.weight[1] = router.weight[0]  # ties: 0 / 0 without a least scale
    assert router(x).load.isfinite().all()


def test_noise_of_every_score_has_its_scale():
    router, x = noisy_router(k=2), samples(1).expand(20000, DIM)
    spread = (router(x).logits - x @ router.weight.T)[:, :4]
    scales = noise_scales(router, x[:1])[0, :4]
    torch.testing.assert_close(spread.std(dim=0), scales, rtol=0.03, atol=0)
    assert (spread.mean(dim=0).abs() < 0.03 * scales).all()
    assert spread.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03


def test_learned_noise_starts_alike_for_all_experts():
    router = make_router("noisy-topk")
    assert not router.noise_weight.any() and router.noise_weight.shape == (5, DIM)
    assert any(p is router.noise_weight for p in router.expert_rows())
    assert make_router("noisy-topk", noise="fixed").noise_weight is None


def test_load_is_the_chance_of_being_chosen_when_one_noise_is_drawn_again():
    """A simulation of the definition, with the other experts' noise held."""
    router, x = noisy_router(k=2), samples(3)
    draws = copy.deepcopy(router.noise).normal(torch.empty(3, 5, dtype=torch.double))
    load, scales = router(x).load, noise_scales(router, x)
    clean = x @ router.weight.T
    noisy = (clean + draws * scales)[:, :4]
    for e in range(4):
        fresh = clean[:, e] + torch.randn(40000, 3, dtype=torch.double) * scales[:, e]
        others = torch.cat([noisy[:, :e], noisy[:, e + 1 :]], dim=1)
        wins = fresh > others.topk(2, dim=1).values[:, 1]
        torch.testing.assert_close(load[:, e], wins.double().mean(dim=0), rtol=0, atol=0.012)


@pytest.mark.parametrize("k", [2, 5])
def test_load_is_certain_while_all_are_used(k):
    router, x = noisy_router(2, k=k), samples(6)
    assert router(x).load.tolist() == [[1, 1, 0, 0, 0]] * 6
    router.active[2] = True
    assert (router(x).load[:, :3] < 1).any() == (k == 2)


def test_selection_bias_moves_choice_and_load_but_not_the_probabilities():
    router, x = noisy_router(k=1).eval(), samples(40)
    before = router(x)
    router.selection_bias[2] = 50.0
    after = router(x)
    assert after.chosen[:, 2].all() and after.chosen.sum() == 40
    torch.testing.assert_close(after.probabilities, before.probabilities)
    assert (after.load[:, 2] > 0.999).all() and after.load[:, :2].max() < 1e-3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), experts=st.integers(1, 5), k=st.integers(1, 5))
def test_chosen_experts_have_the_larger_load(seed, experts, k):
    """One that is chosen passes its threshold at least half of the time without its noise."""
    torch.manual_seed(seed)
    router = noisy_router(experts, k=k).eval()
    routing = router(samples(10))
    assert (routing.load[routing.chosen] >= 0.5).all()
    missed = ~routing.chosen & routing.active
    assert (routing.load[missed] <= 0.5).all()


@pytest.mark.parametrize("noise", ["learned", "fixed"])
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_gradients_of_gates_and_load(noise, experts):
    router = noisy_router(experts, k=2, noise=noise)
    names, values = zip(*router.named_parameters(), strict=True)
    buffers = {name: buffer.clone() for name, buffer in router.named_buffers()}

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        state = {name: buffer.clone() for name, buffer in buffers.items()}  # the same draws
        state |= dict(zip(names, values, strict=True))
        routing = torch.func.functional_call(router, state, x)
        return routing.gates, routing.load

    assert torch.autograd.gradcheck(function, (samples(5).requires_grad_(), *values))
