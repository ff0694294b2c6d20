"""What is swept, what it would cost, and where it runs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from finished_runs import FLAGS, TINY, finish

from dynmoe import sweep
from dynmoe.errors import DynmoeError, UserError
from dynmoe.lab.experiment import Results
from dynmoe.lab.files import writing
from dynmoe.lab.launchers import Failure, Launcher, Outcome, Work
from dynmoe.lab.run import remove_if_never_begun


def test_without_variants_the_choices_of_the_grid_are_compared() -> None:
    grid = sweep.read_grid(("granularity: 1 2", "--router: cosine topk"))
    assert sweep.choose({}, grid, "tta") == (
        {
            "granularity 1, router cosine": "--granularity 1 --router cosine",
            "granularity 1, router topk": "--granularity 1 --router topk",
            "granularity 2, router cosine": "--granularity 2 --router cosine",
            "granularity 2, router topk": "--granularity 2 --router topk",
        },
        {"": ""},
    )
    assert sweep.choose({}, {}, "rl") == (sweep.DEFAULT, {"": ""})


def test_variants_are_compared_at_each_choice_of_the_grid() -> None:
    """No variant is told against another one that ran at other values."""
    variants = {"a": "--lr 1e-3", "b": ""}
    assert sweep.choose(variants, {"granularity": [3, 4]}, "cl") == (
        variants,
        {"granularity 3": "--granularity 3", "granularity 4": "--granularity 4"},
    )
    study = sweep.Sweep("s", *sweep.choose(variants, {"granularity": [3, 4]}, "cl"))
    runs = {
        choice: {label: [_finished(accuracy + noise) for noise in (0.0, 0.01)]
                 for label, accuracy in (("a", 0.9), ("b", level))}
        for choice, level in (("granularity 3", 0.3), ("granularity 4", 0.4))
    }  # fmt: skip
    first, second = study.verdict(Results(runs, {}, sweep.load("cl").experiment()))
    assert first.startswith("granularity 3: b against a: -60.0 points")
    assert second.startswith("granularity 4: b against a: -50.0 points")
    assert "(train accuracy, last task;" in first


def test_a_verdict_is_about_the_metric_that_was_searched_for() -> None:
    study = sweep.Sweep("s", {"a": "", "b": ""}, None, "?", "test_accuracy", "mean")
    runs = {v: [{"tasks": [{"train_accuracy": 0.1, "test_accuracy": x}]} for x in (0.5, level)]
            for v, level in (("a", 0.5), ("b", 0.7))}  # fmt: skip
    (said,) = study.verdict(Results({"": runs}, {}, sweep.load("cl").experiment()))
    assert said.startswith("b against a: +10.0 points") and "(test accuracy, mean over" in said


def _finished(accuracy: float) -> dict:
    return {"tasks": [{"train_accuracy": accuracy}]}


def test_seeds_are_a_number_or_a_range() -> None:
    assert sweep.read_seeds("3") == range(3)
    assert sweep.read_seeds("10..12") == range(10, 13)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "4..2"], r"--seeds 4\.\.2 is too small"),
        (["--seeds", "x"], "--seeds x is no number of seeds"),
        (["--grid", "granularity"], "setting 'granularity' must read"),
        (["--grid", "granularity:"], "--grid 'granularity' needs one or more values"),
        (["--grid", "granularity: 1 1"], "needs one or more values, each once"),
        (["--grid", "lr: 1 'x"], "--grid 'lr' cannot be read: no closing quotation in"),
        (["--variants", "a: --name it's"], "variant 'a' cannot be read: no closing quotation in"),
        (["--variants", "a: --name \\"], "variant 'a' cannot be read: no escaped character in"),
        (["--retries", "-1"], "--retries -1 is too small"),
        (["--variants", "a: --seed 1", "b: --seed 2"], "--seed cannot differ between the runs"),
        (["--grid", "seeds: 1 2"], "--seeds cannot differ between the runs"),
        (["--variants", "a:", "--", "--name=x"], "--name cannot differ between the runs"),
        (["--variants", "a:", "--", "--compare", "cbp"], "--compare cannot differ between"),
    ],
)
def test_a_sweep_that_cannot_work(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        sweep.main(["cl", "--runs-dir", str(tmp_path), *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variants", "a: --lr 1", "b:", "--", "--lr=2"],
         "--lr is in variant 'a' and in the flags of all runs"),
        (["--variants", "a: --lr 1", "--grid", "lr: 1 2"],
         "--lr is in variant 'a' and in the grid's 'lr 1'"),
        (["--variants", "a:", "--grid", "batch-size: 8", "--", "--batch_size", "4"],
         "--batch-size is in the grid's 'batch-size 8' and in the flags of all runs"),
        (["--grid", "lr: 1 2", "--", "--lr", "3"],
         "--lr is in variant 'lr 1' and in the flags of all runs"),
        (["--variants", "a: --no-y", "b: --x.y", "--", "--x.no-y"],
         "--x.y is in variant 'b' and in the flags of all runs"),
    ],
)  # fmt: skip
def test_a_setting_named_in_two_places(flags: list[str], message: str, tmp_path: Path) -> None:
    """One of its values would have no effect."""
    with pytest.raises(UserError, match=message):
        sweep.main(["cl", "--runs-dir", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_the_command_line_that_is_kept_makes_the_sweep_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With name, question and seeds; it is given once more as it was kept."""
    kept: list[tuple[str, str | None, range]] = []

    def run_study(study: sweep.Sweep, *args: object, **_: object) -> None:
        kept.append((str(args[7]), study.__doc__, args[3]))  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "run_study", run_study)
    argv = ["cl", "--name", "s", "--question", "Does it pay?", "--seeds", "3..4",
            "--variants", "a: --lr 1", "--grid", "protocol: class noise"]  # fmt: skip
    sweep.main([*argv, "--runs-dir", str(tmp_path), "--", *FLAGS])
    again = shlex.split(kept[0][0].removeprefix("python -m dynmoe.sweep "))
    sweep.main(again)
    assert kept[0] == kept[1] and kept[0][1:] == ("Does it pay?", range(3, 5))


