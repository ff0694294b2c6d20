"""Studies: sentences that follow from numbers, flags that parse, and a small one run for real."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest

from cl_benchmarks import figures
from dynmoe import commands, registry
from dynmoe.errors import UserError
from dynmoe.lab.config import parse
from dynmoe.lab.experiment import At, Results, logged
from dynmoe.lab.figures import new_figure
from dynmoe.lab.report import cell
from dynmoe.lab.statistics import Family, Interval, paired_difference, seeds_to_see
from dynmoe.lab.study import Preset, Study, judge
from dynmoe.study import Config, carry_out, main

STUDIES = registry.names("study")


def results(**variants: list[list[float]]) -> Results:
    """A stream "s" whose variants have [S][T] train accuracies."""
    runs = {
        name: [{"tasks": [{"train_accuracy": x} for x in seed]} for seed in seeds]
        for name, seeds in variants.items()
    }
    return Results({"s": runs}, {"s": {}}, commands.load("cl").experiment())


def test_a_difference_is_paired_by_seed_and_decides_the_word() -> None:
    r = results(
        a=[[0.5, 0.9], [0.2, 0.61], [0.1, 0.32]],
        b=[[0.5, 0.8], [0.2, 0.5], [0.1, 0.2]],
        c=[[0.5, 0.6], [0.2, 0.9], [0.1, 0.3]],
    )
    gap = r.difference("s", "a", "b")
    assert gap.point == pytest.approx(0.11) and 0.085 < gap.low < 0.086 < 0.134 < gap.high < 0.135
    assert "s: a against b: +11.0 points [8.5, 13.5]" in r.says("s", "a", "b")
    assert "higher (train accuracy, last task; higher with probability 0.67)" in r.says(
        "s", "a", "b"
    )
    assert "lower" in r.says("s", "b", "a")
    assert "no difference seen" in r.says("s", "a", "c")
    needed = seeds_to_see([0.9, 0.61, 0.32], [0.6, 0.9, 0.3])
    assert f"; {needed} seeds to see it)." in r.says("s", "a", "c")
    assert "seeds to see" not in r.says("s", "a", "b")
    assert "+5.5 points" in r.says("s", "a", "b", at="mean")
    assert "+0.0 points" in r.says("s", "a", "b", at="first")


def test_a_variant_has_one_color_though_a_stream_lacks_those_before_it() -> None:
    r = results(a=[[0.1, 0.2]], b=[[0.3, 0.4]], c=[[0.5, 0.6]])
    both = {"s": r.runs["s"], "t": {"c": r.runs["s"]["c"]}}
    r = Results(both, {"s": {}, "t": {}}, r.experiment)
    assert r.variants == ["a", "b", "c"]
    axes = new_figure("", 3).subplots(1, 2)
    for place, stream in zip(axes, r.streams, strict=True):
        figures.draw_curves(place, r, stream, "train_accuracy", "")
    colors = [{line.get_label(): line.get_color() for line in place.lines} for place in axes]
    assert len(set(colors[0].values())) == 3 and colors[1]["c"] == colors[0]["c"]


class Many(Study):
    """Is any of six methods better than the first?"""

    name = "many-test"  # not registered: other tests read the registry

    def variants(self, preset: Preset) -> dict[str, str]:
        return {}

    def verdict(self, results: Results) -> list[str]:
        """At two parts of a run; the first comparison is made twice."""
        first, *others = results.runs["s"]
        parts: tuple[At, ...] = ("last", "first")
        pairs = [(v, at) for at in parts for v in (others[0], *others)]
        return [results.says("s", v, first, at=at) for v, at in pairs]


def test_the_verdict_of_a_study_is_corrected_for_the_comparisons_it_makes() -> None:
    rng = np.random.default_rng(0)
    r = results(**{name: rng.random((5, 2)).tolist() for name in "abcd"})
    sentences, comparisons = judge(Many(), r)
    assert comparisons == 6 and len(sentences) == 8  # those made again count once
    ones, others = r.values("s", "b"), r.values("s", "a")
    _, low, high = paired_difference(ones, others, confidence=1 - 0.05 / 6)
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in sentences[0]
    assert r.difference("s", "b", "a") == paired_difference(ones, others)  # alone: 95 %
    needed = seeds_to_see(ones, others, 1 - 0.05 / 6)
    assert needed and f"; {needed} seeds to see it" in sentences[0]
    assert needed > (seeds_to_see(ones, others) or 0)


def test_variants_with_equal_numbers_are_comparisons_of_their_own() -> None:
    level = [[0.1, 1.0], [0.2, 1.0], [0.3, 1.0]]
    r = results(a=[[0.1, 0.5], [0.2, 0.4], [0.3, 0.3]], b=level, c=level, d=level)
    sentences, comparisons = judge(Many(), r)
    assert comparisons == 6 and len(sentences) == 8


def test_a_study_of_equal_methods_calls_any_better_in_five_of_a_hundred_cases() -> None:
    """At 5 seeds, with methods that share their seeds' ups and downs."""
    rng, studies, wrong, alone = np.random.default_rng(1), 150, 0, 0
    for _ in range(studies):
        values = rng.normal(size=(5, 1, 2)) + rng.normal(size=(5, 5, 1, 2))
        pairs = [(values[k, :, 0, at], values[0, :, 0, at]) for k in range(1, 5) for at in (0, 1)]
        families = Family(len(pairs)), Family()
        found = [[f.difference(list(a), list(b)) for a, b in pairs] for f in families]
        told = [any(gap.low > 0 or gap.high < 0 for gap in gaps) for gaps in found]
        wrong, alone = wrong + told[0], alone + told[1]
    assert wrong / studies <= 0.05 + 2 * (0.05 * 0.95 / studies) ** 0.5
    assert alone / studies > 0.15


