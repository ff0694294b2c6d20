"""What a comparison leaves: results.json, a figure, and tables on the terminal."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.experiments.tta.settings import Config
from dynmoe.lab.config import identity
from dynmoe.lab.figures import COLORS
from dynmoe.lab.files import make_folder, write_atomic, write_json
from dynmoe.lab.statistics import Interval, confidence_interval, paired_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""method's label -> stream -> summaries, one per seed"""
Alignment = dict[str, dict[str, float]]
"""domain -> domain -> cosine between their gradients"""


def report(
    folder: Path, data: str, config: Config, runs: Runs, alignment: Alignment | None = None
) -> None:
    """Write results.json, accuracy.png and experts.png to `folder`; print the tables.

    Args:
        folder: made where it is missing.
        data: what the numbers are about.
        config: the settings.
        runs: the summaries; the last method is the one that the others are compared with.
        alignment: cosines between the domains' gradients, by name.
    """
    make_folder(folder)
    results = {"data": data, "settings": identity(config), "methods": gather(runs),
               "gradient_alignment": alignment}  # fmt: skip
    write_json(folder / "results.json", results)
    title = f"{data}, {config.order} order, severity {config.severity}"
    accuracy_figure(folder / "accuracy.png", runs, title)
    experts_figure(folder / "experts.png", runs, config.streams[-1], title)
    _print_streams(runs, f"{title}; accuracy in %", config.seeds)
    _print_domains(runs, config.streams[-1], config.seeds)
    _print_experts(runs)
    _print_routings(runs, config.routing_batches)
    if alignment is not None:
        pairs = [row[b] for a, row in alignment.items() for b in row if a != b]
        print(f"gradients of {config.streams[-1]}'s domains at the source model: mean cosine "
              f"{sum(pairs) / len(pairs):.2f}, least {min(pairs):.2f}")  # fmt: skip
    skipped = sum(s["skipped"] for streams in runs.values() for seeds in streams.values()
                  for s in seeds)  # fmt: skip
    if skipped:
        print(f"batches not learnt from, because their loss was not finite: {skipped}")
    print(f"results: {folder}")


def gather(runs: Runs) -> dict[str, Any]:
    """Per method and stream: mean accuracy with its interval, difference from the last method."""
    reference = list(runs)[-1]
    out: dict[str, Any] = {}
    for label, streams in runs.items():
        out[label] = {}
        for stream, seeds in streams.items():
            own = [s["accuracy"] for s in seeds]
            entry = {"accuracy": confidence_interval(own, "mean"), "seeds": seeds}
            if label != reference:
                other = [s["accuracy"] for s in runs[reference][stream]]
                entry[f"{reference} minus this"] = paired_difference(other, own)
            out[label][stream] = entry
    return out


