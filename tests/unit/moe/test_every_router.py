"""The router contract, for every router that is registered."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import CASES, ROOM, SIZES, make_router, route, same_routing, samples
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dynmoe.moe import Router, finish_step

SCORED = [name for name in CASES if name not in ("hash", "oracle")]  # a shift has what to shift

every_router = pytest.mark.parametrize("name", CASES)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@every_router
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, ROOM),
    n=st.integers(1, 20),
    log_scale=st.floats(-3, 3),
    training=st.booleans(),
)
def test_gates_are_weights_of_living_experts(name, seed, experts, n, log_scale, training):
    torch.manual_seed(seed)
    router = make_router(name, experts, seed=seed).train(training)
    routing = route(router, samples(n, 10**log_scale))
    gates, probabilities, logits = routing.gates, routing.probabilities, routing.logits
    assert gates.shape == logits.shape == probabilities.shape == (n, ROOM)
    assert routing.active.tolist() == [e < experts for e in range(ROOM)]
    assert gates.isfinite().all() and (gates >= 0).all()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(n, dtype=torch.double))
    assert (probabilities >= 0).all()
    assert not gates[:, experts:].any() and not probabilities[:, experts:].any()
    assert (logits[:, experts:] == -torch.inf).all()
    assert not logits.isnan().any() and (logits < torch.inf).all()
    if routing.chosen is None:
        assert torch.equal(gates, probabilities)
        used = torch.full((n,), experts)
    else:
        assert not routing.chosen[:, experts:].any()
        assert not gates[~routing.chosen].any()
        used = routing.chosen.sum(dim=1)
    if router.k is not None:
        assert (used <= router.k).all()
    if routing.load is not None:
        assert ((routing.load >= 0) & (routing.load <= 1)).all()
        assert not routing.load[:, experts:].any()
    if router.normalised:
        assert (gates.sum(dim=1) <= 1 + 1e-9).all()


@every_router
def test_gates_sum_to_one_or_to_the_chosen_experts_share(name):
    router = make_router(name, 4).eval()
    routing = route(router, samples(50, 2.0))
    total = routing.gates.sum(dim=1)
    assert (total > 0).any()
    if not router.normalised:
        return
    chosen = torch.ones_like(routing.gates) if routing.chosen is None else routing.chosen
    share = (routing.probabilities * chosen).sum(dim=1)
    assert torch.minimum((total - 1).abs(), (total - share).abs()).max() < 1e-12


@pytest.mark.parametrize("name", [name for name in CASES if name != "switch with capacity"])
def test_permuting_samples_permutes_the_routing(name):
    """Experts with a capacity take samples in their order; no other router looks at it."""
    router, x, context = make_router(name).eval(), samples(30), torch.arange(30) % 4
    order = torch.randperm(30)
    plain, mixed = route(router, x, None, context), route(router, x[order], None, context[order])
    for field in ("gates", "logits", "probabilities"):
        torch.testing.assert_close(getattr(mixed, field), getattr(plain, field)[order])
    if plain.chosen is not None:
        assert torch.equal(mixed.chosen, plain.chosen[order])


@every_router
@both_modes
def test_padding_gets_nothing_and_changes_nothing(name, training):
    router, x = make_router(name).train(training), samples(20)
    mask = torch.arange(20) % 4 != 1
    other = torch.where(mask.unsqueeze(1), x, samples(20, 50.0))
    twin = copy.deepcopy(router)
    routing, again = route(router, x, mask), route(twin, other, mask)
    assert torch.equal(routing.mask, mask)
    assert not routing.gates[~mask].any()
    assert routing.gates[mask].any()
    assert routing.chosen is None or not routing.chosen[~mask].any()
    torch.testing.assert_close(again.gates, routing.gates)
    torch.testing.assert_close(again.losses, routing.losses)
    torch.testing.assert_close(twin.state_dict(), router.state_dict())


@every_router
def test_the_selection_bias_decides_only_where_a_router_says_so(name):
    router, x = make_router(name).eval(), samples(20)
    before = route(router, x)
    router.selection_bias[2] = 1e3
    after = route(router, x)
    if router.steerable and before.chosen is not None:
        taken = after.chosen.any(dim=1)  # a full expert takes no more
        assert after.chosen[taken, 2].all() and not before.chosen[taken, 2].all()
        torch.testing.assert_close(after.probabilities, before.probabilities)
    else:
        same_routing(after, before)


@every_router
def test_real_samples_are_routed_as_without_padding(name):
    router, x, context = make_router(name).eval(), samples(21), torch.arange(21) % 3
    mask = torch.arange(21) % 4 != 1
    padded, alone = route(router, x, mask, context), route(router, x[mask], None, context[mask])
    torch.testing.assert_close(padded.gates[mask], alone.gates)
    torch.testing.assert_close(padded.logits[mask], alone.logits)


@every_router
def test_a_router_that_grew_is_one_born_with_more_experts(name):
    """Nothing but the buffers and rows knows how many experts there are."""
    router, x, context = make_router(name).eval(), samples(40), torch.arange(40)
    before = route(router, x, None, context)
    router.active[3] = True
    after = route(router, x, None, context)
    assert not before.gates[:, 3].any() and not after.gates[:, 4].any()
    assert after.gates.isfinite().all() and (after.probabilities[:, 3] > 0).any()
    born = make_router(name, 4, seed=1).eval()
    born.load_state_dict(router.state_dict())
    same_routing(route(born, x, None, context), after, rtol=0, atol=0)


@every_router
def test_drawing_rows_leaves_the_others_alone(name):
    router = make_router(name)
    with torch.no_grad():
        for rows in router.expert_rows():
            rows += 0.1  # as if trained: a row that is always drawn as 0 has then changed, too
    before = copy.deepcopy(router.state_dict())
    router.logit_shift[:], router.selection_bias[:] = 1.0, 2.0
    router.draw_rows(torch.tensor([1, 4]), torch.Generator().manual_seed(9))
    assert router.logit_shift.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert router.selection_bias.tolist() == [2.0, 0.0, 2.0, 2.0, 0.0]
    rows = router.expert_rows()
    assert any(p is router.weight for p in rows)
    for key, value in router.state_dict().items():
        if key in ("logit_shift", "selection_bias", "learning"):  # the latter: which came last
            continue
        changed = value != before[key]
        if any(p.data_ptr() == value.data_ptr() for p in rows):
            changed = changed.flatten(1).any(dim=1) if changed.dim() > 1 else changed
            assert changed.tolist() == [False, True, False, False, True], key
        else:
            assert not changed.any(), key


def shares(router: Router, x: Tensor) -> Tensor:
    """[N, M] what a shift divides among experts: gates, where their scale depends on scores."""
    routing = route(router, x)
    return routing.gates if router.name == "relu" else routing.probabilities


@pytest.mark.parametrize("name", SCORED)
def test_logit_shift_changes_the_odds(name):
    router, x = make_router(name).eval(), samples(20)
    before = shares(router, x)
    router.logit_shift[:3] = torch.tensor([-1.5, 0.0, math.log(2)])
    after = shares(router, x)
    factor = 2 * math.exp(1.5)
    torch.testing.assert_close(after[:, 2] * before[:, 0], factor * after[:, 0] * before[:, 2])


@pytest.mark.parametrize("name", SCORED)
def test_equal_rows_shifted_by_log_half_share_one_gate(name):
    """Why duplicating experts can preserve the function."""
    router, x = make_router(name).eval(), samples(20)
    before = shares(router, x)
    with torch.no_grad():
        for rows in router.expert_rows():
            rows[3] = rows[1]
    router.active[3] = True
    router.logit_shift[[1, 3]] = -math.log(2)
    after = shares(router, x)
    assert before[:, 1].any()
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]])
    torch.testing.assert_close(after[:, [1, 3]], before[:, [1, 1]] / 2)


@every_router
def test_a_saved_router_draws_the_next_numbers(name):
    router, other = make_router(name), make_router(name, 2, seed=1)
    for _ in range(3):
        route(router, samples(8))
        finish_step(router)
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for _ in range(2):
        x = samples(8)
        same_routing(route(other, x), route(router, x), rtol=0, atol=0)


@every_router
def test_a_copy_goes_its_own_way(name):
    router, x = make_router(name), samples(8)
    route(router, x)
    twin = copy.deepcopy(router)
    before = copy.deepcopy(router.state_dict())
    first = route(twin, x)
    route(twin, x)
    torch.testing.assert_close(router.state_dict(), before, rtol=0, atol=0)
    same_routing(route(router, x), first, rtol=0, atol=0)


@every_router
def test_the_generator_decides_everything(name):
    """Equal generators make equal routers, noise included, without torch's own state."""
    state = torch.get_rng_state()
    router, again, other = (make_router(name, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(router.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(router.weight, other.weight)
    for _ in range(2):
        x = samples(8)
        same_routing(route(router, x), route(again, x), rtol=0, atol=0)


@every_router
def test_evaluation_leaves_no_trace(name):
    router, x = make_router(name), samples(8)
    route(router, x)
    before = copy.deepcopy(router.eval().state_dict())
    same_routing(route(router, x), route(router, x), rtol=0, atol=0)
    torch.testing.assert_close(router.state_dict(), before, rtol=0, atol=0)
    assert not route(router, x).losses


def learn(router: Router, scale: float) -> None:
    """One backward pass through random weights of the gates, and the router's own losses."""
    x = samples(40, scale).to(router.weight.dtype)
    routing = route(router, x)
    assert routing.gates.isfinite().all() and routing.probabilities.isfinite().all()
    assert not routing.logits.isnan().any()
    loss = (routing.gates * torch.randn_like(routing.gates)).sum() + sum(routing.losses.values())
    if routing.load is not None:
        assert routing.load.isfinite().all()
        loss = loss + (routing.load * torch.randn_like(routing.load)).sum()
    assert loss.isfinite()
    if loss.requires_grad:
        loss.backward()


@every_router
def test_the_gates_teach_the_rows_of_living_experts(name):
    router = make_router(name, 4)
    learn(router, 1.0)
    for rows in router.expert_rows():
        if not rows.requires_grad:
            assert rows.grad is None
            continue
        living = rows.grad.flatten(1) if rows.dim() > 1 else rows.grad.unsqueeze(1)
        assert living.any(dim=1).tolist() == [True] * 4 + [False]


@every_router
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_samples_stay_finite_in_float32(name, scale):
    for experts in (1, 3):
        router = make_router(name, experts).float()
        learn(router, scale)
        for parameter in router.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()
        learn(router.eval(), scale)


@every_router
@both_modes
def test_reduced_precision_gives_the_same_kind_of_decision(name, training):
    router, x = make_router(name).float().train(training), samples(30).float()
    with torch.autocast("cpu", torch.bfloat16):
        routing = route(router, x)
    assert routing.gates.isfinite().all() and not routing.gates[:, 3:].any()
    assert routing.gates.any() and (routing.gates >= 0).all()
    if router.normalised:
        assert (routing.gates.sum(dim=1) <= 1.02).all()


@every_router
def test_every_device_gives_the_same_routing(name, device):
    """Noise included; large gaps between scores, so that rounding changes no choice."""
    router, x = make_router(name), samples(10, 3.0)
    other, context = copy.deepcopy(router).to(device), torch.arange(10) % 3
    for _ in range(2):
        expected = route(router, x, None, context)
        got = other(x.to(device), context=context.to(device), sizes=SIZES.to(device))
        for field in ("gates", "logits", "probabilities", "chosen", "load"):
            value = getattr(expected, field)
            if value is not None:
                torch.testing.assert_close(getattr(got, field).cpu(), value)


@pytest.mark.thin(12)
@every_router
@both_modes
def test_one_graph_draws_what_eager_code_draws_through_growth(name, training):
    torch._dynamo.reset()
    router = make_router(name, 2).train(training)
    eager, counter = copy.deepcopy(router), CompileCounter()
    compiled = torch.compile(router, fullgraph=True, backend=counter)
    x, context, mask = samples(9), torch.arange(9) % 3, torch.arange(9) < 8
    for experts in (2, 3, 4, 5):
        router.active[:experts] = eager.active[:experts] = True
        with torch._dynamo.config.patch(error_on_recompile=experts > 2):
            routing = compiled(x, mask=mask, context=context, sizes=SIZES)
        same_routing(routing, eager(x, mask=mask, context=context, sizes=SIZES))
    assert counter.frame_count == 1
    torch.testing.assert_close(router.state_dict(), eager.state_dict())
