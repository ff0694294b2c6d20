"""What only adaptation has to show of its runs: experts, domains, routings.

`runs` are summaries, one per seed: method's label -> [seeds].
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from dynmoe.lab.experiment import Results
from dynmoe.lab.figures import band, chance_line, dots, looks, new_figure, save
from dynmoe.lab.report import cell, print_table
from dynmoe.lab.statistics import confidence_interval, paired_difference

Runs = dict[str, list[dict[str, Any]]]


def comparison_figure(path: Path, results: Results, title: str) -> None:
    """Per stream: each variant's accuracy, and what it is above the source along the stream."""
    figure = new_figure(title, 3.6 * len(results.streams))
    grid = figure.subplots(len(results.streams), 2, squeeze=False)
    for stream, (left, right) in zip(results.streams, grid, strict=True):
        variants = results.runs[stream]
        dots(left, {v: results.interval(stream, v, "accuracy", "mean") for v in variants}, 100)
        left.set(title=stream, xlabel="accuracy (%)")
        chance_line(left, results.chance.get(stream), across=True)
        source = "noadapt" if "noadapt" in variants else next(iter(variants))
        own = looks(results.variants)
        for variant, runs in variants.items():
            points = list(zip(*map(gain_so_far, runs, variants[source]), strict=True))
            intervals = [confidence_interval(list(point), "mean") for point in points]
            band(right, range(1, len(points) + 1), intervals, own[variant], variant, 100)
        right.set(title=stream, xlabel="window of the stream",
                  ylabel=f"accuracy so far minus {source}'s (points)")  # fmt: skip
    save(figure, path)


def gain_so_far(run: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Up to each window, the mean accuracy of a run minus that of another on the same images.

    The windows' accuracies themselves mostly tell which images were in them.
    """
    gaps = [a - b for a, b in zip(run["curve"], other["curve"], strict=True)]
    return [total / count for count, total in enumerate(accumulate(gaps), 1)]


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
    own = looks(histories)
    for label, history in histories.items():
        batches = [h["batch"] for h in history]
        left.plot(batches, [100 * h["largest_share"] for h in history], own[label].line,
                  label=label, color=own[label].color)  # fmt: skip
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
    names = ("learned", "random", "most_loaded", "best", "by_domain", "by_image")
    heads = ("learned", "random", "most loaded", "best single", "by domain", "by image")
    rows = [["method", "stream", *heads, "learned - random"]]
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
                    "loaded, best single: one expert per layer for all; by domain, by image: the "
                    "best number for each, by the labels")  # fmt: skip


def depth_profile(runs: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Likeness of experts by layer, from shallow to deep, mean over seeds.

    Returns:
        "first" and "last": at the first window that has a number for the layer, and at the last
        one; None for layers without numbers. {} for methods without experts.
    """
    histories = [[h["similarity"] for h in run["history"] if "similarity" in h] for run in runs]
    if not all(histories):
        return {}
    depth = len(histories[0][0])
    found: dict[str, list[float | None]] = {"first": [], "last": []}
    for layer in range(depth):
        known = [[h[layer] for h in history if h[layer] is not None] for history in histories]
        for at, place in (("first", 0), ("last", -1)):
            values = [seed[place] for seed in known if seed]
            found[at].append(sum(values) / len(values) if values else None)
    return found


def print_depth(stream: str, runs: Runs) -> None:
    """Mean cosine between experts in each layer, at the stream's begin and end."""
    profiles = {label: depth_profile(own) for label, own in runs.items()}
    profiles = {label: profile for label, profile in profiles.items() if profile}
    if not profiles:
        return
    rows = [["layer", *profiles]]
    for layer in range(max(len(p["last"]) for p in profiles.values())):
        cells = []
        for profile in profiles.values():
            pair = [profile[at][layer : layer + 1] for at in ("first", "last")]
            known = [p[0] for p in pair if p and p[0] is not None]
            cells.append(f"{known[0]:+.2f} to {known[1]:+.2f}" if len(known) == 2 else "")
        rows.append([str(layer + 1), *cells])
    print_table(f"{stream}: likeness of experts by depth", rows,
                "mean cosine between experts' scales and shifts, first to last window")  # fmt: skip
