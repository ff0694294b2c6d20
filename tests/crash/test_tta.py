"""`python -m dynmoe.tta`: stopped at any batch it ends as the whole run; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crash_helpers import assert_same, error_line, exit_code, last_checkpoint, stop_at

from dynmoe.tta.__main__ import main
from dynmoe.tta.measures import Tally

SMALL = "--preset smoke --limit 4 --lr-scale 30 --window 2 --name x --allow-unused"
"""76 images of 19 domains: 5 batches."""
CASES = {
    "moetta": "",
    "growing": "--method.grow every --method.grow-wait 2 --method.max-experts 12",
    **{name: f"--method {name}" for name in (
        "noadapt", "tent", "eata", "sar", "deyo", "cotta", "becotta",
    )},
}  # fmt: skip


def _run(runs: Path, flags: str) -> int:
    alone = "" if "--compare" in flags else "--compare"
    return exit_code(main, f"{SMALL} {alone} --runs-dir {runs} {flags}".split())


def _folder(runs: Path) -> Path:
    (folder,) = (runs / "tta").glob("x-*/seed-0")
    return folder


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.thin(2)
@pytest.mark.parametrize("case", CASES)
def test_stopped_after_every_batch(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, whole, parts = (
        f"{CASES[case]} --clean-every 2 --clean-images 5",
        tmp_path / "whole",
        tmp_path / "parts",
    )
    assert _run(whole, f"{flags} --checkpoint-every-s 0") == 0
    stop_at(monkeypatch, Tally, "add")
    sessions = 1
    while (code := _run(parts, f"{flags} --resume")) != 0:
        assert code == 143
        sessions += 1
    assert sessions == 6
    one, two = _folder(whole), _folder(parts)
    for name in ("log.jsonl", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    states = [last_checkpoint(folder) for folder in (one, two)]
    assert states[0] is not None and states[0]["state"]["batch"] == 5
    assert_same(states[0], states[1])
    assert not (parts / "tta" / "x" / "results.json").exists()  # one run compares nothing


def test_what_a_comparison_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--streams clean classical --seeds 2 --compare noadapt moetta:balance_weight=0"
    assert exit_code(main, f"{SMALL} --runs-dir {tmp_path} {flags}".split()) == 0
    folder = tmp_path / "tta" / "x"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["streams"]) == ["clean", "classical"]
    methods = results["streams"]["classical"]
    assert list(methods) == ["moetta", "noadapt", "moetta:balance_weight=0"]
    runs = {
        name: [_summary(folder.parent / entry["runs"] / f"seed-{seed}") for seed in (0, 1)]
        for name, entry in methods.items()
    }
    accuracies = [run["accuracy"] for run in runs["noadapt"]]
    shown = methods["noadapt"]["accuracy_mean"][0]
    assert shown == pytest.approx(sum(accuracies) / 2, abs=1e-4)
    domains = runs["noadapt"][0]["domains"]
    assert len(domains) == 15 and sum(d["images"] for d in domains.values()) == 60
    mean = sum(d["accuracy"] * d["images"] for d in domains.values()) / 60
    assert accuracies[0] == pytest.approx(mean)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    history = runs["moetta"][0]["history"]
    assert len(history) == 2 and 0 <= history[0]["balance"] <= 1
    assert len(history[0]["similarity"]) == 4  # 2 blocks of 2 norms and the last, less the first
    out = capsys.readouterr().out
    assert "classical" in out and "balance_weight=0" in out and "minus" in out
    before = (folder / "results.json").read_bytes()
    assert exit_code(main, f"{SMALL} --runs-dir {tmp_path} {flags}".split()) == 0  # reads
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    flags = "--streams clean classical --seeds 2 --compare deyo --routing-batches 2"
    results = {}
    for jobs in (1, 2):
        argv = f"{SMALL} --runs-dir {tmp_path / str(jobs)} {flags} --jobs {jobs}".split()
        assert exit_code(main, argv) == 0
        results[jobs] = (tmp_path / str(jobs) / "tta" / "x" / "results.json").read_bytes()
    assert results[1] == results[2]
    one = sorted((tmp_path / "1").rglob("seed-*"))
    two = sorted((tmp_path / "2").rglob("seed-*"))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        for name in ("log.jsonl", "summary.json"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
        assert (b / "output.txt").is_file()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_name_that_another_setting_has(
    jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, "--seeds 2 --method tent --gates 0") == 0
    assert _run(tmp_path, f"--seeds 2 --method tent --gates 0 --method.lr 0.1 --jobs {jobs}") == 2
    assert "other settings (method.lr: 0.0005 -> 0.1)" in error_line(capsys.readouterr().err)


def test_the_routing_is_compared_without_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the last batches, at the final weights; the adapted run is bit for bit the same."""
    monkeypatch.setenv("COLUMNS", "160")  # so that tables have one line a row
    seen, states, logs = {}, {}, {}
    for batches in (0, 2):
        assert _run(tmp_path / str(batches), f"--routing-batches {batches} "
                    "--compare tent --checkpoint-every-s 0 --gates 0") == 0  # fmt: skip
        (folder,) = (tmp_path / str(batches) / "tta").glob("x-moetta-*/seed-0")
        seen[batches] = json.loads((folder / "summary.json").read_text())
        states[batches] = last_checkpoint(folder)
        logs[batches] = (folder / "log.jsonl").read_bytes()
        assert ("learned - random" in capsys.readouterr().out) == (batches > 0)
    assert seen[0].pop("routings") == {} and logs[0] == logs[2]
    routings = seen[2].pop("routings")
    assert seen[0] == seen[2]
    assert_same(states[0], states[2])
    assert set(routings) == {"learned", "random", "most_loaded", "best", "by_domain", "by_image"}
    assert all((row["accuracy"] * 28) % 1 == 0 for row in routings.values())  # 16 and 12 images
    assert 0 <= routings["best"]["expert"] < 9
    (other,) = (tmp_path / "2" / "tta").glob("x-tent-*/seed-0")
    assert _summary(other)["routings"] == {}


