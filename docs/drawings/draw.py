"""Makes the documentation's drawings: `python docs/drawings/draw.py` writes SVG files here."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]
"""One per expert, in order of creation (Okabe and Ito's palette, for colour-blind eyes, too)."""
GREY, DARK, LIGHT = "#888888", "#222222", "#F2F2F2"
UNITS = 16


def canvas(width: float, height: float) -> Axes:
    """An empty drawing, `width` x `height` in units of a tenth of an inch."""
    figure, axes = plt.subplots(figsize=(width / 10, height / 10))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return axes


def save(axes: Axes, name: str) -> None:
    """Write the drawing; the same drawing gives the same bytes."""
    axes.figure.savefig(HERE / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(axes.figure)  # type: ignore[arg-type]


def say(axes: Axes, x: float, y: float, words: str, size: float = 9, **how: object) -> None:
    """Write words; `y` is their middle."""
    axes.text(x, y, words, fontsize=size, va="center", **({"color": DARK} | how))  # type: ignore[arg-type]


def box(axes: Axes, x: float, y: float, w: float, h: float, words: str, fill: str = LIGHT) -> None:
    """A box with words in its middle."""
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.6", fc=fill, ec=GREY)
    )
    say(axes, x + w / 2, y + h / 2, words, ha="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=GREY))


def pool(axes: Axes, x: float, y: float, owners: list[int], side: float = 2.2) -> None:
    """A row of hidden units, each in the colour of the expert that owns it."""
    for unit, owner in enumerate(owners):
        axes.add_patch(
            Rectangle((x + unit * side, y), side * 0.86, side * 1.3, fc=COLOURS[owner], ec="none")
        )


def shared(experts: int, units: int = UNITS) -> list[int]:
    """The expert of each unit, as even as can be."""
    return [unit * experts // units for unit in range(units)]


def growth() -> None:
    """An expert, a pool and a budget: before a growth, and after it under both budgets."""
    axes = canvas(80, 36)
    wider = shared(4, 2 * UNITS)
    rows = [
        (27, "before", "", "2 experts of 8 hidden units", shared(2)),
        (15, "after a growth,", "constant budget", "4 experts of 4 units", shared(4)),
        (3, "or,", "budget per growth", "4 experts of 8 units", wider),
    ]
    for y, first, second, third, owners in rows:
        say(axes, 1, y + (3.4 if second else 2.4), first, weight="bold")
        say(axes, 1, y + 1.4, second)
        say(axes, 1, y - (0.8 if second else -0.2), third, color=GREY)
        pool(axes, 27, y, owners, 1.62)
    words = "the same 16 units, divided again: as many parameters as before"
    say(axes, 27, 31.5, "one pool of 16 hidden units; a colour is an expert", color=GREY)
    say(axes, 27, 19.5, words, color=GREY)
    say(axes, 27, 7.5, "16 units more: the layer gets wider", color=GREY)
    arrow(axes, (20, 25.5), (20, 20))
    say(axes, 19, 22.7, "growth", 8, ha="right", color=GREY)
    save(axes, "growth")


def layer() -> None:
    """How an input passes through the layer: router, gates, experts, sum."""
    axes = canvas(80, 36)
    box(axes, 1, 14, 10, 6, "input x")
    box(axes, 19, 25, 12, 6, "router")
    arrow(axes, (11, 18), (19, 26))
    for expert, (y, gate) in enumerate([(18, "0.7"), (10, "0.2"), (2, "0.1")]):
        box(axes, 27, y, 15, 5, "", COLOURS[expert])
        say(axes, 34.5, y + 2.5, f"expert {expert + 1}", ha="center", color="white", weight="bold")
        arrow(axes, (11, 16.5), (27, y + 2.5))
        say(
            axes,
            48,
            y + (0.6 if expert == 2 else 4.6),
            f"\N{MULTIPLICATION SIGN} gate {gate}",
            9,
            ha="center",
        )
        arrow(axes, (42, y + 2.5), (57, 13 + (y - 10) * 0.2))
    arrow(axes, (31, 28), (47, 23.6))
    say(axes, 34, 31.5, "gates: how much each expert says about this input", 9, color=GREY)
    box(axes, 57, 10, 6, 6, "+")
    arrow(axes, (63, 13), (68, 13))
    box(axes, 68, 10, 11, 6, "output y")
    save(axes, "layer")


def routers() -> None:
    """Gates of six inputs over four experts: dense, sparse, slots."""
    axes = canvas(80, 34)
    tables = [
        ("dense", "every expert, weighted", [[6, 2, 1, 1], [5, 3, 1, 1], [1, 6, 2, 1], [1, 2, 6, 1],
                                            [2, 1, 4, 3], [1, 1, 2, 6]]),
        ("sparse", "a few experts an input", [[10, 0, 0, 0], [7, 3, 0, 0], [0, 10, 0, 0],
                                             [0, 0, 10, 0], [0, 0, 6, 4], [0, 0, 0, 10]]),
        ("slots", "experts see mixtures", [[4, 1, 1, 0], [3, 2, 1, 0], [1, 4, 1, 1], [1, 2, 3, 1],
                                          [1, 0, 3, 3], [0, 1, 1, 5]]),
    ]  # fmt: skip
    for place, (name, words, gates) in enumerate(tables):
        left = 7 + 25 * place
        say(axes, left + 8, 32, name, 11, ha="center", weight="bold")
        say(axes, left + 8, 29, words, 9, ha="center", color=GREY)
        for row, line in enumerate(gates):
            for expert, gate in enumerate(line):
                axes.add_patch(
                    Rectangle(
                        (left + 4 * expert, 22 - 3.6 * row), 3.6, 3.2, ec=GREY, lw=0.4,
                        fc=COLOURS[expert] if gate else "white", alpha=max(gate / 10, 0.0) or 1,
                    )
                )  # fmt: skip
        say(axes, left + 8, 1.5, "experts 1 .. 4", 8, ha="center", color=GREY)
    say(axes, 4, 14.5, "inputs", 8, ha="center", color=GREY, rotation=90)
    save(axes, "routers")


def plasticity() -> None:
    """What a network that can still learn looks like, and one that has lost its plasticity."""
    axes = canvas(80, 40)
    healthy = ["#..#.#.#", ".##.#..#", "#.#..##.", ".#.##.#.", "#.##...#"]
    lost = ["#....#..", "#....#..", "#.......", "#....#..", "#......."]
    for left, name, table in ((10, "still learns", healthy), (50, "has lost it", lost)):
        say(axes, left + 10, 38, name, 11, ha="center", weight="bold")
        for row, line in enumerate(table):
            for unit, sign in enumerate(line):
                axes.add_patch(
                    Rectangle((left + 2.5 * unit, 31 - 2.5 * row), 2.2, 2.2, ec=GREY, lw=0.4,
                              fc=COLOURS[0] if sign == "#" else "white")
                )  # fmt: skip
        say(
            axes,
            left + 10,
            18.6,
            "units that are active (blue), by input",
            8,
            ha="center",
            color=GREY,
        )
    say(axes, 7.5, 27, "inputs", 8, ha="center", color=GREY, rotation=90)
    points = [(-3, 1), (-2, -2), (-1, 3), (0, 0), (1, -3), (2, 2), (3, -1), (-2, 1), (1, 1)]
    for left, flat in ((20, False), (60, True)):
        for x, y in points:
            axes.plot(
                left + 1.6 * x, 9.5 + (0.25 * x if flat else 1.6 * y), "o", ms=4, color=COLOURS[2]
            )
        words = "features fill one direction" if flat else "features fill all directions"
        say(axes, left, 1.5, words, 8, ha="center", color=GREY)
    save(axes, "plasticity")


def stream(axes: Axes, y: float, name: str, words: str, cells: list[int], marks: list[int]) -> None:
    """One experiment: cells in the colours of their distributions, growths as triangles."""
    say(axes, 1, y + 2.6, name, weight="bold")
    say(axes, 1, y + 0.4, words, 8, color=GREY)
    for place, colour in enumerate(cells):
        seen = colour >= 0
        axes.add_patch(
            Rectangle((34 + 2.6 * place, y), 2.3, 3.2, fc=COLOURS[colour] if seen else "white",
                      ec=GREY, lw=0.6, ls="-" if seen else "--")
        )  # fmt: skip
    for place in marks:
        axes.plot(34 + 2.6 * place - 0.1, y + 4.3, "v", ms=5, color=DARK)


def experiments() -> None:
    """What a network meets in each of the four experiments."""
    axes = canvas(80, 42)
    tasks = [colour for colour in range(4) for _ in range(4)]
    floors = [0] * 7 + [1] * 5 + [2] * 4
    mixed = [0, 2, 1, 3, 1, 0, 3, 2, 2, 0, 1, 3, 0, 1, 2, 3]
    left_out = [*tasks[:12], -1, -1, -1, -1]
    stream(axes, 32, "continual learning", "tasks, one after another", tasks, [4, 8, 12])
    stream(axes, 22.5, "reinforcement learning", "the agent reaches new floors", floors, [7, 12])
    stream(axes, 13, "test-time adaptation", "a mixed stream without labels", mixed, [])
    stream(axes, 3.5, "domain generalisation", "train on some, test on the last", left_out, [])
    words = "a colour is a distribution of inputs; a triangle is a growth"
    say(axes, 34, 39.5, words, 8, color=GREY)
    say(axes, 34, 1.2, "dashed: a domain that was never seen in training", 8, color=GREY)
    save(axes, "experiments")


def main() -> None:
    """Write all drawings."""
    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "dynmoe", "font.family": "sans-serif"}
    )
    for draw in (growth, layer, routers, plasticity, experiments):
        draw()


if __name__ == "__main__":
    main()
