"""The gates of a run of Tent: can its stream show what experts are worth? And forgetting by step.

The measures are in `dynmoe/tta/headroom.py`; here they get their images and stand in the report.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_benchmarks.shifts.domain import CORRUPTIONS, EXTRA, Domain
from cl_benchmarks.shifts.stream import ShiftSource, domains_of
from dynmoe import seeding
from dynmoe.experiments.tta.settings import Config, for_run
from dynmoe.experiments.tta.source_model import normalise
from dynmoe.lab.files import write_json
from dynmoe.lab.report import print_table
from dynmoe.tta import headroom
from dynmoe.tta.adapter import Adapter
from dynmoe.tta.entropy import tent_loss
from dynmoe.tta.headroom import Batch, Split, accuracy
from dynmoe.tta.methods.tent import Tent

LEAST = 4
"""Images of a domain that can be split into two parts of two."""
QUARTERS = 4
"""The alignment is measured after each quarter of the stream."""
METRICS = (
    "source", "supervised", "supervised_shared", "routed", "shared", "cosine_own",
    "cosine_entropy", "cosine_reliable", "cosine_information",
)  # fmt: skip
"""Columns of a domain; as metrics of a run, with `gate_` before them, means over the domains."""


def domain_of(config: Config, source: ShiftSource, name: str) -> Domain:
    """A domain of a stream by its name, at the settings' severity."""
    corruption = name in CORRUPTIONS + EXTRA
    return source.corrupted(name, config.severity) if corruption else source.other(name)


def taken(domain: Domain, chosen: Tensor, source: ShiftSource, device: torch.device) -> Batch:
    """Images of a domain as the model takes them, and their labels; `chosen` int64 [n]."""
    images = normalise(domain.images(chosen.tolist()).to(device), source.mean, source.std)
    return images, domain.labels[chosen].to(device)


def splits(config: Config, source: ShiftSource, device: torch.device) -> dict[str, Split]:
    """`config.gates` images of each domain of the stream, one half to learn and one to measure.

    Domains of equal size give the same images, so that no image that one domain learns is measured
    in another. Domains of fewer than 4 images are left out.
    """
    found = {}
    for name in domains_of(config.streams[0]):
        domain = domain_of(config, source, name)
        generator = seeding.generator(config.seed, "gates")
        chosen = torch.randperm(len(domain), generator=generator)[: config.gates]
        if len(chosen) >= LEAST:
            parts = chosen.tensor_split(2)
            learnt, held = (taken(domain, part, source, device) for part in parts)
            found[name] = Split(learnt, held)
    return found


