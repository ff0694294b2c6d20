"""The network of actor and critic: where its blocks stand, and how parts of it are had."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from common import growth_settings, make_policy, moe_blocks, stages
from torch import nn

from agents.actor_critic import PLACES, ActorCritic, as_input, dense_block
from agents.encoders import MLP, Conv
from dynmoe import seeding
from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, moe_layers

SUBSETS = [places for count in range(4) for places in combinations(PLACES, count)]
NAMES = {"trunk": "trunk.1", "actor": "actor.0", "critic": "critic.0"}


def build(place: tuple[str, ...], tail: bool = False, make_block: Any = None) -> ActorCritic:
    config = MLP.Config(hidden=10, widths=(6,), place=place, actor_tail=tail)  # type: ignore[arg-type]
    return ActorCritic(config, (5,), 3, make_block or moe_blocks())


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("place", SUBSETS, ids=str)
def test_moe_layers_stand_where_they_are_asked_for(place: tuple[str, ...], tail: bool) -> None:
    torch.manual_seed(0)  # a tail of three units may be dead on seven inputs
    policy = build(place, tail)
    layers = {
        name: (layer.router.weight.shape[1], layer.bank.output_weight().shape[0])
        for name, layer in moe_layers(policy)
    }
    sizes = {"trunk": (6, 6), "actor": (6, 3), "critic": (6, 1)}
    assert layers == {NAMES[p]: sizes[p] for p in place}
    assert all(layer.bank.hidden_sizes() == [5, 5] for _, layer in moe_layers(policy))
    dense = [m for m in policy.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    assert len(dense) == len({"actor", "critic"} - set(place))
    logits, values = policy(torch.randn(7, 5))
    assert logits.shape == (7, 3) and values.shape == (7,)
    (logits.square().sum() + values.square().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())


@pytest.mark.parametrize("place", SUBSETS, ids=str)
def test_forward_is_encoder_blocks_and_heads(place: tuple[str, ...]) -> None:
    """Written out with the modules that stand there."""
    policy, x = build(place, tail=True), torch.randn(7, 5)
    features = policy.trunk[0](x)
    if "trunk" in place:
        features = policy.trunk[1](features).clamp_min(0)
    tail = policy.actor[2]
    logits = policy.actor[0](features).clamp_min(0) @ tail.weight.T + tail.bias
    torch.testing.assert_close(policy(x), (logits, policy.critic[0](features)[:, 0]))


def test_the_tail_is_as_wide_as_there_are_actions() -> None:
    plain, tailed = build((), tail=False), build((), tail=True)
    assert len(plain.actor) == 1 and len(tailed.actor) == 3
    last: Any = tailed.actor[2]
    torch.testing.assert_close(last.weight @ last.weight.T, 1e-4 * torch.eye(3))
    assert last.weight.shape == (3, 3) and not last.bias.any()
    grown = sum(p.numel() for p in tailed.parameters()) - sum(p.numel() for p in plain.parameters())
    assert grown == 3 * 3 + 3


@pytest.mark.parametrize("place", SUBSETS, ids=str)
@pytest.mark.parametrize("tail", [False, True])
def test_output_layers_and_paths(place: tuple[str, ...], tail: bool) -> None:
    policy, x = build(place, tail), torch.randn(7, 5)
    logits, values = policy(x)
    for head, outputs in (("actor", logits), ("critic", values.unsqueeze(1))):
        path, last = policy.path(head), policy.output_layer(head)
        torch.testing.assert_close(path(x), outputs)
        whole = dict(policy.named_parameters())
        assert {n for n, _ in path.named_parameters()} == {
            n for n in whole if n.startswith(("trunk.", f"{head}."))
        }
        assert all(p is whole[n] for n, p in path.named_parameters())
        seen: list[torch.Tensor] = []
        handle = last.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        path(x)
        handle.remove()
        assert seen and torch.equal(seen[-1], path(x))
        linear = isinstance(last, nn.Linear)
        assert linear == (head not in place or (head == "actor" and tail))
        assert linear or isinstance(last, MoELayer)


def test_images_become_floats_between_0_and_1() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(as_input(frames).flatten(), torch.arange(256) / 255)
    vector = torch.randn(3, 4)
    assert as_input(vector) is vector
    with torch.autocast("cpu", torch.bfloat16):
        half = as_input(frames)
        assert half.dtype == torch.bfloat16 and as_input(vector) is vector
    assert (half.float() - as_input(frames)).abs().max() < 2**-8
    assert half.max() == 1
    config = MLP.Config(hidden=4, widths=(4,))
    policy = ActorCritic(config, (1, 16, 16), 2)
    torch.testing.assert_close(policy(frames), policy(frames.float() / 255))


def test_bf16_gives_float32_near_the_exact_outputs() -> None:
    for place in ((), PLACES):
        policy, x = build(place), torch.randn(50, 5)
        exact = policy(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = policy(x)
        for one, other in zip(exact, rough, strict=True):
            assert other.dtype == torch.float32
            assert 0 < (one - other).abs().max() < 0.05


def test_memory_format_does_not_matter() -> None:
    """Frames come with channels last; what comes out is the same."""
    config = Conv.Config(hidden=8, channels=4)
    policy = ActorCritic(config, (3, 27, 29), 5, moe_blocks())
    frames = torch.randint(256, (4, 3, 27, 29)).to(torch.uint8)
    plain = policy(frames)
    policy.to(memory_format=torch.channels_last)
    last = policy(frames.contiguous(memory_format=torch.channels_last))
    for one, other in zip(plain, last, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_depend_on_the_seed_alone() -> None:
    one, again, other = (make_policy(stages(), seed).state_dict() for seed in (1, 1, 2))
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    assert not torch.equal(one["actor.0.0.weight"], other["actor.0.0.weight"])


def test_dense_block_and_moe_layer_of_one_expert_are_of_one_size() -> None:
    dense = dense_block(6, 10, 3)
    layer = growth_settings(1).make_layer(6, 3, 10, 1, 1, seeding.generator(0))
    bank: Any = layer.bank
    sizes = [sum(p.numel() for p in m.parameters()) for m in (dense, layer)]
    assert sizes[1] - sizes[0] == 6  # the router's one row
    state = {"0.weight": bank.w_in, "0.bias": bank.b_in, "2.weight": bank.w_out,
             "2.bias": bank.b_out[0]}  # fmt: skip
    dense.load_state_dict({name: value.detach() for name, value in state.items()})
    x = torch.randn(9, 6)
    torch.testing.assert_close(dense(x), layer(x))


@pytest.mark.parametrize("hidden", [0, -3])
def test_no_hidden_units_are_refused(hidden: int) -> None:
    with pytest.raises(UserError, match=f"hidden={hidden} must be at least 1"):
        ActorCritic(MLP.Config(hidden=hidden), (5,), 3)


def test_unknown_places_are_refused() -> None:
    with pytest.raises(UserError, match=r"place.*head.*trunk, actor, critic"):
        build(("actor", "head"))
