"""`dynmoe doctor`: what it says of packages, data and folders that lack something."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe import doctor, registry
from dynmoe.doctor import Requirement, check_packages, examine, requirements
from dynmoe.doctor_data import PLACES, data_checks

CLASSES = {"PACS": "pacs", "VLCS": "vlcs", "OfficeHome": "office-home", "DomainNet": "domain-net",
           "TerraIncognita": "terra-incognita"}  # fmt: skip


def found(*needed: Requirement, imports: bool = False) -> dict[str, str]:
    """State by the beginning of the text."""
    return {f.text: f.state for f in check_packages(list(needed), imports)}


def test_here_nothing_stops_the_default_commands(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    doctor.main(["--data-dir", str(tmp_path / "none"), "--runs-dir", str(tmp_path / "a" / "runs")])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[:-2]} == {"ok", "note"}
    assert lines[-1].startswith("ready: no problem")
    assert sum("torch" in line for line in lines) >= 2 and any("GB free" in x for x in lines)
    assert not list(tmp_path.iterdir())  # it leaves nothing behind


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--runs-dir", str(tmp_path / "file" / "runs")])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "problem  runs cannot be written to" in out and out.endswith("first (see above)\n")


def test_what_an_extra_lacks_is_said_with_the_line_that_installs_it():
    [(text, state)] = found(Requirement("rl", "nowhere-a", ""), Requirement("rl", "numpy", "1"
                                                                            )).items()  # fmt: skip
    assert state == "note" and text.startswith("rl: nowhere-a not installed")
    assert text.endswith("pip install 'dynmoe[rl]'")
    assert list(found(Requirement("lab", "nowhere-a", "")).values()) == ["problem"]
    assert found(Requirement("", "nowhere-a", "2")) == {
        "nowhere-a is not installed; pip install 'nowhere-a>=2'": "problem"
    }
    [(text, state)] = found(Requirement("tta", "numpy", "999.1")).items()
    assert state == "problem" and "too old (999.1" in text
    assert set(found(Requirement("tta", "numpy", "1.26")).values()) == {"ok"}


def test_a_package_whose_import_raises_is_a_problem(tmp_path: Path, monkeypatch):
    info = tmp_path / "broken_here-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_here\nVersion: 1.0\n")
    (tmp_path / "broken_here.py").write_text("raise RuntimeError('operator is not there')")
    monkeypatch.syspath_prepend(tmp_path)
    needed = Requirement("cl", "broken_here", "1")
    assert set(found(needed).values()) == {"ok"}  # it is there; not imported
    [(text, state)] = found(needed, imports=True).items()
    assert state == "problem" and "cannot be imported (operator is not there)" in text
    assert set(found(Requirement("", "broken_here", "1")).values()) == {"problem"}


def test_a_check_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch):
    def broken() -> list[Requirement]:
        raise ValueError("no table")

    monkeypatch.setattr(doctor, "requirements", broken)
    findings = list(examine(tmp_path, tmp_path))
    assert [f.text for f in findings if f.state == "problem"] == ["a check failed: no table"]
    assert any("runs can be written" in f.text for f in findings)


def test_it_needs_python_alone(tmp_path: Path):
    """Without torch, numpy and tyro it still ends with its list."""
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'tyro', 'rich'): sys.modules[name] = None\n"
        "from dynmoe.commands import main\n"
        f"sys.argv = ['dynmoe', 'doctor', '--runs-dir', {str(tmp_path)!r}]\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == ""
    assert re.search(r"^problem  torch .* cannot be imported .*; pip install", done.stdout, re.M)
    assert "CPU cores" in done.stdout and "runs can be written" in done.stdout


def test_requirements_are_those_of_the_project():
    needed = {(one.extra, one.package): one.minimum for one in requirements()}
    assert needed["", "torch"] and needed["rl", "jax"] and needed["lab", "tyro"]
    assert {extra for extra, _ in needed} == {"", *doctor.EXTRAS}


def test_installed_without_a_checkout_and_a_folder_that_hides_ours(tmp_path: Path, monkeypatch):
    """Requirements come from what was installed; ours elsewhere than beside dynmoe is told."""
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    needed = {(one.extra, one.package): one.minimum for one in requirements()}
    assert needed["", "torch"] and needed["rl", "jax"] and needed["cl", "avalanche-lib"]
    first, *others = doctor.check_python()
    assert first.state == "ok" and [f.state for f in others] == ["problem"] * len(doctor.TOP)
    assert "hides dynmoe's own package agents; rename it" in others[1].text


def test_data_that_are_there_and_data_that_lack_something(tmp_path: Path):
    for name in ("train", "val"):
        (tmp_path / "tiny-imagenet-200" / name).mkdir(parents=True)
    (tmp_path / "tiny-imagenet-200" / "wnids.txt").touch()
    (tmp_path / "PACS" / "photo").mkdir(parents=True)
    (tmp_path / "elec2").mkdir()
    for name in ("elec2_label.dat", "elec2_data.dat"):
        (tmp_path / "elec2" / name).touch()
    lines = list(data_checks(tmp_path))
    assert [state for state, _ in lines] == ["ok", "note", "ok", "note"]
    assert "--dataset tiny-imagenet --dataset.data-dir" in lines[0][1]
    assert "lacks art_painting, cartoon, sketch" in lines[1][1]
    assert f"--dataset.file {tmp_path / 'elec2' / 'elec2_data.dat'}" in lines[2][1]
    assert "CIFAR-100 (cifar-100-python)" in lines[3][1] and "PACS" not in lines[3][1]


def test_places_are_those_that_the_commands_read():
    for place in PLACES:
        if place.name in CLASSES:
            part = registry.get("domains", CLASSES[place.name])
            assert place.folders == (part.folder,) and place.inside == part.domains
            assert f"--domains {part.name} " in place.use
        elif "--dataset " in place.use:
            assert place.use.split("--dataset ")[1].split()[0] in registry.names("dataset")
