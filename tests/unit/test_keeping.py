"""Studies of growth that keeps its experts: variants, verdicts, and the figure of the front."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynmoe import cl
from dynmoe.lab.config import parse
from dynmoe.lab.experiment import Results
from dynmoe.lab.figures import front
from dynmoe.lab.study import Preset, judge
from dynmoe.studies.keeping import (
    GROWN,
    ROUTERS,
    EarlyOverfit,
    GrowthOrReset,
    RouterShiftDomains,
)
from dynmoe.studies.mechanism import CELLS, Mechanism
from dynmoe.study import Config, carry_out

SEEDS = range(5)


def _results(**streams: dict[str, list[dict[str, Any]]]) -> Results:
    return Results(streams, {}, cl.experiment())


def _run(**last: Any) -> dict[str, Any]:
    """A run of two tasks, alike but for what the first cannot have."""
    first = {k: None if "old" in k or "forgetting" in k else v for k, v in last.items()}
    return {"tasks": [first, last], "dataset": "photos"}


def _parsed(flags: str) -> Any:
    return parse(cl.presets(), [*shlex.split(flags), "--allow-unused"], "study", "")[1]


def test_streams_are_of_tiny_imagenet_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        "--dataset fractal --dataset.train-per-class 80"
        in GrowthOrReset().streams("laptop")["class"]
    )
    (tmp_path / "data" / "tiny-imagenet-200" / "train").mkdir(parents=True)
    found = GrowthOrReset().streams("laptop")
    assert list(found) == ["domains", "class", "iid-cumulative", "noise", "shuffle"]
    config = _parsed(found["class"])
    assert config.dataset.part.name == "tiny-imagenet" and config.dataset.size == 32
    assert config.protocol.head == "full" and config.network.place == "head"
    for study in (Mechanism(), RouterShiftDomains(), EarlyOverfit()):
        assert all("tiny-imagenet" in own for own in study.streams("laptop").values())


def test_keep_is_chosen_among_its_paces_by_what_it_learns_and_keeps() -> None:
    study = GrowthOrReset()
    choices = study.searches("laptop")["keep"]
    assert len(set(choices)) == 9 and study.variants("laptop")["keep"] == choices[0]
    config = _parsed(choices[-1])
    assert (config.old_experts.lr, config.intervention.factor) == (1, 0.1)
    assert config.budget.start == "share" and config.granularity == 1

    def score(train: float, old: float) -> float:
        return study.score(cl.experiment(), _run(train_accuracy=train, old_accuracy=old))

    assert score(1.0, 0.3) == score(0.98, 0.3) == pytest.approx((0.97 + 0.3) / 2)
    assert score(0.9, 0.3) < score(0.97, 0.25)


def _compared(keep: float, forgetting: float, asked: bool) -> dict[str, list[dict[str, Any]]]:
    def run(variant: str, seed: int) -> dict[str, Any]:
        own, noise = variant == "keep", 0.001 * (seed + len(variant) % 3 * (seed == 2))
        old = {
            "old_accuracy": 0.4 if own else 0.2,
            "forgetting": forgetting if own else 0.3 + noise,
        }
        train = keep if own else 0.99
        return _run(train_accuracy=train - noise, test_accuracy=0.3 + noise, online_accuracy=0.5,
                    parameters=100 + len(variant), **(old if asked else {}))  # fmt: skip

    return {v: [run(v, s) for s in SEEDS] for v in GrowthOrReset().variants("laptop")}


def test_growth_or_reset_tells_what_was_reached() -> None:
    results = _results(
        domains=_compared(0.98, 0.05, True),
        noise=_compared(0.9, 0, False),
        shuffle=_compared(0.99, 0, False),
    )
    sentences, comparisons = judge(GrowthOrReset(), results)
    assert comparisons == 10 + 4 + 2  # by stream; what was reached adds none
    assert "domains: keep against reset-block: -1.0 points" in sentences[0]
    said = " ".join(sentences)
    assert "domains: keep is within 3 points of fresh networks in train accuracy: shown; 15" in said
    assert "less forgotten than reset-block: shown." in said
    assert "noise: keep is within 3 points of fresh networks in train accuracy: missed." in said
    assert not any(s.startswith("shuffle") and "test accuracy" in s for s in sentences)
    assert sum("frozen trunk" in s and "old accuracy" in s for s in sentences) == 1
    assert "Data: domains on photos" in said and "103 (ewc) to 125" in said


def test_the_front_and_its_figure(tmp_path: Path) -> None:
    assert front([(1, 5), (2, 4), (1.5, 3), (3, 1), (3, 0)]) == [(1, 5), (2, 4), (3, 1)]
    results = _results(domains=_compared(0.98, 0.05, True), shuffle=_compared(0.9, 0, False))
    GrowthOrReset().draw(tmp_path / "figure.png", results, "title")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1100, 400)
    assert (tmp_path / "tasks.png").is_file()


def test_mechanism_has_every_combination_and_pools_the_others() -> None:
    study = Mechanism()
    variants = study.variants("laptop")
    assert len(CELLS) == 24 and len(variants) == 26
    config = _parsed(variants["4 bottleneck all per-growth"])
    assert config.granularity == 4 and config.bank.part.name == "bottleneck"
    assert config.init.router == "all" and config.budget.mode == "per-growth"
    assert _parsed(variants["1 pool new constant"]).pruning.part.name == "utility"

    def accuracy(name: str, seed: int) -> float:
        cell = CELLS[name]
        rows = 0.001 * (-1) ** seed * (cell["rows"] == "all")
        return 0.5 + 0.2 * (cell["bank"] == "bottleneck") - 0.02 * (cell["g"] == "4") + rows

    runs = {name: [_run(train_accuracy=accuracy(name, s), test_accuracy=0.3) for s in SEEDS]
            for name in CELLS}  # fmt: skip
    runs |= {v: [_run(train_accuracy=0.9, test_accuracy=0.3)] * 5 for v in ("dense", "fresh")}
    sentences, comparisons = judge(study, _results(noise=runs))
    assert comparisons == 5  # those of test accuracy are all alike
    assert "g of 2 and 4 against 1: -1.0 points" in sentences[0] and "lower" in sentences[0]
    assert "bottleneck against pool: +20.0 points" in sentences[1] and "higher" in sentences[1]
    assert "no difference seen" in sentences[2] and "no difference seen" in sentences[3]
    assert sentences[4] == (
        "noise: largest in train accuracy, last task: bottleneck against pool (seen)."
    )


def test_router_shift_compares_new_with_old_domains_and_names_lock_out() -> None:
    study = RouterShiftDomains()
    shares = {"softmax": (0.01, 0.01), "gaussian": (0.9, 0.1)}
    names = (*ROUTERS, "cosine, all rows")
    runs: dict[str, list[dict[str, Any]]] = {
        v: [
            _run(newest_share=now + 0.001 * s, newest_share_old=old, newest_even=0.2) for s in SEEDS
        ]
        for v, (now, old) in ((v, shares.get(v, (0.2, 0.2))) for v in names)
    }
    runs["dense"] = [_run(newest_share=None)] * 5
    sentences, _ = judge(study, _results(**{"same images": runs}))
    said = dict(zip(names, sentences, strict=False))
    assert "90.2 % on the new domain, 10.0 % on old ones: +80.2 points" in said["gaussian"]
    assert "higher on the new domain" in said["gaussian"]
    assert "Last task: not locked out" in said["gaussian"]
    assert "Last task: locked out, -3.8 points" in said["softmax"]
    assert set(names) == set(study.variants("laptop")) - {"dense", "fresh"}
    assert _parsed(study.variants("laptop")["cosine, all rows"]).init.router == "all"


def test_early_overfit_compares_ages_on_the_same_tasks() -> None:
    def run(seed: int, oldest: float) -> dict[str, Any]:
        rows = [
            {"next_oldest": 0.9, "next_newest": None, "next_fresh": 0.1},  # before any growth
            {"next_oldest": oldest, "next_newest": 0.5, "next_fresh": 0.4 + 0.001 * seed},
            {"next_oldest": None, "next_newest": None, "next_fresh": None},
        ]
        return {"tasks": rows, "dataset": "photos"}

    runs = {v: [run(s, 0.3 if v == "all learn" else 0.6) for s in SEEDS] for v in GROWN}
    runs["dense"] = [{"tasks": [{}], "dataset": "photos"}]
    sentences, _ = judge(EarlyOverfit(), _results(**{"class": runs}))
    assert "all learn: probes of the oldest experts on the next task 30.0 %" in sentences[0]
    assert "-10.2 points" in sentences[0] and "worse" in sentences[0]
    assert "newest" in sentences[1] and "better" in sentences[1]
    assert "better" in sentences[2] and len(sentences) == 9
    assert set(GROWN) == set(EarlyOverfit().variants("laptop")) - {"dense", "fresh"}


class Short(GrowthOrReset):
    """Is the pace that the stream domains likes used on the other?"""

    name = "growth-or-reset-test"  # not registered: other tests read the registry
    search_seeds = 1

    def streams(self, preset: Preset) -> dict[str, str]:
        """Two of the five."""
        return {s: own for s, own in super().streams(preset).items() if s in ("domains", "noise")}

    def variants(self, preset: Preset) -> dict[str, str]:
        """Those that the verdict compares."""
        wanted = ("dense", "fresh", "keep", "reset-block", "reset-block, frozen trunk")
        return {v: own for v, own in super().variants(preset).items() if v in wanted}

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        """Two of the twelve."""
        return {"keep": super().searches(preset)["keep"][::11]}


@pytest.mark.slow
def test_growth_or_reset_runs(tmp_path: Path) -> None:
    config = Config(study="x", seeds=2, runs_dir=tmp_path, jobs=1)
    short = "--dataset digits --chunks 2 --epochs 1 --network.hidden 16 --threads 1"
    carry_out(Short(), config, shlex.split(short))
    out = tmp_path / "study" / "growth-or-reset-test-laptop"
    found = json.loads((out / "results.json").read_text())
    flags = {s: own["keep"]["flags"] for s, own in found["streams"].items()}
    assert flags["domains"] == flags["noise"] and "--router gaussian" in flags["noise"]
    assert any("domains: keep is within 3 points" in s for s in found["verdict"])
    assert found["streams"]["domains"]["keep"]["old_accuracy_last"][0] > 0
    assert (out / "figure.png").is_file() and (out / "tasks.png").is_file()
    assert "Data: domains on digits" in (out / "study.md").read_text()