@dataclass(frozen=True)
class Seeing(Launcher):
    """Runs nothing: it keeps the folders of what it is given, which all fails."""

    given: list[str] = field(default_factory=list)
    jobs = 1

    def launch(self, work: Work, items: list[Any]) -> Iterator[Outcome]:  # type: ignore[override]
        self.given.extend(str(job.folder) for job in items)
        yield from ((job, Failure("not run", UserError.exit_code)) for job in items)


def test_a_grid_may_set_options_of_a_part_that_the_flags_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All choices are run, and a dry run tells of the same runs."""
    swept: dict[str, Any] = {
        "variants": {"a": "--method dense", "b": "--method wide"},
        "grid": {"protocol.images": [40, 80]},
        "flags": [*FLAGS, "--protocol", "shuffle"],
        "seeds": 1,
        "runs_dir": tmp_path,
    }
    sweep.sweep("cl", **swept, dry_run=True)
    told = re.findall(r"seed 0  (\S+)", capsys.readouterr().out)
    seen = Seeing()
    with pytest.raises(DynmoeError, match="4 runs failed"):
        sweep.sweep("cl", **swept, launcher=seen)
    assert len(set(seen.given)) == 4 and set(told) == set(seen.given)


def test_seeds_with_gaps_are_refused(tmp_path: Path) -> None:
    """Results name the first seed and how many there are."""
    with pytest.raises(UserError, match=r"seeds range\(0, 4, 2\) have gaps; use a range with"):
        sweep.sweep("cl", seeds=range(0, 4, 2), runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_nothing_to_sweep() -> None:
    with pytest.raises(UserError, match="nothing to sweep; give dg --variants"):
        sweep.choose({}, {}, "dg")


def test_a_dry_run_tells_what_is_left_from_finished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["cl", "--runs-dir", str(tmp_path), "--jobs", "2", "--seeds", "2", "--dry-run",
            "--grid", "granularity: 1 2", "--", *FLAGS]  # fmt: skip
    sweep.main(argv)
    out = capsys.readouterr().out
    assert out.count("to do") == 4 and "cost unknown" in out and not list(tmp_path.iterdir())
    module = sweep.load("cl")
    for own, seconds in (("1", 36_000.0), ("2", 144_000.0)):
        flags = [*FLAGS, "--granularity", own]
        found = sweep.plan(module.experiment(), module.presets(), flags, [0], tmp_path, own)
        finish(found[0], 0.5, seconds)
    sweep.main(argv)
    out = capsys.readouterr().out
    assert out.count("finished  ") == 2 and out.count("to do") == 2
    assert "4 runs, 2 finished" in out
    assert "2.1 days of one process, 25.0 hours on 2" in out


def test_two_at_a_time_in_one_folder_are_refused(tmp_path: Path) -> None:
    argv = ["cl", "--runs-dir", str(tmp_path), "--name", "s", "--", *FLAGS]
    with (
        writing(tmp_path / "sweep" / "s"),
        pytest.raises(UserError, match=f"s is in use by process {os.getpid()}"),
    ):
        sweep.main(argv)


def test_folders_of_runs_that_never_began_are_removed(tmp_path: Path) -> None:
    def folder(name: str, file: str, text: str) -> Path:
        path = tmp_path / name / "seed-0"
        (path / file).parent.mkdir(parents=True)
        (path / file).write_text(text)
        remove_if_never_begun(path)
        return path

    assert not folder("a", "output.txt", "x").parent.exists()
    assert not folder("b", "log.jsonl", "").exists()
    assert folder("c", "log.jsonl", "{}").exists()
    assert folder("d", "summary.json", "{}").exists()
    assert folder("e", "checkpoints/step-000000001.pt", "").exists()
    with writing(tmp_path / "f" / "seed-0"):
        remove_if_never_begun(tmp_path / "f" / "seed-0")  # another process has it
        assert (tmp_path / "f" / "seed-0").exists()


# for real ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["submitit", "--cluster", "local"], ["ray"]], ids=str)
def test_a_sweep_is_the_same_wherever_it_runs(
    engine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(engine[0])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    found = []
    for launcher in (["local"], engine):
        runs = tmp_path / launcher[0]
        argv = ["cl", "--launcher", *launcher, "--jobs", "2", "--name", "s", "--seeds", "1",
                "--grid", "granularity: 1 2", "--runs-dir", str(runs), "--", *TINY]  # fmt: skip
        sweep.main(argv)
        summaries = sorted(runs.rglob("summary.json"))
        assert len(summaries) == 2
        found.append([path.read_text() for path in summaries])
    assert found[0] == found[1]
