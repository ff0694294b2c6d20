"""Balancing by counts: global-balance over passes and processes, and bias balancing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_tools import close, given_by, loss_of, make_layer, make_loss, samples
from torch import Tensor

from dynmoe.errors import UserError
from dynmoe.moe import MoELayer, finish_step
from dynmoe.moe.losses.balance import LossFree

ROUTERS = ("cosine", "softmax", "topk")  # dense and sparse


def picks_of(layer: MoELayer, x: Tensor, experts: int) -> list[list[int]]:
    """The experts that count as picked by each sample."""
    k = min(layer.router.k or 1, experts)
    logits = layer.router(x).logits[:, :experts]
    return [row.topk(k).indices.tolist() for row in logits]


def global_loss(layer: MoELayer, x: Tensor, seen: Tensor, experts: int) -> float:
    """E * sum_e f_e P_e, f from all samples `seen`, P from x."""
    picks = [e for row in picks_of(layer, seen, experts) for e in row]
    mean = layer.router(x).probabilities.mean(dim=0).tolist()
    return experts * math.fsum(picks.count(e) / len(picks) * mean[e] for e in range(experts))


@pytest.mark.parametrize("router", ROUTERS)
def test_global_balance_of_one_pass_is_the_switch_loss(router):
    layer = make_layer(router)
    loss = make_loss("global-balance")
    for _ in range(3):
        x = samples()
        close(loss(given_by(layer, x)), loss_of("switch", layer, x).detach())
        loss.finish_step(layer.router)


@pytest.mark.parametrize("experts", [1, 3, 5])
@pytest.mark.parametrize("router", ROUTERS)
def test_global_balance_adds_up_the_picks_of_a_step(router, experts):
    layer, loss = make_layer(router, experts), make_loss("global-balance")
    batches = [samples(n) for n in (4, 9, 2, 7, 5, 1, 3)]
    for i, x in enumerate(batches):
        seen = torch.cat(batches[i - i % 3 : i + 1])
        close(loss(given_by(layer, x)), global_loss(layer, x, seen, experts))
        with torch.no_grad():  # acting does not count
            loss(given_by(layer, x))
        if i % 3 == 2:
            loss.finish_step(layer.router)
    assert loss.counts.sum().item() == 3 * min(layer.router.k or 1, experts)


def test_a_growth_within_a_step_starts_the_new_expert_at_0():
    layer, loss = make_layer("topk"), make_loss("global-balance")
    loss(given_by(layer, samples(6)))
    before = loss.counts.clone()
    layer.router.active[3] = True
    value = loss(given_by(layer, samples(1)))
    assert value.isfinite() and before[3] == 0
    assert (loss.counts - before).sum() == 2


def _process(rank: int, folder: str, batches: list[list[Tensor]]) -> None:
    """What one of two processes gets for its micro-batches, written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer, loss = make_layer("topk"), make_loss("global-balance")
    losses = [loss(given_by(layer, x)).detach() for x in batches[rank]]
    make_loss("global-balance")(given_by(layer, batches[rank][0])).backward()
    bias_loss = make_loss("loss-free", rate=0.01, update="proportional")
    bias_loss(given_by(layer, batches[rank][0]))
    bias_loss.finish_step(layer.router)
    gradient, bias = layer.router.weight.grad, layer.router.selection_bias
    torch.save((losses, gradient, bias, loss.counts), f"{folder}/{rank}.pt")
    dist.barrier()  # gloo aborts a process that leaves while another still needs it
    dist.destroy_process_group()


