"""The routers that learn nothing: random, hash and oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import DIM, make_router, samples

from dynmoe import registry
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, routing_inputs

WORD = 2**64


@pytest.mark.parametrize("gate", ["one", "share"])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("experts", [1, 3, 5])
def test_random_gates_of_the_best_scores_are_1_or_equal_shares(k, experts, gate):
    """1 by default (Eq. 15)."""
    options = {} if gate == "one" else {"gate": gate}
    router, x = make_router("random", experts, k=k, **options), samples(20)
    routing, used = router(x), min(k, experts)
    for row, gates in zip(x, routing.gates, strict=True):
        scores = [float(row @ router.weight[e]) for e in range(experts)]
        best = sorted(range(experts), key=lambda e: -scores[e])[:used]
        each = 1 if gate == "one" else 1 / used
        assert gates.tolist() == [each if e in best else 0.0 for e in range(5)]
    torch.testing.assert_close(routing.probabilities, routing.logits.softmax(dim=1))


@pytest.mark.parametrize("scale", ["experts", "one"])
def test_a_layer_adds_up_the_experts_that_random_routing_picked(scale):
    config = registry.get("router", "random").Config()
    layer = MoELayer(DIM, 2, 8, num_experts=4, router=config, gate_scale=scale).double()
    x = samples(10)
    y, chosen = layer(x), layer.last_routing.chosen
    expected = torch.einsum("ne,eno->no", chosen.double(), layer.bank.expert_outputs(x))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    shared = registry.get("router", "random").Config(gate="share")
    other = MoELayer(DIM, 2, 8, num_experts=4, router=shared, gate_scale=scale).double()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x) * (2 if scale == "one" else 1), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["random", "hash", "oracle"])
def test_nothing_is_learned(name):
    layer = MoELayer(
        DIM, 2, 8, num_experts=2, max_experts=5, router=registry.get("router", name).Config()
    ).double()
    before = layer.router.weight.clone()
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    with routing_inputs(layer, context=torch.arange(10)):
        layer(samples(10)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.router.weight, before) and not layer.router.weight.requires_grad


@pytest.mark.parametrize("k", [0, 6])
def test_bad_k_is_refused(k):
    with pytest.raises(UserError, match=f"k={k} must be between 1 and 5"):
        make_router("random", k=k)
    with pytest.raises(UserError, match="gate='half' must be one or share"):
        make_router("random", gate="half")


# hash ---------------------------------------------------------------------------------------------


def naive_hash(seed: int, token: int, experts: int) -> int:
    """SplitMix64 of one id in Python's whole numbers, without the top bit, modulo E."""
    z = (seed + token * 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    z = z ^ (z >> 31)
    return z % 2**63 % experts


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 5),
    tokens=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=10),
)
def test_hash_of_token_ids(seed, experts, tokens):
    router = make_router("hash", experts, seed=seed)
    routing = router(samples(len(tokens)), context=torch.tensor(tokens))
    owners = [naive_hash(int(router.seed), token, experts) for token in tokens]
    assert routing.gates.tolist() == [[float(e == o) for e in range(5)] for o in owners]
    assert torch.equal(routing.chosen, routing.gates > 0)


def test_hash_of_samples_without_ids_is_of_the_signs_of_their_projections():
    router, x = make_router("hash", 4, bits=3), samples(40)
    routing = router(x)
    for row, gates in zip(x, routing.gates, strict=True):
        code = sum(2**b for b in range(3) if float(row @ router.planes[b]) > 0)
        assert gates.argmax() == naive_hash(int(router.seed), code, 4) and gates.sum() == 1
    torch.testing.assert_close(router(7 * x).gates, routing.gates)


def test_hash_spreads_ids_evenly_and_seeds_differ():
    ids = torch.arange(8000)
    owners = [
        make_router("hash", 4, seed=seed)(samples(8000), context=ids).gates.argmax(dim=1)
        for seed in (0, 1)
    ]
    for owner in owners:
        assert (torch.bincount(owner) - 2000).abs().max() < 200
    assert 0.2 < (owners[0] == owners[1]).double().mean() < 0.3


def test_near_samples_share_an_expert():
    router, x = make_router("hash", 5, bits=12).eval(), samples(400)
    owner, near, far = (
        router(rows).gates.argmax(dim=1) for rows in (x, x + 1e-3 * samples(400), samples(400))
    )
    assert (owner == near).double().mean() > 0.95 and (owner == far).double().mean() < 0.5
    assert len(set(owner.tolist())) == 5


@pytest.mark.parametrize("bits", [0, 63])
def test_bad_bits_are_refused(bits):
    with pytest.raises(UserError, match=f"bits={bits} must be between 1 and 62"):
        make_router("hash", bits=bits)


# oracle -------------------------------------------------------------------------------------------


def test_oracle_follows_the_labels_modulo_the_number_of_experts():
    router, labels = make_router("oracle", 3), torch.tensor([0, 4, 2, 1, 3, -1])
    routing = router(samples(6), context=labels)
    assert routing.gates.argmax(dim=1).tolist() == [0, 1, 2, 1, 0, 2]
    assert (routing.gates.sum(dim=1) == 1).all() and torch.equal(routing.chosen, routing.gates > 0)
    router.active[3:] = True
    assert router(samples(6), context=labels).gates.argmax(dim=1).tolist() == [0, 4, 2, 1, 3, 4]


def test_oracle_says_how_to_give_it_labels():
    config = registry.get("router", "oracle").Config()
    layer = MoELayer(DIM, 2, 8, num_experts=2, router=config).double()
    with pytest.raises(UserError, match=r"routing_inputs\(model, context=labels\)"):
        layer(samples(4))
    with routing_inputs(layer, context=torch.tensor([1, 0, 1, 1])):
        layer(samples(4))
    assert layer.last_routing.gates.argmax(dim=1).tolist() == [1, 0, 1, 1]


def test_labels_of_samples_hold_for_all_their_tokens():
    config = registry.get("router", "oracle").Config()
    layer = MoELayer(DIM, 2, 8, num_experts=2, router=config).double()
    layer(samples(6).view(2, 3, DIM), context=torch.tensor([1, 0]))
    assert layer.last_routing.gates.argmax(dim=1).tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("name", ["hash", "oracle"])
@pytest.mark.parametrize("context", [torch.zeros(4), torch.zeros(4, 2, dtype=torch.long)])
def test_contexts_that_are_no_ids_are_refused(name, context):
    with pytest.raises(UserError, match=r"is no list of (token ids|labels); give one int64 per"):
        make_router(name)(samples(4), context=context)
