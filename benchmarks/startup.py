"""How long `python -m dynmoe.cl --help` takes beside `python -c "import torch"`.

python -m benchmarks.startup [--rounds 9]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "dynmoe.cl --help": [sys.executable, "-m", "dynmoe.cl", "--help"],
}


def seconds(command: list[str]) -> float:
    """Processor seconds of a process and its children: other processes' turns do not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Take turns, then print medians and the ratio taken turn by turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)  # fills the disk cache
    times = [{name: seconds(c) for name, c in COMMANDS.items()} for _ in range(args.rounds)]
    for name in COMMANDS:
        print(f"{name}: {statistics.median(t[name] for t in times):.2f} s")
    ratios = [t["dynmoe.cl --help"] / t["import torch"] for t in times]
    print(f"ratio: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