class Gates:
    """What a run of Tent finds of a stream of several domains.

    Other methods, and all with `--gates 0`, find nothing.

    Attributes:
        figures: of `headroom.measure`, and `along`: [batches seen, alignment] after each quarter of
            the stream; {} where there are none.
    """

    def __init__(self, config: Config, source: ShiftSource, device: torch.device) -> None:
        self.config, self.source, self.device = config, source, device
        self.figures: dict[str, Any] = {}

    def before(self, model: nn.Module) -> None:
        """Measure at the source model, which is left as it was."""
        config = self.config
        if not config.gates or not isinstance(config.method, Tent.Config):
            return
        domains = splits(config, self.source, self.device)
        if len(domains) < 2:  # of one domain all weights are its own
            return

        def adapter(copied: nn.Module, rate: float) -> Adapter:
            lr_scale = rate * config.lr_scale
            return for_run(config.method, lr_scale, config.seed, copied).build(copied)

        generator = seeding.generator(config.seed, "gates-stream")
        self.figures = headroom.measure(
            model, domains, adapter, self._loss(), config.batch_size, generator
        ) | {"along": []}

    def during(self, done: int, batches: int, adapter: Adapter) -> float | None:
        """The alignment now, if a quarter of the stream ends with batch `done`; else None."""
        ends = {-(-quarter * batches // QUARTERS) for quarter in range(1, QUARTERS + 1)}
        if not self.figures or done not in ends:
            return None
        found = splits(self.config, self.source, self.device)
        parts = {name: split.batches(self.config.batch_size) for name, split in found.items()}
        trained = [p for p in adapter.parameters() if p.requires_grad]
        cosines = headroom.alignment(adapter.model, parts, self._loss(), trained)
        self.figures["along"].append([done, headroom.mean_pairwise(cosines)])
        return self.figures["along"][-1][1]

    def _loss(self) -> headroom.Loss:
        method: Any = self.config.method
        return partial(tent_loss, reliable=method.reliable, im=method.im)


def gate_value(gates: dict[str, Any], metric: str) -> float:
    """A number of a run's gates: a mean over domains, or `gate_positive`, `_gain`, `_alignment`."""
    name = metric.removeprefix("gate_")
    if not gates:
        return float("nan")
    gates = averaged([gates])
    if name == "positive":
        return headroom.positive(gates)
    if name == "gain":
        return headroom.routing_gain(gates)
    if name == "headroom":
        means = [headroom.mean_of_domains(gates, f"supervised{end}") for end in ("", "_shared")]
        return means[0] - means[1]
    if name == "alignment":
        return gates["alignment"]
    return headroom.mean_of_domains(gates, name)


def averaged(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The gates of several seeds as those of one: means, domain by domain.

    A number that was not finite is null in a summary that was read; it is left out.
    """

    def mean(values: list[float | None]) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else float("nan")

    domains = {
        name: {c: mean([one["domains"][name][c] for one in seeds]) for c in row}
        for name, row in seeds[0]["domains"].items()
    }
    along = [
        [point[0][0], mean([p[1] for p in point])]
        for point in zip(*(one["along"] for one in seeds), strict=True)
    ]
    return {"domains": domains, "along": along, "alignment": mean([s["alignment"] for s in seeds])}


def verdict(gates: dict[str, Any]) -> str:
    """One plain sentence: do both gates pass, and what follows?"""
    agree, gain = headroom.positive(gates), 100 * headroom.routing_gain(gates)
    count = len(gates["domains"])
    first, second = agree > 0.5, gain >= headroom.GATE_POINTS
    words = {True: "passed", False: "failed"}
    follows = (
        "this stream can tell whether experts help"
        if first and second
        else "unable to tell here whether experts help"
    )
    return (
        f"gate 1 {words[first]} (the loss's gradient agrees with the true one on "
        f"{round(agree * count)} of {count} domains, more than half needed), gate 2 "
        f"{words[second]} (perfect routing against shared weights: {gain:+.1f} points, "
        f"{headroom.GATE_POINTS:g} needed): {follows}."
    )


def report_gates(folder: Path, streams: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write gates.json, print the last stream's domains and a sentence for each stream.

    Args:
        folder: of the report.
        streams: stream -> method's label -> summaries, one per seed.
    """
    found = {
        stream: {label: averaged([run["gates"] for run in own])
                 for label, own in variants.items() if all(run.get("gates") for run in own)}
        for stream, variants in streams.items()
    }  # fmt: skip
    if not any(found.values()):
        return
    write_json(folder / "gates.json", found)
    last = list(found)[-1]
    for label, gates in found[last].items():
        print_table(f"{last}: gates of {label}, by domain", _rows(gates),
                    "accuracies in % on images held out; cosines with the true gradient; own, "
                    "routed: weights of each domain's own; shared: one set for all")  # fmt: skip
    for stream, variants in found.items():
        for label, gates in variants.items():
            print(f"{stream}, {label}: {verdict(gates)}")
            points = " ".join(f"{cosine:.2f}" for _, cosine in gates["along"])
            print(f"  cosine between the domains' gradients: {gates['alignment']:.2f} at the "
                  f"source model, {points} after each quarter of the stream")  # fmt: skip


def _rows(gates: dict[str, Any]) -> list[list[str]]:
    """A row per domain, and their mean."""
    heads = {
        "source": "source", "cosine_entropy": "cos H", "cosine_reliable": "cos H, sure ones",
        "cosine_information": "cos H - H(mean)", "supervised": "labels, own",
        "supervised_shared": "labels, shared", "routed": "routed", "shared": "shared",
    }  # fmt: skip
    means = {column: headroom.mean_of_domains(gates, column) for column in heads}
    rows = [["domain", *heads.values()]]
    for name, row in (*gates["domains"].items(), ("mean", means)):
        cells = [f"{row[c]:+.2f}" if "cosine" in c else f"{100 * row[c]:.1f}" for c in heads]
        rows.append([name, *cells])
    return rows


class Forgetting:
    """Accuracy on clean images that the stream does not show, every so many batches.

    Attributes:
        points: [batches seen, accuracy] each; the first at the source model.
    """

    def __init__(self, config: Config, source: ShiftSource, device: torch.device) -> None:
        self.config, self.source, self.device = config, source, device
        self.points: list[list[float]] = []

    def look(self, done: int, adapter: Adapter) -> float | None:
        """The accuracy after `done` batches, where it is time; the adapter does not learn."""
        config = self.config
        if not config.clean_every or done % config.clean_every:
            return None
        images, labels = taken(*self._chosen(), self.source, self.device)
        value = accuracy(adapter.model, images, labels, config.batch_size)
        self.points.append([done, value])
        return value

    def _chosen(self) -> tuple[Domain, Tensor]:
        """The clean images that the stream's own draw has last: with --limit it shows others."""
        domain = self.source.other("clean")
        generator = seeding.generator(self.config.seed, "images", "clean")
        return domain, torch.randperm(len(domain), generator=generator)[-self.config.clean_images :]
