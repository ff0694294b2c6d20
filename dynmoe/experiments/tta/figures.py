"""What only adaptation has to show of its runs: experts, domains, routings.

`runs` are summaries, one per seed: method's label -> [seeds].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynmoe.lab.figures import COLORS, new_figure, save
from dynmoe.lab.report import cell, print_table
from dynmoe.lab.statistics import confidence_interval, paired_difference

Runs = dict[str, list[dict[str, Any]]]


def experts_figure(path: Path, runs: Runs, title: str) -> None:
    """Load of the most loaded expert and likeness of experts by depth, over one stream.

    Draws nothing where no method has experts. The likeness is the last such method's.

    Args:
        path: the PNG file, written atomically.
        runs: of one stream; the first seed is drawn.
        title: what the numbers are about.
    """
    from matplotlib import colormaps

    histories = {label: seeds[0]["history"] for label, seeds in runs.items()}
    histories = {k: h for k, h in histories.items() if h and "largest_share" in h[0]}
    if not histories:
        return
    figure = new_figure(f"{title}, first seed", 3.8, 11)
    left, right = figure.subplots(1, 2)
    for number, (label, history) in enumerate(histories.items()):
        batches = [h["batch"] for h in history]
        left.plot(batches, [100 * h["largest_share"] for h in history], label=label,
                  color=COLORS[number % len(COLORS)])  # fmt: skip
    left.set(xlabel="batch", ylabel="share of the most loaded expert (%)", ylim=(0, 103))
    depth = len(history[-1].get("similarity", []))
    for layer in range(depth):
        known = [(h["batch"], h["similarity"][layer]) for h in history
                 if h["similarity"][layer] is not None]  # fmt: skip
        shade = colormaps["viridis"](layer / max(depth - 1, 1))
        right.plot([b for b, _ in known], [s for _, s in known], color=shade,
                   label=f"layer {layer + 1}" if layer in (0, depth - 1) else None)  # fmt: skip
    right.set(xlabel="batch", ylabel=f"cosine between experts, {label}")
    right.legend(frameon=False, fontsize=9)
    save(figure, path)


def print_domains(stream: str, runs: Runs, seeds: int) -> None:
    """Accuracy of each domain of a stream; methods as columns."""
    domains = next(iter(runs.values()))[0]["domains"]
    if len(domains) == 1:
        return
    rows = [["domain", *runs]]
    for domain in domains:
        means = [sum(run["domains"][domain]["accuracy"] for run in own) / len(own)
                 for own in runs.values()]  # fmt: skip
        rows.append([domain, *(f"{100 * mean:.1f}" for mean in means)])
    print_table(f"{stream}: accuracy of each domain in %", rows, f"mean over {seeds} seed(s)")


def print_routings(streams: dict[str, Runs], batches: int) -> None:
    """The learned routing against others; methods that have experts in their LayerNorms."""
    names = ("learned", "random", "most_loaded", "best")
    rows = [["method", "stream", *names[:3], "best single", "learned - random"]]
    for stream, runs in streams.items():
        for label, own in runs.items():
            found = [run["routings"] for run in own]
            if all(found):
                accuracies = [[f[name]["accuracy"] for f in found] for name in names]
                cells = [cell(confidence_interval(a, "mean"), 100, 1) for a in accuracies]
                gap = paired_difference(accuracies[0], accuracies[1])
                rows.append([label, stream, *cells, cell(gap, 100, 1)])
    if len(rows) > 1:
        print_table(f"routing compared on the last {batches} batches: accuracy in %", rows,
                    "mean over seeds [95 % t interval]; random: any expert for any image; most "
                    "loaded, best single: one expert per layer for all")  # fmt: skip
