"""DomainBed's rules to select a model; the one by held-out domains in runs and in searches."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_helpers import error_line, exit_code

from dynmoe import search
from dynmoe.dg import __main__ as dg
from dynmoe.experiments.dg.experiment import DomainGeneralisation
from dynmoe.experiments.dg.fold import Fold
from dynmoe.experiments.dg.selection import selected, trainings
from dynmoe.experiments.dg.source import Source
from dynmoe.lab.launchers import Local
from dynmoe.lab.space import read_space

SMALL = (
    "--preset smoke --compare --checkpoint-every-s 0 --name x --features 0 --method linear-probe "
    "--steps 4 --eval-every 2 --selection held-out-domain"
)


def command(runs: Path, extra: str = "") -> int:
    return exit_code(dg.main, f"{SMALL} {extra} --runs-dir {runs}".split())


def summary(runs: Path) -> Any:
    return json.loads((runs / "dg" / "x" / "seed-0" / "summary.json").read_text())


def point(step: int, validation: float, out: float) -> dict[str, Any]:
    return {"step": step, "validation": validation, "out": {"a": out}, "in": {"a": step / 10}}


def test_each_rule_chooses_by_its_own_figure() -> None:
    curve = [point(1, 0.9, 0.1), point(2, 0.9, 0.2), point(3, 0.5, 0.3)]
    held = {"b": [0.1, 0.8, 0.6], "c": [0.1, 0.2, 0.2]}
    found = selected(curve, "a", held)
    assert {rule: (by, at["step"]) for rule, (by, at) in found.items()} == {
        "training-domain": (0.9, 1),
        "held-out-domain": (0.5, 2),
        "oracle": (0.3, 3),
    }
    assert list(selected(curve, "a", {})) == ["training-domain", "oracle"]


def test_two_left_out_domains_share_the_training_of_their_pair() -> None:
    assert trainings("held-out-domain", [0, 1, 2], 3) == [(0, 1), (0, 2), (1, 2), (0,), (1,), (2,)]
    assert trainings("held-out-domain", [2], 4) == [(0, 2), (1, 2), (2, 3), (2,)]
    assert trainings("training-domain", [2, 0], 4) == trainings("oracle", [2, 0], 4) == [(2,), (0,)]


def test_a_run_selects_by_the_domains_held_out(tmp_path: Path) -> None:
    assert command(tmp_path) == 0
    best = []
    for row in summary(tmp_path)["tests"]:
        others = {"plain", "coloured", "edges"} - {row["domain"]}
        assert set(row["held_out"]) == others
        one, two = row["held_out"].values()
        means = [(a + b) / 2 for a, b in zip(one, two, strict=True)]
        place = means.index(max(means))
        chosen = row["curve"][place]
        assert row["selected_step"] == 2 * (place + 1)
        best.append(max(means))
        assert row["accuracy"] == row["held-out-domain_accuracy"] == chosen["in"][row["domain"]]
        assert row["oracle_accuracy"] == row["curve"][-1]["in"][row["domain"]]
    found = DomainGeneralisation().value(summary(tmp_path), "selection_accuracy", "mean")
    assert found == pytest.approx(sum(best) / 3)


def test_the_left_out_domain_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels for it change its own accuracy alone; for a held-out domain, the selection."""
    found, load = {}, DomainGeneralisation.load
    for changed in ("", "edges", "plain"):

        def loaded(self: Any, config: Any, name: str = changed) -> Source:
            source = load(self, config)
            domains = [
                replace(d, labels=torch.zeros_like(d.labels)) if d.name == name else d
                for d in source.data.domains
            ]
            return replace(source, data=replace(source.data, domains=tuple(domains)))

        monkeypatch.setattr(DomainGeneralisation, "load", loaded)
        runs = tmp_path / (changed or "none")
        assert command(runs, "--test-domains edges") == 0
        (found[changed],) = summary(runs)["tests"]
    keys = ("held_out", "selected_step", "source_accuracy")
    assert [found["edges"][k] for k in keys] == [found[""][k] for k in keys]
    assert found["edges"]["accuracy"] != found[""]["accuracy"]
    assert found["plain"]["held_out"] != found[""]["held_out"]


def test_stopped_at_every_step_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = "--test-domains edges --steps 2 --eval-every 1 --method moe2 --granularity 1 "
    short += "--trigger.steps 1 --method.experts 1 --method.max-experts 3"
    assert command(tmp_path / "whole", short) == 0
    original = Fold._train_step

    def signalled(self: Fold) -> float:
        signal.raise_signal(signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Fold, "_train_step", signalled)
    sessions = 1
    while command(tmp_path / "parts", short) == 143:
        sessions += 1
    assert sessions == 1 + 3 * 2
    for name in ("log.jsonl", "summary.json"):
        one, two = (tmp_path / part / "dg/x/seed-0" / name for part in ("whole", "parts"))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--domains.styles plain edges", "leaves out two domains, and there are 2"),
        ("--method domain-experts --method.experts 2", "also trains on 1 source"),
    ],
)
def test_what_cannot_be_selected_so(
    extra: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, extra) == 2
    assert words in error_line(capsys.readouterr().err)


def test_a_search_chooses_settings_as_the_run_selects(tmp_path: Path) -> None:
    config = search.Config(command="dg", space=("lr: 1e-3 1e-2",), runs_dir=tmp_path)
    flags = SMALL.replace("--name x ", "").split()
    own = search.Search(config, flags, read_space(config.space), Local(1))
    assert own.about.startswith("dg --space 'lr: 1e-3 1e-2' --metric selection_accuracy --")
    (job,) = own.plan({"lr": "1e-3"}, "")
    job.folder.mkdir(parents=True)
    curve = [point(1, 0.1, 0.9), point(2, 0.8, 0.9)]
    tests = [{"domain": "a", "curve": curve, "held_out": {"b": [by, 0]}} for by in (0.25, 0.75)]
    for selection, value in (("held-out-domain", 0.5), ("training-domain", 0.8), ("oracle", 0.9)):
        text = json.dumps({"selection": selection, "tests": tests})
        (job.folder / "summary.json").write_text(text)
        assert own.value([job]) == pytest.approx(value)
    chosen = search.Search(replace(config, metric="accuracy"), [], own.space, Local(1))
    assert chosen.metric == "accuracy"
    assert search.Search(replace(config, command="cl"), [], own.space, Local(1)).metric == ""
