"""Craftax's frames from codes against upstream's own renderer.

    python -m benchmarks.craftax_render [--threads 1] [--device cpu] [--quick]

For Craftax and Classic, states of 32 random games that start at all times of the day, so that some
are at night; 64 frames a call. Prints frames per second of one core (with --threads 1 on a CPU;
else of the wall clock), and how many times upstream's renderer, jitted and vmapped, takes in the
same round. Needs craftax.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import alternate, ratio
from envs.craftax_code import fields, layout
from envs.craftax_render import Renderer

sys.path.append(str(Path(__file__).parents[1] / "tests" / "unit" / "envs"))
import states  # the tests' helper: plays games, calls upstream's renderer

FRAMES = 640


def variants(classic: bool, device: torch.device) -> tuple[dict[str, Callable[[], None]], float]:
    """What takes turns, by name, and the share of frames with the night's noise."""
    import jax

    played = states.played(classic, steps=FRAMES // 32 * 5)
    chunks = range(0, FRAMES, states.CHUNK)
    batches = [jax.device_put(states.take(played, slice(i, i + states.CHUNK))) for i in chunks]
    draw, code = states.drawer(classic), states.coder(classic)
    codes = torch.from_numpy(states.in_chunks(code, played)).to(device)
    dark = fields(codes, layout(classic))["daylight"] < 0.5
    renderers = {"torch": Renderer(classic, device, "torch")}
    if device.type == "cpu":
        renderers = {"numba": Renderer(classic, device), **renderers}
    runs: dict[str, Callable[[], None]] = {}
    for name, renderer in renderers.items():
        for form in ("uint8", "float32"):
            runs[f"{name} {form}"] = partial(
                each, getattr(renderer, form), codes.split(states.CHUNK)
            )
    runs["upstream"] = partial(each, lambda batch: draw(batch).block_until_ready(), batches)
    runs["code from state"] = partial(each, lambda batch: code(batch).block_until_ready(), batches)
    return runs, dark.float().mean().item()


def each(function: Callable[[Any], object], batches: Any) -> None:
    """Call a function on one batch after another."""
    for batch in batches:
        function(batch)


def main() -> None:
    """Print one table for both games."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--quick", action="store_true", help="one round")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(
        "game", "what", "frames/s", "us a frame", "times upstream", title=str(args.device)
    )
    for classic in (False, True):
        runs, dark = variants(classic, args.device)
        seconds = alternate(runs, 1 if args.quick else 9, args.device)
        game = "Classic" if classic else "Craftax"
        print(f"{game}: {dark:.0%} of the frames have the night's noise")
        for name in runs:
            microseconds = 1e6 * statistics.median(seconds[name]) / FRAMES
            speed = f"{1e6 / microseconds:,.0f}"
            faster = f"{1 / ratio(seconds, name, 'upstream'):.1f}"
            table.add_row(game, name, speed, f"{microseconds:.1f}", faster)
    Console().print(table)


if __name__ == "__main__":
    main()
