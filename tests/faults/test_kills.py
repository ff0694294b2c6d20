"""Every command, and sweeps under every launcher, killed at random moments and started again.

    KILLS=300 pytest -n 0 -m slow -s tests/faults/test_kills.py

Each kill is SIGKILL to a process of its own, anywhere from its start to its end: while it reads
data, in a step, a save, a growth, or the last figures. In a sweep it is the sweep itself or the
process of one of its runs. After every third kill the newest checkpoint of a run that stands still
is cut off or has one bit turned, where there is one before it. Then the command is started again.
In the end all must be as if nothing had happened, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from kill_harness import Count, Player, World, forks, moment, table

KILLS = int(os.environ.get("KILLS", "21"))
SEED = int(os.environ.get("SEED", "0"))
CL = (
    "--preset smoke --compare --chunks 3 --epochs 6 --eval-samples 60 --probe-samples 40 "
    "--network.width 24 --network.hidden 48 --protocol.images 150 --trigger every "
    "--trigger.steps 10 --budget.mode per-growth --checkpoint-every-s 0 --resume --name x"
)
"""54 steps with growths within tasks, and a checkpoint after each step."""
RL = (
    "--preset smoke --encoder.hidden 16 --encoder.widths 16 --num-envs 4 --rollout-steps 16 "
    "--total-steps 512 --minibatches 2 --epochs 2 --probe-every 3 --probe-samples 32 "
    "--checkpoint-every-s 0 --trigger every --trigger.steps 150 --granularity 2"
)
"""8 updates with 2 growths, and a checkpoint after each."""
TTA = (
    "--preset smoke --limit 3 --lr-scale 30 --window 2 --name x --checkpoint-every-s 0 "
    "--routing-batches 2 --compare eata --method.grow every --method.grow-wait 2 "
    "--method.max-experts 12 --allow-unused"
)
"""Two methods of 4 batches each, and a checkpoint after each."""
DG = (
    "--preset smoke --compare --checkpoint-every-s 0 --name x --steps 6 --eval-every 3 "
    "--test-domains plain edges --granularity 1 --trigger.steps 2 --method.experts 1 "
    "--method.max-experts 3"
)
"""Two domains left out, 6 steps each with growths, and a checkpoint after each."""
SWEEP = "rl --name s --seeds 2 --jobs 2 --grid granularity:2"
RUNS = RL.removesuffix(" --granularity 2")
WORLDS = [
    World("cl", "dynmoe.cl", CL, 0.24),
    World("rl", "dynmoe.rl", f"{RL} --resume --name x", 0.24),
    World("tta", "dynmoe.tta.__main__", TTA, 0.17),
    World("dg", "dynmoe.dg.__main__", DG, 0.17),
    World("sweep, local", "dynmoe.sweep", f"{SWEEP} -- {RUNS}", 0.06, sweep=True),
    World("sweep, submitit", "dynmoe.sweep",
          f"{SWEEP} --launcher submitit --cluster local -- {RUNS}", 0.06, sweep=True),
    World("sweep, ray", "dynmoe.sweep", f"{SWEEP} --launcher ray -- {RUNS}", 0.06, sweep=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def processes() -> Any:
    return forks()


@pytest.fixture(scope="module")
def counts() -> Iterator[dict[str, Count]]:
    found: dict[str, Count] = {}
    yield found
    print(f"\n{table(found)}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name.replace(", ", "-"))
def test_it_ends_as_if_it_had_not_been_killed(
    world: World, tmp_path: Path, processes: Any, counts: dict[str, Count]
) -> None:
    engine = world.name.split()[-1]
    if world.sweep and engine != "local" and find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    player = Player(world, processes, tmp_path, round(world.share * KILLS), SEED)
    counts[world.name] = player.count
    count = player.play()
    assert not count.faults, count.faults


def test_the_shares_of_kills_make_a_whole() -> None:
    assert sum(world.share for world in WORLDS) == pytest.approx(1)
    assert sum(round(world.share * 300) for world in WORLDS) == 300


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        ([], "start"),
        ([("lab/report.py", "run_all"), ("lab/run.py", "_open")], "start"),
        ([("lab/runner.py", "run_one"), ("cl_benchmarks/experiment.py", "work")], "step"),
        ([("agents/x.py", "work"), ("dynmoe/growth/surgery.py", "grow")], "growth"),
        ([("agents/x.py", "work"), ("lab/checkpoint.py", "save")], "save"),
        ([("lab/runner.py", "run_one"), ("lab/run.py", "finish")], "end"),
        ([("lab/study.py", "run_study"), ("lab/launchers.py", "launch")], "between"),
    ],
)
def test_a_trace_tells_the_moment(called: list[tuple[str, str]], expected: str) -> None:
    """Innermost call first, as in a trace."""
    lines = [f'  File "/x/{file}", line 7 in {name}' for file, name in reversed(called)]
    assert moment("\n".join(["Current thread 0x7f (most recent call first):", *lines])) == expected
