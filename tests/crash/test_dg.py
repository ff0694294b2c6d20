"""`python -m dynmoe.dg`: its command line, its runs stopped and resumed, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash_helpers import assert_same, error_line, exit_code, last_checkpoint
from PIL import Image
from torch import Tensor

from cl_benchmarks.domain_set import split
from dynmoe.dg import __main__ as dg
from dynmoe.dg.methods.moe2 import MoE2
from dynmoe.experiments.dg.fold import Fold
from dynmoe.experiments.dg.source import load_source
from dynmoe.lab.experiment import logged

SMALL = "--preset smoke --compare --checkpoint-every-s 0 --name x --features 5"
SHORT = "--steps 3 --eval-every 2 --test-domains plain edges"
CASES = {
    "moe2": SHORT,
    "growth": f"{SHORT} --granularity 1 --trigger.steps 1 --method.experts 1 "
    "--method.max-experts 3",
    "deltas, augmented": f"{SHORT} --method.synthesis deltas --augment",
    "prototypes": f"{SHORT} --method.prototypes kmeans --method.centre --headroom "
    "--method.temperature-start 0.05",
    "swad": "--method swad --test-domains edges --steps 3 --eval-every 1 --method.patience 1",
    "erm": "--method erm --test-domains edges --steps 3 --weight-decay 0.1",
}
GROWTH = CASES["growth"]


def command(runs: Path, extra: str = "") -> int:
    return exit_code(dg.main, f"{SMALL} {extra} --runs-dir {runs}".split())


def folder(runs: Path) -> Path:
    return runs / "dg" / "x" / "seed-0"


def summary(runs: Path) -> Any:
    return json.loads((folder(runs) / "summary.json").read_text())


def _stop_in(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let SIGTERM arrive each time before this method of a fold."""
    original: Callable[[Fold], Any] = getattr(Fold, name)

    def signalled(self: Fold) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Fold, name, signalled)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("case", "moment"), [("moe2", "row"), *((case, "_train_step") for case in CASES)]
)
def test_stopped_and_resumed_at_every_step(
    case: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(tmp_path / "whole", CASES[case]) == 0
    _stop_in(monkeypatch, moment)
    sessions = 1
    while (code := command(tmp_path / "parts", CASES[case])) != 0:
        assert code == 143
        sessions += 1
    rows = summary(tmp_path / "whole")["tests"]
    assert sessions == 1 + len(rows) * (1 if moment == "row" else rows[0]["curve"][-1]["step"])
    one, two = folder(tmp_path / "whole"), folder(tmp_path / "parts")
    for name in ("log.jsonl", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    last = [last_checkpoint(f) for f in (one, two)]
    if moment == "_train_step":
        assert_same(last[0], last[1])
    with np.load(one / "figures.npz") as a, np.load(two / "figures.npz") as b:
        assert a.files == b.files and "features" in a.files
        for name in a.files:
            assert np.array_equal(a[name], b[name]), name


@pytest.mark.thin(1)
@pytest.mark.parametrize("checkpoints", [1, 3])
def test_killed_amid_training_it_ends_as_the_one_never_stopped(
    checkpoints: int, tmp_path: Path
) -> None:
    assert command(tmp_path / "whole", GROWTH) == 0
    argv = f"{SMALL} {GROWTH} --runs-dir {tmp_path / 'parts'}".split()
    process = subprocess.Popen([sys.executable, "-m", "dynmoe.dg", *argv])
    seen: set[str] = set()
    began = time.monotonic()
    while len(seen) < checkpoints:
        assert process.poll() is None and time.monotonic() - began < 240
        seen |= {path.name for path in (tmp_path / "parts").rglob("*.pt")}
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert command(tmp_path / "parts", GROWTH) == 0
    for name in ("log.jsonl", "summary.json"):
        one, two = (folder(tmp_path / part) / name for part in ("whole", "parts"))
        assert one.read_bytes() == two.read_bytes(), name
    assert not list((tmp_path / "parts").rglob(".*.tmp"))


def test_what_a_comparison_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"--preset smoke --seeds 2 --landscape 3 --name y --runs-dir {tmp_path}".split()
    assert exit_code(dg.main, argv) == 0
    out = capsys.readouterr().out
    for word in ("moe2", "linear-probe", "plain", "coloured", "edges", "±", "trainable"):
        assert word in out
    report = tmp_path / "dg" / "y" / "report"
    assert {path.name for path in report.iterdir()} == {
        "results.json", "comparison.png", "routing_moe2.png",
        *(f"{k}_{m}.png" for k in ("features", "landscape", "landscape_principal")
          for m in ("moe2", "linear-probe")),
    }  # fmt: skip
    results = json.loads((report / "results.json").read_text())
    methods = results["streams"][""]
    assert results["seeds"] == 2 and list(methods) == ["moe2", "linear-probe"]
    for seed in (0, 1):
        one = json.loads((tmp_path / "dg" / "y" / f"seed-{seed}" / "summary.json").read_text())
        for row in one["tests"]:
            values = methods["moe2"]["domains"][row["domain"]]
            assert values[seed] == row["accuracy"]
            best = max(row["curve"], key=lambda p: p["validation"])
            assert row["accuracy"] == best["in"][row["domain"]]
            assert row["oracle_accuracy"] == row["curve"][-1]["in"][row["domain"]]
            assert set(best["out"]) == {"plain", "coloured", "edges"}
            assert row["ece"] == best["ece"] and 0 <= row["adaptive_ece"] <= 1
            measures = row["measures"]
            assert -1e-6 < measures["kl"] < 0.1 and 0 <= measures["agreement"] <= 1
            sources = set(best["out"]) - {row["domain"]}
            assert best["validation"] == pytest.approx(sum(best["out"][s] for s in sources) / 2)
    argv_again = [*argv, "--jobs", "2"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("summary.json")}
    assert exit_code(dg.main, argv_again) == 0  # reads what is there
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("summary.json")}


def test_the_departure_is_taken_on_held_out_images_of_the_left_out_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    original = MoE2.measures

    def noted(self: MoE2, images: Tensor, labels: Tensor) -> dict[str, float]:
        seen.append((images, labels))
        return original(self, images, labels)

    monkeypatch.setattr(MoE2, "measures", noted)
    assert command(tmp_path, SHORT) == 0
    source = load_source(dg.presets()["smoke"])
    assert source.data.names[:2] == ["plain", "coloured"] and len(seen) == 2
    for (images, labels), name in zip(seen, ("plain", "edges"), strict=True):
        number = source.data.names.index(name)
        domain, held = source.data.domains[number], split(30, 0, number)[1]
        assert torch.equal(images, source.prepare.batch(domain, held))
        assert torch.equal(labels, domain.labels[held])


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    extra = "--seeds 2 --method linear-probe"
    assert command(tmp_path / "one", extra) == 0
    assert command(tmp_path / "two", f"{extra} --jobs 2") == 0
    for seed in (0, 1):
        one, two = (tmp_path / n / "dg" / "x" / f"seed-{seed}" for n in ("one", "two"))
        assert (one / "log.jsonl").read_bytes() == (two / "log.jsonl").read_bytes()
        assert (one / "summary.json").read_bytes() == (two / "summary.json").read_bytes()


def test_outer_experts_grow(tmp_path: Path) -> None:
    assert command(tmp_path, GROWTH) == 0
    for row in summary(tmp_path)["tests"]:
        assert [event["experts"] for event in row["growth"]] == [2, 3]
        assert [event["step"] for event in row["growth"]] == [1, 2]
        assert [event["experts_before"] for event in row["growth"]] == [1, 2]
    with np.load(folder(tmp_path) / "figures.npz") as arrays:
        gates = arrays["gates"]
    assert gates.shape == (3, 3) and np.allclose(gates.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("init", ["zero-output", "random"])
def test_the_shock_of_a_growth_is_measured_and_logged(init: str, tmp_path: Path) -> None:
    """On held-out images of the sources; new sets that are silent change nothing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    extra = f"--method.synthesis deltas --method.init-noise 0.1 --test-domains edges --init {init}"
    assert command(tmp_path, f"{GROWTH} {extra}") == 0
    events = summary(tmp_path)["tests"][0]["growth"]
    board = EventAccumulator(str(folder(tmp_path)))
    board.Reload()
    assert [e.value for e in board.Scalars("2 growth/experts, edges")] == [1, 2, 2, 3]
    for place, event in enumerate(events):
        shock = event["shock"]
        assert 0 <= shock["accuracy_before"] <= 1 and shock["loss_before"] > 0
        silent = shock["output_change"] < 1e-4
        assert silent == (abs(shock["loss_after"] - shock["loss_before"]) < 1e-5)
        assert silent == (init == "zero-output")
        lines = logged(folder(tmp_path), "edges/growth/loss_after")
        assert lines[place] == shock["loss_after"]
        for key in ("output_change", "loss_before", "loss_after"):
            name = key.replace("output_change", "change of the output").replace("_", " ")
            point = board.Scalars(f"2 growth/{name}, edges")[place]
            assert (point.step, point.value) == (event["step"], pytest.approx(shock[key], rel=1e-5))


def test_the_probe_is_held_out_and_of_the_sources_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Fold] = []
    original = Fold.row
    monkeypatch.setattr(Fold, "row", lambda self: seen.append(self) or original(self))
    assert command(tmp_path, f"{GROWTH} --test-domains coloured") == 0
    (fold,) = seen
    images, labels = fold._probe()
    trial = fold.trial
    assert trial.source.data.names[fold.test] == "coloured" and fold.sources == [0, 2]
    expected = [
        (trial.source.data.domains[n], index) for n in (0, 2) for index in trial.splits[n][1]
    ]
    assert len(images) == len(labels) == len(expected) == 12
    for image, label, (domain, index) in zip(images, labels, expected, strict=True):
        assert image.equal(trial.source.prepare.batch(domain, index[None])[0])
        assert int(label) == int(domain.labels[index])


def test_the_plateau_is_one_of_validation_accuracy(tmp_path: Path) -> None:
    extra = (
        "--method.experts 1 --method.max-experts 2 --granularity 1 --trigger plateau "
        "--trigger.patience 1 --trigger.gain 9 --test-domains edges"
    )
    assert command(tmp_path, extra) == 0
    (event,) = summary(tmp_path)["tests"][0]["growth"]
    assert event["step"] == 4  # first seen at 3, and one step without a gain


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_name_that_another_setting_has(
    jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = "--method linear-probe --seeds 2"
    assert command(tmp_path, extra) == 0
    assert command(tmp_path, f"{extra} --lr 0.5 --jobs {jobs}") == 2
    assert "other settings (lr: 0.002 -> 0.5)" in error_line(capsys.readouterr().err)


BAD = {
    "--steps 0": "--steps 0 is too small; use 1 or more",
    "--lr nan": "--lr nan is no finite number",
    "--method moe3": "unknown method of dg 'moe3'.*Did you mean 'moe2'",
    "--compare moa moa": "--compare names moa twice",
    "--compare mao": "unknown method of dg 'mao'",
    "--test-domains edge": "unknown domain 'edge'.*Did you mean 'edges'",
    "--model vit_tiny_patch16_224": "needs weights: --weights FILE, or --pretrained",
    "--pretrained": "are for timm's models",
    "--vit.heads 5": "heads 5 does not divide",
    "--domains pacs": "pacs not found",
    "--domains pacs --method.experts 0": "pacs not found",
    "--method swad --steps 8 --eval-every 4": "swad needs 3 evaluations, and .* have 2; .*every 1",
    "--method swad --steps 2 --eval-every 1": "have 2; use --steps 3 or more",
    "--method erm --granularity 1": "erm has no experts that can grow; use --method moe2",
    "--granularity 1 --trigger.steps 2": "2 growths of 1 end with 7 experts.*max-experts 7",
    "--lr 1e30": "loss of moe2 is .* use a smaller --lr",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert command(tmp_path, flags) in (2, 3)
    assert re.search(BAD[flags], error_line(capsys.readouterr().err))


def images(root: Path) -> Path:
    """A set of files: 3 domains, 2 classes told by their colour."""
    for d, light in enumerate((60, 120, 240)):
        for c, name in enumerate("ab"):
            place = root / f"domain{d}" / name
            place.mkdir(parents=True)
            for i in range(6):
                pixels = np.zeros((20, 24, 3), np.uint8)
                pixels[..., c] = light - i
                Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def test_files_are_trained_on(tmp_path: Path) -> None:
    data = images(tmp_path / "data")
    extra = f"--domains folder --domains.data-dir {data} --method linear-probe --augment"
    assert command(tmp_path / "runs", extra) == 0
    found = summary(tmp_path / "runs")
    assert found["dataset"] == "data" and len(found["tests"]) == 3


def test_a_backbone_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm's name, weights from a file: image size and normalisation are timm's for that name."""
    import timm
    import torch

    weights = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), weights)
    data = images(tmp_path / "data")
    extra = (
        f"--domains folder --domains.data-dir {data} --method linear-probe --steps 2 "
        f"--batch-size 2 --test-domains domain1 --model vit_tiny_patch16_224 --weights {weights}"
    )
    assert command(tmp_path / "runs", extra) == 0
    found = summary(tmp_path / "runs")
    assert found["tests"][0]["trainable"] == 2 * 193 and found["model"] == "vit_tiny_patch16_224"
    capsys.readouterr()
    assert command(tmp_path / "more", f"{extra}x") == 2
    assert "vit.pthx" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "domain1" / "a" / "0.png").write_bytes(b"x"), "cannot read image .*0.png"),
        (lambda d: (d / "helper").mkdir(), "class lists differ in .*: domain0 has 'a' and helper"),
        (lambda d: (d / "domain2" / "c").mkdir(), "class lists differ"),
        (lambda d: [shutil.rmtree(d / f"domain{i}" / "b") for i in range(3)], "has 1 class, a"),
        (lambda d: [p.unlink() for c, n in (("a", 2), ("b", 1))
            for p in sorted((d / "domain1" / c).iterdir())[n:]],
         "domain1 has 3 image.*takes 5 or more"),
    ],
)  # fmt: skip
def test_spoilt_files(
    spoil: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    data = images(tmp_path / "data")
    spoil(data)
    extra = f"--domains folder --domains.data-dir {data} --method linear-probe"
    assert command(tmp_path / "runs", extra) == 2
    assert re.search(message, error_line(capsys.readouterr().err))


def test_a_helper_folder_among_the_domains_of_a_known_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data" / "PACS"
    for domain in ("art_painting", "cartoon", "photo", "sketch", "tools"):
        (data / domain / "dog").mkdir(parents=True)
    assert command(tmp_path, f"--domains pacs --domains.data-dir {data.parent}") == 2
    line = error_line(capsys.readouterr().err)
    assert f"{data / 'tools'} is no domain of pacs" in line and f"move it out of {data}" in line


def test_weights_and_models_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    import torch

    data = images(tmp_path / "data")
    state = timm.create_model("test_vit").state_dict()
    state["blocks.0.attn.qkv.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "shape.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for model, file, message in (
        ("test_vit", "shape.pth", "shape.pth cannot be loaded into test_vit: "),
        ("test_vit", "resnet.pth", "resnet.pth cannot be loaded into test_vit: they lack "),
        ("test_vit", "text.pth", "text.pth cannot be loaded into test_vit: "),
        ("test_resnet", "resnet.pth", "backbone ResNet has no blocks; it must be a vision transf"),
        ("vit_tny", "shape.pth", "timm has no model 'vit_tny'"),
    ):
        place = f"--domains folder --domains.data-dir {data}"
        assert command(tmp_path, f"{place} --model {model} --weights {tmp_path / file}") == 2
        assert message in error_line(capsys.readouterr().err)
    assert not (tmp_path / "dg").exists()  # told before any run began


def test_help_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(dg.main, ["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for word in ("--test-domains", "--method", "(moe2)", "--domains", "(embedded)", "Cost:"):
        assert word in out
