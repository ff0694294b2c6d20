"""MoE²'s router: where it looks and starts, its temperature; experts by domain, and oracles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dg_cases import images, make, scatter

from dynmoe import registry
from dynmoe.dg.prototypes import kmeans, style
from dynmoe.errors import UserError
from dynmoe.experiments.dg.command import main
from dynmoe.experiments.dg.experiment import DomainGeneralisation
from dynmoe.experiments.dg.headroom import gate_figures, oracle
from dynmoe.lab.experiment import Results

LABELS = torch.tensor([0, 1, 2, 1])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_style_is_mean_and_deviation_behind_the_block() -> None:
    method: Any = make("moe2", embedding="style", block=1)
    x, vit = images(), method.backbone
    tokens = vit.blocks[1](vit.blocks[0](vit._pos_embed(vit.patch_embed(x))))
    count = tokens.shape[1]
    mean = tokens.sum(1) / count
    deviation = (((tokens - mean[:, None]) ** 2).sum(1) / count).sqrt()
    found = style(vit, x, 1)
    torch.testing.assert_close(found, torch.cat([mean, deviation], 1))
    scatter(method).eval()
    torch.testing.assert_close(method(x), method(x, method.embed(x)))
    assert method.outer.router.weight.shape[1] == 32


def test_kmeans_finds_the_directions_of_clusters() -> None:
    axes = torch.eye(6, dtype=torch.double)[:3]
    x = (axes.repeat(20, 1) * 5 + 0.1 * torch.randn(60, 6)).double()
    centres = kmeans(x, 3, generator())
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(3).double())
    assert (centres @ axes.T > 0.99).sum().item() == 3
    torch.testing.assert_close(kmeans(x, 3, generator()), centres)
    with pytest.raises(UserError, match="needs as many"):
        kmeans(x[:2], 3, generator())


def test_prototypes_at_domain_means_about_the_common_mean() -> None:
    method: Any = make("moe2", experts=2, prototypes="domains", centre=True)
    x = torch.randn(6, 16).double() + 4
    domains = torch.tensor([0, 0, 0, 0, 1, 1])
    method.start(x, domains, generator())
    origin = x.mean(0)
    for k in range(2):
        mean = x[domains == k].mean(0) - origin
        torch.testing.assert_close(method.outer.router.weight[k], mean / mean.norm())
    cosines = F.normalize(x - origin, dim=1) @ method.outer.router.weight[:2].T
    torch.testing.assert_close(method.gates(x), (cosines / 0.5).softmax(1))
    with pytest.raises(UserError, match="use --method.experts 3"):
        method.start(x, torch.tensor([0, 0, 1, 1, 2, 2]), generator())


def test_the_temperature_moves_from_its_start_and_is_kept() -> None:
    options: dict[str, Any] = {"temperature_start": 0.1, "temperature_steps": 4}
    method: Any = scatter(make("moe2", experts=2, temperature=0.5, **options)).eval()
    phi, weight = torch.randn(3, 16).double(), method.outer.router.weight
    cosines = F.normalize(phi, dim=1) @ F.normalize(weight[:2], dim=1).T
    for tau in (0.1, 0.2, 0.3, 0.4, 0.5, 0.5):
        torch.testing.assert_close(method.gates(phi), (cosines / tau).softmax(1))
        method.after_step()
    again: Any = make("moe2", experts=2, temperature=0.5, **options)
    again.load_learned_state(method.learned_state())
    assert int(again.steps) == 6
    assert "steps" not in make("moe2").state_dict()


@pytest.mark.parametrize(
    "options",
    [{"prototypes": "x"}, {"embedding": "x"}, {"block": 3}, {"temperature_start": -1.0},
     {"temperature_steps": 0}],
)  # fmt: skip
def test_options_of_routing_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"moe2: .*{next(iter(options))}="):
        make("moe2", **options)


def test_experts_learn_from_their_own_domain_only() -> None:
    method: Any = make("domain-experts", experts=2, dropout=0.0, balance=0.0).eval()
    x, domains = images(), torch.tensor([0, 1, 1, 0])
    loss, _ = method.loss(x, LABELS, None, domains)
    own = [F.cross_entropy(method.member_logits(k, x[domains == k]), LABELS[domains == k])
           for k in range(2)]  # fmt: skip
    torch.testing.assert_close(loss, (own[0] + own[1]) / 2)
    head = method.heads[0].weight
    (gradient,) = torch.autograd.grad(own[0], head, allow_unused=True)
    assert gradient is None  # the second expert's head never sees the first's images
    with pytest.raises(UserError, match="use --method.experts 3"):
        method.loss(x, LABELS, None, torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method domain-experts", r"experts=3, .* 2 source domains; use --method.experts 2$"),
        ("--compare domain-experts", r"use --method domain-experts --method.experts 2, not --comp"),
        ("--compare meta-dmoe", r"use --method meta-dmoe --method.experts 2, not --compare"),
        ("--method becotta --method.domains 1", r"domains=1, .* use --method.domains 2$"),
        ("--method meta-dmoe --method.experts 2 --batch-size 1", "needs 2 images of each source"),
        ("--compare domain-experts --domains.styles plain edges", "use data with 3 domains"),
        ("--method domain-experts --method.experts 2 --selection held-out-domain",
         "also trains on 1 source domains, for which method domain-experts"),
    ],
)  # fmt: skip
def test_what_batches_do_not_suit_is_told_before_any_run(
    flags: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        main(f"--preset smoke --vit.epochs 0 {flags} --runs-dir {tmp_path / 'runs'}".split())
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_an_oracle_takes_any_expert_that_is_right() -> None:
    right = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1]]).bool()
    assert oracle(right) == {"best_per_image": 0.75, "best_expert": 0.5, "mean_expert": 0.5}
    method: Any = scatter(make("moe2", experts=2)).eval()
    x = images()
    alone = method.expert_logits(x, None)
    gates = torch.tensor([[0.0, 1.0]]).double().expand(4, -1)
    torch.testing.assert_close(alone[1], method.forward_with(x, gates))


def test_gates_against_domains() -> None:
    apart = [torch.tensor([[0.9, 0.1]] * 3), torch.tensor([[0.2, 0.8]] * 3)]
    found = gate_figures(apart)
    assert found["gate_nmi"] == pytest.approx(1)
    entropies = [
        -sum(p * math.log(p) for p in row) / math.log(2) for row in ((0.9, 0.1), (0.2, 0.8))
    ]
    assert found["gate_entropy"] == pytest.approx(sum(entropies) / 2)
    mixed = [torch.tensor([[1.0, 0.0], [0.0, 1.0]])] * 2
    assert gate_figures(mixed) == {"gate_nmi": pytest.approx(0), "gate_entropy": 0}
    assert gate_figures([torch.ones(3, 1)]) == {} and gate_figures([]) == {}


def rows(**values: float) -> list[dict[str, Any]]:
    measures = {n: v for n, v in values.items() if "accuracy" not in n}
    return [{"tests": [{"accuracy": 0.6, "oracle_accuracy": 0.6, **values, "measures": measures}]}]


@pytest.mark.parametrize(("best", "word"), [(0.61, "no router"), (0.9, "there is room")])
def test_the_verdict_on_headroom(best: float, word: str) -> None:
    study = registry.get("study", "dg-headroom")()
    runs = {name: rows() * 2 for name in study.variants("laptop")}
    for name in ("domain-experts", "ensemble", "moe2"):
        runs[name] = rows(best_per_image=best) * 2
    first, *_ = study.verdict(Results({"s": runs}, {"s": {}}, DomainGeneralisation()))
    assert word in first and f"{100 * (best - 0.6):+.1f} points" in first
    gates = registry.get("study", "dg-gates")()
    runs = {name: rows(gate_nmi=0.3, gate_entropy=0.9) * 2 for name in gates.variants("laptop")}
    first, *_ = gates.verdict(Results({"s": runs}, {"s": {}}, DomainGeneralisation()))
    assert "random, tau 0.5" in first and "0.30 [0.30, 0.30]" in first


def test_the_verdict_on_photographs() -> None:
    """Each form against one outer expert; gates, spreads and oracles by name."""
    study = registry.get("study", "dg-photographs")()
    figures = {"gate_nmi": 0.3, "gate_entropy": 0.9, "kl": 0.01, "spread": 0.02, "loss_change": 0.0}
    runs = {
        name: rows(**figures, best_per_image=0.9 if name == "domain-experts" else 0.61) * 2
        for name in study.variants("laptop")
    }
    said = study.verdict(Results({"s": runs}, {"s": {}}, DomainGeneralisation()))
    oracles = [line for line in said if "best expert per image of" in line]
    assert len(oracles) == 6 and all("against 1 outer expert" in line for line in oracles)
    rooms = [line for line in oracles if "there is room" in line]
    assert rooms == [line for line in oracles if "of domain-experts" in line]
    assert sum("which are 0.0200" in line for line in said) == 4
    assert sum("gate and source domain" in line for line in said) == 4
