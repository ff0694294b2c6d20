"""The study of upcycling: its networks at the start, its settings, and its verdict."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynmoe.experiments.dg.command as dg
from cl_benchmarks.backbone import vision_transformer
from dynmoe.errors import UserError
from dynmoe.lab.config import parse
from dynmoe.lab.experiment import Results
from dynmoe.lab.runner import run_one
from dynmoe.lab.study import judge
from dynmoe.moe import moe_layers
from dynmoe.registry import get
from dynmoe.studies.upcycling import LONG, DGUpcycling

STUDY = DGUpcycling()


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return vision_transformer(16, 8, 24, 5, 2, 0)


def gmoe(**options: Any) -> nn.Module:
    config = get("dg", "gmoe").Config(experts=3, gate_dim=8, **options)
    return config.build(copy.deepcopy(tiny_vit()), 4, torch.Generator().manual_seed(1))


def test_copies_compute_what_the_dense_block_does_and_fresh_experts_differ() -> None:
    x = torch.randn(6, 24)
    copied, fresh = gmoe(), gmoe(start="fresh")
    for number in (1, 3):
        dense = tiny_vit().blocks[number].mlp(x)  # type: ignore[index, operator]
        for method, same in ((copied, True), (fresh, False)):
            layer = method.backbone.blocks[number].mlp.eval()  # type: ignore[union-attr, index]
            each = layer.bank.expert_outputs(x)
            assert each.shape == (3, 6, 24)
            assert all(torch.allclose(y, dense, atol=1e-5) == same for y in each)
            assert torch.allclose(each[0], each[1], atol=1e-5) == same
    layers = [dict(moe_layers(method)).values() for method in (copied, fresh)]
    for one, other in zip(*layers, strict=True):  # the same routers, whatever the start
        for a, b in zip(one.router.parameters(), other.router.parameters(), strict=True):
            assert a.shape == b.shape
    for name, value in copied.state_dict().items():
        if ".mlp." not in name or ".blocks.0." in name:
            assert torch.equal(value, fresh.state_dict()[name]), name
    with pytest.raises(UserError, match="gmoe: start='zero' must be one of copy, fresh"):
        gmoe(start="zero")


def test_every_variant_is_a_setting_of_its_own_with_equal_steps_but_one() -> None:
    configs = {}
    for name, own in STUDY.variants("laptop").items():
        chosen = STUDY.searches("laptop").get(name, [own])
        for flags in [own, *chosen]:
            configs[name] = parse(dg.presets(), shlex.split(f"{flags} --compare"), "study", "")[1]
    untrained = [name for name, config in configs.items() if config.vit.epochs == 0]
    assert untrained == ["dense from scratch", "moe from scratch", LONG]
    assert {c.steps for name, c in configs.items() if name != LONG} == {200}
    assert configs[LONG].steps == 800
    assert all(config.steps // config.eval_every == 5 for config in configs.values())


def test_a_run_tells_the_accuracy_on_its_sources(tmp_path: Path) -> None:
    flags = (
        "--preset smoke --method gmoe --method.experts 2 --compare --test-domains edges --steps 2 "
        f"--eval-every 1 --vit.epochs 0 --features 0 --runs-dir {tmp_path}"
    )
    _, config = parse(dg.presets(), shlex.split(flags), "study", "")
    experiment = dg.experiment()
    summary = run_one(experiment, "smoke", config, experiment.load(config)).summary
    (row,) = summary["tests"]
    point = row["curve"][row["selected_step"] - 1]
    held = point["out"]
    assert set(held) == {"plain", "coloured", "edges"}
    expected = (held["plain"] + held["coloured"]) / 2
    assert experiment.value(summary, "source_accuracy", "mean") == pytest.approx(expected)


def test_the_verdict_compares_upcycling_with_every_other_start() -> None:
    def runs(value: float) -> list[dict[str, Any]]:
        rows = [{"accuracy": value + s, "source_accuracy": 1 - value, "measures": {}}
                for s in (0.0, 0.01, 0.02)]  # fmt: skip
        return [{"tests": [row]} for row in rows]

    values = {"upcycled": 0.6, "dense": 0.5}
    names = STUDY.variants("laptop")
    found = {name: runs(values.get(name, 0.3 + 0.01 * n)) for n, name in enumerate(names)}
    sentences, count = judge(STUDY, Results({"embedded": found}, {}, dg.experiment()))
    assert len(sentences) == count == 8
    assert sentences[0].startswith("embedded: upcycled against dense: +10.0 points")
    assert sentences[1].startswith("embedded: upcycled against dense: -10.0 points")
    assert LONG in sentences[6] and LONG in sentences[7]
