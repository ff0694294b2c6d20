"""How long a report of many runs takes, and how large its page is.

python -m benchmarks.report [--runs 200] [--tasks 20]

Makes runs of `cl` as that command leaves them (10 variants and 2 streams; accuracies, a matrix and
growths of as many tasks, log and two router maps), in a temporary folder, and reports them.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dynmoe import cl, registry
from dynmoe.lab.config import to_dict
from dynmoe.lab.files import write_json
from dynmoe.lab.heat_maps import heat_map
from dynmoe.lab.run import Run

VARIANTS = 10
STREAMS = ("class", "shuffle")


def write_runs(folder: Path, variant: int, stream: str, seeds: int, tasks: int) -> None:
    """The finished runs of a variant, better with each; the first as a run writes it, then copies.

    Each has numbers of its own; log and pictures are the first one's.
    """
    protocol = registry.get("protocol", stream).Config()
    config = replace(cl.presets()["smoke"], runs_dir=folder, protocol=protocol, seed=0,
                     lr=0.001 * (variant + 1), device="cpu", chunks=tasks)  # fmt: skip
    with Run("cl", "bench", config) as run:
        draw = random.Random(f"{variant} {stream}")
        for step in range(20 * tasks):
            run.log.scalars(step, {f"epoch/{name}": draw.random() for name in "abcdef"})
        for name in ("task", "class"):
            numbers = [str(i) for i in range(10)]
            run.log.image(0, f"experts/{name}/block", heat_map(torch.rand(10, 10), numbers,
                          numbers, "load"))  # fmt: skip
        run.finish(make_summary(variant, stream, 0, tasks))
    for seed in range(1, seeds):
        copy = run.folder.with_name(f"seed-{seed}")
        shutil.copytree(run.folder, copy)
        write_json(copy / "config.json", to_dict(replace(config, seed=seed)))
        write_json(copy / "summary.json", make_summary(variant, stream, seed, tasks))


def make_summary(variant: int, stream: str, seed: int, tasks: int) -> dict[str, Any]:
    """What a run of `cl` finds, of random numbers."""
    draw = random.Random(f"{variant} {stream} {seed}")
    rows: list[dict[str, Any]] = []
    for task in range(tasks):
        accuracy = min(1.0, 0.5 + 0.03 * variant + 0.05 * draw.random())
        names = ("train_accuracy", "test_accuracy", "online_accuracy", "old_accuracy", "forgetting")
        rows.append(dict.fromkeys(names, accuracy) | {"parameters": 10_000 * (task + 1)})
    matrix = [[draw.random() for _ in range(tasks)] for _ in range(tasks)]
    growths = [{"step": 100 * (i + 1), "experts": 2 * (i + 2), "parameters": 10_000 * (i + 1)}
               for i in range(tasks - 1)]  # fmt: skip
    return {
        "method": "dynamicmoe", "seed": seed, "tasks": rows, "growth": growths,
        "accuracy_matrix": {"before": matrix[0], "after": matrix},
    }  # fmt: skip


def main() -> None:
    """Print wall and processor seconds, and the sizes of the page and of its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant in range(VARIANTS):
            for stream in STREAMS:
                seeds = args.runs // (VARIANTS * len(STREAMS))
                write_runs(folder / "runs", variant, stream, seeds, args.tasks)
        out = folder / "out"
        command = [sys.executable, "-m", "dynmoe.report", str(folder / "runs"), "--out", str(out)]
        begin = time.monotonic()
        subprocess.run(command, check=True)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        sizes = {path: path.stat().st_size / 1e6 for path in out.iterdir()}
        print(
            f"{args.runs} runs: {time.monotonic() - begin:.1f} s, of the processor "
            f"{spent.ru_utime + spent.ru_stime:.1f} s; page {sizes[out / 'report.html']:.2f} MB, "
            f"folder {sum(sizes.values()):.2f} MB"
        )


if __name__ == "__main__":
    main()
