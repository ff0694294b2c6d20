"""Make the stored runs again, after a change that is meant to change numbers:

    python tests/golden/make.py cl dg tta rl

Each is a short run that was stopped on its way: its settings, its log and one checkpoint; and of
the run that went on from there the log (`whole.jsonl`) and the summary. Say in the commit why they
change.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from contextlib import chdir, suppress
from pathlib import Path
from unittest.mock import patch

from dynmoe import cl, rl
from dynmoe.dg import __main__ as dg
from dynmoe.lab.config import run_command
from dynmoe.lab.run import Run
from dynmoe.tta import __main__ as tta

HERE = Path(__file__).parent
MAINS = {"cl": cl.main, "dg": dg.main, "tta": tta.main, "rl": rl.main}
FLAGS = {
    "cl": "--preset smoke --compare --chunks 3 --epochs 6 --eval-samples 60 --probe-samples 40 "
    "--network.width 12 --network.hidden 32 --protocol.images 150 --budget.mode per-growth",
    "dg": "--preset smoke --compare --steps 12 --eval-every 6 --features 0 --granularity 1 "
    "--trigger.steps 5 --method.experts 2 --method.max-experts 4 --test-domains plain edges",
    "tta": "--preset smoke --compare --streams classical --batch-size 4 --window 1 "
    "--method.grow every --method.grow-wait 2 --method.max-experts 12",
    "rl": "--preset smoke --compare --env CartPole-v1 --encoder mlp --encoder.widths 8 "
    "--encoder.hidden 16 --num-envs 4 --rollout-steps 16 --total-steps 1024 --trigger every "
    "--trigger.steps 256",
}
"""Command -> settings. Each run grows."""
FOLDERS = {
    "cl": "runs/cl/golden/seed-0",
    "dg": "runs/dg/golden/seed-0",
    "tta": "runs/tta/golden-moetta-classical/seed-0",
    "rl": "runs/rl/golden/seed-0",
}
STOPS = {"cl": 27, "dg": 12, "tta": 20, "rl": 8}
"""The chance to save, counted from 1, at which a run is stopped."""


def carry_out(command: str, *more: str) -> None:
    """Run a command in this process; how it ends is seen from what it leaves."""
    flags = f"{FLAGS[command]} --seeds 1 --jobs 1 --name golden --checkpoint-every-s 1000"
    with suppress(SystemExit):
        run_command(MAINS[command], [*flags.split(), *more])


def make(command: str) -> None:
    """Stop a run on its way, keep it, let it go on, keep its log."""
    due, calls = Run.checkpoint_due, 0

    def stopped(run: Run) -> bool:
        nonlocal calls
        calls += 1
        if calls == STOPS[command]:
            signal.raise_signal(signal.SIGTERM)
        return due(run)

    kept, folder = HERE / command, Path(FOLDERS[command])
    with tempfile.TemporaryDirectory() as place, chdir(place):
        with patch.object(Run, "checkpoint_due", stopped):
            carry_out(command)
        shutil.rmtree(kept, ignore_errors=True)
        (kept / "checkpoints").mkdir(parents=True)
        for path in [folder / "config.json", folder / "log.jsonl", *folder.glob("checkpoints/*")]:
            shutil.copy(path, kept / path.relative_to(folder))
        carry_out(command, "--resume")
        shutil.copy(folder / "log.jsonl", kept / "whole.jsonl")
        shutil.copy(folder / "summary.json", kept / "summary.json")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        make(name)
