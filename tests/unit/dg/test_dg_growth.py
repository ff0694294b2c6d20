"""Outer experts grow under the core's controller; sizes for a ViT-B; Lemma 1."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from dg_cases import bank_of, images, make, scatter, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from dynmoe import registry
from dynmoe.dg.methods.moe2 import departure, router_identity
from dynmoe.errors import UserError
from dynmoe.growth import GrowthController, Signals
from dynmoe.growth.initialisation import RandomInit, ZeroOutputInit
from dynmoe.growth.triggers.clock import EveryTrigger
from dynmoe.moe import moe_layers, routing_stats

both = pytest.mark.parametrize("synthesis", ["factors", "deltas"])
LABELS = torch.tensor([0, 1, 2, 1])


@both
def test_growth_with_silent_sets_changes_no_output(synthesis):
    """A child has its parent's gate rows, half its weight and no update; the parent's doubles."""
    method = scatter(make("moe2", experts=2, max_experts=4, synthesis=synthesis)).eval()
    x = images()
    before = method(x).detach()
    controller = GrowthController(method, init=ZeroOutputInit.Config())
    for experts in (3, 4):
        event = controller.grow(experts, (x, LABELS))
        assert event.experts == experts and event.shock["output_change"] < 1e-10
        torch.testing.assert_close(method(x), before, rtol=1e-10, atol=1e-10)
    assert not bank_of(method).rows["right"][2].any() and not bank_of(method).rows["bias"][3].any()
    with pytest.raises(UserError, match="cannot grow to 5 experts"):
        controller.grow(5)


@both
def test_training_goes_on_through_a_growth(synthesis):
    method = make("moe2", experts=1, max_experts=3, synthesis=synthesis).train()
    optimizer = torch.optim.Adam(method.trainable(), 1e-2)
    trigger = EveryTrigger.Config(steps=5)
    controller = GrowthController(method, optimizer, trigger=trigger, init=ZeroOutputInit.Config())
    x, losses = images(), []
    for step in range(1, 13):
        controller.step(Signals(step=step))
        optimizer.zero_grad()
        loss, parts = method.loss(x, LABELS)
        loss.backward()
        optimizer.step()
        losses.append(float(parts["classification"].detach()))
    assert [event.experts for event in controller.events] == [2, 3]
    assert losses[-1] < losses[0] - 0.05
    rows = bank_of(method).rows["right"]
    assert rows[1].any() and rows[2].any()  # silent sets have begun to speak
    stats = routing_stats(method)
    assert stats.keys() == {"outer"} and len(list(moe_layers(method))) == 1
    assert method.outer.created.tolist() == [0, 1, 2]


def test_random_growth_starts_new_sets_at_the_mean_of_the_old():
    method = scatter(make("moe2", experts=2, max_experts=4, init_noise=1e-5))
    mean = {n: r[:2].mean(dim=0) for n, r in bank_of(method).rows.items()}
    GrowthController(method, granularity=2, init=RandomInit.Config(router="new")).grow(1)
    for name, rows in bank_of(method).rows.items():
        for new in rows[2:]:
            assert 0 < (new - mean[name]).abs().max() < 1e-4, name


@both
def test_sets_in_reserve_have_no_say_and_no_gradient(synthesis):
    method = scatter(make("moe2", experts=2, max_experts=4, synthesis=synthesis)).eval()
    x = images()
    before = method(x)
    with torch.no_grad():
        for rows in bank_of(method).rows.values():
            rows[2:] = 1e30
    assert torch.equal(method(x), before)
    method(x).sum().backward()
    for name, rows in bank_of(method).rows.items():
        assert not rows.grad[2:].any() and rows.grad[:2].any(), name


@both
def test_one_graph_serves_through_a_growth(synthesis):
    method = scatter(make("moe2", experts=1, max_experts=2, synthesis=synthesis)).eval()
    x = images()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(method, fullgraph=True, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), method(x), rtol=1e-10, atol=1e-10)
        if method.outer.num_experts == 1:
            GrowthController(method).grow(1)
    assert counter.frame_count == 1


def test_a_grown_method_resumes_exactly():
    method = make("moe2", experts=1, max_experts=3)
    controller = GrowthController(method, init=ZeroOutputInit.Config())
    controller.grow(1)
    again = make("moe2", experts=1, max_experts=3)
    again.load_learned_state(copy.deepcopy(method.learned_state()))
    other = GrowthController(again, init=ZeroOutputInit.Config())
    other.load_state_dict(copy.deepcopy(controller.state_dict()))
    for one in (controller, other):
        one.grow(2)
    for (key, value), twin in zip(
        method.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(value, twin), key


def test_parameter_counts_of_a_vit_b():
    """MoE²: 93.3M and 7.5M (Table 1, with OfficeHome's 65 classes); MoA 1,494,022 less the 8,192
    that its code never uses; attention 28.4M, LoRA 0.11M."""
    import timm

    def counts(name: str) -> tuple[int, int]:
        with torch.device("meta"):  # sizes only
            vit = timm.create_model("vit_base_patch16_clip_224", num_classes=0)
        config = registry.get("dg", name).Config()
        return config.build(vit, 65, torch.Generator().manual_seed(0)).counts()

    head = 65 * 769
    assert counts("linear-probe") == (85_799_424 + head, head)
    assert counts("moa") == (85_799_424 + 1_485_830 + head, 1_494_022 - 8_192 + head)
    total, trainable = counts("moe2")
    assert trainable == 5 * 1_485_830 + 5 * 768 + head
    assert round(total / 1e6, 1) == 93.3 and round(trainable / 1e6, 1) == 7.5
    assert counts("lora")[1] - head == 110_592


def test_the_snippet_of_the_docs_runs():
    text = (Path(__file__).parents[3] / "docs" / "dg.md").read_text()
    snippet = re.search(r"## Methods.*?```python\n(.*?)```", text, re.DOTALL)
    assert snippet is not None
    names: dict[str, object] = {}
    exec(compile(snippet.group(1), "dg.md", "exec"), names)
    assert names["logits"].shape == (8, 7) and names["method"].outer.num_experts == 3
    assert list(names["parts"]) == ["classification", "balance", "diversity"]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_lemma_1_holds_where_outputs_are_mixed(seed):
    generator = torch.Generator().manual_seed(seed)

    def simplex(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double).softmax(dim=-1)

    p, w, experts = simplex(6, 4), simplex(6, 4), simplex(6, 4, 3)
    labels = torch.randint(3, (6,), generator=generator)
    got = router_identity(p, w, experts, labels)
    for n in range(6):
        ours = sum(w[n, k] * experts[n, k] for k in range(4))
        best = sum(p[n, k] * experts[n, k] for k in range(4))
        excess = -torch.log(ours[labels[n]]) + torch.log(best[labels[n]])
        torch.testing.assert_close(got[n], excess, rtol=1e-12, atol=1e-12)
    assert not router_identity(p, p, experts, labels).any()


def test_how_far_mixed_parameters_depart_from_mixed_outputs():
    x = images()
    near = departure(make("moe2", experts=3), x, LABELS)  # sets differ by noise of 1e-4
    assert near["kl"] < 1e-6 and near["agreement"] == 1 and near["spread"] < 1e-6
    method = scatter(make("moe2", tiny_vit(), experts=3)).train()
    state = copy.deepcopy(method.state_dict())
    far = departure(method, x, LABELS)
    assert method.training and method.outer.last_routing is None
    assert all(torch.equal(v, method.state_dict()[k]) for k, v in state.items())
    assert far["kl"] > 1e-4 and far["spread"] > far["kl"] * 1e-3
    assert far["loss_change_abs"] >= abs(far["loss_change"]) > 0
    method.eval()
    with torch.no_grad():
        gates = method.outer.router(method.embed(x)).gates
        alone = torch.stack(
            [
                method.forward_with(x, one.expand(4, 3)).softmax(dim=1)
                for one in torch.eye(3, dtype=torch.double)
            ]
        )
        mixed = torch.einsum("bk,kbc->bc", gates, alone)
        kl = (mixed * (mixed.log() - method(x).log_softmax(dim=1))).sum(dim=1).mean()
    assert far["kl"] == pytest.approx(float(kl), rel=1e-9)
    one = departure(make("moe2", experts=1), x, LABELS)
    assert abs(one["kl"]) < 1e-12 and abs(one["loss_change"]) < 1e-12
