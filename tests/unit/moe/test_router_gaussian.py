"""The Gaussian router: posteriors of what each expert was trained on."""

from __future__ import annotations

import math

import pytest
import torch
from router_cases import DIM, make_router, samples
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import Router


def learn(router: Router, x: Tensor) -> None:
    """One optimizer step with the samples x [N, D]."""
    router(x)
    router.finish_step()


def grow(router: Router, *new: int) -> None:
    index = torch.tensor(new)
    router.active[index] = True
    router.draw_rows(index, torch.Generator().manual_seed(1))


def domain(place: int, count: int, seed: int) -> Tensor:
    """[count, DIM] correlated samples around a place of their own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(DIM, dtype=torch.double) + 0.5
    noise = torch.randn(count, DIM, dtype=torch.double, generator=generator)
    return noise @ mix + 3 * torch.eye(DIM, dtype=torch.double)[place]


def test_gates_are_the_posterior_of_a_linear_discriminant() -> None:
    router = make_router("gaussian", experts=1, shrinkage=0.25, temperature=2.0)
    batches = [domain(0, 20, 0), domain(2, 30, 1)]
    learn(router, batches[0])
    grow(router, 1)
    learn(router, batches[1])
    means = [batch.mean(0) for batch in batches]
    torch.testing.assert_close(router.weight[:2], torch.stack(means))
    matrix = sum(torch.cov(batch.T, correction=0) for batch in batches) / 2
    diagonal = matrix.diagonal()
    shrunk = 0.75 * matrix + torch.diag(0.25 * diagonal + 1e-3 * diagonal.mean() + 1e-8)
    x = samples(7)
    offs = [x - mean for mean in means]
    logits = torch.stack([-(off @ shrunk.inverse() * off).sum(1) / 4 for off in offs], dim=1)
    routing = router.eval()(x)
    torch.testing.assert_close(routing.logits[:, :2], logits)
    torch.testing.assert_close(routing.gates[:, :2], logits.softmax(1))


def test_samples_find_the_experts_of_their_own_phase() -> None:
    router = make_router("gaussian", experts=1)
    for phase in range(4):
        if phase:
            grow(router, phase)
        for step in range(15):
            learn(router, domain(phase, 32, 100 * phase + step))
    router.eval()
    shares = torch.stack([router(domain(p, 500, 9000 + p)).gates.mean(0) for p in range(4)])
    assert (shares.diagonal() > 0.75).all() and (shares.argmax(1) == torch.arange(4)).all()


def test_means_of_older_experts_stand_still() -> None:
    router = make_router("gaussian", experts=2)
    learn(router, samples(20))
    learn(router, samples(20))
    kept = router.weight[:2].clone()
    grow(router, 2)
    learn(router, samples(20) + 5)
    assert router.weight[:2].equal(kept)
    torch.testing.assert_close(
        router.weight[2].mean(), torch.tensor(5.0).double(), atol=0.5, rtol=0
    )


def test_a_new_expert_is_not_locked_out_before_its_first_sample() -> None:
    router = make_router("gaussian", experts=2)
    for _ in range(3):
        learn(router, samples(40))
    grow(router, 2)
    gates = router.eval()(samples(40)).gates
    assert gates[:, 2].mean() > 0.2 and not gates[:, 3:].any()


def test_newest_experts_divide_a_phase_among_them() -> None:
    router = make_router("gaussian", experts=2, decay=0.8)
    for step in range(60):
        learn(
            router, torch.cat([domain(0, 30, step), domain(1, 30, 500 + step)])[torch.randperm(60)]
        )
    means = router.weight[:2, :2]
    assert (means[0] - means[1]).abs().max() > 1  # of the places [3, 0] and [0, 3]


def test_the_covariance_is_the_mean_over_phases() -> None:
    router = make_router("gaussian", experts=1, decay=0.0)
    for phase, scale in enumerate((1.0, 3.0, 2.0)):
        if phase:
            grow(router, phase)
        generator = torch.Generator().manual_seed(phase)
        x = scale * torch.randn(4000, DIM, dtype=torch.double, generator=generator)
        for _ in range(2):
            learn(router, x)
    total = (router.phases * router.covariance + router.current) / 3
    torch.testing.assert_close(total.diagonal().mean().item(), (1 + 9 + 4) / 3, rtol=0.05, atol=0)


def test_early_samples_fade() -> None:
    router = make_router("gaussian", experts=1, decay=0.5)
    for value in (0.0, 1.0, 1.0, 1.0):
        learn(router, torch.full((4, DIM), value, dtype=torch.double))
    weights = [0.5**3, 0.5**2, 0.5, 1]
    expected = sum(weights[1:]) / sum(weights)
    assert router.weight[0].tolist() == pytest.approx([expected] * DIM)


def test_padding_and_evaluation_move_nothing() -> None:
    router, other = make_router("gaussian", experts=1), make_router("gaussian", experts=1)
    x = samples(10)
    mask = torch.arange(10) < 6
    router(torch.where(mask[:, None], x, 77.0), mask=mask)
    with torch.no_grad():
        router(x + 5)
    router.eval()(x + 9)
    router.finish_step()
    learn(other, x[:6])
    torch.testing.assert_close(router.weight, other.weight)
    torch.testing.assert_close(router.current, other.current)


def test_features_that_never_vary_do_no_harm() -> None:
    router = make_router("gaussian", experts=1)
    x = samples(30)
    x[:, 3] = 0.0
    for _ in range(12):
        learn(router, x)
    grow(router, 1)
    learn(router, x + torch.eye(DIM, dtype=torch.double)[0])
    assert router(x).gates.isfinite().all()


def test_sparse_gates() -> None:
    router = make_router("gaussian", experts=3, k=1)
    for _ in range(5):
        learn(router, samples(30))
    routing = router(samples(20))
    assert routing.chosen.sum(1).tolist() == [1] * 20


@pytest.mark.parametrize(
    ("option", "value"),
    [("k", 9), ("temperature", 0.0), ("shrinkage", 1.5), ("decay", 1.0), ("decay", math.nan)],
)
def test_bad_options(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"gaussian router: {option}="):
        make_router("gaussian", **{option: value})


def test_pruning_leaves_the_covariance_alone_where_there_are_as_many_experts_as_inputs() -> None:
    router = make_router("gaussian", experts=4, room=DIM)
    for _ in range(5):
        learn(router, samples(40) @ torch.linspace(-1, 1, DIM * DIM).double().view(DIM, DIM))
    x = samples(20)
    before = router.eval()(x).gates
    kept = {name: getattr(router, name).clone() for name in ("covariance", "current", "whiten")}
    order = torch.tensor([2, 0, 3, 1, *range(4, DIM)])
    router.keep_experts(order, 4)
    torch.testing.assert_close(router(x).gates, before[:, order])
    assert all(torch.equal(getattr(router, name), value) for name, value in kept.items())
