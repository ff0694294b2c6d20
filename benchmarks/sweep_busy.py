"""How much of the time the processes of a sweep of short runs spend in runs.

python -m benchmarks.sweep_busy [--runs 100] [--jobs 2]

Each process notes when a run begins and ends in it. What lies between two runs of one process is
idle time, as is its start, with imports, and its wait at the end for the last run of another. On a
machine with other work runs and gaps are longer alike: their shares hold, but not the seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dynmoe.lab.launchers import Failure, Local, Outcome, Work
from dynmoe.sweep import sweep

FLAGS = ["--preset", "smoke", "--threads", "1"]


def noted(work: Work, folder: Path, item: Any) -> Failure | None:
    """Do the work, and write down when it began and ended, seconds of the machine's clock."""
    begin = time.monotonic()
    try:
        return work(item)
    finally:
        with (folder / str(os.getpid())).open("a") as file:
            file.write(f"{begin} {time.monotonic()}\n")


@dataclass(frozen=True)
class Noted(Local):
    """Processes of this machine that note when they work."""

    folder: Path = Path()
    """where"""

    def launch(self, work: Work, items: list[Any]) -> Generator[Outcome, None, None]:
        """As `Local`; the time of the launch is noted, too."""
        (self.folder / "launched").write_text(str(time.monotonic()))
        yield from super().launch(partial(noted, work, self.folder), items)


def main() -> None:
    """Sweep in a temporary folder, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        launcher = Noted(args.jobs, folder)
        grid = {"granularity": [2]}
        sweep("cl", grid=grid, flags=FLAGS, seeds=args.runs, launcher=launcher, runs_dir=folder)
        launched = float((folder / "launched").read_text())
        files = [path for path in folder.iterdir() if path.name.isdigit()]
        spans = [[tuple(map(float, line.split())) for line in f.read_text().splitlines()]
                 for f in files]  # fmt: skip
    last = max(end for own in spans for _, end in own)
    whole = len(spans) * (last - launched)
    worked = sum(end - begin for own in spans for begin, end in own)
    start = sum(own[0][0] - launched for own in spans)
    wait = sum(last - own[-1][1] for own in spans)
    count = sum(map(len, spans))
    print(f"{count} runs on {len(spans)} processes in {last - launched:.0f} s")
    print(f"in runs {100 * worked / whole:.2f} % of the time, at their start "
          f"{100 * start / whole:.2f} %, between runs "
          f"{100 * (whole - worked - start - wait) / whole:.3f} %, at the end "
          f"{100 * wait / whole:.2f} %")  # fmt: skip


if __name__ == "__main__":
    main()
