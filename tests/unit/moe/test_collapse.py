"""The collapse demonstration, shortened: one seed, fewer steps, and what it writes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[3]
STEPS = 300


@pytest.fixture(scope="module")
def collapse() -> ModuleType:
    sys.path.insert(0, str(ROOT))  # benchmarks are not installed
    try:
        return importlib.import_module("benchmarks.collapse")
    finally:
        sys.path.remove(str(ROOT))


def test_all_methods_start_alike_and_learn_from_the_same_data(collapse):
    stream = collapse.Stream(3)
    layers = {name: collapse.make_layer(m, stream, 3) for name, m in collapse.METHODS.items()}
    first = layers["top-1"]
    for name, layer in layers.items():
        assert torch.equal(layer.router.weight, first.router.weight), name
        if collapse.METHODS[name].router[0] in ("topk", "expert-choice"):  # no draws of its own
            assert torch.equal(layer.bank.w_in, first.bank.w_in), name
    x, target = stream.batch(4000, torch.Generator().manual_seed(0))
    lead = first.router(x).picks().mean(dim=0)
    assert lead[0] > 0.9
    assert x.mean(dim=0) @ stream.mean == pytest.approx(collapse.COMMON, abs=0.05)
    again = collapse.Stream(3).batch(4000, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], x) and torch.equal(again[1], target)


def test_targets_are_a_linear_map_of_the_deviation_in_each_cluster(collapse):
    stream = collapse.Stream(0)
    x, target = stream.batch(500, torch.Generator().manual_seed(1))
    gaps = torch.cdist(x, stream.centres)
    candidates = torch.einsum("ncd,cod->nco", x.unsqueeze(1) - stream.centres, stream.maps)
    errors = (candidates - target.unsqueeze(1)).norm(dim=2)
    assert (errors.amin(dim=1) < 1e-4).all()
    assert (errors.argmin(dim=1) == gaps.argmin(dim=1)).float().mean() > 0.6
    assert errors.argmin(dim=1).bincount().min() > 30  # every cluster occurs


@pytest.mark.parametrize("name", ["top-1", "noisy top-1"])
def test_without_balancing_the_router_collapses(collapse, name):
    curve = collapse.run(collapse.METHODS[name], 0, STEPS)
    end = curve[-1]
    assert end["load entropy"] < collapse.COLLAPSED
    assert end["largest load"] > 0.85 and end["dead experts"] >= 4


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "name",
    [
        "switch",
        "importance",
        "load",
        "global-balance",
        "loss-free",
        "mutual-information",
        "expert-choice",
        "hash",
    ],
)
def test_with_balancing_it_does_not(collapse, name):
    end = collapse.run(collapse.METHODS[name], 0, STEPS)[-1]
    assert end["load entropy"] > collapse.IN_USE
    assert end["largest load"] < 0.5 and end["dead experts"] <= 2


def test_similarity_is_slow_and_gets_there(collapse):
    curve = collapse.run(collapse.METHODS["similarity"], 0, 800)
    assert curve[-1]["load entropy"] > collapse.IN_USE > curve[5]["load entropy"]


def test_balanced_experts_learn_more(collapse):
    losses = {
        name: collapse.run(collapse.METHODS[name], 1, STEPS)[-1]["task loss"]
        for name in ("top-1", "switch", "loss-free")
    }
    assert losses["switch"] < losses["top-1"] - 0.1 > losses["loss-free"]


def test_the_command_prints_a_table_and_writes_its_files(collapse, tmp_path, monkeypatch, capsys):
    arguments = ["--seeds", "2", "--steps", "40", "--out", str(tmp_path / "new")]
    methods = ["--methods", "top-1", "switch"]
    monkeypatch.setattr(sys, "argv", ["collapse", *arguments, *methods])
    collapse.main()
    text = capsys.readouterr().out
    assert "load entropy" in text and "top-1" in text and "switch" in text and "…" not in text
    record = json.loads((tmp_path / "new" / "collapse.json").read_text())
    assert record["command"].startswith("python -m benchmarks.collapse --seeds 2 --steps 40")
    assert record["seeds"] == [10, 11]
    assert record["methods"].keys() == {"top-1", "switch"}
    ends = record["methods"]["switch"]["end"]
    assert len(ends["task loss"]) == 2 and len(record["methods"]["switch"]["load entropy"][0]) == 3
    assert (tmp_path / "new" / "collapse.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_results_are_those_of_the_methods_listed(collapse):
    record = json.loads((ROOT / "docs" / "results" / "collapse.json").read_text())
    assert record["methods"].keys() == collapse.METHODS.keys()
    for name, method in record["methods"].items():
        given = collapse.METHODS[name]
        assert method["router"] == list(given.router), name
        assert method["loss"] == (None if given.loss is None else list(given.loss)), name
        if name in collapse.UNBALANCED:
            assert method["verdict"] == "collapsed", name
        elif name != "top-2":
            assert method["verdict"] == "in use", name
