"""Launchers, each on real processes: how work ends, is killed, pre-empted, and given out again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dynmoe.errors import ResourceError, UserError
from dynmoe.lab import launchers
from dynmoe.lab.engines import Ray, Where
from dynmoe.lab.launchers import Failure, Launcher, Local
from dynmoe.lab.slurm import Submitit

Item = tuple[Path, str]
PRE_EMPTED = {
    "near its limit": signal.SIGUSR2, "told to": signal.SIGUSR1, "pre-empted": signal.SIGTERM,
}  # fmt: skip


def work(item: Item) -> Failure | None:
    """What a name asks for, at the first attempt; each attempt adds a line to a file."""
    folder, name = item
    path = folder / name
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    first = len(path.read_text().splitlines()) == 1
    if name == "killed" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if name in PRE_EMPTED and first:
        told: list[int] = []
        handler = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
        os.kill(os.getpid(), PRE_EMPTED[name])  # as a run, which saves at its next step
        signal.signal(signal.SIGTERM, handler)
        return Failure("saved" if told else "not told to save", 143)
    while name.startswith("long") and not (folder / "lost").exists():
        time.sleep(0.05)
    return Failure("bad", 3) if name == "bad" else None


def outcomes(launcher: Launcher, folder: Path, *names: str) -> dict[str, int | None]:
    """Name -> exit code."""
    ended = launcher.launch(work, [(folder, name) for name in names])
    return {name: failure and failure.exit_code for (_, name), failure in ended}


def attempts(folder: Path, name: str) -> int:
    return len((folder / name).read_text().splitlines())


@pytest.fixture
def found_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes find this file and our packages."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def test_a_killed_process_costs_its_own_run_alone(tmp_path: Path) -> None:
    found = outcomes(Local(2), tmp_path, "killed", "a", "bad", "b")
    assert found == {"killed": 4, "a": None, "bad": 3, "b": None}
    assert all(attempts(tmp_path, name) == 1 for name in found)
    assert outcomes(Local(1), tmp_path, "killed") == {"killed": None}


def test_an_interrupt_before_the_work_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A process that still imports, here a file of own parts, prints no traceback."""
    (tmp_path / "parts.py").write_text(
        "import multiprocessing, os, signal\n"
        "if multiprocessing.parent_process() is not None:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    monkeypatch.setenv("DYNMOE_PARTS", str(tmp_path / "parts.py"))
    with pytest.raises(KeyboardInterrupt):
        outcomes(Local(1), tmp_path, "a")
    assert not (tmp_path / "a").exists() and "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("found_by_others")
def test_submitit_queues_a_run_again_that_had_to_make_room(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    launcher = Submitit(jobs=5, cluster="local", folder=tmp_path / "submitit")
    launcher.check()
    found = outcomes(launcher, tmp_path, *PRE_EMPTED, "killed", "bad")
    assert found == dict.fromkeys(PRE_EMPTED) | {"killed": 4, "bad": 3}
    assert [attempts(tmp_path, name) for name in (*PRE_EMPTED, "killed", "bad")] == [2, 2, 2, 1, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("found_by_others")
def test_ray_gives_a_run_to_another_worker(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    launcher = Ray(jobs=2)
    launcher.check()
    found = outcomes(launcher, tmp_path, "killed", "a", "bad")
    assert found == {"killed": None, "a": None, "bad": 3}
    assert attempts(tmp_path, "killed") == 2 and attempts(tmp_path, "a") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("found_by_others")
def test_ray_gives_the_run_of_a_lost_node_to_another(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Ray replaces 127.0.0.1 by the machine's own address, and leaves other loopback ones alone.
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.2", "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    names = ("long a", "long b")
    try:
        lost = cluster.add_node(**node)

        def lose() -> None:
            while not all((tmp_path / name).exists() for name in names):
                time.sleep(0.05)
            workers = [Path("/proc", (tmp_path / name).read_text().strip()) for name in names]
            cluster.remove_node(lost, allow_graceful=False)
            while all(worker.exists() for worker in workers):  # it ends soon after its node
                time.sleep(0.05)
            (tmp_path / "lost").touch()

        threading.Thread(target=lose, daemon=True).start()
        launcher = Ray(jobs=2, address=cluster.address)
        launcher.check()
        assert outcomes(launcher, tmp_path, *names) == dict.fromkeys(names)
        assert sorted(attempts(tmp_path, name) for name in names) == [1, 2]
    finally:
        cluster.shutdown()


def test_a_ray_that_does_not_start_is_tried_again_and_then_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray, calls = pytest.importorskip("ray"), []

    def init(*args: Any, **options: Any) -> None:
        calls.append(options["num_cpus"])
        raise Exception("The current node timed out during startup. This could be ...")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        ResourceError, match="Ray does not start here .*timed out.*--launcher local"
    ):
        list(Ray(jobs=2).launch(print, ["item"]))
    assert calls == [2, 2, 2]


@pytest.mark.parametrize(("name", "extra"), [("submitit", "slurm"), ("ray", "ray")])
def test_an_engine_that_is_not_installed(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda package: None)
    launcher = Where(launcher=name).make(Path("runs"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"needs {name}, .*pip install 'dynmoe\[{extra}\]'$"):
        launcher.check()


def test_a_cluster_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "find_spec", lambda package: True)
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))  # and listens to nobody
        address = f"127.0.0.1:{own.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster at --address {address} "):
            Ray(address=address).check()
    with pytest.raises(UserError, match="no Ray cluster at --address nowhere "):
        Ray(address="nowhere").check()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no SLURM here"):
        Submitit().check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": "127.0.0.1:1"}, "--address has no effect with --launcher local; .* ray$"),
        ({"launcher": "ray", "partition": "x"}, "--partition has no effect .* submitit$"),
        ({"cpus": 2}, "--cpus has no effect .* submitit or ray$"),
        ({"launcher": "ray", "cpus": 0}, "--cpus 0 is too small; use 1 or more"),
        ({"jobs": 0}, "--jobs 0 is too small"),
        ({"launcher": "submitit", "minutes": 3}, "--minutes 3 is too small; use 4 or more"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Where(**options).make(Path("runs"))
