"""Interventions at work in PPO."""

from __future__ import annotations

import pytest
import torch
from common import changed, make_policy, moe_blocks, run, stages
from torch import Tensor

from agents.actor_critic import ActorCritic
from agents.ppo import PPOSettings, train
from dynmoe import registry, seeding
from dynmoe.errors import UserError
from dynmoe.interventions.intervention import Intervention
from dynmoe.interventions.units import find_units, watch

SHORT = changed(total_steps=256)
"""Four updates of 2 x 4 optimizer steps."""


def learnt(
    name: str, settings: PPOSettings = SHORT, dense: bool = True, **options: object
) -> tuple[ActorCritic, Intervention]:
    """A policy trained with an intervention, and the intervention."""
    env = stages(4)
    policy = make_policy(env) if dense else make_policy(env, make_block=moe_blocks())
    intervention = registry.get("intervention", name).Config(**options).build()
    intervention.transform(policy, torch.Generator())
    optimizer = torch.optim.Adam(policy.parameters(), settings.lr, eps=settings.adam_eps)
    intervention.attach(policy, optimizer, seeding.generator(0))
    observations, info = env.reset(seed=0)
    observer = type("Nobody", (), {"update_done": lambda *_: None})()
    train(env, policy, optimizer, settings, 0, observer, observations, info["floor"],
          intervention=intervention)  # fmt: skip
    return policy, intervention


def test_units_of_actor_and_critic_are_found() -> None:
    policy = make_policy(stages())
    layers = {layer.name: layer for layer in find_units(policy)}
    assert {n: layer.units for n, layer in layers.items()} == {
        "trunk.0.layers.1": 16, "actor.0.0": 16, "critic.0.0": 16,
    }  # fmt: skip
    assert len(layers["trunk.0.layers.1"].outgoing) == 2  # read by both
    grown = make_policy(stages(), make_block=moe_blocks())
    assert {layer.name for layer in find_units(grown)} == {
        "trunk.0.layers.1",
        "actor.0",
        "critic.0",
    }


def test_acting_is_not_looked_at() -> None:
    """One look per optimizer step; the steps in the environments pass by."""
    env, seen = stages(4), []
    policy = make_policy(env)

    def look(number: int, activations: Tensor) -> None:
        seen.append(len(activations))

    watch(find_units(policy)[0], 0, look)
    run(env, policy, SHORT)
    assert seen == [SHORT.batch_size // SHORT.minibatches] * (4 * 2 * 4)


def test_hooks_come_in_order() -> None:
    """Penalty, gradients before they are clipped, step."""
    calls: list[str] = []
    norms: list[float] = []

    class Witness(Intervention):
        def penalty(self) -> Tensor | float:
            calls.append("penalty")
            return 100.0 * sum(p.sum() for p in self.model.parameters())

        def gradients_ready(self) -> None:
            calls.append("gradients")
            gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

        def after_step(self) -> None:
            calls.append(f"step {self.steps}")

    env = stages(4)
    policy = make_policy(env)
    witness = Witness(registry.get("intervention", "none").Config())
    optimizer = torch.optim.Adam(policy.parameters())
    witness.attach(policy, optimizer, seeding.generator(0))
    observations, info = env.reset(seed=0)
    observer = type("Nobody", (), {"update_done": lambda *_: None})()
    train(env, policy, optimizer, SHORT, 0, observer, observations, info["floor"],
          intervention=witness)  # fmt: skip
    expected = [call for n in range(1, 33) for call in ("penalty", "gradients", f"step {n}")]
    assert calls == expected
    assert min(norms) > 100 > SHORT.max_grad_norm


def test_none_changes_nothing() -> None:
    policy, intervention = learnt("none")
    env = stages(4)
    plain = make_policy(env)
    run(env, plain, SHORT)
    pairs = zip(policy.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert intervention.steps == 32


@pytest.mark.thin(10)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("redo", {"tau": 0.5, "period": 5}),
        ("cbp", {"rate": 0.05, "maturity": 3}),
        ("snr", {"limit": 5, "period": 2}),
        ("l2-init", {"strength": 0.1}),
        ("l2", {"strength": 0.1}),
        ("shrink-perturb", {"every": 6}),
        ("hare-tortoise", {"period": 6}),
        ("fire", {"every": 6}),
        ("parseval", {}),
        ("spectral", {}),
        ("nap", {}),
        ("layernorm", {}),
        ("injection", {"step": 9}),
        ("head-reset", {"every": 6}),
    ],
)
def test_interventions_act_and_learning_goes_on(name: str, options: dict, dense: bool) -> None:
    if not dense and name in ("injection", "head-reset"):
        with pytest.raises(UserError, match=f"intervention {name} needs linear output layers"):
            learnt(name, dense=False, **options)
        return
    policy, intervention = learnt(name, dense=dense, **options)
    plain, _ = learnt("none", dense=dense)
    assert intervention.steps == 32
    assert all(torch.isfinite(p).all() for p in policy.parameters())
    x = torch.rand(5, *stages().input_shape)
    assert not torch.equal(policy(x)[0], plain(x)[0])
    assert not torch.equal(policy(x)[1], plain(x)[1]) or name == "layernorm"


def test_crelu_needs_a_relu_and_mirrors_it() -> None:
    policy, _ = learnt("crelu")
    plain, _ = learnt("none")
    sizes = [sum(p.numel() for p in net.parameters()) for net in (policy, plain)]
    assert sizes[0] < sizes[1]
    with pytest.raises(UserError, match="no ReLU"):
        learnt("crelu", dense=False)


def test_injection_gives_both_heads_a_new_layer() -> None:
    policy, _ = learnt("injection", step=9)
    heads = policy.output_layers()
    assert [type(h).__name__ for h in heads] == ["Injected", "Injected"]
    for head in heads:
        copied, new = head.copy_weight, head.new.weight  # type: ignore[union-attr]
        assert not torch.equal(copied, new)


def test_the_penalty_is_part_of_the_loss() -> None:
    """Strong pulls keep the weights where they began."""
    first = make_policy(stages(4))
    moved = []
    for strength in (0.0, 10.0):
        policy, _ = learnt("l2-init", strength=strength)
        pairs = zip(policy.parameters(), first.parameters(), strict=True)
        moved.append(sum(float((a - b).detach().square().sum()) for a, b in pairs))
    assert moved[1] < 0.5 * moved[0]