@pytest.mark.parametrize(
    "variant", ["mgtta", "deyo:grid=0", "moetta:keep=9", "tent:lr=0", "sar:rho=-1"]
)
def test_a_method_that_cannot_run_is_told_before_any_run(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, f"--compare noadapt {variant}") == 2
    assert variant.split(":")[0] in error_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--streams clasical", "did you mean 'classical'"),
        ("--streams clean clean", "each named once"),
        ("--streams validation", "imagenet"),
        ("--compare tent tent", "named twice"),
        ("--compare moetta", "named twice"),
        ("--compare tend", "did you mean 'tent'"),
        ("--compare tent:rl=1", "unknown option of tent 'rl'"),
        ("--compare tent:lr", "name:option=value"),
        ("--severity 6", "severity 6"),
        ("--seeds 0", "--seeds 0"),
        ("--jobs 0", "--jobs 0"),
        ("--routing-batches -1", "--routing-batches -1"),
        ("--batch-size 0", "--batch-size 0"),
        ("--lr-scale nan", "--lr-scale nan"),
        ("--limit 0", "limit 0"),
        ("--labels subset", "--data imagenet"),
        ("--vit.patch 5", "vit patch 5"),
        ("--vit.heads 3", "vit heads 3"),
        ("--embedded.classes 1", "classes 1"),
        ("--data imagenet", "--data-dir"),
        ("--data imagenet --data-dir /nowhere", "is not there"),
        ("--data imagenet --data-dir .", "--pretrained or --weights"),
        ("--data imagenet --data-dir . --weights gone.pth", "no weights file gone.pth"),
        ("--data imagenet --data-dir . --labels subset --streams clean", "rendition or adv"),
        ("--data imagenet --data-dir . --weights pyproject.toml --model tiny", "'tiny' cannot be"),
    ],
)
def test_bad_input_is_one_line(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    assert _run(tmp_path, flags) == 2
    assert message in error_line(capsys.readouterr().err).lower()


def test_the_gates_are_told_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--streams classical --compare tent tent:im=1 --gates 6 --clean-every 1"
    assert exit_code(main, f"{SMALL} --runs-dir {tmp_path} {flags}".split()) == 0
    out = capsys.readouterr().out
    for label in ("tent", "tent:im=1"):
        assert f"classical, {label}: gate 1 " in out and "whether experts help." in out
    folder = tmp_path / "tta" / "x"
    gates = json.loads((folder / "gates.json").read_text())["classical"]
    assert set(gates) == {"tent", "tent:im=1"} and len(gates["tent"]["domains"]) == 15
    fog = gates["tent"]["domains"]["fog"]
    assert fog["cosine_own"] == fog["cosine_entropy"] != fog["cosine_information"]
    assert gates["tent:im=1"]["domains"]["fog"]["cosine_own"] == pytest.approx(
        fog["cosine_information"]
    )
    assert [batch for batch, _ in gates["tent"]["along"]] == [1, 2, 3, 4]
    entries = json.loads((folder / "results.json").read_text())["streams"]["classical"]
    assert entries["tent"]["gate_gain"][0] == pytest.approx(
        sum(row["routed"] - row["shared"] for row in gates["tent"]["domains"].values()) / 15,
        abs=1e-3,
    )
    assert "gate_gain" not in entries["moetta"] and "held_out_last" in entries["moetta"]
    assert entries["moetta"]["options"] == {"num_experts": 9, "balance_weight": 0.2}