def test_what_is_kept_from_first_to_last_task() -> None:
    r = results(
        up=[[0.1, 0.0, 0.3], [0.2, 0.0, 0.5], [0.2, 0.0, 0.45]],
        down=[[0.9, 0.5, 0.1], [0.8, 0.5, 0.1], [0.8, 0.5, 0.05]],
        level=[[0.5, 0.5, 0.4], [0.5, 0.5, 0.6], [0.5, 0.5, 0.5]],
        once=[[0.1, 0.2]],
    )
    assert "+25.0 points [12.6, 37.4], rises" in r.kept("s", "up")
    assert "-75.0 points [-87.4, -62.6], falls" in r.kept("s", "down")
    assert "no change seen" in r.kept("s", "level")
    assert "not known from one seed" in r.kept("s", "once")


def test_logged_scalars_are_read_in_order(tmp_path: Path) -> None:
    lines = [{"step": 1, "x": 0.5}, {"step": 1, "event": "task"}, {"step": 2, "x": 2, "y": None}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert logged(tmp_path, "x") == [0.5, 2.0] and logged(tmp_path, "y") == []


AFTER = ("long", "parts", "fresh")
WITHOUT_REFERENCES = (
    "pairs", "rl-takeover", "rl-craftax-routers", *(f"tta-photographs-{name}" for name in AFTER)
)  # fmt: skip
"""The first has too many tasks for fresh networks; the next two ask of the newest expert, which a
dense network lacks; the others go on from another study's table."""


@pytest.mark.thin(12)
@pytest.mark.parametrize("preset", ["laptop", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_flag_of_every_study_is_known(name: str, preset: Preset) -> None:
    """Each variant on the first stream, and the first variant on each."""
    study: Study = registry.get("study", name)()
    module = commands.load(study.command)
    presets, references = module.presets(), module.experiment().references
    variants = study.variants(preset)
    searched = {f"{v}-{i}": own for v, all_ in study.searches(preset).items()
                for i, own in enumerate(all_)}  # fmt: skip
    if name not in WITHOUT_REFERENCES:
        assert set(references) <= {*variants, *study.searches(preset)}
    streams, agents = list(study.streams(preset).items()), list((variants | searched).items())
    for (stream, common), (label, own) in dict.fromkeys(
        [*((streams[0], agent) for agent in agents), *((stream, agents[0]) for stream in streams)]
    ):
        argv = [*shlex.split(study.flags_on(stream, own)), *shlex.split(common)]
        _, config = parse(presets, [*argv, "--allow-unused"], "study", "")
        if study.command in ("cl", "rl"):
            config.method.build()
        if study.command == "cl":
            config.intervention.build()
        assert "/" not in label


class Tiny(Study):
    """Does a network learn more when it learns at all?"""

    name = "tiny-test"  # not registered: other tests read the registry

    def streams(self, preset: Preset) -> dict[str, str]:
        short = "--dataset digits --chunks 2 --epochs 2 --network mlp"
        return {"class": f"--protocol class {short}"}

    def variants(self, preset: Preset) -> dict[str, str]:
        return {"still": "--method dense --lr {none}", "dense": "--method dense"}

    def flags_on(self, stream: str, flags: str) -> str:
        return flags.format(none=0)

    def searches(self, preset: Preset) -> dict[str, list[str]]:
        return {"searched": ["--method dense --lr 1e-9", "--method dense --lr 1e-3"]}

    def verdict(self, results: Results) -> list[str]:
        return [results.says("class", "dense", "still")]


@pytest.mark.slow
def test_a_study_runs_searches_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(study="tiny-test", seeds=3, runs_dir=tmp_path, jobs=1)
    carry_out(Tiny(), config, ["--threads", "1"])
    out = tmp_path / "study" / "tiny-test-laptop"
    found = json.loads((out / "results.json").read_text())
    assert found["question"] == "Does a network learn more when it learns at all?"
    assert found["command"] == (
        "python -m dynmoe.study tiny-test --preset laptop --seeds 3 -- --threads 1"
    )
    variants = found["streams"]["class"]
    assert list(variants) == ["still", "dense", "searched"]
    assert variants["still"]["flags"] == "--method dense --lr 0"
    assert variants["searched"]["flags"] == "--method dense --lr 1e-3"
    runs = tmp_path / "cl" / "studies"
    assert len(list(runs.iterdir())) == 3  # "searched" is "dense", once and for all studies
    assert variants["searched"]["runs"] == variants["dense"]["runs"]
    file = runs / variants["dense"]["runs"] / "seed-1" / "summary.json"
    run = json.loads(file.read_text())
    expected = [round(task["train_accuracy"], 4) for task in run["tasks"]]
    assert variants["dense"]["train_accuracy"][1] == expected
    assert "higher" in found["verdict"][0] and "3 seeds" in found["verdict"][1]
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed, page = capsys.readouterr().out, (out / "study.md").read_text()
    for text in (printed, page):
        assert found["verdict"][0] in text and "searched" in text
    assert found["command"] in page and found["question"] in page and "(figure.png)" in page
    last = sum(seed[-1] for seed in variants["dense"]["train_accuracy"]) / 3
    (row,) = [line for line in page.splitlines() if line.startswith("| dense |")]
    assert row.split(" | ")[2].startswith(f"{100 * last:.1f} [") and "--method dense" in row
    commit = json.loads(file.with_name("environment.json").read_text())["sessions"][0]["commit"]
    assert found["commits"] == [commit]

    before = file.stat()
    carry_out(Tiny(), config, ["--threads", "1"])  # all is read, nothing run again
    assert before == file.stat()


def test_the_list_and_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    printed = capsys.readouterr().out
    assert "granularity: Is trainability kept only for granularity 2 and more?" in printed
    with pytest.raises(UserError, match=r"unknown study 'granulrity'.*Did you mean 'granularity'"):
        main(["granulrity"])
    with pytest.raises(UserError, match="--seeds -1 is too small"):
        main(["granularity", "--seeds", "-1"])
    with pytest.raises(UserError, match="--cpus has no effect with --launcher local"):
        main(["granularity", "--cpus", "2"])


def test_cells_of_a_table() -> None:
    assert cell(Interval(0.5, 0.4, 0.6), 100, 1) == "50.0 [40.0, 60.0]"
    assert cell(Interval(0.5, 0.5, 0.5), 100, 1) == "50.0 [50.0, 50.0]"
    assert cell(Interval(5258, 5258, 5258), 1, 0) == "5,258"
    assert cell(Interval(5258, math.nan, math.nan), 1, 0) == "5,258"
    assert cell(Interval(math.nan, math.nan, math.nan), 1, 0) == ""