def accuracy_figure(path: Path, runs: Runs, title: str) -> None:
    """Accuracy over the stream, one panel per stream, one line per method: mean over seeds.

    Args:
        path: the PNG file, written atomically.
        runs: the summaries.
        title: what the numbers are about.
    """
    from matplotlib.figure import Figure

    streams = list(next(iter(runs.values())))
    figure = Figure(figsize=(4 * len(streams) + 2.5, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, stream in zip(figure.subplots(1, len(streams), squeeze=False)[0], streams,
                            strict=True):  # fmt: skip
        for number, (label, by_stream) in enumerate(runs.items()):
            curves = [s["curve"] for s in by_stream[stream]]
            mean = [100 * sum(point) / len(point) for point in zip(*curves, strict=True)]
            line = "--" if number >= len(COLORS) else "-"
            axes.plot(range(1, len(mean) + 1), mean, line, label=label,
                      color=COLORS[number % len(COLORS)])  # fmt: skip
        axes.set(title=stream, xlabel="window of the stream", ylabel="accuracy (%)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside right upper")
    _save(figure, path)


def experts_figure(path: Path, runs: Runs, stream: str, title: str) -> None:
    """Load of the most loaded expert and likeness of experts by depth, over one stream.

    Draws nothing where no method has experts. The likeness is the last such method's.

    Args:
        path: the PNG file, written atomically.
        runs: the summaries.
        stream: which stream.
        title: what the numbers are about.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    histories = {label: by_stream[stream][0]["history"] for label, by_stream in runs.items()}
    histories = {k: h for k, h in histories.items() if h and "largest_share" in h[0]}
    if not histories:
        return
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle(f"{title}: {stream}, first seed", fontsize=11)
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
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(path, buffer.getvalue())


def _print_streams(runs: Runs, title: str, seeds: int) -> None:
    streams = list(next(iter(runs.values())))
    rows = []
    for label, by_stream in runs.items():
        cells = [_cell([s["accuracy"] for s in by_stream[stream]]) for stream in streams]
        rows.append((label, *cells))
    _print(title, ("method", *streams), rows,
           f"mean over {seeds} seed(s) [95 % t interval]")  # fmt: skip


def _print_domains(runs: Runs, stream: str, seeds: int) -> None:
    """Accuracy of each domain; methods as columns."""
    first = next(iter(runs.values()))[stream][0]["domains"]
    if len(first) == 1:
        return
    rows = []
    for domain in first:
        means = []
        for by_stream in runs.values():
            own = [s["domains"][domain]["accuracy"] for s in by_stream[stream]]
            means.append(f"{100 * sum(own) / len(own):.1f}")
        rows.append((domain, *means))
    _print(f"{stream}: accuracy of each domain in %", ("domain", *runs), rows,
           f"mean over {seeds} seed(s)")  # fmt: skip


def _print_experts(runs: Runs) -> None:
    """How the experts were used over the last tenth of each stream; methods that have some."""
    rows = []
    for label, by_stream in runs.items():
        for stream, seeds in by_stream.items():
            late = [h for s in seeds for h in s["history"][-max(len(s["history"]) // 10, 1) :]]
            late = [h for h in late if "balance" in h]
            if late:
                keys = ("balance", "largest_share", "used_experts")
                means = [sum(h[key] for h in late) / len(late) for key in keys]
                rows.append((label, stream, *(f"{m:.2f}" for m in means)))
    if rows:
        columns = ("method", "stream", "balance", "largest share", "experts in use")
        _print("use of experts, last tenth of the stream", columns, rows,
               "mean over layers and seeds; balance 1 is even, 0 is one expert alone")  # fmt: skip


def _print_routings(runs: Runs, batches: int) -> None:
    """The learned routing against others; methods that have experts in their LayerNorms."""
    names = ("learned", "random", "most_loaded", "best")
    rows = []
    for label, by_stream in runs.items():
        for stream, seeds in by_stream.items():
            found = [s["routings"] for s in seeds]
            if all(found):
                cells = [_routing([f[name] for f in found]) for name in names]
                learned, random = ([f[name]["accuracy"] for f in found] for name in names[:2])
                gap = paired_difference(learned, random)
                rows.append((label, stream, *cells, f"{100 * gap.point:+.1f}{_ends(gap)}"))
    if rows:
        columns = ("method", "stream", *names[:3], "best single", "learned - random")
        _print(f"routing compared on the last {batches} batches: accuracy in % (loss in nats)",
               columns, rows, "mean over seeds [95 % t interval]; random: any expert for "
               "any image; most loaded, best single: one expert per layer for all")  # fmt: skip


def _routing(scores: list[dict[str, float | None]]) -> str:
    """Mean accuracy and loss; a loss that was not finite is None."""
    accuracy = sum(s["accuracy"] or 0.0 for s in scores) / len(scores)
    losses = [s["loss"] for s in scores if s["loss"] is not None]
    loss = f"{sum(losses) / len(losses):.2f}" if len(losses) == len(scores) else "not finite"
    return f"{100 * accuracy:.1f} ({loss})"


def _print(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], caption: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def _cell(values: list[float]) -> str:
    interval = confidence_interval(values, "mean")
    return f"{100 * interval.point:.1f}{_ends(interval)}"


def _ends(interval: Interval) -> str:
    """Both ends in points; empty for a single seed, which has none."""
    if math.isnan(interval.low):
        return ""
    return f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