def test_two_processes_count_the_concatenated_batch(tmp_path: Path):
    batches = [[samples(8, 2.0) for _ in range(2)] for _ in range(2)]  # process, micro-batch
    mp.spawn(_process, (str(tmp_path), batches), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    layer = make_layer("topk")
    first, everything = (torch.cat([b for r in batches for b in r[:n]]) for n in (1, 2))
    picks = [e for row in picks_of(layer, everything, 3) for e in row]
    for own, (losses, *_) in zip(batches, results, strict=True):
        close(losses[0], global_loss(layer, own[0], first, 3))
        close(losses[1], global_loss(layer, own[1], everything, 3))
    loss_of("switch", layer, first).backward()  # data parallel training averages gradients
    close((results[0][1] + results[1][1]) / 2, layer.router.weight.grad)
    bias_loss = make_loss("loss-free", rate=0.01, update="proportional")
    bias_loss(given_by(layer, first))
    bias_loss.finish_step(layer.router)
    for _, _, bias, counts in results:
        close(bias, layer.router.selection_bias)
        assert counts.tolist() == [picks.count(e) for e in range(5)]
    assert layer.router.selection_bias.any()


def steps(bias: list[float], counts: list[int], rate: float, update: str) -> list[float]:
    """The biases of active experts after one step, at mean 0."""
    mean = sum(counts) / len(counts)
    for e, count in enumerate(counts):
        gap = mean - count
        bias[e] += rate * ((gap > 0) - (gap < 0) if update == "sign" else gap / mean)
    return [b - math.fsum(bias) / len(bias) for b in bias]


@pytest.mark.parametrize("update", ["sign", "proportional"])
@pytest.mark.parametrize("experts", [1, 3, 4])
def test_biases_move_against_the_counts(experts, update):
    layer = make_layer("topk", experts, k=1)
    loss, bias = make_loss("loss-free", rate=0.02, update=update), [0.0] * experts
    for n in (9, 4, 7):
        inputs = given_by(layer, samples(n))
        counts = inputs.routing.chosen.sum(dim=0).tolist()[:experts]
        value = loss(inputs)
        assert value.item() == 0.0 and not value.requires_grad
        loss.finish_step(layer.router)
        bias = steps(bias, counts, 0.02, update)
        close(layer.router.selection_bias, bias + [0.0] * (5 - experts))
    assert experts == 1 or any(bias)


def test_biases_level_the_counts_without_touching_gates():
    layer, loss = make_layer("topk", k=1), make_loss("loss-free", rate=0.02)
    with torch.no_grad():
        layer.router.weight[0] += 1.0
    x = samples(300) + 1.0
    before = layer.router(x)
    assert before.chosen.sum(dim=0).max() > 250
    for _ in range(300):
        loss(given_by(layer, x))
        loss.finish_step(layer.router)
    after = layer.router(x)
    assert after.chosen.sum(dim=0)[:3].min() > 80
    assert torch.equal(after.probabilities, before.probabilities)
    close(after.gates[after.chosen], after.probabilities[after.chosen].detach())


def test_biases_rest_in_evaluation_and_for_padding():
    layer, loss = make_layer("topk"), make_loss("loss-free")
    inputs = given_by(layer, samples(8), torch.zeros(8, dtype=torch.bool))
    loss(inputs)
    loss.finish_step(layer.router)
    assert not layer.router.selection_bias.any()  # nothing was chosen
    loss.eval()
    loss(given_by(layer, samples(8)))
    loss.finish_step(layer.router)
    assert not layer.router.selection_bias.any()
    loss.train()
    loss(given_by(layer, samples(8)))
    assert not layer.router.selection_bias.any()  # until the step is done
    loss.finish_step(layer.router)
    assert layer.router.selection_bias[:3].any()


def test_a_new_expert_starts_at_the_mean_bias():
    layer, loss = make_layer("topk", k=1), make_loss("loss-free", rate=0.1)
    with torch.no_grad():
        layer.router.weight[0] += 1.0
    for _ in range(20):
        loss(given_by(layer, samples(50) + 1.0))
        loss.finish_step(layer.router)
    assert abs(layer.router.selection_bias[:3].mean().item()) < 1e-12
    layer.router.active[3] = True
    layer.router.draw_rows(torch.tensor([3]), torch.Generator().manual_seed(0))
    assert layer.router.selection_bias[3] == 0 and layer.router.selection_bias[0] < -0.3


@pytest.mark.parametrize("router", ["cosine", "softmax", "expert-choice", "relu"])
def test_bias_balancing_without_a_choice_to_steer_is_refused_in_one_line(router):
    message = f"loss-free balancing: router '{router}' makes no choice that a bias could steer"
    with pytest.raises(UserError, match=message) as error:
        loss_of("loss-free", make_layer(router), samples())
    assert "\n" not in str(error.value)


def test_biases_are_saved_with_the_layer():
    router = make_layer("topk").router.float()
    losses = (LossFree.Config(),)
    layer = MoELayer(4, 3, 12, num_experts=3, max_experts=5, router=router, losses=losses)
    layer(torch.randn(20, 4))
    finish_step(layer)
    assert layer.last_losses["loss-free"] == 0
    assert layer.state_dict()["router.selection_bias"].any()
    layer.eval()
    before = layer.router.selection_bias.clone()
    layer(torch.randn(20, 4))
    assert layer.last_losses == {} and torch.equal(layer.router.selection_bias, before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loss-free", {"rate": 0.0}, "rate=0.0 must be above 0"),
        ("loss-free", {"update": "plain"}, "update='plain' must be sign or proportional"),
    ],
)
def test_bad_options_of_counting_losses_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        make_loss(name, **options)
